"""The models of Step-3's tables 2, 3 and 6 (rows E5): `foveate cost ... --preset KEY`.

Caches are counted at 8 bit, but where the report says BF16 they keep their own. Numbers of experts
and of tokens in the vocabulary, which only `foveate cost memory` and the sparsity bound need, are
those of the models' published configs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from foveate.cost.layer import FeedForward, Layer, Mixing, Model, grouped, linear, mfa, mla
from foveate.ops.errors import InputError, nearest


def _same(count: int, mixing: Mixing, feedforward: FeedForward) -> tuple[Layer, ...]:
    return (Layer((mixing,), feedforward),) * count


def _deepseek_v3() -> Model:
    attention, dense = mla(7168, 128, 1536), FeedForward(18432)
    moe = FeedForward(2048, 2048, 256, 8)
    layers = _same(3, attention, dense) + _same(58, attention, moe)
    return Model("DeepSeek-V3", 7168, layers, 129_280)


def _kimi_k2() -> Model:
    attention, dense = mla(7168, 64, 1536), FeedForward(18432)
    moe = FeedForward(2048, 2048, 384, 8)
    layers = _same(1, attention, dense) + _same(60, attention, moe)
    return Model("Kimi K2", 7168, layers, 163_840)


def _qwen3_moe() -> Model:
    moe = FeedForward(0, 1536, 128, 8)
    layers = _same(94, grouped(4096, 64, 4, 128), moe)
    return Model("Qwen3 MoE 235B", 4096, layers, 151_936)


def _qwen3_32b() -> Model:
    layers = _same(64, grouped(5120, 64, 8, 128), FeedForward(25600))
    return Model("Qwen3 32B", 5120, layers, 151_936)


def _llama4() -> Model:
    """Three of four layers see chunks of 8192 tokens; the fourth all, in BF16."""
    whole = grouped(5120, 40, 8, 128, kv_bytes=2)
    chunk = grouped(5120, 40, 8, 128, window=8192, chunked=True)
    dense, moe = FeedForward(16384), FeedForward(8192, 8192, 128, 1)
    layers = tuple(
        Layer((whole if i % 4 == 3 else chunk,), moe if i % 2 else dense) for i in range(48)
    )
    return Model("Llama 4 Maverick", 5120, layers, 202_048)


def _minimax_m1() -> Model:
    """Every eighth layer attends, in BF16; the others are lightning attention, states in fp32."""
    whole = grouped(6144, 64, 8, 128, kv_bytes=2)
    lightning = linear(5 * 6144 * 8192, 64 * 128 * 128, 64, width=2 * 8192)
    moe = FeedForward(0, 9216, 32, 2)
    layers = tuple(Layer((whole if i % 8 == 7 else lightning,), moe) for i in range(80))
    return Model("MiniMax M1", 6144, layers, 200_064)


def _ernie() -> Model:
    attention = grouped(8192, 64, 8, 128)
    layers = _same(3, attention, FeedForward(28672))
    layers += _same(51, attention, FeedForward(0, 3584, 64, 8))
    return Model("ERNIE 4.5 300B", 8192, layers, 103_424)


def _pangu() -> Model:
    moe = FeedForward(4 * 1344, 1344, 64, 8)
    return Model("Pangu Pro MoE", 5120, _same(48, grouped(5120, 40, 8, 128), moe), 153_600)


def _step3() -> Model:
    """Layers 0 to 3 and 60 are dense."""
    attention = mfa(7168, 64, 256, 2048)
    dense, moe = FeedForward(18432), FeedForward(5120, 5120, 48, 3)
    layers = tuple(Layer((attention,), moe if 4 <= i < 60 else dense) for i in range(61))
    return Model("Step-3", 7168, layers, 128_815)


RELEASED: dict[str, Callable[[], Model]] = {
    "deepseek-v3": _deepseek_v3,
    "kimi-k2": _kimi_k2,
    "qwen3-moe": _qwen3_moe,
    "qwen3-32b": _qwen3_32b,
    "llama4-maverick": _llama4,
    "minimax-m1": _minimax_m1,
    "ernie-4.5": _ernie,
    "pangu-pro": _pangu,
    "step-3": _step3,
}


def released(names: str) -> list[Model]:
    """Models by their keys, comma-separated; "all" is every one.

    Raises:
        InputError: an unknown key.
    """
    if names == "all":
        return [make() for make in RELEASED.values()]
    found = []
    for name in dict.fromkeys(n.strip() for n in names.split(",")):
        if name not in RELEASED:
            raise InputError(f"--preset {name} is not known; {nearest(name, RELEASED)}")
        found.append(RELEASED[name]())
    return found


def at_bits(model: Model, kv_bits: float | None) -> tuple[Model, float]:
    """The model and the bytes of a cached number.

    Args:
        model: any.
        kv_bits: of all caches; None leaves those that have their own as they are, and 8 bit for
            the others, as in the report.
    """
    if kv_bits is None:
        return model, 1.0
    layers = tuple(
        replace(layer, mixing=tuple(replace(one, kv_bytes=None) for one in layer.mixing))
        for layer in model.layers
    )
    return replace(model, layers=layers), kv_bits / 8


def kernel_values(model: Model) -> Model:
    """MLA's second product counted as kernels do it: r for each value, not r + d_r."""

    def changed(one: Mixing) -> Mixing:
        if one.kind != "mla":
            return one
        return replace(one, pair=2 * one.heads * (2 * one.latent + one.rope))

    layers = tuple(
        replace(layer, mixing=tuple(map(changed, layer.mixing))) for layer in model.layers
    )
    return replace(model, layers=layers)
