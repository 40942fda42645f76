"""Hierarchical self-attention: the oracles of its spec, and that the fast form is its matrix."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from foveate import Attention, Context, Layout, attention, causal, documents, padding, window
from foveate.methods import make
from foveate.methods.hsa import solve
from foveate.methods.hsa.columns import columns
from foveate.methods.hsa.definition import divergence, leaves_of, written
from foveate.methods.hsa.siblings import sibling_layout
from foveate.ops.errors import InputError
from foveate.parts.tree import Tree

CROSSED = Tree.nested([[0, 2], [1, *range(3, 12)]])
WORKED = {
    True: (-1.727631, [2.149430, 2.444591, 2.752796, 2.458193]),
    False: (-1.352419, [3.057095, 2.761825, 2.648464, 2.189078]),
}


def drawn(length: int, heads: int = 1, dim: int = 5, batch: int = 1) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, heads, length, dim, dtype=torch.float64) for _ in range(3))


def random_tree(tokens: list[int], most: int = 4) -> list:
    """Nested lists of random depth; some groups are leaves and groups mixed."""
    if len(tokens) <= 2 or (len(tokens) <= most and random.random() < 0.4):
        return list(tokens)
    cuts = sorted(random.sample(range(1, len(tokens)), min(len(tokens) - 1, random.randint(1, 3))))
    parts = [tokens[a:b] for a, b in zip([0, *cuts], [*cuts, len(tokens)])]
    return [p[0] if len(p) == 1 else random_tree(p, most) for p in parts]


def fast(q: Tensor, k: Tensor, tree: list, own: bool = True, scale: float = 0.5):
    """theta and phi(R) by the passes over the tree: values are unit vectors."""
    length = q.shape[2]
    eye = torch.eye(length, dtype=q.dtype)[None, None]
    found = solve(q, k, eye, Tree.nested(tree, length), scale=scale, own=own)
    return found.out[0, 0], found.energy[0, 0]


def logits(q: Tensor, k: Tensor, scale: float = 0.5) -> Tensor:
    return scale * q[0, 0] @ k[0, 0].T


# -- the spec's oracles ---------------------------------------------------------------------------
@pytest.mark.parametrize(("dtype", "band"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_oracle_1_a_flat_tree_is_softmax(dtype, band):
    q, k, v = (x.to(dtype) for x in drawn(37, heads=2, dim=8, batch=2))
    tree = Tree.nested(list(range(37))).expanded(2)
    ours = solve(q, k, v, tree, scale=0.3).out
    softmax = (0.3 * q.double() @ k.double().mT).softmax(-1) @ v.double()
    torch.testing.assert_close(ours.double(), softmax, atol=band, rtol=0)


def blocks_of(tree: list, own: bool) -> list[tuple[list[int], list[int]]]:
    """The free parameters: (rows, columns) of each block of siblings, and each token itself."""
    found = []
    for one in tree:
        for two in tree:
            if one is not two:
                found.append((leaves_of(one), leaves_of(two)))
        found += [([one], [one])] * own if isinstance(one, int) else blocks_of(one, own)
    return found


def by_newton(s: Tensor, tree: list, own: bool) -> Tensor:
    """argmin of sum KL(theta || softmax(s)) over the blocks' values, rows summing to 1.

    Infeasible-start Newton on x > 0: knows nothing of trees but which entries are equal.
    """
    n, log_p = len(s), s.log_softmax(-1)
    params = blocks_of(tree, own)
    count = torch.tensor([float(len(r) * len(c)) for r, c in params], dtype=s.dtype)
    target = torch.stack([log_p[r][:, c].sum() for r, c in params])
    rows = torch.zeros(n, len(params), dtype=s.dtype)
    for at, (r, c) in enumerate(params):
        rows[r, at] = float(len(c))
    x = torch.full((len(params),), 1.0 / n, dtype=s.dtype)
    dual = torch.zeros(n, dtype=s.dtype)

    def residual(x: Tensor, dual: Tensor) -> Tensor:
        return torch.cat((count * (x.log() + 1) - target + rows.T @ dual, rows @ x - 1))

    for _ in range(200):
        now = residual(x, dual)
        if now.norm() < 1e-13:
            break
        inverse = x / count  # of the diagonal Hessian
        first, second = now[: len(x)], now[len(x) :]
        dy = torch.linalg.solve((rows * inverse) @ rows.T, second - rows @ (inverse * first))
        dx = -inverse * (first + rows.T @ dy)
        t = 1.0
        while bool((x + t * dx <= 0).any()) or (
            t > 1e-6 and residual(x + t * dx, dual + t * dy).norm() > (1 - 0.1 * t) * now.norm()
        ):
            t /= 2
        x, dual = x + t * dx, dual + t * dy
    theta = torch.zeros_like(s)
    for value, (r, c) in zip(x, params):
        theta[torch.tensor(r)[:, None], torch.tensor(c)] = value
    return theta


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_oracle_2_no_block_constant_matrix_is_closer(own, seed):
    random.seed(seed)
    torch.manual_seed(seed)
    n = random.randint(5, 12)
    tree = random_tree(list(range(n)))
    q, k, _ = drawn(n)
    theta, _ = fast(q, k, tree, own)
    torch.testing.assert_close(theta, by_newton(logits(q, k), tree, own), atol=1e-10, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_oracle_3_the_energy_is_the_divergence(seed):
    random.seed(seed)
    n = random.randint(6, 40)
    tree = random_tree(list(range(n)))
    q, k, _ = drawn(n)
    s = logits(q, k)
    for own in (True, False):
        theta, energy = fast(q, k, tree, own)
        torch.testing.assert_close(theta.sum(1), torch.ones_like(theta[0]), atol=1e-10, rtol=0)
        for rows, cols in blocks_of(tree, own):
            block = theta[rows][:, cols]
            assert float(block.max() - block.min()) < 1e-12
        said = n * energy + s.logsumexp(-1).sum()
        assert abs(float(divergence(theta, s) - said)) < 1e-10


@pytest.mark.parametrize("own", [True, False])
def test_oracle_4_attention_is_the_gradient_of_the_energy(own):
    random.seed(3)
    tree = random_tree(list(range(30)))
    q, k, _ = drawn(30)
    q.requires_grad_()
    theta, energy = fast(q, k, tree, own)
    (grad,) = torch.autograd.grad(30 * energy, q)
    torch.testing.assert_close(grad[0, 0], -0.5 * (theta @ k[0, 0]).detach(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("own", [True, False])
def test_oracle_5_worked_example(own):
    q = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, -1]]).double()[None, None]
    k = torch.tensor([[1.0, 0], [0, 2], [-1, 0], [1, 1]]).double()[None, None]
    v = torch.tensor([[1.0], [2], [3], [4]]).double()[None, None]
    tree = [[0, 1], [2, 3]]
    found = solve(q, k, v, Tree.nested(tree), scale=2**-0.5, own=own)
    energy, out = WORKED[own]
    assert float(found.energy) == pytest.approx(energy, abs=5e-7)
    assert found.out.flatten().tolist() == pytest.approx(out, abs=5e-7)
    theta, _ = fast(q, k, tree, own, 2**-0.5)
    row = {True: [0.416894, 0.205557, 0.188775, 0.188775], False: [0.270307, 0.270307, 0, 0.459385]}
    assert theta[0 if own else 2].tolist() == pytest.approx(row[own], abs=5e-7)


def test_oracle_6_what_is_block_constant_already_stays_softmax():
    # q and k are alike within groups of 4, so that all pairs of two groups have one logit.
    q, k = (x.repeat_interleave(4, 2) for x in drawn(6)[:2])
    theta, _ = fast(q, k, [list(range(i, i + 4)) for i in range(0, 24, 4)])
    torch.testing.assert_close(theta, logits(q, k).softmax(-1), atol=1e-12, rtol=0)
    # A third level ties groups that differ: now it isn't.
    theta, _ = fast(q, k, [[list(range(i, i + 4)) for i in range(j, j + 8, 4)] for j in (0, 8, 16)])
    assert float((theta - logits(q, k).softmax(-1)).abs().max()) > 1e-3


def test_oracle_7_the_order_of_children_is_nobodys_business():
    random.seed(5)
    tree = random_tree(list(range(40)))

    def shuffled(node):
        if isinstance(node, int):
            return node
        return [shuffled(child) for child in random.sample(node, len(node))]

    q, k, v = drawn(40, heads=2)
    one = solve(q, k, v, Tree.nested(tree), scale=0.4)
    two = solve(q, k, v, Tree.nested(shuffled(tree)), scale=0.4)
    torch.testing.assert_close(one.out, two.out, atol=1e-12, rtol=0)
    torch.testing.assert_close(one.energy, two.energy, atol=1e-12, rtol=0)
    moved = torch.randperm(40)  # tokens elsewhere, and the tree with them
    back = moved.argsort().tolist()

    def renamed(node):
        return back[node] if isinstance(node, int) else [renamed(child) for child in node]

    three = solve(*(x[:, :, moved] for x in (q, k, v)), Tree.nested(renamed(tree)), scale=0.4)
    torch.testing.assert_close(three.out, one.out[:, :, moved], atol=1e-12, rtol=0)


def test_oracle_7_positions_go_with_their_nodes():
    sentence, paragraph = torch.arange(36) // 4, torch.arange(36) // 12
    places = [torch.randint(9, (36,))] + [torch.randint(9, (n,)) for n in (9, 3)]
    given = [places[0], places[1][sentence], places[2][paragraph]]
    method, (q, k, v) = make("hsa(positions=8, position_scale=2.0)"), drawn(36, heads=2)

    def out(order):
        tree = Tree.segments(
            sentence[order], paragraph[order], places=[x[order, None].double() for x in given]
        )
        return method(*(x[:, :, order] for x in (q, k, v)), Context(tree=tree)).out

    moved = torch.randperm(36)
    one = out(torch.arange(36))
    torch.testing.assert_close(out(moved), one[:, :, moved], atol=1e-12, rtol=0)
    given[1] = given[1].flip(0)  # other positions of the sentences: another output
    assert float((out(torch.arange(36)) - one).abs().max()) > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_oracle_7_fewer_ties_are_never_further(seed):
    random.seed(seed)
    tree = random_tree(list(range(24)), most=3)
    q, k, _ = drawn(24)
    s = logits(q, k)
    last = float(divergence(fast(q, k, tree)[0], s))
    while any(isinstance(child, list) for child in tree):
        inner = next(i for i, child in enumerate(tree) if isinstance(child, list))
        tree = [*tree[:inner], *tree[inner], *tree[inner + 1 :]]  # its children on the root
        now = float(divergence(fast(q, k, tree)[0], s))
        assert now <= last + 1e-12
        last = now
    assert last < 1e-12


# -- the fast form is the definition ---------------------------------------------------------------
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_matrix_and_gradients_are_those_of_the_definition(own, seed):
    random.seed(seed)
    tree = [random_tree(list(range(11))), [[11]], [12, [[13], 14]]]  # with only children
    q, k, v = (x.requires_grad_() for x in drawn(15))
    found = solve(q, k, v, Tree.nested(tree), scale=0.7, own=own)
    theta, energy = written(logits(q, k, 0.7), tree, own=own)
    expected = theta @ v[0, 0]
    torch.testing.assert_close(found.out[0, 0], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.energy[0, 0], energy, atol=1e-12, rtol=0)
    weight = torch.randn_like(expected)
    ours = torch.autograd.grad((found.out[0, 0] * weight).sum() + found.energy.sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weight).sum() + energy, (q, k, v))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-11, rtol=0)


def test_a_lone_token_that_may_not_see_itself_sees_nothing():
    q, k, v = (x.requires_grad_() for x in drawn(1))
    found = solve(q, k, v, Tree.nested([[0]]), scale=1.0, own=False)
    assert float(found.energy) == torch.inf
    assert not found.out.any()
    assert all(not g.any() for g in torch.autograd.grad(found.out.sum(), (q, k, v)))
    # Where it has company, none of its group's mass stays inside.
    theta, energy = fast(*drawn(3)[:2], [[0], [1, 2]], own=False)
    assert theta.diag().tolist() == [0, 0, 0]
    assert float(energy) < torch.inf
    torch.testing.assert_close(theta.sum(1), torch.ones(3, dtype=torch.float64))


def test_trees_of_a_batch_heads_in_groups_and_padding():
    trees = [[[0, 1, 2], [3, 4], 5], [[0, 1], [[2, 3], [4, 5, 6]]], [0, 1, 2]]
    lengths = torch.tensor([6, 7, 3])
    forest = Tree.batched([Tree.nested(t) for t in trees], length=7)
    q = torch.randn(3, 4, 7, 6, dtype=torch.float64)
    k, v = torch.randn(2, 3, 2, 7, 6, dtype=torch.float64)
    k[2, :, 5] = torch.nan  # padding may hold anything
    v[2, :, 6] = torch.inf
    ctx = Context(mask=padding(lengths), tree=forest)
    out, lse = make("hsa")(q, k, v, ctx)
    assert lse.isnan().all()
    for b, (tree, n) in enumerate(zip(trees, lengths.tolist())):
        for h in range(4):
            s = (q[b, h, :n] @ k[b, h // 2, :n].T) * 6**-0.5
            expected = written(s, tree).theta @ v[b, h // 2, :n]
            torch.testing.assert_close(out[b, h, :n], expected)


def test_tokens_that_the_mask_hides_leave_the_tree():
    q, k, v = drawn(8, heads=2)
    ctx = Context(mask=padding(torch.tensor([5])), tree=Tree.windows(8, 2))
    out = make("hsa")(q, k, v, ctx).out
    theta = written(logits(q, k, 5**-0.5)[:5, :5], [[[0, 1], [2, 3]], [[4]]]).theta
    torch.testing.assert_close(out[0, 0, :5], theta @ v[0, 0, :5])
    alone = make("hsa")(q[:, :, :5], k[:, :, :5], v[:, :, :5], Context(tree=Tree.windows(5, 2))).out
    torch.testing.assert_close(out[:, :, :5], alone)
    assert not out[:, :, 5:].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_windows_count_from_the_first_real_token(side):
    q, k, v = (torch.randn(2, 2, 40, 8, dtype=torch.float64) for _ in range(3))
    pads, index = torch.tensor([0, 11]), torch.arange(40)[None]
    ctx = Context(mask=padding(40 - pads))
    if side == "left":
        at = index - pads[:, None]
        ctx = Context(mask=padding(40 - pads), q_positions=at, kv_positions=at)
    method = make("hsa(branch=4, first=1)")
    out = method(q, k, v, ctx).out
    for b, pad in enumerate(pads.tolist()):
        real = slice(pad, 40) if side == "left" else slice(0, 40 - pad)
        alone = method(*(x[b : b + 1, :, real] for x in (q, k, v))).out
        torch.testing.assert_close(out[b : b + 1, :, real], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    q, k, v = (torch.randn(2, 4, 300, 32).to(dtype) for _ in range(3))
    method = make("hsa(branch=8)")
    out = method(q, k, v).out
    expected = method(q.double(), k.double(), v.double()).out
    band = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=band, rtol=band)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_low_precision(dtype):
    tensors = [torch.randn(1, 2, 200, 16).to(dtype).requires_grad_() for _ in range(3)]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    weight = torch.randn(1, 2, 200, 16, dtype=torch.float64)
    method = make("hsa(branch=8)")
    ours = torch.autograd.grad((method(*tensors).out * weight.to(dtype)).sum(), tensors)
    theirs = torch.autograd.grad((method(*wide).out * weight).sum(), wide)
    band = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), two, atol=band, rtol=band)


def test_positions_are_logits_of_siblings():
    tree = Tree.windows(24, 3)
    q, k, v = drawn(24)
    out = make("hsa(branch=3, positions=8, position_scale=2.0)")(q, k, v, Context(tree=tree)).out
    # The definition: e_B . e_C for the siblings above each pair, node by node.
    s, e = logits(q, k, 5**-0.5), tree.places[:, 0]
    angle = e[:, None].double() * 10_000.0 ** (-torch.arange(4) / 4).double()
    e = torch.cat((angle.sin(), angle.cos()), 1).float().double()  # |e| = 2: scale 2, width 4
    pairs = torch.zeros(24, 24, dtype=torch.float64)
    up = [tree.leaves]
    while bool((tree.parent[up[-1]] >= 0).any()):
        up.append(torch.where(tree.parent[up[-1]] >= 0, tree.parent[up[-1]], up[-1]))
    for i in range(24):
        for j in range(24):
            level = next(
                n for n in range(len(up)) if tree.parent[up[n][i]] == tree.parent[up[n][j]]
            )
            pairs[i, j] = e[up[level][i]] @ e[up[level][j]]

    def nested(node: int):
        kids = (tree.parent == node).nonzero()[:, 0].tolist()
        return [nested(c) for c in kids] if kids else int(tree.token[node])

    theta = written(s + pairs, nested(0)).theta
    torch.testing.assert_close(out[0, 0], theta @ v[0, 0], atol=1e-6, rtol=0)
    plain = make("hsa(branch=3)")(q, k, v, Context(tree=tree)).out
    assert float((out - plain).abs().max()) > 1e-3


def test_a_bias_of_keys_is_part_of_their_logits():
    q, k, v = drawn(20, heads=2)
    bias = torch.randn(1, 2, 1, 20, dtype=torch.float64, requires_grad=True)
    tree = [list(range(5)), [[*range(5, 9)], [*range(9, 20)]]]
    ctx = Context(bias=bias, tree=Tree.nested(tree))
    out = make("hsa")(q, k, v, ctx).out
    for h in range(2):
        s = q[0, h] @ k[0, h].T * 5**-0.5 + bias[0, h]
        torch.testing.assert_close(out[0, h], written(s, tree).theta @ v[0, h])
    assert torch.autograd.grad(out.sum() + (out * v).sum(), bias)[0].abs().sum() > 0


# -- cost ------------------------------------------------------------------------------------------
def test_scores_are_those_of_siblings_alone_and_linear_in_the_length():
    random.seed(1)
    tree = Tree.nested(random_tree(list(range(400)), most=9))
    layout = sibling_layout(tree, own=True)
    assert layout.pairs == tree.scores
    assert sibling_layout(tree, own=False).pairs == tree.scores - 400
    flat = Tree.windows(1 << 14, 16)
    # M b (b - 1) and the leaves themselves, for M = (N - 1) / (b - 1) full groups of b.
    families = sum(-(-(1 << 14) // 16**i) for i in range(1, 5))
    assert flat.families == families
    assert flat.scores < families * 16 * 16 + (1 << 14)
    for n in (4096, 10_001, 16384):  # a tile of 32 rows meets three tiles of keys at most
        wide = Tree.windows(n, 16)
        assert sibling_layout(wide, own=True).tile_area <= len(wide) * 3 * 32


def test_levels_of_the_sheet_s_miniature_count_as_it_says():
    tree = Tree.nested([0, *[list(range(1 + 8 * i, 9 + 8 * i)) for i in range(6)]])
    assert tree.scores == 6 * 8 * 8 + 7 * 7 - 6  # one less for each group than b^2: no self
    assert 49 * 49 == 2401


# -- the causal extension --------------------------------------------------------------------------
def column_rows(s: Tensor, tree: list) -> Tensor:
    """theta of the extension, by its text: row by row a softmax over what came before."""
    n = len(s)
    theta = torch.zeros_like(s)

    def path(node, token):
        for i, child in enumerate(node):
            if token in leaves_of(child):
                return [(node, i), *([] if isinstance(child, int) else path(child, token))]
        raise AssertionError

    for row in range(n):
        blocks = [leaves_of(node[j]) for node, at in path(tree, row) for j in range(at)] + [[row]]
        terms = torch.stack(
            [s[row, b].mean() + torch.tensor(float(len(b))).double().log() for b in blocks]
        )
        for weight, block in zip(terms.softmax(0), blocks):
            theta[row, block] = weight / len(block)
    return theta


def test_columns_are_tied_and_causal():
    random.seed(2)
    tree = random_tree(list(range(50)), most=6)
    q, k, v = drawn(50, heads=2)
    out, lse = make("hsa(ties='columns')")(q, k, v, Context(mask=causal(), tree=Tree.nested(tree)))
    for h in range(2):
        s = q[0, h] @ k[0, h].T * 5**-0.5
        torch.testing.assert_close(out[0, h], column_rows(s, tree) @ v[0, h])
    assert lse.isfinite().all()
    flat = columns(q, k, v, Tree.nested(list(range(50))), scale=0.3)
    dense = attention(q, k, v, causal(), scale=0.3, backend="reference")
    torch.testing.assert_close(flat.out, dense.out)
    torch.testing.assert_close(flat.lse, dense.lse)


def test_columns_do_not_see_later_tokens_and_decode_as_they_prefill():
    method, mask = make("hsa(ties='columns', branch=4)"), causal()
    q, k, v = drawn(61, heads=2, batch=2)
    full = method(q, k, v, Context(mask=mask)).out
    short = method(q[:, :, :47], k[:, :, :47], v[:, :, :47], Context(mask=mask)).out
    torch.testing.assert_close(full[:, :, :47], short)
    for start in (60, 58, 3):
        last = method(q[:, :, start:], k, v, Context(mask=mask, phase="decode")).out
        torch.testing.assert_close(last, full[:, :, start:])


def test_columns_with_padding_and_backward():
    method = make("hsa(ties='columns', branch=4)")
    q, k, v = (x.requires_grad_() for x in drawn(30, heads=2, batch=2))
    pads = torch.tensor([0, 9])
    at = torch.arange(30)[None] - pads[:, None]
    mask = causal() & padding(30 - pads)
    out = method(q, k, v, Context(mask=mask, q_positions=at, kv_positions=at)).out
    alone = method(*(x[1:, :, 9:] for x in (q, k, v)), Context(mask=causal())).out
    torch.testing.assert_close(out[1:, :, 9:], alone)
    grads = torch.autograd.grad(out[:, :, 9:].square().sum(), (q, k, v))
    assert all(g.isfinite().all() and g.any() for g in grads)
    assert not grads[1][1, :, :9].any()


# -- refusals --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("spec", "context", "word"),
    [
        ("hsa", {"mask": causal()}, "ties='columns'"),
        ("hsa", {"mask": window(5, 5)}, "'full'"),
        ("hsa(ties='columns')", {}, "causal"),
        ("hsa(ties='columns')", {"mask": causal() & window(4, 0)}, "causal"),
        ("hsa", {"mask": documents([0, 10])}, "there are 12 keys"),
        ("hsa", {"mask": padding([13])}, "only 12 keys"),
        ("hsa", {"softcap": 3.0}, "softcap"),
        ("hsa", {"sink_logits": torch.zeros(2)}, "sink_logits"),
        ("hsa", {"dropout": 0.1}, "dropout"),
        ("hsa", {"bias": torch.zeros(1, 1, 12, 12)}, "bias of keys"),
        ("hsa", {"tree": Tree.windows(11, 3)}, "11 tokens"),
        ("hsa", {"tree": torch.zeros(3)}, "Tree"),
        ("hsa(ties='columns')", {"mask": causal(), "tree": CROSSED}, "before"),
        ("hsa(positions=8)", {"tree": CROSSED}, "places"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(spec, context, word):
    q, k, v = drawn(12, heads=2)
    with pytest.raises(InputError, match=word):
        make(spec)(q, k, v, Context(**context))


def test_other_masks_are_looked_at_without_a_table_of_pairs(monkeypatch):
    """Packed texts are refused, and what sees all is taken, at lengths whose pairs fit nowhere."""
    monkeypatch.setattr(Layout, "dense", lambda *_: pytest.fail("all pairs were written out"))
    q, k, v = (x.float() for x in drawn(30, heads=2, batch=2))
    whole, later = Context(), Context(mask=causal())
    for spec, alike, mask in (
        ("hsa(branch=4)", whole, window(-1, -1)),
        ("hsa(branch=4)", whole, documents([0, 30])),
        ("hsa(branch=4)", whole, causal() | ~causal()),
        ("hsa(branch=4, ties='columns')", later, window(-1, 0)),
        ("hsa(branch=4, ties='columns')", later, causal() & documents([0, 30])),
    ):
        assert torch.equal(
            make(spec)(q, k, v, Context(mask=mask)).out, make(spec)(q, k, v, alike).out
        )
    monkeypatch.setattr("foveate.methods.hsa.method._ROWS", 7)
    for mask in (documents([0, 29, 30]), window(-1, 28), window(-1, -1) & padding([30, 21])):
        good = mask.groups()[0] == 2
        ctx = Context(mask=mask)
        if not good:
            with pytest.raises(InputError, match="'full'"):
                make("hsa(branch=4)")(q, k, v, ctx)
            continue
        want = make("hsa(branch=4)")(q, k, v, Context(mask=padding([30, 21]))).out
        assert torch.equal(make("hsa(branch=4)")(q, k, v, ctx).out, want)
    with pytest.raises(InputError, match="causal"):
        make("hsa(branch=4, ties='columns')")(q, k, v, Context(mask=window(28, 0)))


@pytest.mark.parametrize(
    "spec",
    ["hsa(branch=1)", "hsa(ties='rows')", "hsa(positions=6)", "hsa(ties='columns', own=False)"],
)
def test_hyper_parameters_are_checked(spec):
    with pytest.raises(InputError):
        make(spec)


def test_fewer_queries_than_keys_are_refused():
    q, k, v = drawn(12)
    with pytest.raises(InputError, match="as many queries"):
        make("hsa")(q[:, :, :3], k, v)


def test_a_layer_decodes_with_its_cache_as_it_reads():
    torch.manual_seed(1)
    tied = "hsa(ties='columns', branch=4)"
    layer = Attention(32, 4, projection="gqa(kv_heads=2)", attention=tied)
    x = torch.randn(2, 23, 32)
    full = layer(x, mask=causal()).y
    cache = layer.new_cache()
    parts = [layer(x[:, :9], mask=causal(), cache=cache).y]
    parts += [layer(x[:, i : i + 1], mask=causal(), cache=cache).y for i in range(9, 23)]
    torch.testing.assert_close(torch.cat(parts, 1), full)


@pytest.mark.parametrize(
    "spec", ["hsa(branch=4)", "hsa(branch=4, ties='columns')", "hsa(positions=8)"]
)
def test_an_entry_of_padding_alone_gives_zeros(spec):
    q, k, v = drawn(20, heads=2, batch=2)
    mask = padding(torch.tensor([20, 0]))
    alone = Context(mask=causal()) if "columns" in spec else Context()
    out = make(spec)(q, k, v, Context(mask=causal() & mask if "columns" in spec else mask)).out
    assert not out[1].any()
    torch.testing.assert_close(out[:1], make(spec)(q[:1], k[:1], v[:1], alone).out)


def test_nothing_gives_nothing():
    q, k, v = drawn(20, heads=2, batch=2)
    assert make("hsa")(q[:0], k[:0], v[:0]).out.shape == (0, 2, 20, 5)
    assert make("hsa")(q[:, :, :0], k[:, :, :0], v[:, :, :0]).out.shape == (2, 2, 0, 5)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("spec", "mask"),
    [
        ("hsa(branch=4)", None),
        ("hsa(branch=4, ties='columns')", causal()),
        ("hsa(branch=4, positions=8)", None),
    ],
)
def test_what_inference_mode_kept_of_a_tree_serves_training(spec, mask, given):
    ctx = Context(mask=mask, tree=Tree.windows(39, 4) if given else None)
    q, k, v = (x.float() for x in drawn(39, heads=2, dim=8))
    with torch.inference_mode():
        want = make(spec)(q, k, v, ctx).out.clone()
    q.requires_grad_()
    out = make(spec)(q, k, v, ctx).out
    assert torch.equal(out, want)
    (grad,) = torch.autograd.grad(out.square().sum(), q)
    assert grad.isfinite().all()


def test_a_bias_that_hides_keys_is_refused():
    q, k, v = drawn(16)
    bias = torch.zeros(1, 1, 1, 16, dtype=torch.float64)
    bias[..., 12:] = -torch.inf
    with pytest.raises(InputError, match=r"finite biases.*padding\(lengths\)"):
        make("hsa(branch=4)")(q, k, v, Context(bias=bias))
