"""The miniatures of biformer and ulsam: their tasks, their arms, all paths."""

from __future__ import annotations

import pytest
import torch

from foveate import Context, papers
from foveate.ops.errors import InputError
from foveate.papers import biformer, ulsam
from foveate.papers.harness import Trial
from foveate.papers.tasks.base import split_of
from foveate.papers.tasks.digits import Digits, Textures, digits
from foveate.papers.tasks.regions import MatchingRegions, partners


def cell(key, name, **more):
    made = papers.load(key)
    torch.manual_seed(0)
    found = made.run(Trial(name, 0, quick=True, tuned=made.grid.points[0], **more))
    assert set(found) <= {*made.baseline, *made.ours}
    return made, found[name]


def test_digits_are_the_real_ones():
    found = digits()
    assert found.pixels.shape == (1797, 8, 8)
    assert found.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert float(found.pixels.max()) == 1
    task = Digits(16)
    held = {split: torch.cat([b.inputs for b in task.held_out(split, 64)])
            for split in ("validation", "test")}  # fmt: skip
    assert [len(x) for x in held.values()] == [100, 697]
    assert held["test"].shape[1:] == (1, 16, 16)
    epoch = [Digits(16, shift=0).batch(5, n, 100) for n in range(10)]
    counts = torch.cat([b.targets for b in epoch] + [b.targets for s in held for b in
                       task.held_out(s, 64)]).flatten().bincount()  # fmt: skip
    assert torch.equal(counts, found.labels.bincount())  # an epoch takes each image once
    with pytest.raises(InputError, match="multiple of 8"):
        Digits(20)


def test_digits_are_shifted_and_drawn_by_seed_and_number_alone():
    task, still = Digits(16, shift=2), Digits(16, shift=0)
    one, two = task.batch(3, 7, 20), still.batch(3, 7, 20)
    torch.manual_seed(9)
    assert torch.equal(one.inputs, task.batch(3, 7, 20).inputs)
    assert torch.equal(one.targets, two.targets)
    wide = torch.nn.functional.pad(two.inputs, (2, 2, 2, 2))
    moved = set()
    for image, full in zip(one.inputs, wide):
        at = [
            (y, x) for y in range(5) for x in range(5)
            if torch.equal(full[:, y : y + 16, x : x + 16], image)
        ]  # fmt: skip
        assert at
        moved.add(at[0])
    assert len(moved) > 5
    assert not torch.equal(task.batch(4, 7, 20).targets, one.targets)


def test_textures_lie_where_the_class_says():
    task = Textures(noise=0.0, held=200)
    drawn = task.draw(200, torch.Generator().manual_seed(0))
    corners = [(slice(0, 8), slice(0, 8)), (slice(0, 8), slice(8, 16)),
               (slice(8, 16), slice(8, 16)), (slice(8, 16), slice(0, 8))]  # fmt: skip
    for image, label in zip(drawn.inputs[:, 0], drawn.targets[:, 0].tolist()):
        power = [float(image[c].square().sum()) for c in corners]
        coarse, fine = label // 2, (label // 2 + 1 + label % 2) % 4
        assert {i for i, p in enumerate(power) if p > 0} == {coarse, fine}
        rough = [float(image[corners[i]].diff(dim=d).square().sum()) / power[i]
                 for i in (coarse, fine) for d in (0, 1)]  # fmt: skip
        assert sum(rough[:2]) < sum(rough[2:])
    assert drawn.targets.unique().tolist() == list(range(8))


def test_matching_regions_by_hand():
    task = MatchingRegions(held=40)
    batch = task.batch(0, 0, 50)
    for row, target in zip(batch.inputs.view(-1, 8, 8), batch.targets.view(-1, 8, 8)):
        boxes = {
            (i, j): row[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] for i in range(4) for j in range(4)
        }
        keys = {at: (box // 8).unique().tolist() for at, box in boxes.items()}
        assert all(len(found) == 1 for found in keys.values())
        for (i, j), (key,) in keys.items():
            (other,) = [at for at, found in keys.items() if found == [key] and at != (i, j)]
            want = boxes[other] % 8
            assert torch.equal(target[2 * i : 2 * i + 2, 2 * j : 2 * j + 2], want)
            told = partners(row.reshape(1, 64))[0, 4 * i + j]
            assert int(told) == 4 * other[0] + other[1]
    assert (split_of(batch.inputs) == 0).all()


def test_fixed_patterns_see_their_own_region_and_as_many_others():
    q = torch.randn(2, 2, 64, 8)
    for arm, others in biformer.FIXED.items():
        method = biformer.attention(arm, 3)
        table = method.choose(q, q, Context(grid=(8, 8), layer=1))
        assert table.shape == (1, 16, others + 1)
        assert torch.equal(table[0, :, 0], torch.arange(16))
        assert all(len(set(row)) == others + 1 for row in table[0].tolist())
        layout = method.layout(q, q, q, Context(grid=(8, 8), layer=1))
        assert layout.pairs == 64 * 4 * (others + 1)
        if others:
            other = method.choose(q, q, Context(grid=(8, 8), layer=0))
            assert not torch.equal(other, table)


def test_arms_on_digits_are_of_equal_size_and_dense_is_dense():
    made, ours = cell("biformer", "BiFormer, digits")
    _, dense = cell("biformer", "dense, digits")
    assert ours["parameters"] == dense["parameters"]
    found = {"BiFormer, digits": ours, "dense, digits": dense}
    exact = [check for check in made.checks if check.exact]
    assert len(exact) == 2
    assert all(check.verdict([found]).value == "holds" for check in exact)


@pytest.mark.parametrize("name", ["dense", "BRA k=2", "own and 3 random"])
def test_matching_cells_run(name, tmp_path):
    _, found = cell("biformer", name, folder=tmp_path)
    assert 0 <= found["accuracy"] <= 1
    assert ("partner is seen" in found) is (name == "BRA k=2")


def test_partners_are_found_where_keys_alone_decide():
    """One-hot keys as queries and keys: a region and its partner suit it best, or worst."""
    task = MatchingRegions(held=16)
    model = biformer.Model(biformer.attention("BRA k=2", 0))
    with torch.no_grad():
        model.key.weight.copy_(torch.eye(16, 64))
        for name in ("payload", "place"):
            getattr(model, name).weight.zero_()
        for layer in model.layers:
            layer.feedforward[2].weight.zero_()
            layer.feedforward[2].bias.zero_()
            layer.attention.projection.out.weight.zero_()
            layer.attention.projection.out.bias.zero_()
            for part in (layer.attention.projection.q, layer.attention.projection.k):
                torch.nn.init.eye_(part.weight)
                part.bias.zero_()
        assert biformer.partner_share(model, task) == 1.0
        for layer in model.layers:
            layer.attention.projection.k.weight.neg_()
        assert biformer.partner_share(model, task) == 0.0


def test_ulsam_counts():
    made = papers.load("ulsam")
    found = {}
    for arm in ulsam.ARMS:
        model = ulsam.network(arm, 10)
        found[arm] = {
            "weights": float(sum(p.numel() for p in model.parameters() if p.dim() > 1)),
            "macs": float(ulsam.macs(model, (1, 1, 16, 16)).total),
        }
    exact = [check for check in made.checks if check.exact]
    assert len(exact) == 6
    assert all(check.verdict([found]).value == "holds" for check in exact)
    assert found["block deleted"]["weights"] == found["MobileNet"]["weights"] - ulsam.BLOCK


@pytest.mark.parametrize("name", ["MobileNet", "ULSAM g=4", "block deleted, textures"])
def test_ulsam_cells_run(name, tmp_path):
    _, found = cell("ulsam", name, folder=tmp_path)
    assert 0 <= found["accuracy"] <= 1
    assert found["validation"] > 0


def test_ulsams_groups_are_chosen_by_validation():
    at = {f"ULSAM g={g}": {"validation": v, "accuracy": a}
          for g, v, a in ((1, 0.3, 0.99), (4, 0.2, 0.9), (8, 0.4, 0.95))}  # fmt: skip
    assert ulsam.ours(at) == 0.9
