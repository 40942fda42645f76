"""Small configs of transformers' families, and what their own classes come to."""

from __future__ import annotations

BASE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 100,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
MLA = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
       "v_head_dim": 12}  # fmt: skip
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
         "linear_value_head_dim": 24, "linear_conv_kernel_dim": 4}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 12,
          "mamba_d_conv": 4, "mamba_expand": 2}  # fmt: skip
FEW = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}

FAMILIES: dict[str, dict[str, object]] = {
    "llama": BASE,
    "qwen2": BASE,
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 100, "n_positions": 32},
    "opt": {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "vocab_size": 100, "word_embed_proj_dim": 64, "max_position_embeddings": 32},
    "gpt_neox": {k: v for k, v in BASE.items() if k != "num_key_value_heads"},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
               "vocab_size": 100, "ffn_hidden_size": 96, "multi_query": True},
    "mistral": BASE | {"sliding_window": 5},
    "mixtral": BASE | LOCAL,
    "gemma3_text": BASE | {"head_dim": 24, "sliding_window": 5},
    "gemma2": BASE | {"head_dim": 24, "sliding_window": 5},
    "cohere2": BASE | {"sliding_window": 5},
    "qwen3_moe": BASE | FEW | {"head_dim": 24, "mlp_only_layers": [1]},
    "gpt_oss": BASE | LOCAL | {"head_dim": 24, "sliding_window": 5},
    "llama4_text": BASE | {
        "head_dim": 16, "intermediate_size_mlp": 80, "num_local_experts": 6,
        "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "attention_chunk_size": 5,
    },
    "ernie4_5_moe": BASE | {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 24,
                            "moe_num_shared_experts": 1},
    "glm4_moe": BASE | ROUTED | {"head_dim": 24},
    "mimo_v2_flash": BASE | {
        "head_dim": 24, "v_head_dim": 16, "n_routed_experts": 6, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "sliding_window": 5,
    },
    "deepseek_v3": BASE | MLA | ROUTED | {"num_key_value_heads": 4},
    "deepseek_v2": BASE | MLA | ROUTED | {"num_key_value_heads": 4, "q_lora_rank": None},
    "deepseek_v32": BASE | MLA | ROUTED | {
        "num_key_value_heads": 4, "index_topk": 6, "index_head_dim": 16, "index_n_heads": 2,
    },
    "minimax": BASE | LOCAL | {"head_dim": 16},
    "qwen3_next": BASE | DELTA | FEW | {"head_dim": 24, "shared_expert_intermediate_size": 20},
    "olmo_hybrid": BASE | DELTA | {"linear_num_key_heads": 4, "pad_token_id": None},
    "jamba": BASE | {"num_experts": 6, "num_experts_per_tok": 2, "attn_layer_period": 4,
                     "attn_layer_offset": 2, "mamba_d_state": 12, "mamba_dt_rank": 10,
                     "use_mamba_kernels": False},
    "bamba": BASE | MAMBA2 | {"attn_layer_indices": [2]},
    "granitemoehybrid": BASE | MAMBA2 | LOCAL | {
        "shared_intermediate_size": 40, "layer_types": ["mamba", "attention", "mamba", "mamba"],
    },
    "falcon_h1": BASE | MAMBA2 | {"mamba_d_ssm": 128, "head_dim": 16},
    "nemotron_h": {k: v for k, v in BASE.items() if k != "num_hidden_layers"} | {
        "head_dim": 16, "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 12,
        "n_routed_experts": 6, "n_shared_experts": 1, "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 20, "num_experts_per_tok": 2,
        "use_mamba_kernels": False,
    },
    "mamba": {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 100, "state_size": 12},
    "mamba2": {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 100, "state_size": 12,
               "num_heads": 8, "head_dim": 16, "n_groups": 2},
    "arcee": BASE,
    "nanochat": BASE,
    "lfm2": BASE | {"layer_types": ["conv", "full_attention", "conv", "conv"], "conv_L_cache": 3,
                    "block_multiple_of": 16},
    "kimi_linear": BASE | MLA | {
        "num_key_value_heads": 4, "q_lora_rank": None, "num_experts": 6, "pad_token_id": 0,
        "num_experts_per_token": 2, "moe_intermediate_size": 24, "num_shared_experts": 1,
        "linear_head_dim": 16, "linear_num_heads": 4,
        "layer_types": ["linear_attention", "linear_attention", "full_attention",
                        "linear_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
}  # fmt: skip
