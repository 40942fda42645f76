"""Rotary positions against complex multiplication, and there and back."""

from __future__ import annotations

import pytest
import torch

from foveate.ops.errors import InputError
from foveate.parts.rope import Rope, half_tables, rotate, unrotate

CONVENTIONS = pytest.mark.parametrize("interleaved", [False, True])
PARTIAL = pytest.mark.parametrize("turning", [16, 6])


def by_complex_numbers(x, positions, inv_freq, interleaved, scaling=1.0):
    """Each pair is a complex number that is multiplied by exp(i * position * frequency)."""
    out = x.clone()
    half = len(inv_freq)
    for i, frequency in enumerate(inv_freq.tolist()):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        angle = positions.double() * frequency
        number = torch.complex(x[..., a], x[..., b]) * torch.polar(
            torch.full_like(angle, scaling), angle
        )
        out[..., a], out[..., b] = number.real, number.imag
    return out


@CONVENTIONS
@PARTIAL
def test_rotation_is_complex_multiplication(interleaved, turning):
    x = torch.randn(2, 3, 11, 16, dtype=torch.float64)
    rope = Rope.of(turning, interleaved=interleaved, scaling=1.3)
    positions = torch.randint(0, 5000, (11,))
    expected = by_complex_numbers(x, positions, rope.inv_freq, interleaved, 1.3)
    torch.testing.assert_close(rope.rotate(x, positions), expected, atol=1e-12, rtol=1e-12)
    assert torch.equal(rope.rotate(x, positions)[..., turning:], x[..., turning:])


@CONVENTIONS
@PARTIAL
def test_there_and_back(interleaved, turning):
    x = torch.randn(2, 3, 11, 16, dtype=torch.float64)
    rope = Rope.of(turning, interleaved=interleaved, scaling=0.7)
    positions = torch.randint(0, 100_000, (2, 11))
    back = rope.unrotate(rope.rotate(x, positions), positions)
    torch.testing.assert_close(back, x, atol=1e-12, rtol=1e-12)


@CONVENTIONS
def test_moving_is_rotating_further(interleaved):
    x = torch.randn(2, 3, 11, 16, dtype=torch.float64)
    rope = Rope.of(16, interleaved=interleaved, scaling=1.1)
    positions, by = torch.randint(0, 900, (2, 11)), torch.randint(-400, 900, (2, 11))
    moved = rope.move(rope.rotate(x, positions), by)
    torch.testing.assert_close(moved, rope.rotate(x, positions + by), atol=1e-11, rtol=1e-11)


@CONVENTIONS
def test_scores_depend_on_distance_alone(interleaved):
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    rope = Rope.of(16, interleaved=interleaved)

    def score(i, j):
        turned = rope.rotate(q, torch.tensor([i])), rope.rotate(k, torch.tensor([j]))
        return float((turned[0] * turned[1]).sum())

    assert score(900, 850) == pytest.approx(score(51, 1), abs=1e-11)
    assert score(900, 850) != pytest.approx(score(900, 849), abs=1e-3)


@CONVENTIONS
def test_tables_as_transformers_hands_them_over(interleaved):
    rope = Rope.of(16, interleaved=interleaved)
    x, positions = torch.randn(2, 3, 11, 16, dtype=torch.float64), torch.arange(11)
    cos, sin = rope.tables(positions)
    twice = [
        t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in (cos, sin)
    ]
    halves = [half_tables(t, interleaved=interleaved) for t in twice]
    turned = rotate(x, *halves, interleaved=interleaved)
    assert torch.equal(turned, rope.rotate(x, positions))
    torch.testing.assert_close(unrotate(turned, *halves, interleaved=interleaved), x)


def test_transformers_llama_agrees():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = torch.randn(2, 2, 3, 7, 16)
    rope = Rope.of(16)
    cos, sin = rope.tables(torch.arange(7))
    wide = (torch.cat((t, t), -1)[None].float() for t in (cos, sin))
    theirs = llama.apply_rotary_pos_emb(q, k, *wide)
    for x, other in zip((q, k), theirs):
        torch.testing.assert_close(rope.rotate(x, torch.arange(7)), other)


def test_far_positions_keep_their_precision_and_dtype():
    x = torch.randn(1, 1, 1, 16)
    rope = Rope(Rope.of(16).inv_freq.float())
    near, far = rope.rotate(x, torch.tensor([0])), rope.rotate(x, torch.tensor([1_000_003]))
    expected = by_complex_numbers(
        x.double(), torch.tensor([1_000_003]), rope.inv_freq.double(), False
    )
    torch.testing.assert_close(far.double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(near, x)
    assert rope.rotate(x.bfloat16(), torch.tensor([3])).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Rope(torch.arange(4)), "floats"),
        (lambda: Rope.of(5), "even"),
        (lambda: Rope.of(4, scaling=0.0), "scaling"),
        (lambda: Rope.of(8).rotate(torch.zeros(1, 1, 2, 4), torch.arange(2)), "only 4"),
        (lambda: half_tables(torch.zeros(2, 3)), "even"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
