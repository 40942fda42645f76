"""What the tables and summaries of a GPU say of results."""

from __future__ import annotations

from foveate.bench.gpu_show import decode_summary, decode_table, kernel_summary


def kernel(mask: str, density: float, flex: float, ideal: float, **more: object) -> dict:
    cell = {"dtype": "bfloat16", "length": 8192, "direction": "forward", "head_dim": 64}
    ours = {
        "backend": "triton", "vs_flex": {"median": flex}, "of_ideal": {"median": ideal},
        "vs_sdpa-cudnn": {"median": 0.5}, "of_peak": 0.25, **more,
    }  # fmt: skip
    other = {"backend": "flex", "of_peak": 0.9}
    return {
        "cell": {"mask": mask, **cell},
        "values": {"tile_density": density, "results": [ours, other]},
    }


def test_medians_of_kernels_lie_between_the_middle_ones() -> None:
    found = [
        kernel("full", 1.0, 1.0, 9.0),
        kernel("causal", 0.5, 1.2, 0.8),
        kernel("window@0.1", 0.1, 1.4, 0.6),
        kernel("window@0.01", 0.01, 2.0, 0.1, failed="wrong"),
    ]
    (line,) = kernel_summary(found)
    assert line.startswith("triton, bfloat16 forward, 8192 tokens, D=64: ")
    assert "x FlexAttention 1.30 (least 1.00)" in line
    assert "of ideal, from 5% of the tiles, 0.70 (least 0.60)" in line
    assert "full x cuDNN 0.50; causal x cuDNN 0.50; 25% of the matrix product's rate" in line
    assert line.endswith("1 of 4 cells wrong or failed")


def test_decoding_says_three_shares() -> None:
    def step(share: float, alike: float | None) -> dict:
        ours = {
            "backend": "triton", "seconds": {"median": 1e-5}, "gbps": 1.0, "of_copy": share,
            "of_roof": share / 2,
        }  # fmt: skip
        if alike is not None:
            ours["of_copy_alike"] = {"median": alike, "q20": alike, "q80": alike}
        cell = {
            "form": "whole", "batch": 1, "context": 1024, "group": 1, "kv_heads": 1,
            "head_dim": 64, "dtype": "bfloat16",
        }  # fmt: skip
        return {"cell": cell, "values": {"copy_gbps": 1.0, "results": [ours]}}

    found = [step(0.2, 0.4), step(0.4, 0.8), step(0.8, None)]
    (line,) = decode_summary(found)
    assert "40% of a copy's bandwidth (20%-80%)" in line
    assert "60% of a copy of as many bytes (40%-80%)" in line
    assert "20% of the lower roof (10%-40%)" in line
    assert decode_table(found).row_count == 3
