"""How far a method's predictions are from dense's, on the same tokens.

Language models: with p and q the next-token distributions of dense and of the method,

    KL(p || q) = sum_x p(x) (log p(x) - log q(x))   nats, mean over tokens
    agreement  = share of tokens where argmax p = argmax q
    perplexity = exp(mean of -log q(next token)),   loss = perplexity / dense perplexity - 1

Encoders have no next token: there it's the cosine between the final hidden states of each position,
and the relative error |h' - h| / |h| over all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.ops.errors import InputError

CHUNK = 256


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """(..., vocabulary) fp32: a model's logits from what its head is given, (..., dim)."""
    head = model.get_output_embeddings()
    logits = head(hidden).float()
    config = model.config.get_text_config()
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


@torch.inference_mode()
def check_head(model: Any, hidden: Tensor, logits: Tensor) -> None:
    """Refuse a model whose logits are made in another way than `logits_of` knows.

    Args:
        model: transformers' model.
        hidden: (B, L, dim), what the head was given.
        logits: (B, vocabulary) that the model gave for the last token.
    """
    ours, theirs = logits_of(model, hidden[:, -1]), logits.float()
    slack = 1e-3 if logits.dtype == torch.float32 else 5e-2
    worst = float((ours - theirs).abs().max())
    if not worst <= slack * max(1.0, float(theirs.abs().max())):
        raise InputError(
            f"{type(model).__name__} makes its logits in a way that isn't known here (difference "
            f"{worst:.2g}), so its quality can't be measured."
        )


@torch.inference_mode()
def score(
    model: Any, reference: Tensor, hidden: Tensor, ids: Tensor, scored: Tensor
) -> dict[str, float]:
    """Sums over the scored tokens, for means over several passes.

    Args:
        model: whose head turns hidden states into logits.
        reference: (B, L, dim), dense's hidden states.
        hidden: (B, L, dim), the method's.
        ids: (B, L) tokens.
        scored: (B, L) bool, the tokens that count, as targets.

    Returns:
        tokens, kl, agree, nll_dense, nll, and of the difference d of the two negative
        log-likelihoods the sum of squares (nll_difference_squared); max_logit, max_difference.
    """
    device = hidden.device
    rows, places = scored.to(device)[:, 1:].nonzero(as_tuple=True)
    targets = ids.to(device)[rows, places + 1]
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    most = torch.zeros(2, dtype=torch.float64, device=device)
    for part in torch.arange(len(rows), device=device).split(CHUNK):
        at = (rows[part], places[part])
        p, q = logits_of(model, reference[at]), logits_of(model, hidden[at])
        most[0] = torch.maximum(most[0], p.abs().max().double())
        most[1] = torch.maximum(most[1], (p - q).abs().max().double())
        lse_p, lse_q = p.logsumexp(-1), q.logsumexp(-1)
        target = targets[part][:, None]
        nll_p = lse_p - p.gather(1, target)[:, 0]
        nll_q = lse_q - q.gather(1, target)[:, 0]
        agree = p.argmax(-1) == q.argmax(-1)
        # sum p (log p - log q) = sum p (p_logit - q_logit) - lse_p + lse_q
        gap = torch.sub(p, q, out=q)
        weights = torch.sub(p, lse_p[:, None], out=p).exp_()
        kl = (weights * gap).sum(-1) - lse_p + lse_q
        sums += torch.stack(
            [
                kl.double().sum(),
                agree.double().sum(),
                nll_p.double().sum(),
                nll_q.double().sum(),
                ((nll_q - nll_p).double() ** 2).sum(),
            ]
        )
    names = ("kl", "agree", "nll_dense", "nll", "nll_difference_squared")
    return {
        "tokens": float(len(rows)),
        **dict(zip(names, sums.tolist())),
        "max_logit": float(most[0]),
        "max_difference": float(most[1]),
    }


@torch.inference_mode()
def compare_states(reference: Tensor, hidden: Tensor) -> dict[str, float]:
    """Sums for the agreement of an encoder's final hidden states, both (B, L, dim)."""
    p, q = reference.double(), hidden.double()
    cosine = torch.nn.functional.cosine_similarity(p, q, dim=-1)
    return {
        "tokens": float(cosine.numel()),
        "cosine": float(cosine.sum()),
        "worst_cosine": float(cosine.min()),
        "error_squared": float(((q - p) ** 2).sum()),
        "norm_squared": float((p**2).sum()),
    }
