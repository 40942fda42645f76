"""Visited tiles against brute force and the spec's counts; search; Amdahl; the command."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest
import torch

from foveate import neighborhood
from foveate.cli import main
from foveate.cost.command import preset_rows
from foveate.cost.search import BLACKWELL, HOPPER, search
from foveate.cost.tiles import end_to_end, simulate
from foveate.ops.errors import InputError

HUNYUAN = (30, 48, 80)


def tile_ids(mask, tile):
    """Which tile each token lies in, counted residue by residue and tile by tile."""
    ids = torch.zeros(1, dtype=torch.int64)
    for axis, size in zip(mask.axes, tile):
        names: dict[tuple[int, int], int] = {}
        for g in range(axis.dilation):
            for place in range(len(range(g, axis.length, axis.dilation))):
                names.setdefault((g, place // size), len(names))
        own = [names[i % axis.dilation, i // axis.dilation // size] for i in range(axis.length)]
        ids = (ids[:, None] * len(names) + torch.tensor(own)).flatten()
    return ids


def brute(mask, q_tile, kv_tile):
    """Key tiles that each query tile touches, from the dense mask."""
    n = mask.tokens
    q, k = tile_ids(mask, q_tile), tile_ids(mask, kv_tile)
    hit = torch.zeros(int(q.max()) + 1, int(k.max()) + 1, dtype=torch.bool)
    a, b = mask.dense(n, n)[0, 0].nonzero(as_tuple=True)
    hit[q[a], k[b]] = True
    return hit


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_counts_by_brute_force(rank):
    from neighbors import random_setting

    draw = random.Random(rank)
    for seed in range(25):
        mask = neighborhood(*random_setting(rank, 500 + seed, most=300))
        q_tile, kv_tile = (tuple(draw.randint(1, 6) for _ in range(rank)) for _ in range(2))
        hit = brute(mask, q_tile, kv_tile)
        got = simulate(mask, q_tile, kv_tile)
        assert got.worst == hit.sum(1).max(), (mask, q_tile, kv_tile)
        assert got.mean == pytest.approx(hit.sum(1).double().mean().item())
        back = simulate(mask, q_tile, kv_tile, backward=True)
        assert back.worst == hit.sum(0).max(), (mask, q_tile, kv_tile)
        assert back.mean == pytest.approx(hit.sum(0).double().mean().item())


@pytest.mark.parametrize("seed", range(20))
def test_dynamic_tiles_begin_at_the_first_window(seed):
    draw = random.Random(seed)
    n, k = draw.randint(8, 60), draw.randint(2, 8)
    s, q_tile, kv_tile = draw.randint(1, k), draw.randint(1, 9), draw.randint(1, 9)
    seen = neighborhood(n, k, s).dense(n, n)[0, 0]
    counts = []
    for first in range(0, n, q_tile):
        keys = seen[first : first + q_tile].any(0).nonzero()[:, 0]
        counts.append(-(-(int(keys[-1]) - int(keys[0]) + 1) // kv_tile))
    got = simulate(neighborhood(n, k, s), (q_tile,), (kv_tile,), dynamic=True)
    assert got.worst == max(counts)
    assert got.mean == pytest.approx(sum(counts) / len(counts))


@pytest.mark.parametrize(
    ("stride", "worst", "ratio"),
    [
        ((1, 1, 1), 275, 3.27), ((2, 1, 1), 250, 3.60), ((1, 1, 8), 165, 5.45),
        ((2, 1, 8), 150, 6.00), ((1, 8, 8), 99, 9.09), ((2, 8, 8), 90, 10.0),
        ((16, 8, 8), 81, 11.11), ((18, 24, 24), 135, 6.67),
    ],
)  # fmt: skip
def test_hunyuan_91(stride, worst, ratio):
    got = simulate(neighborhood(HUNYUAN, (18, 24, 24), stride), (4, 8, 8), (2, 8, 8))
    assert (got.total, got.worst) == (900, worst)
    assert got.parallel == pytest.approx(ratio, abs=5e-3)
    assert got.optimal == (stride == (16, 8, 8))
    assert got.flops == pytest.approx(11.11, abs=5e-3)


@pytest.mark.parametrize(
    ("stride", "worst", "ratio"),
    [((1, 1, 1), 630, 1.43), ((1, 1, 8), 450, 2.0), ((1, 32, 8), 375, 2.4)],
)
def test_hunyuan_58(stride, worst, ratio):
    got = simulate(neighborhood(HUNYUAN, (30, 40, 40), stride), (4, 8, 8), (2, 8, 8))
    assert (got.total, got.worst) == (900, worst)
    assert got.parallel == pytest.approx(ratio, abs=5e-3)


def test_the_block_row_of_hunyuan_58_depends_on_tiles_that_the_paper_does_not_name():
    mask = neighborhood(HUNYUAN, (30, 40, 40), (30, 40, 40))
    found = [
        end_to_end(simulate(mask, q_tile, (2, 8, 8)).parallel, 0.607)
        for q_tile in ((4, 8, 8), (2, 16, 8))
    ]
    assert [round(x, 2) for x in found] == [1.55, 1.44]


@pytest.mark.parametrize(
    ("stride", "worst", "ratio"),
    [((1, 1), 84, 6.10), ((16, 1), 60, 8.53), ((1, 16), 70, 7.31), ((16, 16), 50, 10.24)],
)
def test_flux(stride, worst, ratio):
    got = simulate(neighborhood((256, 256), (80, 80), stride), (16, 16), (16, 8))
    assert (got.total, got.worst) == (512, worst)
    assert got.parallel == pytest.approx(ratio, abs=5e-3)
    assert got.optimal == (stride == (16, 16))


@pytest.mark.parametrize(
    ("window", "ratios"),
    [((16, 32, 48), (1.75, 1.96, 2.04, 2.29)), ((16, 24, 16), (5.24, 6.11, 7.86, 9.17))],
)
def test_cosmos(window, ratios):
    for stride, ratio in zip(((1, 1, 1), (1, 8, 1), (1, 1, 16), (1, 8, 16)), ratios):
        got = simulate(neighborhood((16, 44, 80), window, stride), (8, 4, 8), (4, 4, 8))
        assert got.parallel == pytest.approx(ratio, abs=2e-2)


@pytest.mark.parametrize(
    ("q_tile", "stride", "worst", "ratio"),
    [(128, 1, 17, 15.06), (128, 256, 16, 16.0), (256, 1, 18, 14.22), (256, 128, 18, 14.22),
     (256, 256, 16, 16.0)],
)  # fmt: skip
def test_one_axis(q_tile, stride, worst, ratio):
    got = simulate(neighborhood(32768, 2048, stride), (q_tile,), (128,))
    assert got.worst == worst
    assert got.parallel == pytest.approx(ratio, abs=5e-3)


def test_amdahl_rows():
    expected = {"hunyuan": [1.73, 1.78, 1.98, 2.02, 2.18, 2.20, 2.23, 2.07],
                "flux": [1.76, 1.84, 1.81, 1.88]}  # fmt: skip
    for name, wanted in expected.items():
        rows = [r for r in preset_rows(name) if r["window"] in ("18x24x24", "80x80")]
        assert [r["end_to_end"] for r in rows] == pytest.approx(wanted, abs=1e-2)


@pytest.mark.parametrize(("name", "band"), [("hunyuan", 0.01), ("flux", 0.01), ("cosmos", 0.02)])
def test_presets_are_the_papers_simulated_figures(name, band):
    """To the two digits that the paper prints."""
    compared = 0
    for row in preset_rows(name):
        if row["paper"] is not None:
            assert abs(round(row["end_to_end"], 2) - row["paper"]) <= band + 1e-9, row
            compared += 1
    assert compared >= 4


@pytest.mark.parametrize(
    ("name", "window", "late"),
    [("cosmos", "16x32x48", 1.28), ("flux", "80x80", 1.46)],
)
def test_dense_early_steps(name, window, late):
    row = [r for r in preset_rows(name) if r["window"] == window][-1]
    assert row["end_to_end_late"] == pytest.approx(late, abs=1.5e-2)


def test_amdahl_itself():
    assert end_to_end(2.0, 0.5) == pytest.approx(4 / 3)
    assert end_to_end(2.0, 1.0, 10, 4) == pytest.approx(10 / 7)
    assert end_to_end(5.0, 0.0) == 1
    with pytest.raises(InputError, match="0 to 1"):
        end_to_end(2.0, 1.5)
    with pytest.raises(InputError, match="dense_steps"):
        end_to_end(2.0, 0.5, 4, 5)


def by_brute_search(shape, window, q_tile, kv_tile):
    good = []
    for stride in itertools.product(*(range(1, k + 1) for k in window)):
        got = simulate(neighborhood(shape, window, stride), q_tile, kv_tile)
        if got.optimal:
            good.append(stride)
    return good


def test_search_finds_the_smallest_optimal_strides():
    shape, window, pair = (32, 48), (8, 16), ((4, 8), (4, 4))
    every = by_brute_search(shape, window, *pair)
    found = search(shape, window, (pair,), most=100)
    minimal = {
        s for s in every if not any(t != s and all(a <= b for a, b in zip(t, s)) for t in every)
    }
    assert {one.stride for one in found} == minimal
    assert minimal
    products = [math.prod(one.stride) for one in found]
    assert products == sorted(products)


def test_search_in_the_papers_grids():
    first = search(HUNYUAN, (18, 24, 24), BLACKWELL[3])[0]
    assert first.visited.optimal
    assert math.prod(first.stride) <= 16 * 8 * 8
    among = search(HUNYUAN, (18, 24, 24), (((4, 8, 8), (2, 8, 8)),))
    assert (16, 8, 8) in [one.stride for one in among]
    flux = search((256, 256), (80, 80), (((16, 16), (16, 8)),))
    assert (16, 16) in [one.stride for one in flux]


def test_search_without_an_optimal_setting_comes_as_close_as_it_can():
    found = search((17, 19), (5, 5), (((4, 4), (8, 8)),))
    assert not any(one.visited.optimal for one in found)
    best = max(
        simulate(neighborhood((17, 19), (5, 5), s), (4, 4), (8, 8)).parallel
        for s in itertools.product(range(1, 6), repeat=2)
    )
    assert {one.visited.parallel for one in found} == {best}


def test_tiles_of_the_papers_kernels():
    assert (
        {math.prod(q) for q, _ in BLACKWELL[3]} == {256} == {math.prod(q) for q, _ in BLACKWELL[2]}
    )
    assert {math.prod(k) for _, k in (*BLACKWELL[3], *BLACKWELL[2])} == {128}
    assert {math.prod(t) for pair in (*HOPPER[2], *HOPPER[3]) for t in pair} == {128}


def run(capsys, *args):
    assert main(["cost", "tiles", *args]) == 0
    return capsys.readouterr().out


def test_command_prints_presets_and_settings(capsys, tmp_path):
    pytest.importorskip("typer")
    text = run(capsys, "--preset", "hunyuan")
    assert "11.11" in text
    assert "2.23" in text
    rows = json.loads(run(capsys, "--shape", "30x48x80", "--window", "18x24x24", "--stride",
                          "1x1x1,16x8x8", "--q-tile", "4x8x8", "--kv-tile", "2x8x8", "--share",
                          "0.607", "--json"))  # fmt: skip
    assert [row["worst"] for row in rows] == [275, 81]
    assert [row["optimal"] for row in rows] == [False, True]
    found = json.loads(run(capsys, "--shape", "64x64", "--window", "16x16", "--search", "--json"))
    assert all(row["optimal"] for row in found)
    pytest.importorskip("matplotlib")
    path = tmp_path / "deep" / "tiles.png"
    run(capsys, "--preset", "flux", "--figure", str(path))
    assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--preset", "hunyun"], "hunyuan"),
        (["--shape", "8x8"], "--window"),
        (["--shape", "8y8", "--window", "3"], "30x48x80"),
        (["--shape", "8x8", "--window", "9x3"], "axis 0 has 8 tokens"),
        (["--shape", "8x8", "--window", "3x3", "--q-tile", "4x4"], "both --q-tile"),
        (["--shape", "8x8", "--window", "3x3", "--kernels", "blakwell"], "blackwell"),
        (["--preset", "flux", "--stride", "1x1"], "brings its own"),
        (["--shape", "8x8", "--window", "4x4", "--share", "2"], "0 to 1"),
        (["--preset", "flux", "--share", "0.5"], "brings its own share"),
        (["--preset", "flux", "--dense-steps", "3"], "brings its own share"),
        (["--shape", "8x8", "--window", "4x4", "--dense-steps", "1"], "give --share"),
        (["--shape", "8x8", "--window", "4x4", "--search", "--most", "0"], "--most 0"),
    ],
)
def test_command_refuses_what_makes_no_sense(capsys, args, says):
    pytest.importorskip("typer")
    assert main(["cost", "tiles", *args]) == 2
    assert says in capsys.readouterr().err


def test_a_figure_of_an_unknown_kind_is_refused(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("tiles.xyz", "tiles"):
        path = str(tmp_path / name)
        assert main(["cost", "tiles", "--preset", "flux", "--figure", path]) == 2
        assert ".png" in capsys.readouterr().err


def test_no_bound_passes_the_operations_where_tiles_divide_the_grid():
    passed = 0
    for length in range(4, 33):
        for k in range(1, length + 1):
            for s, q_tile, kv_tile in itertools.product({1, k // 2 + 1, k}, (2, 4, 8), (2, 4, 8)):
                got = simulate(neighborhood(length, k, min(s, k)), (q_tile,), (kv_tile,))
                assert got.parallel <= got.flops * (1 + 1e-9)
                ragged = length % q_tile or length % kv_tile
                assert ragged or got.serial <= got.flops * (1 + 1e-9), (length, k, s)
                passed += got.serial > got.flops * (1 + 1e-9)
    assert passed  # short last tiles


def test_bounds_of_the_sheets_miniature():
    from foveate.papers.gna import GRIDS

    wanted = {
        "2-D": ([4.00, 5.33, 5.33, 7.11], [4.87, 5.89, 5.89, 7.11]),
        "3-D": (None, [4.10, 5.12, 5.12, 5.12, 8.00]),
    }
    for name, (shape, window, q_tile, kv_tile, strides) in GRIDS.items():
        found = [simulate(neighborhood(shape, window, s), q_tile, kv_tile) for s in strides]
        parallel, serial = wanted[name]
        assert [one.serial for one in found] == pytest.approx(serial, abs=5e-3)
        if parallel is not None:
            assert [one.parallel for one in found] == pytest.approx(parallel, abs=5e-3)


def test_the_released_world_models_sparsity():
    """98, 95, 92, 77 and 55% of the pairs of a grid of T x 44 x 80 are left out."""
    settings = [((4, 16), 1, (11, 5)), ((12, 16), (4, 1), (1, 5)), ((12, 24), (4, 8), 1),
                ((20, 40), (4, 8), 1), ((28, 56), (4, 8), 1)]  # fmt: skip
    shares = [1 - 1 / simulate(neighborhood((44, 80), k, s, d), (8, 8), (8, 8)).flops
              for k, s, d in settings]  # fmt: skip
    assert [100 * share for share in shares] == pytest.approx([98, 95, 92, 77, 55], abs=0.6)
