"""LAMA: low-rank attention that pools, its classifier, and pictures of its heads."""

from __future__ import annotations

import math

import pytest
import torch

from foveate import attention
from foveate.methods import make
from foveate.methods.lama.weights import redundancy
from foveate.models import word_picture
from foveate.ops.errors import InputError

DIM = 12
PLAIN = "activation='none', normalize=False"


def pooler(spec="lama(heads=5)", dim=DIM, seed=1):
    torch.manual_seed(seed)
    made = make(spec).build(dim).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.6)
    return made


def states(length=9, batch=3, dim=DIM, seed=2):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, dim, generator=random, dtype=torch.float64)


# -- the spec's oracles ---------------------------------------------------------------------------
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("context", ["learned", "mean"])
def test_oracle_1_scores_are_those_of_whole_matrices(rank, context):
    made, h = pooler(f"lama(heads=5, rank={rank}, context='{context}', {PLAIN})"), states()
    c = made.c.expand(3, -1) if context == "learned" else h.mean(1)
    for i in range(5):
        whole = made.p[:, i] @ made.q[:, i].T
        want = torch.einsum("bd,de,bne->bn", c, whole, h)
        torch.testing.assert_close(made.scores(h, made.context(h))[:, i], want, atol=1e-6, rtol=0)
    pooled = made(h).vector.unflatten(1, (5, DIM))
    weights = torch.einsum("bd,dik,eik,bne->bin", c, made.p, made.q, h).softmax(-1)
    torch.testing.assert_close(pooled, weights @ h, atol=1e-6, rtol=0)


def test_oracle_2_it_is_cross_attention_with_a_query_for_each_head():
    made, h = pooler(f"lama(heads=5, context='mean', {PLAIN})"), states()
    factor = h.mean(1) @ made.p[..., 0]
    query = (factor[..., None] * made.q[..., 0].T)[:, :, None]  # (B, m, 1, d)
    out = attention(query, h[:, None], h[:, None], scale=1.0, backend="reference").out
    torch.testing.assert_close(made(h).vector, out.flatten(1), atol=1e-6, rtol=0)


def test_oracle_3_scores_of_a_token_have_length_1_over_the_heads():
    made, h = pooler(), states()
    scores = made.scores(h, made.context(h))
    torch.testing.assert_close(scores.square().sum(1), torch.ones(3, 9).double(), atol=1e-5, rtol=0)
    raw = pooler(f"lama(heads=5, {PLAIN})").scores(h, made.c[None]).tanh()
    torch.testing.assert_close(scores, raw / raw.square().sum(1, keepdim=True).sqrt())
    one = pooler("lama(heads=1)")
    scores = one.scores(h, one.context(h))
    torch.testing.assert_close(scores.abs(), torch.ones_like(scores))
    assert len(one(h).weights[0].unique().round(decimals=12).unique()) == 2
    h[0, 4] = 0  # a score of exactly 0 in each head: nothing to divide by
    h.requires_grad_()
    for found in (one(h), made(h)):
        assert found.vector.isfinite().all()
    made(h).vector.sum().backward()
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("spec", ["lama(heads=5)", "lama(context='mean')", "self-attentive"])
def test_oracle_4_rows_sum_to_1_and_padding_counts_nowhere(spec):
    made, h = pooler(spec), states()
    real = torch.ones(3, 9, dtype=torch.bool)
    real[1, 6:] = False
    real[2, :4] = False  # in front
    h[~real] = torch.nan
    found = made(h, real)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones_like(found.weights[..., 0]))
    assert not found.weights[(~real)[:, None].expand_as(found.weights)].any()
    for row, kept in ((0, slice(0, 9)), (1, slice(0, 6)), (2, slice(4, 9))):
        alone = made(h[row : row + 1, kept])
        torch.testing.assert_close(found.vector[row], alone.vector[0], atol=1e-6, rtol=0)
    empty = made(h, real & torch.tensor([[True], [False], [True]]))
    assert empty.vector.isfinite().all()
    assert not empty.weights[1].any()


def test_oracle_5_without_a_context_or_p_it_is_the_mean():
    h, real = states(), torch.ones(3, 9, dtype=torch.bool)
    real[1, 5:] = False
    want = torch.stack([h[0].mean(0), h[1, :5].mean(0), h[2].mean(0)])
    for name in ("p", "c"):
        made = pooler("lama(heads=5, normalize=False)")
        getattr(made, name).data.zero_()
        found = made(h, real).vector.unflatten(1, (5, DIM))
        torch.testing.assert_close(found, want[:, None].expand(-1, 5, -1))


def test_oracle_6_with_the_mean_as_context_the_order_of_tokens_doesnt_count():
    made, h = pooler("lama(heads=5, context='mean')"), states()
    order = torch.randperm(9)
    one, two = made(h), made(h[:, order])
    torch.testing.assert_close(two.weights, one.weights[..., order], atol=1e-6, rtol=0)
    torch.testing.assert_close(two.vector, one.vector, atol=1e-6, rtol=0)


def test_oracle_7_the_worked_example():
    made = make(f"lama(heads=1, context='mean', {PLAIN})").build(2).double()
    made.p.data = torch.tensor([[[1.0]], [[0.0]]]).double()
    made.q.data = torch.tensor([[[0.0]], [[3.0]]]).double()
    h = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]]).double()
    found = made(h)
    torch.testing.assert_close(made.scores(h, h.mean(1))[0, 0], torch.tensor([0.0, 2, 2]).double())
    square = math.exp(2)
    exact = torch.tensor([1, square, square]).double() / (1 + 2 * square)
    torch.testing.assert_close(found.weights[0, 0], exact)
    torch.testing.assert_close(
        found.weights[0, 0], torch.tensor([0.06338, 0.46831, 0.46831]).double(), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        found.vector[0], torch.tensor([0.53169, 0.93662]).double(), atol=1e-5, rtol=0
    )


def test_oracle_8_parameters():
    def count(spec, dim):
        return sum(p.numel() for p in make(spec).build(dim).parameters())

    assert count("lama(heads=16, context='mean')", 256) == 2 * 256 * 16 == 8192
    assert count("lama(heads=16)", 256) == 8192 + 256
    assert count("lama(heads=16, rank=3)", 256) == 3 * 8192 + 256
    assert count("self-attentive(heads=16, hidden=128)", 256) == 34_816


# -- variants --------------------------------------------------------------------------------------
@pytest.mark.parametrize("cuts", [(1,) * 9, (4, 5), (9,)])
@pytest.mark.parametrize("more", ["", ", activation='none', normalize=False, output=7"])
def test_every_prefix_from_running_sums(cuts, more):
    made, h = pooler(f"lama(heads=5{more})"), states()
    real = torch.ones(3, 9, dtype=torch.bool)
    real[1, :3] = False
    h = h * 4
    state, found = made.new_state(), []
    for part, some in zip(h.split(cuts, 1), real.split(cuts, 1)):
        found.append(made.step(part, state, some))
    found = torch.cat(found, 1)
    for t in range(9):
        torch.testing.assert_close(found[:, t], made(h[:, : t + 1], real[:, : t + 1]).vector)
    assert state.bytes() == 3 * 5 * (DIM + 1) * 8
    assert len(state) == 9
    state.reorder(torch.tensor([2, 2]))
    one = states(1, seed=4)
    again = made.step(one[[2, 2]], state)
    torch.testing.assert_close(again[0], made(torch.cat((h, one), 1)[2:]).vector)
    torch.testing.assert_close(again[1], again[0])


def test_long_chunks_of_large_scores_stay_finite():
    made, h = pooler(f"lama(heads=2, {PLAIN})"), states(200, 1) * 300
    found = made.step(h, made.new_state())
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 150], made(h[:, :151]).vector)


def test_a_large_score_leaves_the_gradients_of_earlier_prefixes_finite():
    """Behind the prefix it would be exp of more than fits, times 0."""
    made, h = pooler(f"lama(heads=2, {PLAIN})"), states(20, 1)
    real = torch.ones(1, 20, dtype=torch.bool)
    real[0, :3] = False
    h[0, 17] *= 3000
    h[0, 18] = -h[0, 17]  # one of both is large in each head
    assert (made.scores(h, made.c[None])[0, :, 17].abs() > 720).all()
    h.requires_grad_()
    weight = torch.randn(1, 14, 2 * DIM, dtype=torch.float64)
    (made.step(h, made.new_state(), real)[:, 3:17] * weight).sum().backward()
    ours = [h.grad.clone(), *(p.grad.clone() for p in made.parameters())]
    made.zero_grad()
    h.grad = None
    each = [made(h[:, : t + 1], real[:, : t + 1]).vector for t in range(3, 17)]
    (torch.stack(each, 1) * weight).sum().backward()
    for got, want in zip(ours, [h.grad, *(p.grad for p in made.parameters())]):
        torch.testing.assert_close(got, want)


def test_a_mean_has_no_running_sums():
    with pytest.raises(InputError, match="changes the weights of all before"):
        pooler("lama(context='mean')").new_state()


def test_the_contexts_source_is_a_choice():
    made, h, e = pooler("lama(heads=5, context='embeddings')"), states(), states(seed=7)
    real = torch.ones(3, 9, dtype=torch.bool)
    real[1, 5:] = False
    torch.testing.assert_close(made.context(h, real, e)[1], e[1, :5].mean(0))
    assert not torch.allclose(made(h, real, e).vector, made(h, real, e * 2).vector)
    with pytest.raises(InputError, match="expected embeddings"):
        made(h, real, e[..., :5])
    with pytest.raises(InputError, match="expected embeddings"):
        made(h)


def test_the_penalty_is_0_where_each_head_has_a_token_of_its_own():
    assert redundancy(torch.eye(4)[None].expand(2, -1, -1)) == 0
    same = torch.full((1, 3, 4), 0.25)
    assert redundancy(same).item() == pytest.approx(3 * 0.75**2 + 6 * 0.25**2)
    made, h = pooler("lama(heads=3, penalty=0.5)"), states()
    found = made(h)
    a = found.weights
    want = torch.stack([(row @ row.T - torch.eye(3)).norm() ** 2 for row in a]).mean()
    torch.testing.assert_close(found.aux["redundancy_loss"], 0.5 * want)
    assert not pooler("lama(heads=3)")(h).aux
    found.aux["redundancy_loss"].backward()
    assert made.q.grad.any()


@pytest.mark.parametrize("spec", ["lama(heads=5)", "lama(context='mean')", "self-attentive"])
def test_gradients(spec):
    made, h = pooler(spec, 4), states(4, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: made(h).vector, h)
    made(h).vector.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in made.parameters())


@pytest.mark.parametrize("spec", ["lama(heads=5)", "self-attentive"])
def test_low_precision(spec):
    made, h = pooler(spec), states()
    exact, low = made(h).vector, made.bfloat16()(h.bfloat16())
    assert low.vector.dtype == torch.bfloat16
    assert low.weights.dtype == torch.float32
    assert (low.vector.double() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("lama(heads=0)", "heads"),
        ("lama(context='mine')", "context='mine'"),
        ("lama(activation='relu')", "activation='relu'"),
        ("lama(penalty=-1)", "penalty"),
        ("self-attentive(hidden=0)", "hidden"),
    ],
)
def test_what_is_refused(spec, said):
    with pytest.raises(InputError, match=said):
        make(spec)


def test_a_pooler_is_no_attention():
    from foveate import Attention
    from foveate.methods.naming import make_attention

    with pytest.raises(InputError, match="is a pooler"):
        make_attention("lama")
    with pytest.raises(InputError, match="no attention"):
        Attention(32, 4, attention="lama")
    with pytest.raises(InputError, match=r"expected tokens \(B, L, 12\)"):
        pooler()(states(dim=8))


@pytest.mark.parametrize("spec", ["lama(heads=2)", "self-attentive(heads=2, hidden=4)"])
@pytest.mark.parametrize("real", [torch.ones(3, 9), torch.ones(3, 9).long(), torch.ones(3, 8) > 0])
def test_a_wrong_mask_is_refused(spec, real):
    with pytest.raises(InputError, match=r"expected real \(3, 9\) of bool"):
        pooler(spec)(states(), real)


def test_another_batch_doesnt_go_on_from_a_state():
    made = pooler()
    state = made.new_state()
    made.step(states(), state)
    with pytest.raises(InputError, match="holds 3 texts, but 1 go on"):
        made.step(states(1, 1), state)
    assert len(state) == 9


def test_a_picture_shades_words_by_weight():
    weights = torch.tensor([[[0.1, 0.9, 0.0], [0.5, 0.5, 0.0]], [[0.2, 0.3, 0.5]] * 2])
    page = word_picture([["my", "<card>"], ["a", "b", "c"]], weights, ["lost & found", "two"])
    assert "&lt;card&gt;" in page
    assert "<card>" not in page
    assert "lost &amp; found" in page
    assert page.count("<p>") == 2 * 3  # the mean and two heads
    assert 'title="0.900" style="background:rgba(61,90,152,1.00);color:#fff">&lt;card' in page
    assert 'title="0.700"' in page  # the mean
    with pytest.raises(InputError, match="3 weights"):
        word_picture([["a"] * 4, []], weights)
    with pytest.raises(InputError, match="1 texts"):
        word_picture([["a"]], weights)


# -- the classifier --------------------------------------------------------------------------------
def classifier(**options):
    pytest.importorskip("transformers")
    from foveate.models import FoveateEncoderConfig, FoveateForSequenceClassification

    given = {
        "vocab_size": 41, "num_hidden_layers": 0, "recurrent_layers": 1, "embedding_size": 10,
        "hidden_size": 16, "num_attention_heads": 2, "num_labels": 5, "initializer_range": 0.3,
        "pooling": "lama(heads=3)",
    }  # fmt: skip
    torch.manual_seed(0)
    return FoveateForSequenceClassification(FoveateEncoderConfig(**(given | options))).eval()


def padded(side):
    ids, mask = torch.randint(1, 41, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :3] = 0
    if side == "right":
        mask = mask.flip(1)
    return ids, mask, mask[1].bool()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"pooling": "max"}, {"pooling": "ends"}, {"recurrent_layers": 2},
        {"pooling": "lama(context='embeddings')", "embedding_size": None},
        {"pooling": "self-attentive(heads=2, hidden=4)", "num_hidden_layers": 1},
    ],
)  # fmt: skip
def test_padding_changes_nothing_in_the_classifier(options, side):
    model = classifier(**options)
    ids, mask, real = padded(side)
    found = model(ids, mask)
    for row, alone in ((0, ids[:1]), (1, ids[1:, real])):
        torch.testing.assert_close(found.logits[row], model(alone).logits[0], atol=1e-6, rtol=1e-5)


def test_the_classifier_by_hand():
    model = classifier(classifier_hidden=7)
    ids, mask, real = padded("left")
    encoder, found = model.encoder, model(ids, mask)
    h, ends = encoder.recurrent.gru(encoder.embed_tokens(ids[1:, real]))
    pooled = encoder.pooler(h)
    want = model.classifier(model.classifier_hidden(pooled.vector).relu())
    torch.testing.assert_close(found.logits[1:], want)
    assert found.pooler_weights.shape == (2, 3, 9)
    torch.testing.assert_close(found.pooler_weights[1:, :, real], pooled.weights)
    inner = classifier(pooling="ends").encoder
    h, ends = inner.recurrent.gru(inner.embed_tokens(ids[:1]))
    torch.testing.assert_close(inner(ids[:1]).pooler_output, torch.cat((ends[0], ends[1]), 1))


def test_the_classifiers_loss_holds_the_penalty():
    model = classifier(pooling="lama(heads=3, penalty=0.5)").train()
    ids, labels = torch.randint(1, 41, (2, 9)), torch.tensor([3, 0])
    out = model(ids, labels=labels)
    plain = torch.nn.functional.cross_entropy(out.logits, labels)
    torch.testing.assert_close(out.loss, plain + out.aux["redundancy_loss"])
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_the_classifier_is_saved_and_loaded_again(tmp_path):
    model = classifier(pooling="lama(heads=3, output=6)", classifier_hidden=7)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    ids = torch.randint(1, 41, (2, 9))
    assert torch.equal(again(ids).logits, model(ids).logits)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pooling": "lamma"}, "did you mean 'lama'"),
        ({"recurrent_layers": 0, "embedding_size": None, "pooling": "ends"}, "recurrent_layers"),
        ({"recurrent_layers": 0}, "embedding_size"),
        ({"position": "learned"}, "know the order"),
        ({"hidden_size": 15}, "even number"),
        ({"pooling": "lama(context='embeddings')"}, "embedding_size is 10"),
    ],
)
def test_what_the_classifiers_config_refuses(options, said):
    with pytest.raises(InputError, match=said):
        classifier(**options)


def test_packed_sequences_are_refused_by_recurrent_layers():
    with pytest.raises(InputError, match="as rows of a batch"):
        classifier()(torch.randint(1, 41, (1, 4)), position_ids=torch.tensor([[0, 1, 0, 1]]))
