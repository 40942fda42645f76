"""Tasks: worked examples, disjoint splits, batches that depend on nothing but their place."""

import pytest
import torch

from foveate.ops.errors import InputError
from foveate.papers.tasks import (
    IGNORED,
    Backcopy,
    ByteText,
    Copying,
    FillerRecall,
    Needle,
    Recall,
    standard_library,
    text_file,
)
from foveate.papers.tasks.backcopy import pairs
from foveate.papers.tasks.base import generator, split_of

TASKS = [
    Backcopy(length=12, symbols=9, held=40),
    Recall(tokens=64, length=32, pairs=4, held=40),
    Copying(string=8, symbols=7, held=40),
    Needle(length=32, needles=2, held=40),
    FillerRecall(length=32, pairs=2, spread=20, chains=0.0, held=40),
    FillerRecall(length=32, pairs=2, spread=20, blended=True, held=40),
    ByteText(bytes(range(256)) * 40, length=16, held=40),
]
GENERATED = TASKS[:5]
IDS = [type(task).__name__ for task in TASKS]


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_a_batch_depends_on_seed_and_number_alone(task):
    once = task.batch(3, 7, 5)
    torch.manual_seed(99)
    again = task.batch(3, 7, 5)
    assert torch.equal(once.inputs, again.inputs)
    assert torch.equal(once.targets, again.targets)
    for other in (task.batch(4, 7, 5), task.batch(3, 8, 5)):
        assert not torch.equal(once.inputs, other.inputs)
    assert once.inputs.dtype == once.targets.dtype == torch.int64
    assert once.inputs.shape == once.targets.shape
    assert 0 <= once.inputs.min() <= once.inputs.max() < task.vocab
    scored = once.targets[once.targets != IGNORED]
    assert len(scored)
    assert 0 <= scored.min() <= scored.max() < task.vocab


@pytest.mark.parametrize("task", TASKS, ids=IDS)
@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_sequences_are_the_same_in_any_batch_size(task, split):
    whole = torch.cat([batch.inputs for batch in task.held_out(split, 100)])
    parts = list(task.held_out(split, 7))
    assert len(whole) == task.held
    assert torch.equal(torch.cat([batch.inputs for batch in parts]), whole)
    assert [len(batch.inputs) for batch in parts] == [7, 7, 7, 7, 7, 5]


@pytest.mark.parametrize("task", GENERATED, ids=IDS[:5])
def test_no_sequence_is_in_two_splits(task):
    train = torch.cat([task.batch(seed, n, 50).inputs for seed in range(3) for n in range(4)])
    assert split_of(train).eq(0).all()
    for wanted, split in ((1, "validation"), (2, "test")):
        for batch in task.held_out(split, 64):
            assert split_of(batch.inputs).eq(wanted).all()


def test_splits_have_their_shares():
    rows = torch.randint(5, (20_000, 12))
    found = split_of(rows)
    for split in (1, 2):
        assert found.eq(split).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(split_of(rows), found)


def test_a_task_with_too_few_sequences_is_refused():
    task = Copying(string=1, symbols=1)  # a single one

    def both():
        task.batch(0, 0, 4)
        list(task.held_out("validation", 4))

    with pytest.raises(InputError, match="too few different sequences"):
        both()


def rows_of(task, count=200):
    return task.draw(count, generator("test"))


def test_recall_by_hand():
    """Each question is a key of the beginning, its target that key's value, nothing else scored."""
    task = Recall(tokens=40, length=24, pairs=3, noise=False)
    inputs, targets = rows_of(task)
    for row, wanted in zip(inputs.tolist(), targets.tolist()):
        told = dict(zip(row[0:6:2], row[1:6:2]))
        assert len(told) == len(set(told.values())) == 3
        assert all(1 <= key < 20 for key in told)
        assert all(20 <= value < 40 for value in told.values())
        assert wanted[:6] == [IGNORED] * 6
        asked = {row[i]: value for i, value in enumerate(wanted) if value != IGNORED}
        assert asked == told
        for i, token in enumerate(row[6:], 6):
            assert (token != 0) == (wanted[i] != IGNORED)
            assert i % 2 == 0 or token == 0


def test_recall_asks_soon_more_than_late():
    """The first slot's share, against Zoology's power law, drawn one by one."""
    task = Recall(tokens=80, length=64, pairs=1, noise=False)
    _, targets = rows_of(task, 8000)
    slots = (targets[:, 2:] != IGNORED).float().mean(0)[0::2]
    expected = torch.arange(1.0, 32) ** -0.99
    expected /= expected.sum()
    torch.testing.assert_close(slots, expected, atol=0.02, rtol=0)


def test_recall_noise_comes_from_the_whole_vocabulary_and_leaves_the_rest():
    quiet = Recall(tokens=40, length=24, pairs=3, noise=False)
    loud = Recall(tokens=40, length=24, pairs=3)
    inputs, targets = rows_of(loud)
    asked = targets != IGNORED
    assert asked.sum(1).eq(3).all()
    noise = inputs[:, 6:][~asked[:, 6:]]
    assert len(noise.unique()) == 40
    assert rows_of(quiet).inputs[:, 6:].ne(0).sum(1).eq(3).all()


def test_copying_by_hand():
    inputs, targets = rows_of(Copying(string=3, symbols=9))
    assert inputs.shape == (200, 6)
    string = inputs[:, :3]
    assert 1 <= string.min() <= string.max() == 9
    assert inputs[:, 3].eq(0).all()
    assert torch.equal(inputs[:, 4:], string[:, :2])
    assert targets[:, :3].eq(IGNORED).all()
    assert torch.equal(targets[:, 3:], string)


def test_needle_by_hand():
    task = Needle(length=30, needles=2, keys=4, values=5, filler=6, outside=7)
    inputs, targets = rows_of(task)
    places = set()
    for row, wanted in zip(inputs.tolist(), targets.tolist()):
        assert row[-2] == 0
        told = {}
        marks = [i for i, token in enumerate(row[:-2]) if token == 0]
        for at in marks:
            assert 1 <= row[at + 1] <= 4
            assert 5 <= row[at + 2] <= 9
            told[row[at + 1]] = row[at + 2]
        assert len(told) == 2
        assert marks[-1] + 3 <= 30 - 2 - 7
        assert wanted[:-1] == [IGNORED] * 29
        assert wanted[-1] == told[row[-1]]
        assert sum(token >= 10 for token in row) == 30 - 2 - 6
        places |= set(marks)
    assert places == set(range(0, 19))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Recall(tokens=64, length=15, pairs=3), "must be even and hold 3 pairs"),
        (lambda: Recall(tokens=64, length=12, pairs=4), "16 tokens or more"),
        (lambda: Recall(tokens=32, length=32, pairs=4), "must exceed the length, 32"),
        (lambda: Backcopy(symbols=5), "5 symbols are too few; expected 6"),
        (lambda: Backcopy(length=2), "length must be 3 or more, got 2"),
        (lambda: Copying(string=0), "string must be 1 or more, got 0"),
        (lambda: Needle(length=8, needles=3), "length of 11 or more, got 8"),
        (lambda: Needle(needles=9, keys=8), "9 facts need as many keys, there are 8"),
        (lambda: ByteText(b"short", length=16), "give a longer text"),
        (lambda: text_file("nowhere.txt", 16), "there is no such file"),
        (lambda: text_file(".", 16), "is a folder"),
    ],
)
def test_bad_sizes_are_refused(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_bytes_predict_the_next_byte_and_stretches_are_disjoint():
    content = b"".join(i.to_bytes(2, "big") for i in range(1500))  # windows tell where they begin
    task = ByteText(content, length=16, held=1000, offset=3)
    assert task.vocab == 259
    batch = task.batch(0, 0, 64)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    for row, wanted in zip(batch.inputs.tolist(), batch.targets.tolist()):
        text = bytes(token - 3 for token in [*row, wanted[-1]])
        at = content.index(text)
        assert at + 17 <= 2600
    seen = [bytes((b.inputs[i] - 3).tolist()) for b in task.held_out("validation", 4)
            for i in range(len(b.inputs))]  # fmt: skip
    assert b"".join(seen) == content[2600 : 2600 + 16 * len(seen)]
    assert len(seen) == (200 - 1) // 16
    last = list(task.held_out("test", 4))
    assert bytes((last[0].inputs[0] - 3).tolist()) == content[2800:2816]


def test_the_standard_library_as_text():
    task = standard_library(length=32, size=60_000, held=10)
    assert len(task.content) == 60_000
    assert task.vocab == 256
    assert b"import" in task.content
    assert "standard library of Python 3." in task.describe()
    assert "60000 bytes" in task.describe()
    assert standard_library(length=32, size=60_000, held=10).content == task.content
    assert repr(task).count("import") == 0


def test_tests_and_installed_packages_are_no_part_of_the_library():
    import sysconfig
    from pathlib import Path

    from foveate.papers.tasks.text import _sources

    root = Path(sysconfig.get_path("stdlib"))
    found = _sources(root)
    assert found == sorted(found)
    assert {"abc.py", "json/decoder.py"} <= set(found)
    folders = {part for path in found for part in path.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "__pycache__"}
    assert not any(path.startswith("_sysconfigdata") for path in found)
    first = (root / found[0]).read_bytes()
    assert standard_library(size=60_000).content.startswith(first)


def test_a_file_as_text(tmp_path):
    (tmp_path / "text.txt").write_text("Grüße. " * 300, encoding="utf-8")
    task = text_file(tmp_path / "text.txt", 16, offset=3)
    inputs = task.batch(0, 0, 2).inputs[0]
    assert bytes((inputs - 3).tolist()) in task.content
    assert task.describe().startswith("file text.txt, ")


@pytest.mark.parametrize("blended", [False, True])
def test_filler_recall_tells_its_pairs_once_and_asks_for_all(blended):
    task = FillerRecall(length=40, pairs=3, spread=24, blended=blended, chains=0.0)
    batch = task.batch(0, 0, 50)
    told = batch.inputs[:, 1:-6]
    for row, targets, body in zip(batch.inputs, batch.targets, told):
        assert row[0] == 0
        asked = row[-6::2]
        assert len(asked.unique()) == 3
        assert targets.ne(IGNORED).nonzero().flatten().tolist() == [34, 36, 38]
        for key, value, target in zip(asked, row[-5::2], targets[-6::2]):
            assert value == target
            at = (body == key).nonzero().flatten().tolist()
            assert len(at) == 1
            assert at[0] < 24
            assert at[0] % 2 == 0
            assert body[at[0] + 1] == value
    kinds = [set(batch.inputs[:, -6::2].flatten().tolist()), set(told.flatten().tolist())]
    assert (max(kinds[0]) > 11) is blended


def test_filler_recall_trains_on_chains_too_but_never_tests_on_them():
    task = FillerRecall(held=40)
    batch = task.batch(0, 0, 32)
    assert (batch.targets != IGNORED).sum(1).tolist() == [4] * 24 + [64] * 8
    chain = batch.inputs[24:]
    assert torch.equal(batch.targets[24:, :-1], chain[:, 1:])
    assert all(len(row.unique()) <= 6 for row in chain)
    for split in ("validation", "test"):
        for held in task.held_out(split, 40):
            assert (held.targets != IGNORED).sum(1).eq(4).all()


@pytest.mark.parametrize(
    ("sizes", "said"),
    [({"pairs": 11}, "slots as pairs"), ({"length": 40}, "length of 45"),
     ({"chains": 1.0}, "share below 1")],
)  # fmt: skip
def test_filler_recall_refuses_sizes_that_do_not_fit(sizes, said):
    with pytest.raises(InputError, match=said):
        FillerRecall(**sizes)


def test_after_a_trigger_comes_what_was_before_it_and_else_a_pair_of_the_table():
    task = Backcopy(length=60, symbols=12, triggers=2, held=400)
    inputs, targets = rows_of(task)
    assert (inputs[:, 0] == 0).all()
    assert (targets > 0).all()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])  # all is scored
    copied = task.is_trigger(inputs)
    assert 0.05 < copied.float().mean() < 0.5
    assert not copied[:, :2].any()
    assert torch.equal(targets[:, 2:][copied[:, 2:]], inputs[:, 1:-1][copied[:, 2:]])
    table, counts = pairs(12), torch.zeros(12, 12)
    plain = ~copied & (inputs > 0)
    counts.index_put_((inputs[plain], targets[plain]), torch.ones(1), accumulate=True)
    rows = counts.sum(1) > 500
    assert rows.sum() > 3
    torch.testing.assert_close(
        (counts / counts.sum(1, keepdim=True))[rows], table[rows], atol=0.06, rtol=0
    )
