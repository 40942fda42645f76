"""Refuses a projection or an attention that no layer of a model would have."""

from __future__ import annotations

from foveate.methods import make
from foveate.ops.errors import InputError
from foveate.parts.mixer import MixerRecipe


def refuse_idle(
    mixer: str | tuple[str | None, ...] | None, projection: str, attention: str
) -> None:
    """Refuse a projection or an attention beside mixers in all layers.

    What is no mixer is left to the model, which says so.

    Raises:
        InputError: mixers stand in all layers, and one was given; or a mixer isn't known.
    """
    given = mixer if isinstance(mixer, tuple) else (mixer,)
    if not all(text is not None and isinstance(make(text), MixerRecipe) for text in given):
        return
    options = {"--projection": (projection, "mha"), "--attention": (attention, "full")}
    idle = [f"{name} {value}" for name, (value, default) in options.items() if value != default]
    if idle:
        raise InputError(
            f"{' and '.join(idle)} would do nothing: mixers stand in all layers. Leave it out, or "
            'name a mixer for each layer and "none" where attention is to stay.'
        )
