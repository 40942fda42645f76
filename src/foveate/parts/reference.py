"""A reference stream: a sequence of its own that runs through a model beside its input.

Some mixers take queries and keys from such a stream (fixed random embeddings, a fixed text) and
only values from the input. A mixer says so by its `reference`; a model runs the stream first,
through the same blocks, while mixers record their queries and keys, and then the input, while they
read them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from foveate.ops.errors import InputError


@dataclass(frozen=True)
class Reference:
    """What a mixer's reference stream is; one for all layers of a model.

    Attributes:
        kind: "random" (fixed Gaussian embeddings) or "tokens" (a fixed sequence of token ids).
        length: positions, and so the longest sequence.
        sigma: standard deviation of the random embeddings.
        seed: that they are drawn from.
    """

    kind: str
    length: int
    sigma: float = 0.0
    seed: int = 0


@dataclass
class Maps:
    """Queries and keys of a reference stream, by layer.

    Attributes:
        recording: whether mixers write (while the stream runs) or read (while the input does).
        by_layer: layer -> q (1, Hq, n, D) and k (1, Hkv, n, D), rotated to 0 ... n - 1.
    """

    recording: bool = True
    by_layer: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def of(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """What was recorded for a layer, for at least `length` positions.

        Raises:
            InputError: there is nothing, or less.
        """
        found = self.by_layer.get(layer)
        if found is None or found[1].shape[2] < length:
            have = "none" if found is None else f"{found[1].shape[2]}"
            raise InputError(
                f"layer {layer} needs {length} positions of its reference stream, but there are "
                f"{have}; run the layer in a model such as foveate.models.FoveateForCausalLM, "
                "which runs the stream."
            )
        return found

    def bytes(self) -> int:
        """Bytes of all layers' queries and keys; the whole batch shares them."""
        held = [x for pair in self.by_layer.values() for x in pair]
        return sum(x.numel() * x.element_size() for x in held)
