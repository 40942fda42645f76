"""The models of the GNA paper: their grids, windows, tiles, shares of time, and its own figures.

Source: Hassani et al. 2025, arXiv 2504.16922, tables of the end-to-end results (B200).
"""

from __future__ import annotations

from dataclasses import dataclass

from foveate.cost.tiles import Tile


@dataclass(frozen=True)
class Case:
    """One window of a preset.

    Attributes:
        window: keys on each axis.
        q_tile, kv_tile: of the paper's kernel where it names them or its figures tell them.
        paper: by stride, what the paper's simulator says of the whole model's speed; None where it
            isn't printed.
    """

    window: Tile
    q_tile: Tile
    kv_tile: Tile
    paper: dict[Tile, float | None]


@dataclass(frozen=True)
class Preset:
    """One model.

    Attributes:
        title: its name.
        shape: of its tokens.
        share: of the time that self attention takes.
        steps: of the diffusion.
        dense_steps: of these, that keep dense attention in the paper's safer setting.
        cases: windows.
    """

    title: str
    shape: Tile
    share: float
    steps: int
    dense_steps: int
    cases: tuple[Case, ...]


PRESETS = {
    "cosmos": Preset(
        "Cosmos-7B",
        (16, 44, 80),
        0.587,
        35,
        12,
        (
            Case(
                (16, 32, 48),
                (8, 4, 8),
                (4, 4, 8),
                {(1, 1, 1): 1.35, (1, 8, 1): 1.42, (1, 1, 16): 1.42, (1, 8, 16): 1.50},
            ),
            Case(
                (16, 24, 16),
                (8, 4, 8),
                (4, 4, 8),
                {(1, 1, 1): 1.90, (1, 8, 1): None, (1, 1, 16): None, (1, 8, 16): 2.10},
            ),
        ),
    ),
    "hunyuan": Preset(
        "HunyuanVideo",
        (30, 48, 80),
        0.607,
        50,
        15,
        (
            Case(
                (30, 40, 40),
                (4, 8, 8),
                (2, 8, 8),
                {(1, 1, 1): 1.21, (1, 1, 8): 1.44, (1, 32, 8): 1.55},
            ),
            Case(
                (18, 24, 24),
                (4, 8, 8),
                (2, 8, 8),
                {
                    (1, 1, 1): 1.73, (2, 1, 1): 1.78, (1, 1, 8): 1.98, (2, 1, 8): 2.02,
                    (1, 8, 8): 2.18, (2, 8, 8): 2.20, (16, 8, 8): 2.23, (18, 24, 24): 2.07,
                },
            ),
        ),
    ),
    "flux": Preset(
        "FLUX.1-dev 4K",
        (256, 256),
        0.518,
        28,
        9,
        (
            Case(
                (80, 80),
                (16, 16),
                (16, 8),
                {(1, 1): 1.76, (16, 1): 1.84, (1, 16): 1.81, (16, 16): 1.88},
            ),
        ),
    ),
}  # fmt: skip
