"""Families without experts: what their configs say beyond llama's fields.

Each takes a config and the layers as `read_layers` has them, and gives fields of `Arch`.
"""

from typing import Any

from mud_puppy.model.arch import Layer
from mud_puppy.model.families.layers import without_rope
from mud_puppy.model.families.modules import MLP, QKV

Layers = tuple[Layer, ...]
Fields = dict[str, Any]

_POST = ("attn_post_norm", "mlp_post_norm")
_BOTH = ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")


def _attention_biases(config: Any, names: tuple[str, ...] = (*QKV, "o_proj")) -> tuple[str, ...]:
    return names if config.attention_bias else ()


def llama(config: Any, layers: Layers) -> Fields:
    return {"biases": _attention_biases(config) + (MLP if config.mlp_bias else ())}


def qwen3(config: Any, layers: Layers) -> Fields:
    return {"qk_norm": "head", "biases": _attention_biases(config)}


def gemma(config: Any, layers: Layers) -> Fields:
    return {
        "norm_offset": 1.0,
        "embed_scale": config.hidden_size**0.5,
        "biases": _attention_biases(config),
    }


def gemma2(config: Any, layers: Layers) -> Fields:
    return gemma(config, layers) | {
        "norms": _BOTH,
        "attn_scale": config.query_pre_attn_scalar**-0.5,
        "attn_softcap": config.attn_logit_softcapping,
        "logit_softcap": config.final_logit_softcapping,
    }


def gemma3(config: Any, layers: Layers) -> Fields:
    return gemma2(config, layers) | {"qk_norm": "head"}


def olmo2(config: Any, layers: Layers) -> Fields:
    return {"norms": _POST, "qk_norm": "width", "biases": _attention_biases(config)}


def smollm3(config: Any, layers: Layers) -> Fields:
    bare = [not rotated for rotated in config.no_rope_layers]
    return llama(config, layers) | {"kinds": without_rope(layers, bare)}


def granite(config: Any, layers: Layers) -> Fields:
    return llama(config, layers) | {
        "attn_scale": config.attention_multiplier,
        "embed_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": 1 / config.logits_scaling,
    }


def starcoder2(config: Any, layers: Layers) -> Fields:
    return {
        "norm": "layer",
        "norm_biases": True,
        "biases": (*QKV, "o_proj", "c_fc", "c_proj") if config.use_bias else (),
        "renames": (("mlp/c_fc", "mlp/up_proj"), ("mlp/c_proj", "mlp/down_proj")),
    }


def cohere(config: Any, layers: Layers) -> Fields:
    return {
        "norm": "layer",
        "norms": ("attn_norm",),
        "parallel": True,
        "interleaved": True,
        "qk_norm": "heads" if config.use_qk_norm else None,
        "logit_scale": config.logit_scale,
        "biases": _attention_biases(config),
    }


def cohere2(config: Any, layers: Layers) -> Fields:
    return {
        "norm": "layer",
        "norms": ("attn_norm",),
        "parallel": True,
        "interleaved": True,
        "logit_scale": config.logit_scale,
        "biases": _attention_biases(config),
        "kinds": without_rope(layers, [layer.window is None for layer in layers]),
    }


def glm(config: Any, layers: Layers) -> Fields:
    return {"interleaved": True, "biases": _attention_biases(config, QKV)}


def glm4(config: Any, layers: Layers) -> Fields:
    return glm(config, layers) | {"norms": _BOTH}


def gpt2(config: Any, layers: Layers) -> Fields:
    return {
        "mlp_size": config.n_inner or 4 * config.hidden_size,
        "kv_heads": config.num_attention_heads,
        "learned_positions": True,
        "norm": "layer",
        "norm_biases": True,
        "attn_scale": None if config.scale_attn_weights else 1.0,
        "biases": ("c_attn", "c_proj", "c_fc"),
        "renames": (
            ("attn", "self_attn"),
            ("self_attn/c_attn", "self_attn/qkv_proj"),
            ("self_attn/c_proj", "self_attn/o_proj"),
            ("mlp/c_fc", "mlp/up_proj"),
            ("mlp/c_proj", "mlp/down_proj"),
        ),
        "modules": ("transformer.wte", "transformer.h.", "lm_head"),
    }


def gpt_neox(config: Any, layers: Layers) -> Fields:
    own = _attention_biases(config, ("query_key_value", "dense"))
    return {
        "kv_heads": config.num_attention_heads,
        "norm": "layer",
        "norm_biases": True,
        "parallel": config.use_parallel_residual,
        "qkv_by_head": True,
        "biases": (*own, "dense_h_to_4h", "dense_4h_to_h"),
        "renames": (
            ("attention", "self_attn"),
            ("self_attn/query_key_value", "self_attn/qkv_proj"),
            ("self_attn/dense", "self_attn/o_proj"),
            ("mlp/dense_h_to_4h", "mlp/up_proj"),
            ("mlp/dense_4h_to_h", "mlp/down_proj"),
        ),
        "modules": ("gpt_neox.embed_in", "gpt_neox.layers.", "embed_out"),
    }


def stablelm(config: Any, layers: Layers) -> Fields:
    parallel = config.use_parallel_residual
    return {
        "norm": "layer",
        "norm_biases": True,
        "norms": ("attn_norm",) if parallel else ("attn_norm", "mlp_norm"),
        "parallel": parallel,
        "qk_norm": "heads" if config.qk_layernorm else None,
        "biases": QKV if config.use_qkv_bias else (),
    }


def plain(config: Any, layers: Layers) -> Fields:
    return {}
