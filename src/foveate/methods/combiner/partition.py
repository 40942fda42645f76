"""What a partition of the tokens provides to Combiner: its direct tokens and its spans."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from foveate.methods.combiner.call import Call
from foveate.methods.combiner.pooling import Pooling
from foveate.methods.combiner.state import Lane
from foveate.ops import AttentionOutput
from foveate.parts.attention import Heads
from foveate.parts.cache import Field

Parts = list[AttentionOutput]


class Partition(nn.Module, ABC):
    """Omega_i^0, the tokens that query i sees directly, and Omega_i^r, its spans.

    All parts of a query are disjoint and make up all that it may see, so that merging them by their
    lse is the joint softmax over direct tokens and spans.

    Args:
        heads: sizes of the layer.
        queries: pools queries to q_S.
        keys: pools keys to k_S.
    """

    def __init__(self, heads: Heads, queries: Pooling, keys: Pooling) -> None:
        super().__init__()
        self.heads, self.queries, self.keys = heads, queries, keys

    @abstractmethod
    def direct(self, call: Call) -> Parts:
        """Attention to the direct tokens: out (B, Hq, L, Dv) and lse of each part."""

    @abstractmethod
    def spans(self, call: Call) -> Parts:
        """Attention to the spans, likewise."""

    # -- decoding ------------------------------------------------------------------------------
    @property
    @abstractmethod
    def fields(self) -> tuple[Field, ...]:
        """What a lane keeps."""

    @abstractmethod
    def fill(self, call: Call, lane: Lane) -> None:
        """Take a prompt into an empty lane; all of its tokens are real."""

    @abstractmethod
    def step_direct(self, call: Call, lane: Lane) -> Parts:
        """For one new token: attention to its direct tokens; takes it in."""

    @abstractmethod
    def step_spans(self, call: Call, lane: Lane) -> Parts:
        """For the same token, which `step_direct` took in: attention to its spans."""

    @abstractmethod
    def close(self, call: Call, lane: Lane) -> None:
        """After the token: make the summaries of spans that it completes."""

    # -- counts --------------------------------------------------------------------------------
    @abstractmethod
    def items(self, length: int) -> tuple[int, int, int]:
        """(direct tokens, spans) that all causal queries see, and keys read to summarise."""

    def summary(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """u_S of one span for each head: q (B, Hq, D), k (B, Hkv, n, D), v -> (B, Hq, 1, Dv)."""
        return call.attend(q[:, :, None], k, v).out
