"""The table of families: what of each differs from llama, as data.

`arch` gives the fields of `Arch` that a config decides and llama's reading does not, from the
config and the layers as `read_layers` has them. `linears`: the modules of a block with their
logical axes. `names`: HF's names of norms and routers. `fields`: what the config calls a field.
`reads`: fields that only this family's `arch` looks at. `transposed`: modules whose weights are
stored [in, out]; `stacked`: those whose experts are one tensor. `left_out`: a pattern of tensors
that a file may have and nobody reads; the log says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mud_puppy.model.arch import Arch, Layer
from mud_puppy.model.families import dense, modules
from mud_puppy.model.families.mixtures import (
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)
from mud_puppy.model.families.modules import QKV

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
    left_out: str = ""

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
_SLIDING = "use_sliding_window sliding_window max_window_layers layer_types"
_LAYER_NORM = {"norm_eps": "layer_norm_eps"}


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", dense.llama, reads="attention_bias mlp_bias head_dim"),
    "mistral": Family(
        "MistralForCausalLM", dense.plain, reads="sliding_window head_dim layer_types"
    ),
    "qwen2": Family("Qwen2ForCausalLM", lambda c, ls: {"biases": QKV}, reads=_SLIDING),
    "qwen3": Family("Qwen3ForCausalLM", dense.qwen3, reads=f"{_SLIDING} attention_bias head_dim"),
    "gemma": Family(
        "GemmaForCausalLM", dense.gemma, reads="attention_bias head_dim hidden_activation"
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        dense.gemma2,
        names=_SANDWICH,
        fields={"act": "hidden_activation"},
        reads="attention_bias head_dim query_pre_attn_scalar attn_logit_softcapping hidden_act "
        "final_logit_softcapping sliding_window layer_types",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        dense.gemma3,
        names=_SANDWICH,
        fields={"act": "hidden_activation"},
        reads="attention_bias head_dim query_pre_attn_scalar attn_logit_softcapping hidden_act "
        "final_logit_softcapping sliding_window layer_types _sliding_window_pattern "
        "sliding_window_pattern",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        dense.plain,
        modules.phi3,
        reads="sliding_window original_max_position_embeddings partial_rotary_factor",
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        dense.olmo2,
        names=_AFTER,
        reads="attention_bias",
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        dense.olmo2,
        names=_AFTER,
        reads="attention_bias sliding_window layer_types",
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        dense.smollm3,
        reads=f"{_SLIDING} no_rope_layers no_rope_layer_interval attention_bias mlp_bias",
    ),
    "granite": Family(
        "GraniteForCausalLM",
        dense.granite,
        reads="attention_bias mlp_bias attention_multiplier embedding_multiplier "
        "residual_multiplier logits_scaling",
    ),
    "starcoder2": Family(
        "Starcoder2ForCausalLM",
        dense.starcoder2,
        modules.starcoder2,
        fields={"norm_eps": "norm_epsilon"},
        reads="use_bias sliding_window",
    ),
    "cohere": Family(
        "CohereForCausalLM",
        dense.cohere,
        fields=_LAYER_NORM,
        reads="attention_bias use_qk_norm logit_scale",
    ),
    "cohere2": Family(
        "Cohere2ForCausalLM",
        dense.cohere2,
        fields=_LAYER_NORM,
        reads="attention_bias logit_scale head_dim sliding_window layer_types",
    ),
    "glm": Family("GlmForCausalLM", dense.glm, modules.glm, reads="attention_bias head_dim"),
    "glm4": Family(
        "Glm4ForCausalLM",
        dense.glm4,
        modules.glm,
        names={
            "attn_post_norm": "post_self_attn_layernorm",
            "mlp_post_norm": "post_mlp_layernorm",
        },
        reads="attention_bias head_dim",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        dense.gpt2,
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
        dense.gpt_neox,
        modules.gpt_neox,
        names={"final_norm": "gpt_neox.final_layer_norm"},
        fields=_LAYER_NORM,
        reads="attention_bias use_parallel_residual",
    ),
    "stablelm": Family(
        "StableLmForCausalLM",
        dense.stablelm,
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
        left_out=r"model\.layers\.{layers}\..*",
    ),
}
