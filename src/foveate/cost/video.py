"""What a video diffusion transformer's forward costs, dense and with chosen blocks.

Of a layer of width w, feed-forward width f, S video and T text tokens, in operations (two for each
multiply-add):

    8 S w^2                          queries, keys, values and output
    4 S^2 w                          self attention
    4 S w^2 + 4 T w^2 + 4 S T w      cross attention to the text
    4 S w f                          feed-forward

With blocks self attention is 4 S^2 w times its density, and 2 S w C for scoring C blocks.

Source: KwaiVGI/VMoBA, cal_theo_flops; arXiv 2506.23858, tables 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from foveate.ops.masks.checks import whole


@dataclass(frozen=True)
class VideoModel:
    """Sizes of a video diffusion transformer.

    Attributes:
        layers: blocks.
        width: of a token.
        feedforward: inner width.
        text: tokens of text.
    """

    layers: int
    width: int
    feedforward: int
    text: int = 300

    def __post_init__(self) -> None:
        for name in ("layers", "width", "feedforward"):
            whole("VideoModel", name, getattr(self, name), least=1)
        whole("VideoModel", "text", self.text, least=0)

    def flops(self, tokens: int, density: float = 1.0, blocks: Sequence[int] = ()) -> float:
        """Operations of a forward of one video.

        Args:
            tokens: S.
            density: share of all pairs that self attention computes.
            blocks: C of layers 0, 1, 2, ..., over and over; empty scores none.
        """
        whole("VideoModel.flops", "tokens", tokens, least=1)
        s, w, t = tokens, self.width, self.text
        attention = 4 * s * s * w * density
        fixed = 8 * s * w * w + 4 * s * w * w + 4 * t * w * w + 4 * s * t * w
        total = self.layers * (attention + fixed + 4 * s * w * self.feedforward)
        scored = sum(blocks[layer % len(blocks)] for layer in range(self.layers)) if blocks else 0
        return float(total + 2 * s * w * scored)


MODELS = {"wan-1.3b": VideoModel(layers=30, width=1536, feedforward=8960)}
