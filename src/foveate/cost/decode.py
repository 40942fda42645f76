"""What a decoded token costs: Step-3's model in USD, the roofline, and how sparse a MoE may be.

    E1  cost of 1M tokens = 1e6 [ max(F_attn U_flop, BYTES U_byte) + F_lin U_flop + F_ffn U_flop ]
    E3  attention and FFN on different chips: the least of the first two terms over all chips, and
        the least of the third
    E6  training: 3 (F_attn + F_lin + F_ffn) U_flop for each token

Communication is taken to overlap, weights to be amortised by batching; embedding and head are left
out. With a draft of k tokens in one pass the cache is read once for all of them, and only accepted
tokens count (F5).

    F1  F_attn / BYTES, against X / M: above it attention is bound by compute
    F2  B_dense = X / (2 M) tokens fill a dense FFN, B_moe = B_dense / S a sparse one
    F3  a batch of B tokens crosses the network as 3 D B bytes for each layer (8-bit there, 16-bit
        back), within TPOT / stages / L:   S >= 3 D X L stages / (2 M Net TPOT)

Source: StepFun 2025, arXiv 2507.19427, sections 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from foveate.cost.hardware import Chip
from foveate.cost.layer import FeedForward, Model
from foveate.ops.errors import InputError

TPOT = 50e-3
STAGES = 3


@dataclass(frozen=True)
class Setting:
    """How a model decodes.

    Attributes:
        context: tokens in the cache, n.
        kv_bytes: of a cached number, where the model doesn't say.
        drafted: tokens that one pass computes.
        accepted: of them, on average.

    Raises:
        InputError: a number below its least, or more accepted than drafted.
    """

    context: int
    kv_bytes: float = 1.0
    drafted: int = 1
    accepted: float = 1.0

    def __post_init__(self) -> None:
        if self.context < 1 or not 0 < self.kv_bytes < math.inf:
            raise InputError(
                f"context {self.context}, {self.kv_bytes} bytes: expected 1 or more, above 0."
            )
        if self.drafted < 1 or not 0 < self.accepted <= self.drafted:
            raise InputError(
                f"{self.accepted:g} of {self.drafted} drafted tokens accepted: expected more than "
                "0, at most all."
            )


@dataclass(frozen=True)
class Price:
    """USD for a million tokens on one chip.

    Attributes:
        core: of attention proper, the cache's bytes or the products.
        linear: of the projections around it.
        ffn: of the feed-forward layers.
    """

    core: float
    linear: float
    ffn: float

    @property
    def attention(self) -> float:
        """What an attention machine does."""
        return self.core + self.linear

    @property
    def total(self) -> float:
        """All of it."""
        return self.attention + self.ffn


def price(model: Model, chip: Chip, at: Setting) -> Price:
    """E1, by its parts."""
    each = 1e6 / at.accepted
    flops = model.attention(at.context) * at.drafted * chip.per_flop
    read = model.bytes(at.context, at.kv_bytes) * chip.per_byte
    passed = at.drafted * chip.per_flop
    return Price(
        each * max(flops, read), each * model.linear * passed, each * model.feedforward * passed
    )


def training_price(model: Model, chip: Chip, context: int) -> float:
    """E6: USD for a million tokens of training, at full use of the chip."""
    flops = model.attention(context) + model.linear + model.feedforward
    return 1e6 * 3 * flops * chip.per_flop


def intensity(model: Model, at: Setting) -> float:
    """F1: operations of attention for each byte that it reads."""
    read = model.bytes(at.context, at.kv_bytes)
    if not read:
        raise InputError(f"{model.name} keeps no cache and no state.")
    return model.attention(at.context) * at.drafted / read


def bound(model: Model, chip: Chip, at: Setting) -> str:
    """The side of the roofline on which attention lies: "compute" or "memory"."""
    return "compute" if intensity(model, at) > chip.balance else "memory"


@dataclass(frozen=True)
class Choice:
    """The cheapest chips, and USD for a million tokens there.

    Attributes:
        alone: the chip for everything.
        usd_alone: what it costs.
        attention, ffn: chips for each side of a disaggregated decoder.
        usd: what these cost.
    """

    alone: str
    usd_alone: float
    attention: str
    ffn: str
    usd: float


def choose(model: Model, chips: Sequence[Chip], at: Setting) -> Choice:
    """E3 over these chips."""
    if not chips:
        raise InputError("There is no chip to choose from.")
    prices = {chip.name: price(model, chip, at) for chip in chips}
    alone = min(prices, key=lambda name: prices[name].total)
    attention = min(prices, key=lambda name: prices[name].attention)
    ffn = min(prices, key=lambda name: prices[name].ffn)
    usd = prices[attention].attention + prices[ffn].ffn
    return Choice(alone, prices[alone].total, attention, ffn, usd)


def dense_batch(chip: Chip) -> float:
    """B_dense: tokens above which a dense FFN at 8 bit is bound by compute (F2)."""
    return chip.balance / 2


def least_sparsity(
    dim: int,
    layers: int,
    chip: Chip,
    *,
    tpot: float = TPOT,
    stages: int = STAGES,
    network: float | None = None,
) -> float:
    """F3: the smallest share of experts that a token may run while the network keeps up.

    Args:
        dim: D.
        layers: L.
        chip: of the FFN side.
        tpot: seconds for each token.
        stages: of the pipeline, among which that time is shared.
        network: bytes/s of a server; None is the chip's.
    """
    net = chip.network if network is None else network
    return 3 * dim * dense_batch(chip) * layers * stages / (net * tpot)


def experts_needed(part: FeedForward, least: float) -> float:
    """Routed experts that a token had to run for this sparsity; may be none or more than all."""
    if not part.experts:
        raise InputError("A dense feed-forward has no experts.")
    return (least * part.width - part.dense) / part.expert
