"""The Gaussian gate as a mixing layer: y = x w(x), around which a block adds its residual.

Along features a token is weighed by itself. Along tokens the statistics are those of the whole
sequence; with a causal mask those of the tokens s <= t (not the paper's: it has no causal form),

    mu_t, s2_t = mean, |mean(x^2) - mean(x)^2| + 1e-8 of x_1 ... x_t

in the density form, whose weights aren't normalised over tokens. Sums are of x - x_1, so that a
large mean costs no digits; they are the state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.methods.gaam.gate import EPS, FORMS, GaussianGate, density
from foveate.ops.errors import InputError, nearest
from foveate.ops.masks.checks import whole
from foveate.parts.cache import Field
from foveate.parts.context import Context
from foveate.parts.form import check_step, is_causal_or_full, sees_later
from foveate.parts.mixer import Mixer, MixerRecipe, MixerSizes, mixed_tokens
from foveate.parts.state import State
from foveate.parts.tokens import queries_that_are

AXES = ("features", "tokens")


@dataclass(frozen=True)
class GAAM(MixerRecipe):
    """A learnt gate in attention's place; arXiv 2401.11143 and `foveate.methods.gaam.gate`.

    Attributes:
        form: "mixture" (the published package) or "density" (the published figures).
        axis: "features", where no token sees another, or "tokens". With a causal mask the latter
            needs form="density" and heads=1.
        heads: parts of the axis.
        gaussians: K of each head; None is 5, the package's example, or 1 in the density form.

    Raises:
        InputError: a field that doesn't fit.
    """

    form: str = "mixture"
    axis: str = "features"
    heads: int = 4
    gaussians: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("form", FORMS), ("axis", AXES)):
            given = getattr(self, name)
            if given not in known:
                raise InputError(f"GAAM({name}={given!r}) is unknown; {nearest(str(given), known)}")
        whole("GAAM", "heads", self.heads, least=1)
        if self.gaussians is not None:
            whole("GAAM", "gaussians", self.gaussians, least=1)
            if self.form == "density" and self.gaussians > 1:
                raise InputError(
                    f"GAAM(gaussians={self.gaussians}): the density form has one for each feature."
                )

    def build(self, sizes: MixerSizes) -> GaussianMixer:
        """The mixer of a layer.

        Raises:
            InputError: more heads than features along which they lie.
        """
        if self.axis == "features" and self.heads > sizes.dim:
            raise InputError(f"GAAM(heads={self.heads}): the layer has {sizes.dim} features.")
        gaussians = self.gaussians or (5 if self.form == "mixture" else 1)
        axis = -1 if self.axis == "features" else 1
        return GaussianMixer(GaussianGate(self.heads, gaussians, self.form, axis, sizes.dim))


class GaussianMixer(Mixer):
    """The mixer of one layer.

    Args:
        gate: along axis 1, tokens, or -1, features, of x (B, L, dim).
    """

    def __init__(self, gate: GaussianGate) -> None:
        super().__init__()
        self.gate = gate

    def full(self, x: Tensor, ctx: Context) -> Tensor:
        """All tokens x (B, L, dim) at once."""
        if self.gate.axis == -1:
            return self.gate(x)
        tokens = mixed_tokens(x, 0, ctx)
        if not is_causal_or_full(ctx, tokens):
            raise InputError(
                "gaam along tokens takes statistics over all tokens, or over those that aren't "
                "later, but the mask is neither (a window or packed documents, for example)."
            )
        real = tokens.q_real.expand(len(x), -1)
        if sees_later(ctx, tokens):
            return self.gate(x, real)
        return self._running(x, real, {})[0]

    def new_state(self) -> State:
        """Sums over the tokens so far; nothing along features.

        Raises:
            InputError: the mixer has no causal form.
        """
        if self.gate.axis == -1:
            return _Counted(())
        self._check_causal()
        return State(
            [Field(name, "sequence", (), 1) for name in ("count", "first", "sum", "square")]
        )

    def step(self, x: Tensor, ctx: Context, state: State) -> Tensor:
        """The next tokens x (B, n, dim).

        Raises:
            InputError: along tokens, a mask that isn't causal, padding aside.
        """
        past = state.length
        if self.gate.axis == 1:
            check_step("gaam", x[:, None], x[:, None], replace(ctx, real=None), past)
        state.length += x.shape[1]
        if self.gate.axis == -1:
            return self.gate(x)
        real = ctx.real
        if real is None:
            tokens = mixed_tokens(x, past, ctx)
            real = queries_that_are(tokens).expand(len(x), -1)
        y, state.held = self._running(x, real, state.held)
        state.fields = tuple(
            Field(name, "sequence", tuple(held.shape[1:]), 1) for name, held in state.held.items()
        )
        return y

    def _check_causal(self) -> None:
        if self.gate.form != "density" or self.gate.heads > 1:
            raise InputError(
                "gaam: parts of a sequence, and weights that sum to 1 over it, are only known at "
                "its end; a causal one along tokens needs gaam(axis='tokens', form='density', "
                "heads=1), or take axis='features'."
            )

    def _running(
        self, x: Tensor, real: Tensor, held: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The causal density form, from sums over earlier tokens; x (B, n, D), real (B, n)."""
        self._check_causal()
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        keep = real[..., None]
        wide = torch.where(keep, wide, 0)
        at = real.int().argmax(1)
        first = wide.detach()[torch.arange(len(x), device=x.device), at][:, None]
        if held:  # the first real token may only have come now
            first = torch.where(held["count"] > 0, held["first"], first)
        off = torch.where(keep, wide - first, 0)
        total = {"count": keep.to(wide.dtype), "sum": off, "square": off.square()}
        total = {name: part.cumsum(1) + (held[name] if held else 0) for name, part in total.items()}
        n = total["count"].clamp(min=1)
        mean = total["sum"] / n
        spread = (total["square"] / n - mean.square()).abs() + EPS
        weights = density(off, mean, spread, *self.gate.parameters_of(0, False, []))
        # Clones, for a view would hold what all tokens had.
        kept = {name: sums[:, -1:].clone() for name, sums in total.items()} | {"first": first}
        return (wide * weights).to(x.dtype), kept


class _Counted(State):
    """How many tokens there were: any of them can be forgotten."""

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Raises:
            InputError: there are fewer.
        """
        if whole("truncate", "length", length, least=0) > self.length:
            raise InputError(f"truncate({length}): the state holds only {self.length} tokens.")
        self.length = length
