"""MQSA-TED's windows, blocks, teacher and losses against loops and dense formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from foveate.methods.mqsa_ted import MQSATED, Transitions, WindowQuery, log_sums, windowed_mean
from foveate.models.sequential import SequentialRecommender
from foveate.ops.errors import InputError

B, T, D, V = 3, 9, 8, 20
PADS = torch.tensor([0, 4, 7])
REAL = torch.arange(T) >= PADS[:, None]
SMALL = MQSATED(dim=D, length=T, heads=2, window=3, blocks=2, dropout=0.0)


def items(seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(V, (B, T), generator=random).masked_fill(~REAL, V)


def model(**more):
    torch.manual_seed(1)
    made = SequentialRecommender(V, MQSATED(**{**vars(SMALL), **more})).double().eval()
    for p in made.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return made


def loop_of_shifts(h, real, window):
    """The spec's sum over l = 0 ... L-1, place by place."""
    out = torch.zeros_like(h)
    for b in range(len(h)):
        for t in range(h.shape[1]):
            seen = [h[b, t - l] for l in range(window) if t - l >= 0 and real[b, t - l]]
            if seen:
                out[b, t] = sum(seen) / len(seen)
    return out


@pytest.mark.parametrize("window", [1, 2, 3, 5, 20])
def test_oracle_2_prefix_sums_are_the_loop_of_shifts(window):
    h = torch.randn(B, T, D, dtype=torch.float64)
    noise = torch.where(REAL[..., None], h, torch.nan)
    found = windowed_mean(noise, REAL, window)
    torch.testing.assert_close(found, loop_of_shifts(h, REAL, window), atol=1e-6, rtol=0)
    free = h.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: windowed_mean(x, REAL, window), free)


def test_oracle_2_by_hand():
    a, b, c = torch.randn(3, D)
    h = torch.stack((torch.full((D,), 7.0), torch.full((D,), -3.0), a, b, c))[None]
    real = torch.tensor([[False, False, True, True, True]])
    expected = torch.stack((torch.zeros(D), torch.zeros(D), a, (a + b) / 2, (a + b + c) / 3))
    torch.testing.assert_close(windowed_mean(h, real, 3)[0], expected, atol=1e-6, rtol=1e-6)


def test_oracle_1_window_one_is_the_item_and_the_usual_block():
    h = torch.randn(B, T, D)
    assert torch.equal(windowed_mean(h, REAL, 1)[REAL], h[REAL])
    short, long_ = WindowQuery(D, 1, 2).eval(), WindowQuery(D, 1, 2).eval()
    long_.load_state_dict(short.state_dict())
    assert torch.equal(short(h, REAL), long_(h, REAL))
    # alpha = 1 is SASRec: the long branch isn't even there.
    recipe = MQSATED().self_attention()
    assert (recipe.alpha, recipe.distil) == (1.0, 0.0)
    assert list(SequentialRecommender(V, recipe).branches) == ["short"]


def by_definition(block, h, real):
    """The spec's steps a to f with a dense softmax, one sequence at a time."""
    heads, length = block.heads, h.shape[1]
    mean = loop_of_shifts(h, real, block.window)
    out = torch.zeros_like(h)
    for b in range(len(h)):
        n = functional.layer_norm(mean[b], (D,), block.query_norm.weight, block.query_norm.bias,
                                  block.query_norm.eps)  # fmt: skip
        split = [x.view(length, heads, D // heads).transpose(0, 1)
                 for x in (block.q(n), block.k(h[b]), block.v(h[b]))]  # fmt: skip
        scores = split[0] @ split[1].mT / math.sqrt(D / heads)
        allowed = real[b][None] & torch.ones(length, length, dtype=torch.bool).tril()
        p = torch.softmax(scores.masked_fill(~allowed, -(2.0**32) + 1), -1)
        o = (p @ split[2]).transpose(0, 1).reshape(length, D) + n
        o = functional.layer_norm(o, (D,), block.norm.weight, block.norm.bias, block.norm.eps)
        out[b] = (o + block.second(torch.relu(block.first(o)))) * real[b][:, None]
    return out


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("padding", ["left", "right", "none"])
def test_a_block_is_its_equations(window, padding):
    real = {"left": REAL, "right": REAL.flip(1), "none": torch.ones_like(REAL)}[padding]
    block = WindowQuery(D, window, 2).double().eval()
    for p in block.parameters():
        p.data += 0.2 * torch.randn_like(p)
    h = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    found, expected = block(h, real), by_definition(block, h, real)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    used = [h, *block.parameters()]
    ours = torch.autograd.grad((found * weight).sum(), used)
    theirs = torch.autograd.grad((expected * weight).sum(), used)
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_model_is_its_equations(alpha):
    made, given = model(alpha=alpha), items()
    e = torch.cat((made.table, torch.zeros(1, D, dtype=torch.float64)))
    for length in (T, 5):  # the last place is the latest item's, however long the sequence
        real, x = REAL[:, T - length :], given[:, T - length :]
        h = (e[x] * math.sqrt(D) + made.places[T - length :]) * real[..., None]
        expected = torch.zeros_like(h)
        for name, share in (("short", alpha), ("long", 1 - alpha)):
            if share:
                y, norm = h, made.branches[name].norm
                for block in made.branches[name].blocks:
                    assert block.window == (1 if name == "short" else 3)
                    y = by_definition(block, y, real)
                y = functional.layer_norm(y, (D,), norm.weight, norm.bias, norm.eps)
                expected = expected + share * y * real[..., None]
        torch.testing.assert_close(made(x), expected)
        torch.testing.assert_close(made.scores(x), expected[:, -1] @ made.table.T)


def test_padding_leaves_no_trace_in_gradients():
    made = model()
    given = items()
    loss = made.losses(given, given.roll(-1, 1) % V, Transitions([[1, 2]], V))["next"]
    loss.backward()
    grads = {name: p.grad.clone() for name, p in made.named_parameters()}
    assert all(g.isfinite().all() and float(g.abs().max()) < 1e3 for g in grads.values())
    made.zero_grad()
    s = made(given)
    s[~REAL].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in made.parameters())


@pytest.mark.parametrize("changed", [0, 5, 8])
def test_oracle_3_causality(changed):
    made, given = model(), items()
    before = made(given)
    other = given.clone()
    other[:, changed] = torch.where(other[:, changed] < V, (other[:, changed] + 1) % V, V)
    after = made(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


def test_oracle_3_more_padding_changes_nothing():
    made, given = model(), items()[:1]
    for pads in (1, 4):
        padded = torch.cat((torch.full((1, pads), V), given[:, pads:]), 1)
        torch.testing.assert_close(made(padded)[:, pads:], made(given[:, pads:]))


def test_oracle_4_a_window_of_everything_is_the_cumulative_mean():
    h = torch.randn(1, T, D, dtype=torch.float64)
    real = torch.ones(1, T, dtype=torch.bool)
    mean = h.cumsum(1) / torch.arange(1, T + 1)[:, None]
    torch.testing.assert_close(windowed_mean(h, real, T), mean)
    assert not torch.allclose(windowed_mean(h, real, 3), mean)


def test_oracle_5_mixing_scores_is_mixing_states():
    made, given = model(alpha=0.3), items()
    h, real = made.enter(given)
    short, long_ = (made.branches[n](h, real) @ made.table.T for n in ("short", "long"))
    expected = 0.3 * short + 0.7 * long_
    torch.testing.assert_close(made(given) @ made.table.T, expected, atol=1e-5, rtol=0)


def test_steps_equal_the_full_forward():
    made = model()
    given = torch.randint(V, (2, T))
    places = torch.arange(T)
    full = made(given, places)
    state, parts, at = made.new_state(2), [], 0
    for n in (3, 1, 2, 1, 1, 1):
        s, state = made.step(given[:, at : at + n], state)
        parts.append(s)
        at += n
    torch.testing.assert_close(torch.cat(parts, 1), full)
    assert state.length == T
    start = made.step(given[:, :4], made.new_state(2))[1]
    swapped = made.step(given[:, 4:5].flip(0), start.reorder(torch.tensor([1, 0])))[0]
    torch.testing.assert_close(swapped.flip(0), full[:, 4:5])
    with pytest.raises(InputError, match="begin anew"):
        made.step(given[:, :1], state)


def test_looks_are_the_last_places_weights():
    made, given = model(blocks=1), items()
    h, real = made.enter(given)
    for name, found in made.looks(given).items():
        assert not found[~REAL].any()
        torch.testing.assert_close(found.sum(1), torch.ones(B, dtype=torch.float64))
        block = made.branches[name].blocks[0]
        p = block.looks(h, real)
        v = block.v(h).view(B, T, 2, D // 2).transpose(1, 2)
        mixed = (p[:, :, None] @ v)[:, :, 0].flatten(1)
        n = block._query(windowed_mean(h, real, block.window), real)[:, -1]
        o = block.norm(mixed + n)
        expected = o + block.second(torch.relu(block.first(o)))
        torch.testing.assert_close(expected, block(h, real)[:, -1])


SEQUENCES = [[0, 1, 0, 1, 0, 2], [3, 0, 1], [4]]


def test_transitions_are_counted_within_their_sequence():
    found = Transitions(SEQUENCES, 6)
    dense = torch.zeros(6, 6, dtype=torch.long)
    for s in SEQUENCES:
        for i, j in zip(s, s[1:]):
            dense[i, j] += 1
    first, second = torch.cartesian_prod(torch.arange(6), torch.arange(6)).unbind(1)
    assert torch.equal(found.counts(first, second).view(6, 6), dense)
    for s in SEQUENCES:
        for i, j in zip(s, s[2:]):
            dense[i, j] += 1
    wide = Transitions(SEQUENCES, 6, span=2)
    assert torch.equal(wide.counts(first, second).view(6, 6), dense)
    assert not Transitions([[1], []], 6).counts(first, second).any()


def test_oracle_6_the_teacher():
    found = Transitions(SEQUENCES, 6)
    p = found.dense_teacher(0.1)
    torch.testing.assert_close(p.sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(p[5], torch.full((6,), 1 / 6, dtype=torch.float64))
    for tau in (0.05, 0.1, 1.0):
        dense = torch.zeros(6, 6, dtype=torch.float64)
        dense[found.row, found.item] = found.count
        scaled = dense / dense.amax(1, keepdim=True).clamp(min=1)
        torch.testing.assert_close(found.dense_teacher(tau), torch.softmax(scaled / tau, 1))
    # Counts [0, 2, 1] at tau 0.1: softmax([0, 10, 5]).
    row = Transitions([[0, 1], [0, 1], [0, 2]], 3).dense_teacher(0.1)[0]
    assert row.tolist() == pytest.approx([4.51e-5, 0.99326, 0.00669], abs=1e-5)
    sharp = Transitions([[0, 1], [0, 1], [0, 2]], 3).dense_teacher(1e-3)[0]
    assert sharp.tolist() == pytest.approx([0, 1, 0])


def test_oracle_6_the_distillation_is_least_at_the_teacher():
    found = Transitions(SEQUENCES, 6)
    p = found.dense_teacher(0.5)
    logits = p.log().clone().requires_grad_()
    inputs = torch.tensor([0, 0, 1, 3, 5])
    x = logits[inputs]
    loss = (torch.logsumexp(x, 1) - (x * p[inputs]).sum(1)).mean()
    entropy = -(p * p.log()).sum(1)[inputs].mean()
    torch.testing.assert_close(loss, entropy)
    (grad,) = torch.autograd.grad(loss, logits)
    assert float(grad.abs().max()) < 1e-12
    table = torch.randn(6, 4, dtype=torch.float64)
    assert float(found.loss(table, inputs, 0.5)) > float(entropy)
    # Items that follow themselves alone, and orthogonal vectors of the length that makes q = p.
    found, tau = Transitions([[i, i] for i in range(6)], 6), 0.7
    table = (torch.eye(6, dtype=torch.float64) * 6**-0.25).requires_grad_()
    p = found.dense_teacher(tau)[inputs]
    loss = found.loss(table, inputs, tau)
    torch.testing.assert_close(loss, -(p * p.log()).sum(1).mean())
    (grad,) = torch.autograd.grad(loss, table)
    assert float(grad.abs().max()) < 1e-12
    for _ in range(5):
        other = table.detach() + 0.1 * torch.randn_like(table)
        assert found.loss(other, inputs, tau) > loss


@pytest.mark.parametrize("room", [6, 18, 1 << 20])
def test_the_distillation_is_the_dense_formula(room):
    found = Transitions(SEQUENCES, 6)
    table = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    inputs = torch.tensor([0, 1, 1, 5, 3])
    ours = found.loss(table, inputs, 0.7, room=room)
    q = torch.softmax(table[inputs] * 2.0 @ table.T / 0.7, 1)
    p = found.dense_teacher(0.7)[inputs]
    theirs = -(p * (q + 1e-24).log()).sum(1).mean()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    for one, two in zip(torch.autograd.grad(ours, table), torch.autograd.grad(theirs, table)):
        torch.testing.assert_close(one, two)


def test_oracle_7_gradcheck_of_the_distillation():
    found = Transitions(SEQUENCES, 6)
    table = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    inputs = torch.tensor([0, 2, 1, 1])
    assert torch.autograd.gradcheck(lambda e: found.loss(e, inputs, 0.3), table)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: log_sums(a, b, room=12), (x, table))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_losses_are_those_of_the_sheet(alpha):
    made, given = model(alpha=alpha, distil=0.2, tau=0.5), items()
    targets = torch.randint(V, (B, T))
    teacher = Transitions([list(range(V)), [3, 1, 3, 1]], V)
    found = made.losses(given, targets, teacher, l2=0.01)
    z = made(given)[REAL] @ made.table.T
    z = torch.cat((z, z.new_zeros(len(z), 1)), 1)  # the padding class
    torch.testing.assert_close(found["next"], functional.cross_entropy(z, targets[REAL]))
    kd = teacher.loss(made.table, given[REAL], 0.5)
    torch.testing.assert_close(found["transitions"], 0.2 * kd)
    squares = sum(p.square().sum().item() for p in made.parameters())
    assert found["l2"].item() == pytest.approx(0.005 * squares)
    assert set(made.losses(given, targets, teacher)) == {"next", "transitions"}
    with pytest.raises(InputError, match="Transitions"):
        made.losses(given, targets)
    with pytest.raises(InputError, match="no item"):
        made.losses(torch.full((2, 3), V), targets[:2, :3], teacher)
    names = {name for name, p in made.named_parameters()}
    only = torch.autograd.grad(found["transitions"], [*made.parameters()], allow_unused=True)
    touched = {n for (n, _), g in zip(made.named_parameters(), only) if g is not None}
    assert touched == {"table"} < names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    made, given = model(), items()
    expected = made(given)
    found = made.to(dtype)(given)
    assert found.dtype == dtype
    band = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(found.double(), expected, atol=band, rtol=band)
    sum(made.losses(given, items(1) % V, Transitions([[1, 2]], V)).values()).backward()
    assert all(p.grad.isfinite().all() for p in made.parameters())


def test_dropout_draws_in_training_only():
    made = model(dropout=0.5)
    given = items()
    assert torch.equal(made(given), made(given))
    made.train()
    assert not torch.equal(made(given), made(given))


def test_bad_input_is_named():
    for bad, said in (
        ({"window": 0}, "window"), ({"heads": 3}, "heads don't divide"), ({"alpha": 1.5}, "alpha"),
        ({"tau": 0.0}, "tau"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            MQSATED(**bad)
    with pytest.raises(InputError, match="last 9 items"):
        model()(torch.zeros(1, T + 1, dtype=torch.long))
    with pytest.raises(InputError, match="0 ... 19"):
        model()(torch.full((1, 2), V + 1))
    with pytest.raises(InputError, match="0 ... 5"):
        Transitions([[6]], 6)
    with pytest.raises(InputError, match=r"real \(B, T\)"):
        windowed_mean(torch.zeros(1, 2, 3), torch.ones(1, 3, dtype=torch.bool), 2)
