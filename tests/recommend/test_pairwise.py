"""BPR-MF, FM and KGAT as recommenders: their formulas, their training, their reasons."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from foveate.methods.kgat import KGAT, Graph
from foveate.models.recommender import BPRMF, FM, KGATRecommender, Tables
from foveate.ops.errors import InputError
from foveate.recommend.explain import paths
from foveate.recommend.loop import DivergedError, Plan, train
from foveate.recommend.pairwise import KINDS, Pairwise, Setting

SMALL = KGAT(dim=8, relation_dim=6, layers=(8, 4))
PLAN = Plan(epochs=6, every=2, patience=None, seed=3)


def setting(kind="kgat", **more):
    return Setting(kind, dim=8, lr=0.02, batch=32, triple_batch=64, recipe=SMALL, **more)


def test_factorisation_machine_is_its_sum_over_pairs_of_features(data):
    model = FM(data.users, data.items, data.features(), data.entities, 5).double()
    model.features = replace(model.features, weight=model.features.weight.double())
    torch.nn.init.normal_(model.linear)
    features = {i: [i, data.items + i % 5, data.items + 5 + i // 10] for i in range(data.items)}

    def by_definition(u, i):
        vectors = [model.user[u], *(model.entity[f] for f in features[i])]
        pairs = sum((a @ b) for n, a in enumerate(vectors) for b in vectors[n + 1 :])
        return pairs + sum(model.linear[f, 0] for f in features[i])

    found = model.vectors()
    scores = found.scores(torch.tensor([4, 9]))
    for row, u in enumerate((4, 9)):
        for i in (0, 13, 29):
            torch.testing.assert_close(scores[row, i], by_definition(u, i))
    some = model.vectors(torch.tensor([4, 4]), torch.tensor([13, 0]))
    torch.testing.assert_close(some.items, found.items[[13, 0]])
    torch.testing.assert_close(some.bias, found.bias[[13, 0]])
    pairs = torch.tensor([[4, 13, 0], [9, 0, 29]])
    one = torch.autograd.grad(model.pair_loss(pairs), [*model.parameters()])
    margins = torch.stack([by_definition(u, i) - by_definition(u, j) for u, i, j in pairs.tolist()])
    two = torch.autograd.grad(-margins.sigmoid().log().mean(), [*model.parameters()])
    for a, b in zip(one, two):
        torch.testing.assert_close(a, b)


def test_oracle_6_pair_loss_at_equal_scores_is_ln_2():
    model = BPRMF(3, 4, 5)
    pairs = torch.tensor([[0, 2, 2], [1, 3, 3]])
    assert model.pair_loss(pairs).item() == pytest.approx(math.log(2))
    u, i, j = model.user[0], model.item[2], model.item[1]
    expected = -torch.sigmoid(u @ i - u @ j).log() + 0.3 * (u @ u + i @ i + j @ j) / 2
    torch.testing.assert_close(model.pair_loss(torch.tensor([[0, 2, 1]]), 0.3), expected)


@pytest.mark.parametrize("field", [False, True])
def test_kgat_scores_are_dot_products_of_its_nodes(data, field):
    torch.manual_seed(2)
    model = KGATRecommender(SMALL, data.graph(), data.users, data.items, field).eval()
    model.refresh()
    e = model.network(model.graph.adjacency(model.network.weights(model.graph)))
    assert e.shape == (40 + 38, SMALL.width)
    scores = model.vectors().scores(torch.tensor([7]))
    torch.testing.assert_close(scores[0], e[40:70] @ e[7])
    pairs = torch.tensor([[7, 3, 12], [1, 29, 0]])
    margin = torch.stack([e[u] @ (e[40 + i] - e[40 + j]) for u, i, j in pairs.tolist()])
    squares = sum(e[u] @ e[u] + e[40 + i] @ e[40 + i] + e[40 + j] @ e[40 + j]
                  for u, i, j in pairs.tolist())  # fmt: skip
    expected = -margin.sigmoid().log().mean() + 0.1 * squares / 2 / 2
    torch.testing.assert_close(model.pair_loss(pairs, 0.1), expected)


def test_kgat_starts_from_a_factorisation_and_first_from_the_laplacian(data):
    factors = BPRMF(data.users, data.items, 8)
    trainee = Pairwise(setting(), data, start=factors)
    assert torch.equal(trainee.model.network.nodes[:40], factors.user)
    assert torch.equal(trainee.model.network.nodes[40:70], factors.item)
    first = trainee.model.attention
    torch.testing.assert_close(first, trainee.graph.laplacian())
    trainee.epoch(0, torch.Generator().manual_seed(0))
    sums = first.new_zeros(78).index_add(0, trainee.graph.head, trainee.model.attention)
    torch.testing.assert_close(sums, torch.ones(78))
    with pytest.raises(InputError, match=r"\(40, 8\)"):
        Pairwise(setting(), data, start=BPRMF(40, 30, 4))


def test_an_epoch_alternates_between_two_optimisers(data):
    trainee = Pairwise(setting(), data)
    figures = trainee.epoch(0, torch.Generator().manual_seed(0))
    assert set(figures) == {"pairs", "triples"}
    pairs, triples = trainee.optimizers
    network = trainee.model.network
    steps = {
        name: [int(o.state[p]["step"]) if p in o.state else 0 for o in (pairs, triples)]
        for name, p in network.named_parameters()
    }
    per_epoch = [-(-120 // 32), -(-len(trainee.graph) // 64)]
    assert steps["nodes"] == per_epoch
    assert steps["projections"] == steps["relations"] == [0, per_epoch[1]]
    assert steps["aggregators.0.first.weight"] == [per_epoch[0], 0]
    published = Pairwise(replace(setting(), triple_batch=None), data)  # 120 // 32 steps and a rest
    triples = [t for t, _ in published._triples(torch.Generator().manual_seed(0))]
    assert {len(t) for t in triples[:-1]} == {len(published.graph) // 3}
    assert len(torch.cat(triples).unique(dim=0)) == len(published.graph)
    without = Pairwise(setting(translation=False), data)
    assert set(without.epoch(0, torch.Generator().manual_seed(0))) == {"pairs"}
    alone = Pairwise(setting(knowledge=False), data)
    assert set(alone.graph.relation.tolist()) == {0, 3}


def test_pairs_and_triples_have_a_weight_decay_each(data):
    trainee, seen = Pairwise(setting(decay=0.25, triple_decay=0.5), data), set()
    model = trainee.model
    for name in ("pair_loss", "triple_loss"):
        loss = getattr(model, name)

        def told(*given, loss=loss, name=name):
            seen.add((name, given[-1]))
            return loss(*given)

        setattr(model, name, told)
    trainee.epoch(0, torch.Generator().manual_seed(0))
    assert seen == {("pair_loss", 0.25), ("triple_loss", 0.5)}
    with pytest.raises(InputError, match="triple_decay"):
        setting(triple_decay=-1.0)


def test_draws_are_negatives_and_every_pair_comes_once(data):
    trainee = Pairwise(setting("bpr-mf"), data)
    drawn = torch.cat([*trainee._pairs(torch.Generator().manual_seed(1))])
    assert sorted(map(tuple, drawn[:, :2].tolist())) == sorted(map(tuple, data.train.tolist()))
    held = set(map(tuple, data.train.tolist()))
    assert not any((u, j) in held for u, _, j in drawn.tolist())


def test_figures_by_sparsity_average_to_those_of_all(data):
    some = replace(data, train=data.train[torch.arange(120) % 7 > 0])  # users of 2 or 3 items
    trainee = Pairwise(setting("bpr-mf"), some)
    found = trainee.by_sparsity(5)
    assert [one["most"] for one in found] == [2, 3, 3, 3]
    assert sum(one["users"] for one in found) == 40
    mean = sum(one["users"] * one["ndcg@5"] for one in found) / 40
    assert mean == pytest.approx(trainee.figures("test", (5,))["ndcg@5"])


@pytest.mark.parametrize("kind", KINDS)
def test_they_learn_what_is_to_be_learnt(data, kind):
    trainee = Pairwise(setting(kind), data)
    before = trainee.figures()["recall@20"]
    done = train(trainee, Plan(epochs=40, every=10, patience=None))
    after = trainee.figures("test", (5,))["recall@5"]
    assert done.best_epoch <= done.epochs == 40
    # Of the 26 items that are ranked, chance finds the test item among the first 5 in 5 of 26.
    assert after > (0.9 if kind == "kgat" else 0.6), before


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_was_killed_ends_with_the_same_bits(data, kind, tmp_path):
    def made():
        return Pairwise(setting(kind), data, seed=1)

    whole = made()
    expected = train(whole, PLAN)

    def stop(share, doing):
        if share > 0.6:
            raise KeyboardInterrupt

    path = tmp_path / "training.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(made(), PLAN, path, stop)
    again = made()
    found = train(again, PLAN, path)
    assert found.resumed_at in (2, 4)
    assert (found.best, found.best_epoch, found.epochs) == (
        expected.best, expected.best_epoch, expected.epochs,
    )  # fmt: skip
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert torch.equal(whole.tables().items, again.tables().items)
    finished = made()
    assert train(finished, PLAN, path).resumed_at == 6
    assert torch.equal(finished.tables().items, whole.tables().items)
    with pytest.raises(InputError, match="another training"):
        train(Pairwise(setting(kind), data, seed=2), PLAN, path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged"):
        train(made(), PLAN, path)


def test_it_stops_early_with_the_best_weights_and_when_it_diverges(data):
    trainee = Pairwise(setting("bpr-mf"), data)
    figures = iter([0.3, 0.5, 0.4, 0.2, 0.1])
    kept = []

    def validate():
        kept.append(trainee.model.user.detach().clone())
        return next(figures)

    trainee.validate = validate
    done = train(trainee, Plan(epochs=50, every=1, patience=2))
    assert (done.epochs, done.best_epoch, done.best) == (4, 2, 0.5)
    assert torch.equal(trainee.model.user, kept[1])
    broken = Pairwise(replace(setting("bpr-mf"), lr=1e30), data)
    with pytest.raises(DivergedError, match="lower learning rate"):
        train(broken, PLAN)


def test_a_last_step_that_breaks_the_weights_is_no_best(data):
    trainee = Pairwise(setting("bpr-mf"), data)

    def epoch(number, random):
        trainee.model.user.data[0] = torch.nan
        return {"pairs": 0.5}  # the loss of before the step

    trainee.epoch = epoch
    with pytest.raises(DivergedError, match="A weight is no finite number"):
        train(trainee, Plan(epochs=1))


def test_likes_that_are_not_used_stand_before_nothing(data):
    few = Pairwise(setting("bpr-mf"), data.sparse(1))
    u, i = few.data.unused.T
    assert len(u) == 80
    scores = torch.zeros(40, 30)
    scores[u, i] = 2
    scores[data.test[:, 0], data.test[:, 1]] = 1
    few.tables = lambda: replaced(scores)
    for part, at in (("test", 1.0), ("validation", 0.0)):
        assert few.figures(part, (1,))["recall@1"] == at
    assert few.by_sparsity(1)[0]["recall@1"] == 1
    assert few.data.digest() != data.sparse(2).digest()


def replaced(scores):
    """Tables with these scores."""
    users = len(scores)
    return Tables(torch.eye(users), scores.T.contiguous(), torch.zeros(scores.shape[1]))


def every_path(graph, attention, start, end, steps):
    """All paths by trying every chain of triples."""
    triples = [*zip(graph.head.tolist(), graph.relation.tolist(), graph.tail.tolist())]
    found = []
    for n in range(1, steps + 1):
        for chain in product(range(len(triples)), repeat=n):
            taken = [triples[e] for e in chain]
            joined = all(a[2] == b[0] for a, b in zip(taken, taken[1:]))
            nodes = [taken[0][0], *(t[2] for t in taken)]
            if not joined or nodes[0] != start or nodes[-1] != end:
                continue
            if start in nodes[1:] or end in nodes[:-1]:
                continue
            weight = math.prod(float(attention[e]) for e in chain)
            found.append((tuple(nodes), tuple(t[1] for t in taken), weight))
    return sorted(found, key=lambda one: -one[2])


def test_paths_are_the_heaviest_of_all():
    graph = Graph(torch.stack([torch.randint(n, (28,)) for n in (6, 2, 6)], 1), 6, 2)
    attention = torch.rand(len(graph))
    expected = every_path(graph, attention, 0, 4, 3)
    found = paths(graph, attention, 0, 4, 3, most=len(expected) + 5)
    assert len(found) == len(expected) > 5
    for one, (nodes, relations, weight) in zip(found, expected):
        assert one.weight == pytest.approx(weight)
        assert (one.nodes, one.relations) == (nodes, relations)
    assert [p.weight for p in paths(graph, attention, 0, 4, 3, most=3)] == [
        p.weight for p in found[:3]
    ]
    few = paths(graph, attention, 0, 4, 3, beam=8)  # not all, but real ones
    assert {(p.nodes, p.relations) for p in few} <= {(p.nodes, p.relations) for p in found}
    with pytest.raises(InputError, match="nodes 0 ... 5"):
        paths(graph, attention, 0, 6)


def test_paths_add_up_to_the_power_of_the_matrix():
    layers = [torch.cartesian_prod(torch.arange(3) + 3 * n, torch.arange(2), torch.arange(3)
                                   + 3 * n + 3) for n in range(3)]  # fmt: skip
    graph = Graph(torch.cat(layers), 12, 2)
    attention = torch.rand(len(graph), dtype=torch.float64)
    found = paths(graph, attention, 1, 11, 3, most=10_000)
    dense = graph.adjacency(attention) @ torch.eye(12, dtype=torch.float64)
    expected = (dense @ dense @ dense)[1, 11]
    assert sum(p.weight for p in found) == pytest.approx(float(expected))
