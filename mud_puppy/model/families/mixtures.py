"""Families with experts: how their configs become `Experts` and `Latent`."""

import math
from typing import Any

from mud_puppy.errors import UserError
from mud_puppy.model.arch import Experts, Latent, Layer
from mud_puppy.model.families.layers import with_experts
from mud_puppy.model.families.modules import QKV

Layers = tuple[Layer, ...]
Fields = dict[str, Any]

_QKVO = (*QKV, "o_proj")


def mixtral(config: Any, layers: Layers) -> Fields:
    return {
        "experts": _experts(config, config.num_local_experts, renormalize=True),
        "kinds": _everywhere(layers),
        "renames": (
            ("block_sparse_moe", "mlp"),
            ("mlp/experts/w1", "mlp/experts/gate_proj"),
            ("mlp/experts/w3", "mlp/experts/up_proj"),
            ("mlp/experts/w2", "mlp/experts/down_proj"),
        ),
    }


def qwen2_moe(config: Any, layers: Layers) -> Fields:
    return {
        "experts": _experts(
            config,
            config.num_experts,
            shared=config.shared_expert_intermediate_size,
            renormalize=config.norm_topk_prob,
        ),
        "kinds": _sparse_steps(config, layers),
        "biases": QKV if config.qkv_bias else (),
        "renames": (("mlp/shared_expert", "mlp/shared"),),
    }


def qwen3_moe(config: Any, layers: Layers) -> Fields:
    return {
        "experts": _experts(config, config.num_experts, renormalize=config.norm_topk_prob),
        "kinds": _sparse_steps(config, layers),
        "qk_norm": "head",
        "biases": _QKVO if config.attention_bias else (),
    }


def olmoe(config: Any, layers: Layers) -> Fields:
    return {
        "experts": _experts(config, config.num_experts, renormalize=config.norm_topk_prob),
        "kinds": _everywhere(layers),
        "qk_norm": "width",
        "biases": _QKVO if config.attention_bias else (),
    }


def gpt_oss(config: Any, layers: Layers) -> Fields:
    _expect(config, "swiglu_alpha", 1.702)
    attention = _QKVO if config.attention_bias else ()
    return {
        "experts": _experts(config, config.num_local_experts, score="softmax_chosen"),
        "kinds": _everywhere(layers),
        "sinks": True,
        # transformers 5.17 has no such field, and this value.
        "act_limit": float(config.to_dict().get("swiglu_limit", 7.0)),
        "biases": (*attention, "router", "gate_up_proj", "down_proj"),
    }


def deepseek_v2(config: Any, layers: Layers) -> Fields:
    _expect(config, "scoring_func", "softmax")
    if config.topk_method not in ("greedy", "group_limited_greedy"):
        raise UserError(f"config: topk_method '{config.topk_method}' is not supported")
    # transformers reads it and does not use it; DeepSeek's own models have it false.
    _expect(config, "norm_topk_prob", False)
    grouped = config.topk_method == "group_limited_greedy"
    own = _groups(config) if grouped else {}
    return _deepseek(config, layers, **own) | {"interleaved": True}


def deepseek_v3(config: Any, layers: Layers) -> Fields:
    _expect(config, "scoring_func", "sigmoid")
    _expect(config, "topk_method", "noaux_tc")
    routing = {"score": "sigmoid", "renormalize": config.norm_topk_prob, "group_pairs": True}
    own = _deepseek(config, layers, **_groups(config), **routing)
    return own | {"interleaved": config.rope_interleave, "biases": (*own["biases"], "choice")}


def _deepseek(config: Any, layers: Layers, **routing: Any) -> Fields:
    _expect(config, "moe_layer_freq", 1)
    latent = Latent(
        q_rank=config.q_lora_rank,
        kv_rank=config.kv_lora_rank,
        nope=config.qk_nope_head_dim,
        rotated=config.qk_rope_head_dim,
        value=config.v_head_dim,
    )
    head_dim = latent.nope + latent.rotated
    biases = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj") if config.attention_bias else ()
    dense = config.first_k_dense_replace
    return {
        "experts": _experts(
            config,
            config.n_routed_experts,
            shared=config.moe_intermediate_size * (config.n_shared_experts or 0),
            scale=config.routed_scaling_factor,
            **routing,
        ),
        "latent": latent,
        "head_dim": head_dim,
        # Every head has keys of its own; they are made from what all share.
        "kv_heads": config.num_attention_heads,
        "kinds": with_experts(layers, [i >= dense for i in range(len(layers))]),
        "attn_scale": head_dim**-0.5 * _yarn_scale(config.rope_parameters) ** 2,
        "biases": biases,
        "renames": (("mlp/shared_experts", "mlp/shared"),),
    }


def _experts(config: Any, count: int, **own: Any) -> Experts:
    """own: the fields of `Experts` that the family decides."""
    fields = config.to_dict()
    size = fields.get("moe_intermediate_size") or fields["intermediate_size"]
    return Experts(count=count, size=size, per_token=config.num_experts_per_tok, **own)


def _groups(config: Any) -> Fields:
    return {"groups": config.n_group, "groups_per_token": config.topk_group}


def _everywhere(layers: Layers) -> Layers:
    return with_experts(layers, [True] * len(layers))


def _sparse_steps(config: Any, layers: Layers) -> Layers:
    """Every decoder_sparse_step-th layer has experts, but for mlp_only_layers."""
    step, dense = config.decoder_sparse_step, config.mlp_only_layers or ()
    if step < 1:
        raise UserError(f"config: decoder_sparse_step must be at least 1, not {step}")
    sparse = [i not in dense and (i + 1) % step == 0 for i in range(len(layers))]
    return with_experts(layers, sparse)


def _yarn_scale(spec: dict[str, Any]) -> float:
    """What DeepSeek multiplies queries and keys by, for the entropy of long contexts."""
    weight = spec.get("mscale_all_dim")
    if spec.get("rope_type", "default") == "default" or not weight or spec["factor"] <= 1:
        return 1.0
    return 0.1 * weight * math.log(spec["factor"]) + 1.0


def _expect(config: Any, name: str, value: Any) -> None:
    """UserError for another value of a field that this family's models have only one of."""
    found = config.to_dict().get(name, value)
    if found != value:
        raise UserError(f"config: {name} {found!r} is not supported; {value!r} is")
