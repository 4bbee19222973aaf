"""A tiny random model of each family and of each of its options, made by transformers' classes."""

from typing import Any

from tests.tiny import SIZES

# Small, and with every number another one: a mixed up axis shows.
FIELDS = SIZES | {
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE = {"moe_intermediate_size": 20, "num_experts_per_tok": 2, "norm_topk_prob": True}
_LATENT = {
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
_SLIDING = {"use_sliding_window": True, "sliding_window": 5}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 2.0, 4.0],
    "original_max_position_embeddings": 32,
}

# case -> (transformers' class without its ending, fields of the config)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama 3.1": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 12}),
    "qwen2": ("Qwen2", _SLIDING | {"max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 12, "attention_bias": True}),
    "gemma": ("Gemma", {"head_dim": 12}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 10,
            "sliding_window": 5,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3_text": (
        "Gemma3Text",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 10,
            "sliding_window": 5,
            "num_hidden_layers": 8,
            "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2
            + ["sliding_attention"] * 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
            },
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 5}),
    "phi4": (
        "Phi3",
        {
            "rope_parameters": _LONG,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 32,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        _MOE
        | {
            "num_experts": 6,
            "shared_expert_intermediate_size": 28,
            "mlp_only_layers": [0],
            "norm_topk_prob": False,
        },
    ),
    "qwen3_moe": ("Qwen3Moe", _MOE | {"num_experts": 6, "head_dim": 12}),
    "olmoe": (
        "Olmoe",
        {"num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True},
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 12,
            "sliding_window": 5,
            "num_hidden_layers": 4,
            "swiglu_limit": 0.4,
            "rope_parameters": _YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
        },
    ),
    "olmo2": ("Olmo2", {"attention_bias": True}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 5,
            "num_hidden_layers": 4,
            "layer_types": [*["sliding_attention"] * 2, "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                "full_attention": _YARN,
            },
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.5,
        },
    ),
    "starcoder2": ("Starcoder2", {"sliding_window": 5}),
    "cohere": ("Cohere", {"logit_scale": 0.3, "use_qk_norm": True}),
    "cohere2": (
        "Cohere2",
        {
            "logit_scale": 0.3,
            "sliding_window": 5,
            "head_dim": 12,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "glm": ("Glm", {"head_dim": 8}),
    "glm4": ("Glm4", {"head_dim": 8}),
    "gpt2": ("GPT2", {"n_inner": 40}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt_neox in turn": ("GPTNeoX", {"use_parallel_residual": False, "attention_bias": False}),
    "stablelm": (
        "StableLm",
        {
            "use_qkv_bias": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "stablelm 2 12b": (
        "StableLm",
        {
            "qk_layernorm": True,
            "use_parallel_residual": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        _LATENT
        | {
            "moe_intermediate_size": 20,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 1.7,
            "rope_parameters": _YARN,
        },
    ),
    "deepseek_v2 lite": (
        "DeepseekV2",
        _LATENT | {"moe_intermediate_size": 20, "num_experts_per_tok": 2, "q_lora_rank": None},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        _LATENT
        | {
            "moe_intermediate_size": 20,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
            "attention_bias": True,
            "rope_parameters": _YARN,
        },
    ),
}
