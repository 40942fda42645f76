"""`foveate.nn.MixerLayer`: a mixer in the place of an attention layer."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from foveate.methods import make
from foveate.nn.output import LayerOutput
from foveate.nn.position import rope_for
from foveate.ops import Mask
from foveate.ops.errors import InputError
from foveate.parts.attention import Attention, AttentionRecipe
from foveate.parts.context import Context, Phase
from foveate.parts.mixer import Mixer, MixerRecipe, MixerSizes
from foveate.parts.rope import Rope
from foveate.parts.state import StateCache


class MixerLayer(nn.Module):
    """A mixing layer: x (B, L, dim) -> y (B, L, dim), called as `foveate.Attention` is.

        layer = foveate.nn.MixerLayer(256, 8, mixer="grassmann")
        y, _, _ = layer(x, mask=foveate.causal())

        cache = layer.new_cache()
        y, cache, _ = layer(prompt, mask=foveate.causal(), cache=cache)
        y, cache, _ = layer(token, mask=foveate.causal(), cache=cache)      # the same numbers

    Args:
        dim: width of x and y.
        num_heads: heads of the model, for mixers that have some.
        mixer: a key of the catalog with its hyper-parameters, its recipe, or a mixer that was built
            already.
        position: "rope", a `Rope`, or "none"; for mixers that turn heads by positions.
        theta: base of the rotary frequencies, where position is "rope".
        interleaved: whether rotary pairs are neighbours; None is the mixer's own habit.
        head_dim: width of a head; None is dim / num_heads.
        layer: index of the layer, for mixers that differ by layer.
        layers: of the whole model; None is unknown.

    Raises:
        UnknownMethodError: no such mixer.
        InputError: sizes don't fit, or a name of the wrong kind.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mixer: str | MixerRecipe | Mixer,
        position: str | Rope | None = "rope",
        *,
        theta: float = 10_000.0,
        interleaved: bool | None = None,
        head_dim: int | None = None,
        layer: int = 0,
        layers: int | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.layer = dim, layer
        self.mixer = _mixer(mixer, MixerSizes(dim, num_heads, head_dim, layer, layers))
        self.mixer.rope = rope_for(position, self.mixer, theta, interleaved)

    def new_cache(self, capacity: int = 0) -> StateCache:
        """An empty cache for this layer; `capacity` is for attentions, states need no room."""
        return StateCache(self.mixer.new_state())

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask | None = None,
        cache: StateCache | None = None,
        ctx: Context | None = None,
    ) -> LayerOutput:
        """Run the layer.

        Args:
            x: (B, L, dim), the new tokens.
            mask: who may look at whom, over all tokens, those in the cache included; None is
                everyone.
            cache: what earlier calls kept; the new tokens are added to it.
            ctx: more that is known; without it training is as the module.

        Returns:
            y (B, L, dim), the cache, and losses and statistics by name.

        Raises:
            InputError: shapes don't fit, a mask for other lengths or both here and in ctx, or a
                cache of another kind.
        """
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise InputError(f"MixerLayer: expected x (B, L, {self.dim}), got {tuple(x.shape)}.")
        if cache is not None and not isinstance(cache, StateCache):
            raise InputError(
                f"MixerLayer: expected a cache made by new_cache(), got a {type(cache).__name__}."
            )
        if cache is not None and cache.batch not in (None, len(x)):
            raise InputError(
                f"MixerLayer: the cache holds {cache.batch} sequences, x has {len(x)}."
            )
        if ctx is None:
            phase: Phase = "train" if self.training and not cache else "prefill"
            phase = "decode" if cache and x.shape[1] == 1 else phase
            ctx = Context(phase=phase, mask=mask, layer=self.layer)
        elif mask is not None and ctx.mask is not None:
            raise InputError("MixerLayer: give the mask as mask= or in ctx, not both.")
        else:
            ctx = replace(ctx, mask=ctx.mask if mask is None else mask)
        if ctx.mask is not None:
            ctx.mask._check(x.shape[1], x.shape[1] + (0 if cache is None else len(cache)))
        ctx.hidden, ctx.cache, ctx.aux = x, cache, {}
        y = self.mixer(x, ctx) if x.shape[1] else x.new_zeros(x.shape)
        return LayerOutput(y, cache, ctx.aux)

    def extra_repr(self) -> str:
        """What torch prints of it."""
        return f"{self.dim}, position={'none' if self.mixer.rope is None else 'rope'}"


def _mixer(mixer: object, sizes: MixerSizes) -> Mixer:
    if isinstance(mixer, Mixer):
        return mixer
    recipe = make(mixer) if isinstance(mixer, str) else mixer
    if isinstance(recipe, Attention | AttentionRecipe):
        raise InputError(
            f"MixerLayer(mixer={mixer!r}): that is an attention; give it as attention= (in "
            "commands --attention)."
        )
    if not isinstance(recipe, MixerRecipe):
        raise InputError(
            f'MixerLayer(mixer={mixer!r}): that is no mixer; expected one such as "grassmann" '
            "(see foveate methods)."
        )
    return recipe.build(sizes)
