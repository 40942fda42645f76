"""What `--mixer` says: one for all layers of a model, or one for each."""

from __future__ import annotations

from typing import Any

from foveate.ops.errors import InputError


def by_layer(mixer: str | None, layers: int) -> str | tuple[str | None, ...] | None:
    """Nothing, one text for all layers, or one for each, with None for attention.

    Raises:
        InputError: neither one nor as many as there are layers.
    """
    from foveate.methods.naming import split

    if mixer is None:
        return None
    given = split(mixer)
    if len(given) not in (1, layers):
        raise InputError(
            f"--mixer {mixer}: {len(given)} mixers for {layers} layers; give one for all of them, "
            "or one for each."
        )
    found = tuple(None if text == "none" else text for text in given)
    return found[0] if len(found) == 1 else found


def told(facts: dict[str, Any]) -> str:
    """A composition for people, from its "projection", "attention" and "mixer"."""
    attention, mixer = f"{facts['projection']}, {facts['attention']}", facts["mixer"]
    if isinstance(mixer, list | tuple):
        return "; ".join(attention if one is None else one for one in mixer)
    return mixer or attention
