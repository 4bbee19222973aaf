"""What the metadata of each GGUF architecture says of its config, beside what all say.

Each function takes entries out of `given`, and returns fields of a config.json; `fields` has those
of all. What llama.cpp knows by the name of the architecture alone (which layers have a window,
whether the weights of experts are normalized) is said here. Source: the same names in
https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py and src/llama-model.cpp.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

Fields = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """rotary: rows of q and k have the two halves of each head's rotation side by side.
    norm_offset: what norms were raised by. head_dim: the config has one."""

    fields: Callable[[Fields, Fields, Collection[str]], Fields]
    rotary: bool = False
    norm_offset: float = 0.0
    head_dim: bool = True


def _llama(given: Fields, fields: Fields, tensors: Collection[str]) -> Fields:
    """Files of Mistral and Mixtral models say llama."""
    window = {}
    if "attention.sliding_window" in given:
        window = {"sliding_window": given.pop("attention.sliding_window")}
    if "expert_count" in given:
        return {
            "model_type": "mixtral",
            "num_local_experts": given.pop("expert_count"),
            "num_experts_per_tok": given.pop("expert_used_count"),
        } | window
    if window:
        return {"model_type": "mistral"} | window
    return {
        "model_type": "llama",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def _plain(model_type: str) -> Callable[[Fields, Fields, Collection[str]], Fields]:
    return lambda given, fields, tensors: {"model_type": model_type}


def _qwen2_moe(given: Fields, fields: Fields, tensors: Collection[str]) -> Fields:
    shared = given.pop("expert_shared_feed_forward_length")
    return _experts(given) | {
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": shared,
        "norm_topk_prob": False,
    }


def _qwen3_moe(given: Fields, fields: Fields, tensors: Collection[str]) -> Fields:
    return _experts(given) | {"model_type": "qwen3_moe", "norm_topk_prob": True}


def _experts(given: Fields) -> Fields:
    return {
        "num_experts": given.pop("expert_count"),
        "num_experts_per_tok": given.pop("expert_used_count"),
        "moe_intermediate_size": given.pop("expert_feed_forward_length"),
    }


def _gemma2(given: Fields, fields: Fields, tensors: Collection[str]) -> Fields:
    large = fields["num_hidden_layers"] == 46  # 27B
    return {
        "model_type": "gemma2",
        "query_pre_attn_scalar": _query_scale(fields, large),
        "attn_logit_softcapping": short(given.pop("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": short(given.pop("final_logit_softcapping", 30.0)),
        "sliding_window": given.pop("attention.sliding_window"),
        "layer_types": _pattern(fields, 2),
    }


def _gemma3(given: Fields, fields: Fields, tensors: Collection[str]) -> Fields:
    large = fields["num_hidden_layers"] == 62  # 27B
    local = {"rope_type": "default", "rope_theta": short(given.pop("rope.freq_base_swa", 10000.0))}
    return {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": _query_scale(fields, large),
        "final_logit_softcapping": given.pop("final_logit_softcapping", None),
        "sliding_window": given.pop("attention.sliding_window"),
        "layer_types": _pattern(fields, 6),
        "rope_parameters": {
            "full_attention": fields["rope_parameters"],
            "sliding_attention": local,
        },
    }


def _query_scale(fields: Fields, large: bool) -> int:
    """The number whose root scores are divided by, which no entry says."""
    width = fields["hidden_size"] // fields["num_attention_heads"]
    return width if large else fields["head_dim"]


def _pattern(fields: Fields, every: int) -> list[str]:
    """Each `every`th layer sees all positions, the others a window."""
    kinds = ["sliding_attention"] * (every - 1) + ["full_attention"]
    return [kinds[i % every] for i in range(fields["num_hidden_layers"])]


def _phi3(given: Fields, fields: Fields, tensors: Collection[str]) -> Fields:
    own = {
        "model_type": "phi3",
        "sliding_window": given.pop("attention.sliding_window", 0) or None,
    }
    original = given.pop("rope.scaling.original_context_length", None)
    return own if original is None else own | {"original_max_position_embeddings": original}


def _granite(given: Fields, fields: Fields, tensors: Collection[str]) -> Fields:
    return {
        "model_type": "granite",
        "attention_multiplier": short(given.pop("attention.scale")),
        "embedding_multiplier": short(given.pop("embedding_scale")),
        "residual_multiplier": short(given.pop("residual_scale")),
        "logits_scaling": short(given.pop("logit_scale")),
    }


def _starcoder2(given: Fields, fields: Fields, tensors: Collection[str]) -> Fields:
    # llama.cpp gives these models no window either.
    return {
        "model_type": "starcoder2",
        "sliding_window": None,
        "use_bias": "blk.0.attn_q.bias" in tensors,
    }


ARCHITECTURES = {
    "llama": Architecture(_llama, rotary=True),
    "qwen2": Architecture(_plain("qwen2"), head_dim=False),
    "qwen2moe": Architecture(_qwen2_moe, head_dim=False),
    "qwen3": Architecture(_plain("qwen3")),
    "qwen3moe": Architecture(_qwen3_moe),
    "gemma": Architecture(_plain("gemma"), norm_offset=1.0),
    "gemma2": Architecture(_gemma2, norm_offset=1.0),
    "gemma3": Architecture(_gemma3, norm_offset=1.0),
    "phi3": Architecture(_phi3, head_dim=False),
    "olmo2": Architecture(_plain("olmo2"), head_dim=False),
    "smollm3": Architecture(_plain("smollm3"), rotary=True, head_dim=False),
    "granite": Architecture(_granite, rotary=True, head_dim=False),
    "starcoder2": Architecture(_starcoder2, head_dim=False),
}


def short(value: float) -> float:
    """1e-5 for the float32 9.99999974e-06: the number that was written."""
    return float(str(np.float32(value)))
