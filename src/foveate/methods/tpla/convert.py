"""A trained MLA as a TPLA or GLA, without training: fold the gain, turn the basis, cut slices.

TPLA, arXiv 2508.15881, section 4. Folding and turning are exact:

    W_UK <- diag(gamma) W_UK,  W_UV <- diag(gamma) W_UV,  gamma <- 1
    W_DKV' = W_DKV U,  W_UK' = U^T W_UK,  W_UV' = U^T W_UV

because RMS(c U) = RMS(c) for an orthogonal U, as long as no gain stands between.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor

from foveate.methods.tpla.basis import MOST, Transform, find_basis
from foveate.methods.tpla.mla import MLAProjection
from foveate.methods.tpla.sharded import TPLA, TPLAProjection
from foveate.ops.errors import InputError
from foveate.parts.norm import RMSNorm
from foveate.parts.projection import Sizes


@torch.no_grad()
def fold_gain(mla: MLAProjection) -> MLAProjection:
    """A copy with gamma = 1 and its gain in W_UK and W_UV: the same outputs (step 6)."""
    made = deepcopy(mla)
    norm = made.kv_norm
    if isinstance(norm, RMSNorm):
        made.kv_up.weight.copy_(made.kv_up.weight.double() * norm.weight.double())
        norm.weight.fill_(1.0)
    return made


@torch.no_grad()
def rebase(mla: MLAProjection, matrix: Tensor) -> MLAProjection:
    """A copy whose latent is in the basis U (r, r) (step 7); the same outputs if gamma is 1."""
    made = deepcopy(mla)
    r = made.latent
    u = matrix.to(made.kv_down.weight.device, torch.float64)
    down = made.kv_down
    down.weight[:r] = (u.T @ down.weight[:r].double()).to(down.weight.dtype)
    if down.bias is not None:
        down.bias[:r] = (down.bias[:r].double() @ u).to(down.bias.dtype)
    made.kv_up.weight.copy_(made.kv_up.weight.double() @ u)
    return made


@torch.no_grad()
def to_tpla(
    mla: MLAProjection,
    recipe: TPLA | None = None,
    transform: Transform = "pca",
    hidden: Tensor | None = None,
    mu: str | None = None,
    generator: torch.Generator | None = None,
) -> TPLAProjection:
    """A TPLA or GLA with a trained MLA's weights.

    Args:
        mla: the trained projection; it stays as it is.
        recipe: groups and variants; its sizes don't count, they are the MLA's.
        transform: "pca" (the paper's choice), "hadamard" or "identity".
        hidden: (..., dim) inputs of this layer on a calibration text; PCA and mu="fit" need them.
        mu: "one", "inverse" (1 / share) or "fit", the least squares of whole scores on a slice's;
            None is "one" for PCA, else "inverse".
        generator: draws the Hadamard signs.

    Raises:
        InputError: calibration is missing, or g doesn't divide the latent.
    """
    recipe = TPLA() if recipe is None else recipe
    folded = fold_gain(mla)
    rows = None if hidden is None else hidden.reshape(-1, hidden.shape[-1])
    latents = None if rows is None else _latents(folded, rows)
    if mu == "fit" and rows is None:
        raise InputError("mu='fit' needs hidden=, inputs of this layer on a calibration text.")
    basis = find_basis(
        transform,
        mla.latent,
        recipe.groups,
        latents,
        None if mu == "fit" else mu,
        generator,
    )
    turned = rebase(folded, basis.matrix)
    made = _with_weights(turned, recipe)
    made.alpha.copy_(basis.alpha)
    if not made.blocks:  # GLA has no mu
        made.mu.copy_(basis.mu if rows is None or mu != "fit" else _fitted(turned, made, rows))
    return made


def _with_weights(mla: MLAProjection, recipe: TPLA) -> TPLAProjection:
    """A TPLA of the MLA's sizes with its weights."""
    source = mla.kv_down
    rank = None if mla.q_down is None else mla.q_down.out_features
    sizes = Sizes(
        mla.out.out_features,
        mla.heads,
        mla.head_dim,
        source.in_features,
        source.bias is not None,
        mla.out.bias is not None,
    )
    same = replace(
        recipe,
        latent=mla.latent,
        rope_dim=mla.rope_dim,
        query_rank=rank,
        head_dim=mla.head_dim,
        value_dim=mla.value_dim,
        mscale=mla.mscale,
        eps=mla.eps,
    )
    made = same.build(sizes).to(source.weight.device, source.weight.dtype)
    state = {k: v for k, v in mla.state_dict().items() if not k.startswith("kv_norm")}
    missing, unknown = made.load_state_dict(state, strict=False)
    assert not unknown
    assert set(missing) == {"alpha", "mu"}
    return made


def _latents(mla: MLAProjection, rows: Tensor) -> Tensor:
    """Normalised latents chat (N, r) of inputs (N, dim)."""
    return mla.kv_norm(mla.kv_down(rows)[:, : mla.latent])


def _fitted(mla: MLAProjection, made: TPLAProjection, rows: Tensor) -> Tensor:
    """mu_j that minimises |Q chat^T - mu_j Q_j chat_j^T|^2 over all heads and pairs of tokens.

    With s = Q chat^T and s_j = Q_j chat_j^T it is <s, s_j> / <s_j, s_j>; both are traces of r x r
    matrices, so no n x n scores are made.
    """
    x = rows[None]
    q = mla._absorbed(mla.query(x))[0].double()  # (h, n, r)
    chat = _latents(mla, rows).double()
    local = made.entries(x, phase="decode")["latent"][0, ..., : made.slice_width].double()
    found = []
    for j in range(made.groups):
        at = slice(j * made.slice_width, (j + 1) * made.slice_width)
        q_full = torch.einsum("hnr,hns->rs", q, q[..., at])
        k_full = chat.T @ local[j]
        q_own, k_own = q_full[at], local[j].T @ local[j]
        found.append((q_full * k_full).sum() / (q_own * k_own).sum().clamp_min(1e-30))
    return torch.stack(found).clamp(-MOST, MOST)
