"""The table of families: what of each differs from llama, as data.

`arch` gives the fields of `Arch` that a config decides and llama's reading does not, from the
config and the layers as `read_layers` has them. `linears`: the modules of a block with their
logical axes. `names`: HF's names of norms and routers. `fields`: what the config calls a field.
`reads`: fields that only this family's `arch` looks at. `transposed`: modules whose weights are
stored [in, out]; `stacked`: those whose experts are one tensor. `ignored`: a pattern of tensors
that a file may have and nobody reads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mud_puppy.model.arch import Arch, Layer
from mud_puppy.model.families import modules
from mud_puppy.model.families.layers import without_rope
from mud_puppy.model.families.mixtures import (
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)
from mud_puppy.model.families.modules import MLP, QKV

Layers = tuple[Layer, ...]
Fields = dict[str, Any]


@dataclass(frozen=True)
class Family:
    hf_class: str
    arch: Callable[[Any, Layers], Fields]
    linears: Callable[[Arch], modules.Modules] = modules.llama
    names: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    reads: str = ""
    transposed: frozenset[str] = frozenset()
    stacked: frozenset[str] = frozenset()
    ignored: str = ""

    def name(self, norm: str) -> str:
        """HF's name of one of our norms, or of the router."""
        return ({**_NAMES, **self.names})[norm]


_NAMES = {
    "final_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "router": "mlp.gate",
}
_SANDWICH = {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_AFTER = {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_POST = ("attn_post_norm", "mlp_post_norm")
_BOTH = ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")
_SLIDING = "use_sliding_window sliding_window max_window_layers layer_types"
_LAYER_NORM = {"norm_eps": "layer_norm_eps"}


def _attention_biases(config: Any, names: tuple[str, ...] = (*QKV, "o_proj")) -> tuple[str, ...]:
    return names if config.attention_bias else ()


def _llama(config: Any, layers: Layers) -> Fields:
    return {"biases": _attention_biases(config) + (MLP if config.mlp_bias else ())}


def _qwen3(config: Any, layers: Layers) -> Fields:
    return {"qk_norm": "head", "biases": _attention_biases(config)}


def _gemma(config: Any, layers: Layers) -> Fields:
    return {
        "norm_offset": 1.0,
        "embed_scale": config.hidden_size**0.5,
        "biases": _attention_biases(config),
    }


def _gemma2(config: Any, layers: Layers) -> Fields:
    return _gemma(config, layers) | {
        "norms": _BOTH,
        "attn_scale": config.query_pre_attn_scalar**-0.5,
        "attn_softcap": config.attn_logit_softcapping,
        "logit_softcap": config.final_logit_softcapping,
    }


def _gemma3(config: Any, layers: Layers) -> Fields:
    return _gemma2(config, layers) | {"qk_norm": "head"}


def _olmo2(config: Any, layers: Layers) -> Fields:
    return {"norms": _POST, "qk_norm": "width", "biases": _attention_biases(config)}


def _smollm3(config: Any, layers: Layers) -> Fields:
    bare = [not rotated for rotated in config.no_rope_layers]
    return _llama(config, layers) | {"kinds": without_rope(layers, bare)}


def _granite(config: Any, layers: Layers) -> Fields:
    return _llama(config, layers) | {
        "attn_scale": config.attention_multiplier,
        "embed_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": 1 / config.logits_scaling,
    }


def _starcoder2(config: Any, layers: Layers) -> Fields:
    return {
        "norm": "layer",
        "norm_biases": True,
        "biases": (*QKV, "o_proj", "c_fc", "c_proj") if config.use_bias else (),
        "renames": (("mlp/c_fc", "mlp/up_proj"), ("mlp/c_proj", "mlp/down_proj")),
    }


def _cohere(config: Any, layers: Layers) -> Fields:
    return {
        "norm": "layer",
        "norms": ("attn_norm",),
        "parallel": True,
        "interleaved": True,
        "qk_norm": "heads" if config.use_qk_norm else None,
        "logit_scale": config.logit_scale,
        "biases": _attention_biases(config),
    }


def _cohere2(config: Any, layers: Layers) -> Fields:
    return {
        "norm": "layer",
        "norms": ("attn_norm",),
        "parallel": True,
        "interleaved": True,
        "logit_scale": config.logit_scale,
        "biases": _attention_biases(config),
        "kinds": without_rope(layers, [layer.window is None for layer in layers]),
    }


def _glm(config: Any, layers: Layers) -> Fields:
    return {"interleaved": True, "biases": _attention_biases(config, QKV)}


def _glm4(config: Any, layers: Layers) -> Fields:
    return _glm(config, layers) | {"norms": _BOTH}


def _gpt2(config: Any, layers: Layers) -> Fields:
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


def _gpt_neox(config: Any, layers: Layers) -> Fields:
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


def _stablelm(config: Any, layers: Layers) -> Fields:
    parallel = config.use_parallel_residual
    return {
        "norm": "layer",
        "norm_biases": True,
        "norms": ("attn_norm",) if parallel else ("attn_norm", "mlp_norm"),
        "parallel": parallel,
        "qk_norm": "heads" if config.qk_layernorm else None,
        "biases": QKV if config.use_qkv_bias else (),
    }


def _plain(config: Any, layers: Layers) -> Fields:
    return {}


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _llama, reads="attention_bias mlp_bias head_dim"),
    "mistral": Family("MistralForCausalLM", _plain, reads="sliding_window head_dim layer_types"),
    "qwen2": Family("Qwen2ForCausalLM", lambda c, ls: {"biases": QKV}, reads=_SLIDING),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, reads=f"{_SLIDING} attention_bias head_dim"),
    "gemma": Family("GemmaForCausalLM", _gemma, reads="attention_bias head_dim hidden_activation"),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _gemma2,
        names=_SANDWICH,
        fields={"act": "hidden_activation"},
        reads="attention_bias head_dim query_pre_attn_scalar attn_logit_softcapping hidden_act "
        "final_logit_softcapping sliding_window layer_types",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _gemma3,
        names=_SANDWICH,
        fields={"act": "hidden_activation"},
        reads="attention_bias head_dim query_pre_attn_scalar attn_logit_softcapping hidden_act "
        "final_logit_softcapping sliding_window layer_types _sliding_window_pattern "
        "sliding_window_pattern",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _plain,
        modules.phi3,
        reads="sliding_window original_max_position_embeddings partial_rotary_factor",
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        _olmo2,
        names=_AFTER,
        reads="attention_bias",
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        _olmo2,
        names=_AFTER,
        reads="attention_bias sliding_window layer_types",
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _smollm3,
        reads=f"{_SLIDING} no_rope_layers no_rope_layer_interval attention_bias mlp_bias",
    ),
    "granite": Family(
        "GraniteForCausalLM",
        _granite,
        reads="attention_bias mlp_bias attention_multiplier embedding_multiplier "
        "residual_multiplier logits_scaling",
    ),
    "starcoder2": Family(
        "Starcoder2ForCausalLM",
        _starcoder2,
        modules.starcoder2,
        fields={"norm_eps": "norm_epsilon"},
        reads="use_bias sliding_window",
    ),
    "cohere": Family(
        "CohereForCausalLM",
        _cohere,
        fields=_LAYER_NORM,
        reads="attention_bias use_qk_norm logit_scale",
    ),
    "cohere2": Family(
        "Cohere2ForCausalLM",
        _cohere2,
        fields=_LAYER_NORM,
        reads="attention_bias logit_scale head_dim sliding_window layer_types",
    ),
    "glm": Family("GlmForCausalLM", _glm, modules.glm, reads="attention_bias head_dim"),
    "glm4": Family(
        "Glm4ForCausalLM",
        _glm4,
        modules.glm,
        names={
            "attn_post_norm": "post_self_attn_layernorm",
            "mlp_post_norm": "post_mlp_layernorm",
        },
        reads="attention_bias head_dim",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        _gpt2,
        modules.gpt2,
        names={
            "positions": "transformer.wpe",
            "final_norm": "transformer.ln_f",
            "attn_norm": "ln_1",
            "mlp_norm": "ln_2",
        },
        fields={"act": "activation_function", "norm_eps": "layer_norm_epsilon"},
        reads="n_inner n_embd n_head n_layer n_positions n_ctx scale_attn_weights",
        transposed=frozenset(("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")),
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        _gpt_neox,
        modules.gpt_neox,
        names={"final_norm": "gpt_neox.final_layer_norm"},
        fields=_LAYER_NORM,
        reads="attention_bias use_parallel_residual",
    ),
    "stablelm": Family(
        "StableLmForCausalLM",
        _stablelm,
        names={
            "q_norm": "self_attn.q_layernorm.norms.{e}",
            "k_norm": "self_attn.k_layernorm.norms.{e}",
        },
        fields=_LAYER_NORM,
        reads="use_parallel_residual qk_layernorm use_qkv_bias",
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        mixtral,
        modules.mixtral,
        names={"router": "block_sparse_moe.gate"},
        reads="sliding_window head_dim num_local_experts num_experts_per_tok",
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        qwen2_moe,
        modules.qwen2_moe,
        reads=f"{_SLIDING} decoder_sparse_step mlp_only_layers moe_intermediate_size qkv_bias "
        "shared_expert_intermediate_size num_experts num_experts_per_tok norm_topk_prob",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        qwen3_moe,
        modules.qwen3_moe,
        reads=f"{_SLIDING} decoder_sparse_step mlp_only_layers moe_intermediate_size head_dim "
        "num_experts num_local_experts num_experts_per_tok norm_topk_prob attention_bias",
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        olmoe,
        modules.qwen3_moe,
        reads="attention_bias num_experts num_local_experts num_experts_per_tok norm_topk_prob",
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        gpt_oss,
        modules.gpt_oss,
        names={"router": "mlp.router"},
        reads="attention_bias head_dim sliding_window layer_types num_local_experts num_experts "
        "num_experts_per_tok experts_per_token swiglu_alpha swiglu_limit initial_context_length",
        transposed=frozenset(("mlp/experts/gate_up_proj", "mlp/experts/down_proj")),
        stacked=frozenset(("mlp/experts/gate_up_proj", "mlp/experts/down_proj")),
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        deepseek_v2,
        modules.deepseek,
        reads="attention_bias head_dim first_k_dense_replace kv_lora_rank q_lora_rank "
        "n_group n_routed_experts num_experts n_shared_experts qk_nope_head_dim qk_rope_head_dim "
        "qk_head_dim v_head_dim routed_scaling_factor topk_group topk_method norm_topk_prob "
        "num_experts_per_tok moe_intermediate_size moe_layer_freq scoring_func seq_aux "
        "aux_loss_alpha ep_size",
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        deepseek_v3,
        modules.deepseek,
        reads="attention_bias head_dim first_k_dense_replace kv_lora_rank q_lora_rank n_group "
        "n_routed_experts num_local_experts n_shared_experts qk_nope_head_dim qk_rope_head_dim "
        "qk_head_dim v_head_dim routed_scaling_factor topk_group topk_method norm_topk_prob "
        "num_experts_per_tok moe_intermediate_size moe_layer_freq scoring_func rope_interleave "
        "seq_aux aux_loss_alpha ep_size num_nextn_predict_layers num_mtp_layers",
        # Layers that predict tokens further ahead; transformers leaves them out too.
        ignored=r"model\.layers\.{layers}\..*",
    ),
}
