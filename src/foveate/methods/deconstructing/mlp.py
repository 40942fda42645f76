"""The variant without token mixing: a gated MLP of as many parameters as an attention layer.

    O = (SiLU(H W_gt) * (H W_up)) W_dn,   three matrices d x w,   3 d w = 4 d^2

Source: arXiv 2510.11602, variant "MLP".
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole
from foveate.parts.context import Context
from foveate.parts.mixer import Mixer, MixerRecipe, MixerSizes
from foveate.parts.state import State


@dataclass(frozen=True)
class DeconstructedMLP(MixerRecipe):
    """No token sees another one; see the module's text.

    Attributes:
        width: w; None is 4 dim / 3, rounded, which matches the four maps of an attention layer.

    Raises:
        InputError: width is below 1.
    """

    width: int | None = None

    def __post_init__(self) -> None:
        if self.width is not None:
            whole("DeconstructedMLP", "width", self.width, least=1)

    def build(self, sizes: MixerSizes) -> MLPMixer:
        """The mixer of a layer."""
        return MLPMixer(sizes.dim, self.width or max(1, round(4 * sizes.dim / 3)))


class Count(State):
    """How many tokens there were, and nothing else: any of them can be forgotten."""

    def __init__(self) -> None:
        super().__init__(())

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            InputError: there are fewer.
        """
        length = whole("truncate", "length", length, least=0)
        if length > self.length:
            raise InputError(f"truncate({length}): the state holds only {self.length} tokens.")
        self.length = length


class MLPMixer(Mixer):
    """The mixer of one layer; see the module's text.

    Args:
        dim: width of x and y.
        width: w.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, width, bias=False)
        self.up = nn.Linear(dim, width, bias=False)
        self.down = nn.Linear(width, dim, bias=False)

    def new_state(self) -> Count:
        """There is no past to keep."""
        return Count()

    def full(self, x: Tensor, ctx: Context) -> Tensor:
        """Each token of x (..., dim) by itself."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))

    def step(self, x: Tensor, ctx: Context, state: State) -> Tensor:
        """As `full`."""
        state.length += x.shape[1]
        return self.full(x, ctx)
