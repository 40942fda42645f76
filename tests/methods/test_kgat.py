"""KGAT's graph, attention, propagation and TransR against dense formulas and worked figures."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from foveate.methods.kgat import (
    KGAT,
    Aggregator,
    Graph,
    collaborative,
    corrupt,
    edge_attention,
    segment_softmax,
    translate,
)
from foveate.ops.errors import InputError

N, R, D, K = 12, 3, 6, 5


def distinct_pairs(edges: int = 40) -> Graph:
    """A graph without parallel edges; nodes 10 and 11 have none at all."""
    pairs = torch.randperm(100)[:edges]
    triples = torch.stack((pairs // 10, torch.randint(R, (edges,)), pairs % 10), 1)
    return Graph(triples, N, R)


def parallel() -> Graph:
    """A graph with parallel edges and loops."""
    return Graph(torch.stack([torch.randint(n, (60,)) for n in (5, R, 5)], 1), N, R)


def vectors(dtype=torch.float64):
    return (
        torch.randn(N, D, dtype=dtype), torch.randn(R, K, dtype=dtype),
        torch.randn(R, D, K, dtype=dtype),
    )  # fmt: skip


def logit(e, e_r, w, h, r, t):
    """The paper's pi before its softmax, one triple."""
    return (e[t] @ w[r]) @ torch.tanh(e[h] @ w[r] + e_r[r])


def dense_attention(graph, e, e_r, w):
    """A (N, N) triple by triple in Python, each head normalised over all of its triples."""
    e, e_r, w = (x.detach() for x in (e, e_r, w))
    made = torch.zeros(N, N, dtype=e.dtype)
    for node in range(N):
        mine = [
            (h, r, t) for h, r, t in zip(*(x.tolist() for x in (graph.head, graph.relation,
                                                                graph.tail))) if h == node
        ]  # fmt: skip
        exps = [math.exp(float(logit(e, e_r, w, *triple))) for triple in mine]
        for (_, _, t), x in zip(mine, exps):
            made[node, t] += x / sum(exps)
    return made


def matrix(adjacency):
    """The sparse matrix, by multiplying it."""
    return adjacency @ torch.eye(adjacency.shape[1], dtype=adjacency.weight.dtype)


def test_oracle_1_segment_softmax_is_dense_masked_softmax():
    graph, (e, e_r, w) = distinct_pairs(), vectors()
    scores = torch.full((N, N), -torch.inf, dtype=torch.float64)
    for h, r, t in zip(graph.head, graph.relation, graph.tail):
        scores[h, t] = logit(e, e_r, w, h, r, t)
    dense = torch.softmax(scores, 1).nan_to_num(0.0)
    found = matrix(graph.adjacency(edge_attention(e, e_r, w, graph, chunk=7)))
    torch.testing.assert_close(found, dense, atol=1e-6, rtol=0)
    sums = found.sum(1)
    busy = graph.head.bincount(minlength=N) > 0
    torch.testing.assert_close(sums[busy], torch.ones_like(sums[busy]), atol=1e-6, rtol=0)
    assert not busy[10:].any()
    x = torch.randn(N, 4, dtype=torch.float64)
    assert torch.equal((graph.adjacency(edge_attention(e, e_r, w, graph)) @ x)[10:],
                       torch.zeros(2, 4, dtype=torch.float64))  # fmt: skip


def test_oracle_1_segment_softmax_stays_finite_and_differentiable():
    logits = torch.tensor([800.0, 801.0, -900.0], dtype=torch.float64, requires_grad=True)
    segment = torch.tensor([2, 2, 0])
    found = segment_softmax(logits, segment, 4)
    torch.testing.assert_close(found[:2], torch.softmax(logits[:2], 0))
    assert found[2] == 1
    assert torch.autograd.gradcheck(lambda x: segment_softmax(x, segment, 4), logits)


def test_oracle_2_parallel_edges_compete_as_triples_and_then_add_up():
    graph = Graph(torch.tensor([[0, 0, 1], [0, 1, 1], [0, 0, 2]]), 3, 2)
    weight = segment_softmax(torch.zeros(3), graph.head, 3)  # a = b = c = 0
    found = matrix(graph.adjacency(weight))[0]
    torch.testing.assert_close(found, torch.tensor([0.0, 2 / 3, 1 / 3]))
    logits = {(1, 0): 0.3, (1, 1): -1.2, (2, 0): 0.9}
    given = torch.tensor([logits[t, r] for t, r in zip(graph.tail.tolist(),
                                                       graph.relation.tolist())])  # fmt: skip
    found = matrix(graph.adjacency(segment_softmax(given, graph.head, 3)))[0]
    a, b, c = (math.exp(x) for x in logits.values())
    torch.testing.assert_close(found, torch.tensor([0.0, a + b, c]) / (a + b + c))
    graph, (e, e_r, w) = parallel(), vectors()
    assert len(graph) > len((graph.head * N + graph.tail).unique())  # some are parallel
    found = matrix(graph.adjacency(edge_attention(e, e_r, w, graph, chunk=11)))
    torch.testing.assert_close(found, dense_attention(graph, e, e_r, w), atol=1e-9, rtol=0)


@pytest.mark.parametrize("how", ["no projection", "equal tails"])
def test_oracle_3_equal_tails_are_weighted_equally(how):
    graph, (e, e_r, w) = parallel(), vectors()
    if how == "no projection":
        w = torch.zeros_like(w)
    else:
        e, w, e_r = e[:1].expand(N, D), w[:1].expand(R, D, K), e_r[:1].expand(R, K)
    found = edge_attention(e, e_r, w, graph)
    torch.testing.assert_close(found, 1.0 / graph.head.bincount(minlength=N)[graph.head].double())
    torch.testing.assert_close(found, graph.equal_weights().double(), atol=1e-7, rtol=1e-6)


def test_oracle_4_aggregators():
    x, n = torch.randn(2, N, D, dtype=torch.float64)
    sage = Aggregator("graphsage", D, D, activation=lambda y: y).double()
    sage.first.weight.data = torch.cat((torch.eye(D), torch.zeros(D, D)), 1).double()
    assert torch.equal(sage(x, n), x)
    both, gcn = Aggregator("bi-interaction", D, 4).double(), Aggregator("gcn", D, 4).double()
    both.second.weight.data.zero_()
    gcn.load_state_dict({k: v for k, v in both.state_dict().items() if k.startswith("first")})
    assert torch.equal(both(x, n), gcn(x, n))
    plain = Aggregator("gcn", D, D, activation=lambda y: y).double()
    plain.first.weight.data = torch.eye(D).double()
    assert torch.equal(plain(x, torch.zeros_like(n)), x)
    both = Aggregator("bi-interaction", D, 4).double()
    (w1, w2), (b1, b2) = ([getattr(m, p) for m in (both.first, both.second)]
                          for p in ("weight", "bias"))  # fmt: skip
    b1.data.normal_(), b2.data.normal_()

    def leaky(y):
        return torch.where(y > 0, y, 0.2 * y)

    expected = leaky((x + n) @ w1.T + b1) + leaky((x * n) @ w2.T + b2)
    torch.testing.assert_close(both(x, n), expected)


def network(graph, aggregator="bi-interaction", **more):
    made = KGAT(D, K, (5, 4, 3), aggregator, **more).build(graph.nodes, graph.relations)
    return made.double().eval()


def by_hand(model, a):
    """e* from a dense A."""
    x, parts = model.nodes, [model.nodes]
    for layer in model.aggregators:
        x = layer(x, a @ x)
        parts.append(x / x.norm(dim=1, keepdim=True).clamp(min=1e-12))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("aggregator", ["bi-interaction", "gcn", "graphsage"])
def test_propagation_and_its_gradients_are_those_of_the_dense_matrix(aggregator):
    graph = parallel()
    model = network(graph, aggregator)
    a = graph.adjacency(model.weights(graph))
    found, expected = model(a), by_hand(model, dense_attention(graph, model.nodes,
                                        model.relations, model.projections))  # fmt: skip
    assert found.shape == (N, D + 5 + 4 + 3)
    torch.testing.assert_close(found, expected)
    weight, used = torch.randn_like(found), [model.nodes, *model.aggregators.parameters()]
    for one, two in zip(torch.autograd.grad((found * weight).sum(), used, retain_graph=True),
                        torch.autograd.grad((expected * weight).sum(), used)):  # fmt: skip
        torch.testing.assert_close(one, two)


def test_a_batch_reads_only_its_field_and_gives_the_same():
    chain = torch.stack((torch.arange(11), torch.zeros(11, dtype=torch.long), torch.arange(1, 12)))
    for graph in (parallel(), Graph(chain.T.contiguous(), N, R)):
        model = network(graph)
        a = graph.adjacency(model.weights(graph))
        wanted = torch.tensor([7, 2, 2, 0, 11])
        part, whole = model(a, wanted), model(a)[wanted]
        torch.testing.assert_close(part, whole)
        weight = torch.randn_like(part)
        one, two = (
            torch.autograd.grad((x * weight).sum(), [*model.parameters()], allow_unused=True)
            for x in (part, whole)
        )
        for x, y in zip(one, two):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y)
    model.nodes.data[5:] = torch.nan  # three layers from node 0 reach nodes 1, 2 and 3
    assert model(a, torch.tensor([0])).isfinite().all()
    sub, needed = a.rows(torch.tensor([0, 4]))
    assert needed.tolist() == [0, 1, 4, 5]
    assert sub.shape == (2, 4)


def test_no_vector_is_kept_for_each_edge():
    triples = torch.cartesian_prod(torch.arange(12), torch.arange(R), torch.arange(12))
    graph = Graph(triples, N, R)
    model = network(graph)
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(graph.adjacency(model.weights(graph))).sum().backward()
    assert kept
    assert max(kept) <= N * (2 * D) < len(graph) < len(graph) * D


def test_oracle_5_relabelled_nodes_give_relabelled_vectors():
    graph = parallel()
    model = network(graph)
    to = torch.randperm(N)
    moved = Graph(torch.stack((to[graph.head], graph.relation, to[graph.tail]), 1), N, R)
    other = network(graph)
    other.load_state_dict(model.state_dict())
    other.nodes.data[to] = model.nodes.data
    found = other(moved.adjacency(other.weights(moved)))[to]
    torch.testing.assert_close(found, model(graph.adjacency(model.weights(graph))),
                               atol=1e-6, rtol=0)  # fmt: skip


def test_oracle_5_other_components_have_no_influence():
    one = torch.stack([torch.randint(n, (30,)) for n in (6, R, 6)], 1)
    two = torch.stack([torch.randint(n, (30,)) for n in (6, R, 6)], 1) + torch.tensor([6, 0, 6])
    graph = Graph(torch.cat((one, two)), N, R)
    model = network(graph)
    before = model(graph.adjacency(model.weights(graph)))[:6].clone()
    model.nodes.data[6:] = torch.randn(6, D).double() * 5
    after = model(graph.adjacency(model.weights(graph)))[:6]
    assert torch.equal(before, after)


def test_oracle_6_transr():
    e, e_r, w = vectors()
    triples, corrupted = torch.tensor([[0, 1, 2], [3, 0, 4], [5, 1, 0]]), torch.tensor([7, 8, 9])
    e_r[1] = (e[2] - e[0]) @ w[1]
    found = translate(e, e_r, w, triples, corrupted)
    assert float(found.true[0]) < 1e-24
    for i, (h, r, t) in enumerate(triples.tolist()):
        for energy, tail in ((found.true, t), (found.false, int(corrupted[i]))):
            away = e[h] @ w[r] + e_r[r] - e[tail] @ w[r]
            torch.testing.assert_close(energy[i], away @ away, atol=1e-12, rtol=1e-9)
        norms = [float((e[x] @ w[r]).square().sum()) for x in (h, t, int(corrupted[i]))]
        assert float(found.squares[i]) == pytest.approx(sum(norms) + float(e_r[r] @ e_r[r]))
    equal = translate(e, e_r, w, triples, triples[:, 2])
    assert float(equal.loss()) == pytest.approx(math.log(2))
    free = [x.requires_grad_() for x in (e, e_r, w)]
    assert torch.autograd.gradcheck(lambda *x: translate(*x, triples, corrupted).loss(1e-2), free)


def test_false_triples_are_not_in_the_graph():
    graph = parallel()
    triples = torch.stack((graph.head, graph.relation, graph.tail), 1).repeat(20, 1)
    drawn = corrupt(graph, triples, torch.Generator().manual_seed(0))
    held = set(map(tuple, triples.tolist()))
    assert not any((h, r, t) in held for (h, r, _), t in zip(triples.tolist(), drawn.tolist()))
    assert set(drawn.tolist()) == set(range(N))  # of all nodes, users and entities
    full = Graph(torch.tensor([[0, 0, 0], [0, 0, 1]]), 2, 1)
    with pytest.raises(InputError, match="nearly all 2 nodes"):
        corrupt(full, torch.tensor([[0, 0, 1]]), torch.Generator())


def test_oracle_8_attention_carries_no_gradient():
    graph = parallel()
    model = network(graph).train()
    a = graph.adjacency(model.weights(graph))
    e = model(a)
    functional.softplus(-(e[0] * (e[5] - e[6])).sum()).backward()
    assert model.nodes.grad.abs().sum() > 0
    assert model.relations.grad is None
    assert model.projections.grad is None


def test_the_first_weights_are_each_relations_own():
    graph = parallel()
    rows = matrix(graph.adjacency(graph.laplacian())).sum(1)
    kinds = torch.zeros(N, R).index_put((graph.head, graph.relation), torch.tensor(1.0)).sum(1)
    torch.testing.assert_close(rows, kinds)
    known = torch.tensor([[0, 0, 1], [0, 0, 2], [3, 0, 2]])
    graph = collaborative(torch.tensor([[0, 0]]), known, 1, 4, 1)
    both = matrix(graph.adjacency(graph.laplacian("bi")))
    torch.testing.assert_close(both, both.T)
    assert float(both[1, 3]) == pytest.approx(1 / 2)  # 1 / sqrt(2 edges x 2 edges)
    assert float(both[1, 2]) == pytest.approx(1 / math.sqrt(2))
    with pytest.raises(InputError, match="'si' or 'bi'"):
        graph.laplacian("rw")


def test_the_collaborative_graph_has_both_directions_users_first():
    graph = collaborative(torch.tensor([[1, 0], [1, 0]]), torch.tensor([[0, 1, 2]]), 2, 3, 2)
    found = set(zip(graph.head.tolist(), graph.relation.tolist(), graph.tail.tolist()))
    assert found == {(1, 0, 2), (2, 3, 1), (2, 2, 4), (4, 5, 2)}
    assert (graph.nodes, graph.relations) == (5, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    graph = parallel()
    exact = network(graph)
    model = network(graph)
    model.load_state_dict(exact.state_dict())
    model.to(dtype)
    found = model(graph.adjacency(model.weights(graph)))
    assert found.dtype == dtype
    band = 1e-5 if dtype == torch.float32 else 6e-2
    expected = exact(graph.adjacency(exact.weights(graph)))
    torch.testing.assert_close(found.double(), expected, atol=band, rtol=band)
    found.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.aggregators.parameters())


def test_an_empty_graph_and_bad_input():
    graph = Graph(torch.empty(0, 3, dtype=torch.long), N, R)
    model = network(graph)
    assert model(graph.adjacency(model.weights(graph))).isfinite().all()
    for bad, said in (
        (torch.zeros(2, 2, dtype=torch.long), r"\(E, 3\)"), (torch.zeros(2, 3), "float32"),
        (torch.tensor([[0, R, 0]]), "relation is 3"), (torch.tensor([[0, 0, N]]), "tail is 12"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            Graph(bad, N, R)
    with pytest.raises(InputError, match="bi-interaction, gcn, graphsage"):
        KGAT(aggregator="sum")
    with pytest.raises(InputError, match="layers"):
        KGAT(layers=())
    with pytest.raises(InputError, match=r"x \(12, D\)"):
        graph.adjacency(torch.empty(0)) @ torch.zeros(3, 4)
