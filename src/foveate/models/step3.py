"""Step-3's language model, as released or in small: MFA, experts beside a shared one, dense layers.

Pre-norm blocks (RMSNorm, eps 1e-5) of MFA and a feed-forward: SwiGLU in the first layers and the
last, elsewhere

    y = shared(x) + sum over the top 3 experts i of softmax(router)_i expert_i(x)

with weights of the softmax over all experts, not renormalised. Rotary positions with theta 5e5 turn
all of a head. Source: StepFun 2025, arXiv 2507.19427, section 2, and the released config.
"""

from __future__ import annotations

from typing import Any

from foveate.models.config import FoveateConfig
from foveate.ops.errors import InputError
from foveate.ops.masks.checks import whole

# As released; the small model is a 64th as wide in every map, with 16 heads of 16 in place of 64 of
# 256 (a 64th of their width together), and a quarter of the experts.
RELEASED: dict[str, int] = {
    "vocab_size": 128_815, "hidden_size": 7168, "num_hidden_layers": 61,
    "num_attention_heads": 64, "head_dim": 256, "query_rank": 2048, "intermediate_size": 18432,
    "num_experts": 48, "num_experts_per_tok": 3, "moe_intermediate_size": 5120,
    "shared_expert_intermediate_size": 5120, "dense_first": 4, "dense_last": 1,
    "max_position_embeddings": 65536,
}  # fmt: skip
SMALL: dict[str, int] = {
    "vocab_size": 256, "hidden_size": 112, "num_hidden_layers": 6, "num_attention_heads": 16,
    "head_dim": 16, "query_rank": 32, "intermediate_size": 288, "num_experts": 12,
    "num_experts_per_tok": 3, "moe_intermediate_size": 80, "shared_expert_intermediate_size": 80,
    "dense_first": 1, "dense_last": 1, "max_position_embeddings": 4096,
}  # fmt: skip


def step3_config(released: bool = False, **changes: Any) -> FoveateConfig:
    """The config of a Step-3 model, for `FoveateForCausalLM`.

    Args:
        released: the sizes of the released model (316 billion weights); else those of SMALL (1.9
            million).
        changes: sizes to replace, by the names of SMALL: head_dim is C, query_rank r_q, dense_first
            and dense_last the layers at either end that have no experts. Further names are fields
            of `FoveateConfig`, such as router_balance.

    Raises:
        InputError: more dense layers than there are, or a size below its least.
    """
    sizes = {name: changes.pop(name, value) for name, value in
             (RELEASED if released else SMALL).items()}  # fmt: skip
    for name, value in sizes.items():
        whole("step3_config", name, value, least=0 if name.startswith("dense_") else 1)
    first, last = sizes.pop("dense_first"), sizes.pop("dense_last")
    layers, rank, width = (sizes["num_hidden_layers"], sizes.pop("query_rank"), sizes["head_dim"])
    if first + last > layers:
        raise InputError(
            f"step3_config(dense_first={first}, dense_last={last}): there are {layers} layers."
        )
    fixed: dict[str, Any] = {
        "projection": f"mfa(head_dim={width}, query_rank={rank}, eps=1e-05)",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "rms_norm_eps": 1e-5,
        "moe_layers": list(range(first, layers - last)),
        "router_score": "softmax",
        "router_renormalize": False,
    }
    return FoveateConfig(**(sizes | fixed | changes))
