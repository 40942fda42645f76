"""Mixture of heads: the spec's oracles 1 to 9, by their numbers."""

from __future__ import annotations

import pytest
import torch
from projections import DIM, decoded, layer, rotated, softmax_attention, tokens

import foveate
from foveate import Context, causal, padding
from foveate.methods import make
from foveate.methods.moh import QueryRouter, key_ranges, ragged_layout
from foveate.ops.errors import InputError
from foveate.parts.balance import load_balance

H, D = 8, 6
QUERY = "router='query'"


def moh(text="shared=3, active=3", dtype=torch.float64, **options):
    return layer(f"moh({text})", dtype, num_heads=H, **options)


def mha_like(made, dtype=torch.float64):
    plain = layer("mha", dtype, num_heads=H)
    names = plain.projection.state_dict()
    plain.projection.load_state_dict({n: made.projection.state_dict()[n] for n in names})
    return plain


def silent_routers(made):
    with torch.no_grad():
        for parameter in made.projection.router.parameters():
            parameter.zero_()
    return made


def chosen(made, x, real=None, phase="train"):
    p = made.projection
    return p.select(x, p.query(x), real, phase)


def ctx(phase="train"):
    return Context(mask=causal(), phase=phase)


# -- gates -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("shared", [0, 1, 3, 8])
def test_moh_oracle_1_silent_routers_and_all_heads_is_mha(shared):
    made = silent_routers(moh(f"shared={shared}, active={H - shared}", torch.float32))
    x = tokens(dtype=torch.float32)
    difference = made(x, mask=causal()).y - mha_like(made, torch.float32)(x, mask=causal()).y
    assert difference.abs().max() < 1e-6


@pytest.mark.parametrize("execution", ["ragged", "dense"])
def test_moh_oracle_1_ties_go_to_the_first_heads(execution):
    made = silent_routers(moh(f"shared=3, active=2, execution={execution!r}"))
    x, plain = tokens(), mha_like(made)
    with torch.no_grad():
        plain.projection.out.weight[:, 5 * D :] = 0
    torch.testing.assert_close(made(x, mask=causal()).y, plain(x, mask=causal()).y)


def test_moh_oracle_2_sums_of_gates():
    x = 3 * tokens()
    for shared, active in [(3, 3), (2, 5), (1, 4), (5, 2)]:
        made = moh(f"shared={shared}, active={active}")
        total = chosen(made, x).gates.sum(1)
        low, high = 2 * min(shared, active), 2 * max(shared, active)
        assert ((total > low - 1e-9) & (total < high + 1e-9)).all()
        made.projection.router.stage.weight.data.zero_()
        total = chosen(made, x).gates.sum(1)
        torch.testing.assert_close(total, torch.full_like(total, shared + active))
    paper = chosen(moh("shared=3, active=3, gates='paper'"), x).gates.sum(1)
    assert (paper < 1).all()
    every = chosen(moh("shared=3, active=5, gates='paper'"), x).gates.sum(1)
    torch.testing.assert_close(every, torch.ones_like(every))


@torch.no_grad()
@pytest.mark.parametrize("gates", ["paper", "normalized"])
def test_gates_by_definition(gates):
    made, x = moh(f"shared=3, active=2, gates={gates!r}"), tokens()
    r = made.projection.router
    got = chosen(made, x).gates
    for b in range(2):
        for t in range(37):
            ps = (r.shared.weight @ x[b, t]).softmax(0)
            pr = (r.routed.weight @ x[b, t]).softmax(0)
            a1, a2 = (r.stage.weight @ x[b, t]).softmax(0)
            best = set(pr.topk(2).indices.tolist())
            kept = [float(v) if i in best else 0.0 for i, v in enumerate(pr)]
            if gates == "paper":
                g = [float(a1 * v) for v in ps] + [float(a2) * v for v in kept]
            else:
                g = [float(6 * a1 * v) for v in ps]
                g += [float(4 * a2) * v / sum(kept) for v in kept]
            torch.testing.assert_close(got[b, :, t], torch.tensor(g, dtype=torch.float64))


def test_no_routed_heads_mixes_softly():
    made, x = moh("shared=8, active=0"), tokens()
    expected = H * (x @ made.projection.router.shared.weight.T).softmax(-1)
    torch.testing.assert_close(chosen(made, x).gates, expected.transpose(1, 2))
    assert chosen(made, x).aux == {}


def test_one_shared_head_needs_no_weights_of_its_own():
    router = moh("shared=1, active=4").projection.router
    assert router.shared is None
    assert router.stage is not None
    assert moh("shared=0, active=4").projection.router.stage is None


def test_moh_oracle_8_summation_form_is_concatenation_form():
    made, x = moh("shared=3, active=3, gates='paper'"), tokens()
    p, gates = made.projection, chosen(made, x).gates
    q, k, v = (f(x).unflatten(2, (H, D)).transpose(1, 2) for f in (p.q, p.k, p.v))
    o = softmax_attention(rotated(q), rotated(k), v, D**-0.5)
    y = sum(
        gates[:, i, :, None] * (o[:, i] @ p.out.weight[:, i * D : (i + 1) * D].T) for i in range(H)
    )
    assert (made(x, mask=causal()).y - y).abs().max() < 1e-6


# -- ragged execution ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        "shared=2, active=2", "shared=0, active=3, kv_heads=2", f"shared=2, active=3, {QUERY}",
        f"shared=4, active=1, kv_heads=2, {QUERY}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("mask", [causal(), None])
@pytest.mark.parametrize("length", [7, 150])
def test_moh_oracle_3_ragged_is_compute_all_and_mask(text, mask, length):
    ragged, dense = (moh(f"{text}, execution={e!r}", torch.float32) for e in ("ragged", "dense"))
    x = tokens(length, dtype=torch.float32)
    results = []
    for made in (ragged, dense):
        x_ = x.clone().requires_grad_()
        out = made(x_, ctx=Context(mask=mask, phase="train"))
        total = out.y.square().mean() + out.aux["head_balance_loss"]
        grads = torch.autograd.grad(total, [x_, *made.parameters()])
        results.append((out.y, *grads))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-5


def test_ragged_skips_what_does_not_count():
    made, x = moh("shared=2, active=2, execution='ragged'"), tokens(600)
    seen = []
    made(x, ctx=Context(mask=causal(), stats=lambda **told: seen.append(told["layout"])))
    layout, active = seen[0], chosen(made, x).active
    assert torch.equal(layout.dense(), active[..., None] & causal().dense(600, 600))
    assert active.sum() == 2 * 600 * 4  # rho = 1/2 of all (token, head) pairs, exactly
    assert made.projection.share_active == 0.5
    assert layout.tile_density < 0.32


@pytest.mark.parametrize("mask", [causal(), None])
@pytest.mark.parametrize("lengths", [None, (1, 1), (60, 5), (129, 70)])
def test_ragged_layout_by_brute_force(mask, lengths):
    for q_len, kv_len in [(1, 1), (1, 90), (70, 70), (5, 133), (129, 129)]:
        active = torch.rand(2, 3, q_len) < torch.rand(2, 3, 1)
        active[0, 1] = False
        known = Context(mask=mask)
        if lengths is not None:  # padding in front of one row, behind the other
            real = torch.tensor([min(n, kv_len) for n in lengths])
            known.mask = padding(real) if mask is None else mask & padding(real)
            places = torch.arange(kv_len) - torch.tensor([[0], [kv_len - int(real[1])]])
            known.q_positions, known.kv_positions = places[:, kv_len - q_len :], places
        ranges = key_ranges(known, q_len, kv_len, torch.device("cpu"))
        layout = ragged_layout(active, kv_len, ranges)
        assert layout.sound
        seen = torch.ones(q_len, kv_len, dtype=torch.bool)
        if known.mask is not None:
            seen = known.mask.dense(
                q_len, kv_len, q_positions=known.q_positions, kv_positions=known.kv_positions
            )
        assert torch.equal(layout.dense(), active[..., None] & seen)
        if q_len == kv_len and lengths is None:
            both = active[..., None] & active[:, :, None] & seen
            assert torch.equal(ragged_layout(active, kv_len, ranges, kv_masked=True).dense(), both)


def test_ranges_are_only_told_where_they_are_ranges():
    cpu = torch.device("cpu")
    assert key_ranges(Context(mask=causal() & foveate.window(3, 0)), 9, 9, cpu) is None
    holes = torch.tensor([0, 1, 2, 4, 5])
    assert key_ranges(Context(mask=causal(), kv_positions=holes), 5, 5, cpu) is None


@pytest.mark.parametrize("left", [False, True])
def test_ragged_under_padding(left):
    """Padded batches skip work too, and decode as they run."""
    x = tokens(90, dtype=torch.float32)
    real = torch.tensor([90, 61])
    places = torch.arange(90) - (90 - real if left else 0 * real)[:, None]
    results = []
    for execution in ("ragged", "dense"):
        made = moh(f"shared=2, active=2, execution={execution!r}", torch.float32)
        seen = {}
        padded = Context(
            mask=causal() & padding(real), q_positions=places, kv_positions=places, phase="train",
            stats=seen.update,
        )  # fmt: skip
        x_ = x.clone().requires_grad_()
        out = made(x_, ctx=padded)
        total = (out.y * (places < real[:, None])[..., None]).square().mean()
        results.append((out.y, *torch.autograd.grad(total, [x_, made.projection.q.weight])))
        assert (seen["layout"].q_index is not None) is (execution == "ragged")
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-5
    made = moh("shared=2, active=2, execution='ragged'", torch.float32)
    cache, parts = made.new_cache(), []
    with torch.no_grad():
        for start, stop in ((0, 85), *((t, t + 1) for t in range(85, 90))):
            counts = torch.tensor([stop, stop - 29]) if left else real.clamp(max=stop)
            step = Context(
                mask=causal() & padding(counts), q_positions=places[:, start:stop],
                kv_positions=places[:, :stop], phase="decode" if start else "prefill",
            )  # fmt: skip
            parts.append(made(x[:, start:stop], cache=cache, ctx=step).y)
    difference = (torch.cat(parts, 1) - results[0][0]).abs() * (places < real[:, None])[..., None]
    assert difference.max() < 1e-5


def test_auto_is_ragged_only_where_it_pays_and_can():
    made = moh("shared=2, active=2")
    seen = []

    def run(length, **options):
        seen.clear()
        stats = Context(stats=lambda **told: seen.append(told["layout"]), **options)
        made(tokens(length, 1), ctx=stats)
        return seen[0].q_index is not None

    assert run(1030, mask=causal())
    assert not run(100, mask=causal())
    assert not run(1030, mask=causal() & foveate.window(9, 0))


def test_kv_masked_drops_keys_too():
    made, x = moh("shared=2, active=2, execution='kv-masked'"), tokens(70)
    p, selected = made.projection, chosen(made, x)
    q, k, v = (f(x).unflatten(2, (H, D)).transpose(1, 2) for f in (p.q, p.k, p.v))
    allowed = selected.active[:, :, None] | torch.eye(70, dtype=torch.bool)
    o = softmax_attention(rotated(q), rotated(k), v, D**-0.5, allowed=allowed)
    expected = p.out((o * selected.gates[..., None]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(made(x, mask=causal()).y, expected)
    with pytest.raises(InputError, match="can't decode"):
        decoded(made, x, 60)


@pytest.mark.parametrize("execution", ["ragged", "dense", "auto"])
@pytest.mark.parametrize(
    "text",
    ["shared=2, active=2", f"shared=2, active=2, {QUERY}", "shared=2, active=2, kv_heads=2"],
)
def test_moh_oracle_9_decoding_equals_the_full_forward(text, execution):
    made = moh(f"{text}, execution={execution!r}", torch.float32)
    x = tokens(80, dtype=torch.float32)
    whole = made(x, mask=causal()).y
    steps, cache = decoded(made, x, 70)
    assert (steps - whole).abs().max() < 1e-5
    assert cache.elements_per_token == 2 * made.projection.kv_heads * D


def test_what_cannot_be_ragged_is_refused():
    made, x = moh("shared=2, active=2, execution='ragged'"), tokens()
    with pytest.raises(InputError, match="neither causal"):
        made(x, mask=causal() & foveate.window(3, 0))
    with pytest.raises(InputError, match="isn't full attention"):
        moh("execution='ragged'", attention="sink-window")(x, mask=causal())
    with pytest.raises(InputError, match="needs the outputs of all heads"):
        moh(f"{QUERY}, gradient='all', execution='ragged'")(x, ctx=ctx())


# -- causality and padding -------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["shared=2, active=2", f"shared=2, active=2, {QUERY}"])
@pytest.mark.parametrize("execution", ["ragged", "dense"])
def test_moh_oracle_4_later_tokens_change_nothing(text, execution):
    made, x = moh(f"{text}, execution={execution!r}"), tokens()
    other = x.clone()
    other[:, 20:] += 1
    assert torch.equal(chosen(made, x).gates[..., :20], chosen(made, other).gates[..., :20])
    before, after = made(x, mask=causal()).y, made(other, mask=causal()).y
    torch.testing.assert_close(before[:, :20], after[:, :20], atol=1e-12, rtol=0)


def test_moh_oracle_4_padding_is_not_counted():
    made, x = moh("shared=2, active=2"), tokens()
    pads = torch.tensor([0, 9])
    positions = torch.arange(37)[None] - pads[:, None]
    padded = Context(
        mask=causal() & padding(37 - pads), q_positions=positions, kv_positions=positions,
        phase="train",
    )  # fmt: skip
    other = x.clone()
    other[1, :9] += 5
    first, second = (made(y, ctx=padded).aux for y in (x, other))
    assert torch.equal(first["head_balance_loss"], second["head_balance_loss"])
    assert torch.equal(first["head_load"], second["head_load"])
    real = torch.cat((x[0], x[1, 9:]))[None]
    alone = chosen(made, real).aux
    torch.testing.assert_close(first["head_balance_loss"], alone["head_balance_loss"])


def test_moh_oracle_4_padding_of_a_single_sequence_is_not_counted():
    """A batch of one, padded on the right, where lengths alone say what is padding."""
    made, x = moh("shared=2, active=2"), tokens(batch=1)
    other = x.clone()
    other[:, 28:] += 5
    padded = Context(mask=causal() & padding([28]), phase="train")
    first, second = (made(y, ctx=padded).aux for y in (x, other))
    alone = chosen(made, x[:, :28]).aux
    for name, value in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value)


# -- load balance ----------------------------------------------------------------------------------
def both_losses(probs, active):
    return [float(load_balance(probs, active, scaled=scaled).loss) for scaled in (False, True)]


def test_moh_oracle_5_uniform_and_collapsed_routers():
    experts, k = 8, 2
    uniform = torch.full((24, experts), 1 / experts)
    spread = torch.zeros(24, experts, dtype=torch.bool)
    for t in range(24):
        spread[t, [t % experts, (t + 1) % experts]] = True
    assert both_losses(uniform, spread) == pytest.approx([k / experts, k])
    collapsed = torch.zeros(24, experts)
    collapsed[:, :k] = 1 / k
    assert both_losses(collapsed, collapsed > 0) == pytest.approx([1, experts])


@pytest.mark.parametrize("gates", ["paper", "normalized"])
def test_moh_oracle_5_gradient_of_the_router(gates):
    made, x = moh(f"shared=3, active=2, gates={gates!r}, beta=1.0"), tokens()
    weight = made.projection.router.routed.weight
    grad = torch.autograd.grad(chosen(made, x).aux["head_balance_loss"], weight)[0]
    load = chosen(made, x).aux["head_load"]  # f, frozen
    factor = 1 if gates == "paper" else 5

    def loss():
        p = (x @ weight.T).softmax(-1).reshape(-1, 5).mean(0)
        return float(factor * (p * load).sum())

    with torch.no_grad():
        for at in [(0, 0), (2, 7), (4, 47)]:
            kept = weight[at].clone()
            weight[at] = kept + 1e-5
            above = loss()
            weight[at] = kept - 1e-5
            below = loss()
            weight[at] = kept
            assert float(grad[at]) == pytest.approx((above - below) / 2e-5, rel=1e-5)


def test_moh_oracle_6_worked_example():
    one, two = torch.tensor([0.4, 0.3, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.3, 0.4])

    def losses(probs):
        return both_losses(probs, torch.stack([p >= p.topk(2).values[-1] for p in probs]))

    assert losses(torch.stack((one, two))) == pytest.approx([0.5, 2.0])
    assert losses(torch.stack((one, one))) == pytest.approx([0.7, 2.8])


def test_balance_of_ill_fitting_shapes():
    with pytest.raises(InputError, match="don't fit together"):
        load_balance(torch.zeros(3, 4), torch.zeros(3, 5, dtype=torch.bool))


# -- continue-tuning a pretrained model ------------------------------------------------------------
@pytest.mark.parametrize("gradient", ["selected", "all"])
def test_moh_oracle_7_all_heads_active_is_the_model_itself(gradient):
    made = moh(f"shared=4, active=4, {QUERY}, gradient={gradient!r}", torch.float32)
    x, plain = tokens(dtype=torch.float32), mha_like(made, torch.float32)
    assert torch.equal(made(x, mask=causal()).y, plain(x, mask=causal()).y)
    assert not list(made.projection.router.parameters())
    assert torch.equal(made.train()(x, mask=causal()).y, plain(x, mask=causal()).y)


def test_moh_oracle_7_a_factor_on_all_queries_changes_no_choice():
    made, x = moh(f"shared=3, active=2, {QUERY}"), tokens()
    before = chosen(made, x).active
    made.projection.q.weight.data.mul_(7.5)
    assert torch.equal(chosen(made, x).active, before)


@pytest.mark.parametrize("gradient", ["selected", "all"])
def test_moh_oracle_7_straight_through_gradient(gradient):
    made, x = moh(f"shared=4, active=2, {QUERY}, gradient={gradient!r}"), tokens()
    p = made.projection
    ours = torch.autograd.grad(made(x, ctx=ctx()).y.square().sum(), p.q.weight)[0]
    # gate = indicator + pr - detach(pr), written out around plain attention
    q, k, v = (f(x).unflatten(2, (H, D)).transpose(1, 2) for f in (p.q, p.k, p.v))
    logits = q.square().sum(-1).sqrt()[:, 4:]
    pr = (logits / (logits.std(1, keepdim=True) + 1e-6)).softmax(1)
    indicator = torch.zeros_like(pr).scatter(1, pr.topk(2, 1).indices, 1.0)
    step = pr - pr.detach()
    gate = indicator + (step if gradient == "all" else step * indicator)
    gate = torch.cat((torch.ones_like(gate), gate), 1)
    o = softmax_attention(rotated(q), rotated(k), v, D**-0.5) * gate[..., None]
    y = o.transpose(1, 2).flatten(2) @ p.out.weight.T
    theirs = torch.autograd.grad(y.square().sum(), p.q.weight)[0]
    torch.testing.assert_close(ours, theirs)


def test_equal_norms_give_no_nan():
    gated = QueryRouter(1, 3, 2, "selected")(torch.ones(1, 4, 5, 6))
    assert gated.gates.isfinite().all()
    assert gated.active[0, 0].tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("heads", "counts"), [(8, (3, 3)), (4, (2, 1)), (1, (1, 0)), (2, (1, 1)), (16, (5, 7))]
)
def test_default_heads(heads, counts):
    assert make("moh").counts(heads) == counts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("moh(shared=9)", "are routed"),
        ("moh(shared=3, active=0)", "are routed"),
        ("moh(shared=3, active=6)", "are routed"),
        ("moh(gates='nice')", "is unknown"),
        ("moh(router='key')", "is unknown"),
        ("moh(execution='fast')", "is unknown"),
        ("moh(beta=-1)", "at least 0"),
        ("moh(shared=-1)", "at least 0"),
    ],
)
def test_refusals(text, said):
    with pytest.raises(InputError, match=said):
        foveate.Attention(DIM, H, text)


def test_the_query_router_needs_all_heads():
    with pytest.raises(InputError, match="queries of all heads"):
        moh(QUERY).projection.shard(0, 2)
