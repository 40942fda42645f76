"""A bidirectional GRU over token vectors, padding left out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from foveate.ops.errors import InputError


class BiGRU(nn.Module):
    """torch's GRU in both directions: states h_t = [forward_t ; backward_t].

    Args:
        inputs: width of the token vectors.
        outputs: width of h, both directions together.
        layers: one on top of the other.

    Raises:
        InputError: an odd width, which two directions can't share.
    """

    def __init__(self, inputs: int, outputs: int, layers: int = 1) -> None:
        super().__init__()
        if outputs % 2:
            raise InputError(
                f"hidden_size={outputs}: the two directions of the recurrent layers share it; "
                "expected an even number."
            )
        self.gru = nn.GRU(inputs, outputs // 2, layers, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """Run over the real tokens of each row.

        Args:
            x: (B, L, inputs).
            real: (B, L) bool, False on padding, wherever it stands; None is all real. Each row has
                at least one real token.

        Returns:
            (B, L, outputs), 0 on padding.
        """
        if real is None or not x.shape[0]:
            return self.gru(x)[0]
        # Real tokens first, in their order, as torch's packing wants them; and back.
        order = (~real).to(torch.int8).argsort(dim=1, stable=True)[..., None]
        packed = pack_padded_sequence(
            x.gather(1, order.expand(-1, -1, x.shape[2])),
            real.sum(1).cpu(),
            batch_first=True,
            enforce_sorted=False,
        )
        y, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=x.shape[1])
        return torch.zeros_like(y).scatter(1, order.expand(-1, -1, y.shape[2]), y)
