"""The change of basis of a latent that lets its slices stand for the whole.

TPLA, arXiv 2508.15881, section 4. With an orthogonal U [r, r] and slice j of r / g columns, the
conditions are alpha_j ||(c U)_j||^2 ~ ||c U||^2 for the norm and Q chat^T ~ mu_j Q'_j (chat U)_j^T
for the softmax. With share_j, the part of the energy that slice j holds, the first one asks for
alpha_j = 1 / share_j. (The paper prints alpha_j = share_j, which contradicts its own condition.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveate.ops.errors import InputError, nearest

Transform = Literal["pca", "hadamard", "identity"]
TRANSFORMS: tuple[Transform, ...] = ("pca", "hadamard", "identity")
MOST = 1e3  # a slice without energy would otherwise get an infinite factor


def hadamard(size: int) -> Tensor:
    """Sylvester's H (size, size), entries 1 and -1, in float64.

    Raises:
        InputError: size is no power of two.
    """
    if size < 1 or size & (size - 1):
        raise InputError(
            f"hadamard({size}): Sylvester's matrices exist for powers of two only; use "
            "transform='pca' for this latent width."
        )
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def orthogonal_basis(
    transform: Transform,
    size: int,
    latents: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """U (size, size) in float64: columns are the new axes.

    Args:
        transform: "hadamard" is diag(random signs) H / sqrt(size); "pca" the eigenvectors of the
            latents' second moments, largest first; "identity".
        size: r.
        latents: (N, size) normalised latents, for "pca".
        generator: draws the signs.

    Raises:
        InputError: an unknown transform, "pca" without latents, or a size that doesn't fit.
    """
    if transform == "identity":
        return torch.eye(size, dtype=torch.float64)
    if transform == "hadamard":
        signs = torch.randint(0, 2, (size, 1), generator=generator, device="cpu") * 2.0 - 1.0
        return signs.double() * hadamard(size) / size**0.5
    if transform != "pca":
        raise InputError(f"transform={transform!r} is unknown; {nearest(transform, TRANSFORMS)}")
    rows = _rows(latents, size)
    return torch.linalg.eigh(rows.T @ rows / len(rows)).eigenvectors.flip(-1).cpu()


def _rows(latents: Tensor | None, size: int) -> Tensor:
    if latents is None or latents.shape[-1] != size or not latents.numel():
        got = "none" if latents is None else tuple(latents.shape)
        raise InputError(
            f"PCA needs latents (N, {size}) of a calibration text, got {got}; run the layer's "
            "inputs through it, or use transform='hadamard'."
        )
    return latents.reshape(-1, size).double()


@dataclass(frozen=True, eq=False)
class Basis:
    """A change of basis and what the slices then need.

    Attributes:
        matrix: U (r, r), orthogonal, float64.
        shares: (g,) share of the latents' energy in each slice, summing to 1.
        alpha: (g,) factors of the norm.
        mu: (g,) factors of the scores.
    """

    matrix: Tensor
    shares: Tensor
    alpha: Tensor
    mu: Tensor


def find_basis(
    transform: Transform,
    size: int,
    groups: int,
    latents: Tensor | None = None,
    mu: str | None = None,
    generator: torch.Generator | None = None,
) -> Basis:
    """U, and alpha and mu as the conditions ask.

    Args:
        transform: as in `orthogonal_basis`.
        size: r.
        groups: g.
        latents: (N, r) normalised latents; without them ("hadamard", "identity") all slices count
            as equal.
        mu: "one" or "inverse" (1 / share); None is "one" for PCA, where a weak slice's scores are
            noise that mustn't be blown up, else "inverse". ("fit" is made from it by `to_tpla`.)
        generator: draws the Hadamard signs.

    Raises:
        InputError: g doesn't divide r, or an unknown name.
    """
    if groups < 1 or size % groups:
        raise InputError(f"groups={groups}: expected a divisor of the latent's {size}.")
    matrix = orthogonal_basis(transform, size, latents, generator)
    shares = torch.full((groups,), 1.0 / groups, dtype=torch.float64)
    if transform == "pca":
        energy = (_rows(latents, size).cpu() @ matrix).square().mean(0)
        shares = energy.unflatten(0, (groups, -1)).sum(1) / energy.sum()
    inverse = (1.0 / shares).clamp(max=MOST)
    if mu is None:
        mu = "one" if transform == "pca" else "inverse"
    if mu not in ("one", "inverse"):
        raise InputError(f"mu={mu!r} is unknown; {nearest(str(mu), ('one', 'inverse', 'fit'))}")
    return Basis(matrix, shares, inverse, torch.ones_like(shares) if mu == "one" else inverse)
