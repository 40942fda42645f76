"""Packed bit tiles: each distinct one once."""

import torch

from foveate.ops.layout import bits


def test_tiles_that_differ_in_high_bits_have_hashes_of_their_own(monkeypatch):
    """Last rows, and whole words and their opposites, once fell on one hash and were sorted."""
    one = torch.zeros(64, 64, 64, dtype=torch.bool)
    one[torch.arange(64), torch.arange(64), 63] = True  # key i is seen by the last row alone
    halves = torch.zeros(2, 64, 64, dtype=torch.bool)
    halves[0, :, :16] = halves[1, :, 16:] = True
    packed = bits.pack(torch.cat((one, halves, one[:5])))
    real, called = torch.unique, []

    def spy(x, *given, **more):
        called.append(x.dim())
        return real(x, *given, **more)

    monkeypatch.setattr(torch, "unique", spy)
    table, index = bits.distinct(packed)
    assert called == [1]
    assert len(table) == 66
    assert torch.equal(table[index], packed)
    assert index.tolist() == [*range(66), *range(5)]
