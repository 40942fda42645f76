"""Times of a disaggregated decoder from a model and its chips, and how many instances it takes.

Attention and FFN instances are servers of `Chip.chips` chips. Attention is data-parallel over
chips: each holds all attention weights and the caches of its own tokens; an FFN instance holds its
share of the experts, and the tokens of all attention instances visit it (G1). For one micro-batch
with B_a tokens on each attention chip, B in all, by the roofline of each side:

    t_A  = max(B_a F_attn / X, B_a BYTES / M) + max(2 B_a W / X, w W / M)
    t_F  = max(B F_ffn / X, weights touched / M) over all FFN chips
    c_AF = D bytes a token (8 bit), sent to every FFN instance;  c_FA = 2 D bytes (16 bit) from each

with a network of the server's cards together, the slower of sending and receiving. "efficiency" is
what kernels reach of the roofline. As the context grows, attention instances are added and the
batch and the FFN side stay: throughput for each chip falls as (N_A + N_F) / (N_A' + N_F) (G4).

Source: StepFun 2025, arXiv 2507.19427, sections 5 and 6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from foveate.cost.hardware import Chip
from foveate.cost.layer import Layer, Model
from foveate.cost.pipeline import Stages, Steady, steady
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole

MOST = 1024  # attention instances that are tried


@dataclass(frozen=True)
class Deployment:
    """A disaggregated decoder.

    Attributes:
        attention_chip, ffn_chip: what either side is made of.
        attention: N_A, instances (servers).
        ffn: N_F.
        tokens: of a micro-batch, over all attention chips.
        micro_batches: in flight.
        kv_bytes: of a cached number, where the model doesn't say.
        weight_bytes: of a weight.
        efficiency: share of the roofline that kernels reach, and of its rate the network.

    Raises:
        InputError: a number below 1, an efficiency outside 0 to 1, or no bytes.
    """

    attention_chip: Chip
    ffn_chip: Chip
    attention: int
    ffn: int
    tokens: int
    micro_batches: int = 3
    kv_bytes: float = 1.0
    weight_bytes: float = 1.0
    efficiency: float = 1.0

    def __post_init__(self) -> None:
        for name in ("attention", "ffn", "tokens", "micro_batches"):
            whole("deployment", name, getattr(self, name), least=1)
        if not 0 < self.efficiency <= 1:
            raise InputError(f"efficiency {self.efficiency}: expected above 0, at most 1.")
        if not (0 < self.weight_bytes < math.inf and 0 < self.kv_bytes < math.inf):
            raise InputError("Weights and cached numbers need more than 0 bytes each.")

    @property
    def chips(self) -> int:
        """Of both sides."""
        return self.attention * self.attention_chip.chips + self.ffn * self.ffn_chip.chips

    @property
    def tokens_on_chip(self) -> float:
        """B_a: of a micro-batch, on each attention chip."""
        return self.tokens / (self.attention * self.attention_chip.chips)


def stages(model: Model, at: Deployment, context: int) -> list[Stages]:
    """Modelled times of every layer that has both sides.

    Args:
        model: whose blocks have attention and feed-forward.
        at: chips and instances.
        context: tokens in every cache.

    Raises:
        InputError: a context below 1, or a model with blocks of one side only.
    """
    whole("afd", "context", context, least=1)
    made: dict[Layer, Stages] = {}
    for layer in model.layers:
        if layer not in made:
            made[layer] = _layer(model.dim, layer, at, context)
    return [made[layer] for layer in model.layers]


def _layer(dim: int, layer: Layer, at: Deployment, context: int) -> Stages:
    if layer.feedforward is None or not layer.mixing:
        raise InputError(
            "This model has blocks without attention or without feed-forward; AFD needs both in "
            "each."
        )
    a, f, part = at.attention_chip, at.ffn_chip, layer.feedforward
    mine = at.tokens_on_chip
    core = linear = 0.0
    for one in layer.mixing:
        core += max(mine * one.flops(context) / a.peak,
                    mine * one.bytes(context, at.kv_bytes) / a.bandwidth)  # fmt: skip
        linear += max(2 * mine * one.weights / a.peak, one.weights * at.weight_bytes / a.bandwidth)
    many = at.ffn * f.chips
    size = dim * part.matrices
    touched = size * part.touched(at.tokens) * at.weight_bytes
    ffn = max(2 * size * part.activated * at.tokens / f.peak, touched / f.bandwidth) / many
    sent = at.tokens / at.attention * at.ffn / a.network  # a server's tokens, to each FFN instance
    received = at.tokens / f.network
    slowest = dim * max(sent, received)
    e = at.efficiency
    return Stages((core + linear) / e, slowest / e, ffn / e, 2 * slowest / e)


@dataclass(frozen=True)
class Outcome:
    """What a deployment comes to at one context.

    Attributes:
        context: tokens in each cache.
        at: the deployment.
        steady: TPOT and bottleneck.
    """

    context: int
    at: Deployment
    steady: Steady

    @property
    def per_chip(self) -> float:
        """Tokens a second for each chip (TGS)."""
        return self.at.micro_batches * self.at.tokens / self.steady.tpot / self.at.chips

    @property
    def usd(self) -> float:
        """USD for a million tokens, at this speed."""
        a, f = self.at.attention_chip, self.at.ffn_chip
        hour = a.price * self.at.attention * a.chips + f.price * self.at.ffn * f.chips
        return 1e6 * hour / 3600 * self.steady.tpot / (self.at.micro_batches * self.at.tokens)

    @property
    def ratio(self) -> float:
        """Attention instances for each FFN instance."""
        return self.at.attention / self.at.ffn


def outcome(model: Model, at: Deployment, context: int) -> Outcome:
    """Evaluate a deployment by the closed form."""
    return Outcome(context, at, steady(stages(model, at, context), at.micro_batches))


def fewest(model: Model, at: Deployment, context: int, tpot: float) -> Outcome | None:
    """The fewest attention instances with which the deployment keeps within `tpot`.

    Args:
        model: to decode.
        at: chips, FFN instances and batch; its number of attention instances is left aside.
        context: tokens in each cache.
        tpot: seconds.

    Returns:
        None if none do: the FFN side, the network or the attention weights alone take longer.
    """

    def tried(count: int) -> Outcome:
        return outcome(model, replace(at, attention=count), context)

    if tried(MOST).steady.tpot > tpot:
        return None
    low, high = 1, MOST  # more instances never make it slower
    while low < high:
        middle = (low + high) // 2
        if tried(middle).steady.tpot <= tpot:
            high = middle
        else:
            low = middle + 1
    return tried(low)


def scaled(per_chip: float, attention: int, ffn: int, more: int) -> float:
    """G4: tokens a second for each chip once attention instances are added for a longer context.

    Args:
        per_chip: before.
        attention: N_A, before.
        ffn: N_F.
        more: N_A', after.
    """
    return per_chip * (attention + ffn) / (more + ffn)


def budget(tpot: float, layers: int, pipeline: int = 3) -> float:
    """Seconds of one stage in one layer: a token's time is shared by the pipeline's stages."""
    return tpot / pipeline / layers
