"""A transformers config as an `Arch`, and the refusal of what nothing here reads.

A field that is neither read nor known to be harmless nor at its default is an error, so that a
setting that changes the mathematics is never dropped in silence.
"""

import json
import logging
from typing import Any

from mud_puppy.errors import UserError
from mud_puppy.model.arch import Arch, Experts
from mud_puppy.model.families.heads import read_head
from mud_puppy.model.families.layers import read_layers
from mud_puppy.model.families.tables import FAMILIES
from mud_puppy.model.mlp import ACTIVATIONS

log = logging.getLogger("mud_puppy")


def read_config(config: Any) -> Arch:
    """`config`: a transformers PreTrainedConfig of a known family."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"model_type '{config.model_type}' has no table here; "
            f"families that load: {', '.join(sorted(FAMILIES))}"
        )
    family, fields = FAMILIES[config.model_type], config.to_dict()
    named = {**_FIELDS, **family.fields}
    _refuse_unread(config, (*named.values(), *family.reads.split()))
    for name in _SIZES:
        size = getattr(config, name)
        if not isinstance(size, int) or size < 1:
            raise UserError(f"config: {name} must be a whole number from 1, not {size!r}")
    heads, width = config.num_attention_heads, config.hidden_size
    kv_heads = fields.get("num_key_value_heads") or heads
    head_dim = fields.get("head_dim") or width // heads
    if heads % kv_heads:
        raise UserError(
            f"config: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    act = fields.get("hidden_activation") or fields[named["act"]]
    if act not in ACTIVATIONS:
        raise UserError(
            f"config: {named['act']} '{act}' is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    ropes, kinds = read_layers(config, head_dim)
    known = {
        "family": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": width,
        "mlp_size": fields.get("intermediate_size"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_positions": config.max_position_embeddings,
        "ropes": ropes,
        "kinds": kinds,
        "act": act,
        "norm_eps": fields[named["norm_eps"]],
        "tied": bool(config.tie_word_embeddings),
        "init_std": config.initializer_range,
        "config": json.dumps(fields, sort_keys=True, default=str),
    }
    arch = read_head(Arch(**(known | family.arch(config, kinds))), config)
    if arch.experts is not None:
        _check_experts(arch.experts)
    return arch


def _check_experts(e: Experts) -> None:
    """UserError for numbers of experts that no token can be given."""
    each = e.count // max(e.groups, 1)
    for fits, what in (
        (e.count >= 1 and e.size >= 1, f"{e.count} experts of {e.size} units"),
        (1 <= e.per_token <= e.count, f"{e.per_token} experts a token of {e.count}"),
        (e.groups >= 1 and e.count % e.groups == 0, f"{e.groups} groups of {e.count} experts"),
        (1 <= e.groups_per_token <= e.groups, f"{e.groups_per_token} of {e.groups} groups a token"),
        (
            e.per_token <= e.groups_per_token * each,
            f"{e.per_token} experts a token of {e.groups_per_token} groups of {each}",
        ),
        (
            not e.group_pairs or e.groups == 1 or each >= 2,
            f"groups of {each} ranked by their two best",
        ),
    ):
        if not fits:
            raise UserError(f"config: {what}: no such mixture can be computed")


_SIZES = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads max_position_embeddings"
).split()
# What llama calls the fields that some families call otherwise.
_FIELDS = {"act": "hidden_act", "norm_eps": "rms_norm_eps"}
_READ = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers "
    "num_attention_heads num_key_value_heads rope_parameters "
    "tie_word_embeddings max_position_embeddings initializer_range"
).split()
# Fields that do not change the forward pass, or belong to tokenizers, exports and other programs.
_HARMLESS = (
    "architectures dtype torch_dtype transformers_version _name_or_path name_or_path "
    "use_cache bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id "
    "bos_token eos_token pad_token unk_token cls_token_id pretraining_tp id2label label2id "
    "problem_type output_attentions "
    "output_hidden_states return_dict torchscript chunk_size_feed_forward "
    "is_encoder_decoder tokenizer_class task_specific_params finetuning_task prefix "
    "unsloth_fixed unsloth_version is_llama_config transformers.js_config auto_map "
    "_num_labels max_sequence_length _attn_implementation_autoset model_max_length "
    "cache_implementation output_router_logits router_aux_loss_coef router_z_loss_coef "
    "token_classification_bias"
).split()
# Fields of hub repositories that transformers does not read, at the values that mean what it does.
_ONLY: dict[str, dict[str, tuple]] = {
    "phi3": {"full_attn_mod": (1,), "interpolate_factor": (1,)},
    "starcoder2": {"mlp_type": ("default",), "norm_type": ("layer_norm",)},
    "qwen3_moe": {"use_qk_norm": (True,), "shared_expert_intermediate_size": (0,)},
    "cohere2": {
        "layer_switch": (4,),
        "order_of_interleaved_layers": ("local_attn_first",),
        "position_embedding_type": ("rope_gptj",),
        "rotary_pct": (1.0,),
        "use_embedding_sharing": (True,),
        "use_gated_activation": (True,),
        "use_parallel_block": (True,),
        "use_parallel_embedding": (True,),
    },
    "gpt2": {"n_special": (0,), "predict_special_tokens": (True,), "output_past": (True,)},
    "gpt_neox": {"attention_probs_dropout_prob": (0,), "hidden_dropout_prob": (0,)},
    "stablelm": {"rotary_scaling_factor": (1.0,)},
}
# Dropout of pretraining; ours is the adapter's own.
_DROPOUTS = (
    "attention_dropout attn_pdrop resid_pdrop embd_pdrop summary_first_dropout hidden_dropout "
    "classifier_dropout residual_dropout embedding_dropout"
).split()


def _refuse_unread(config: Any, reads: tuple[str, ...]) -> None:
    """UserError on a field that would change the model and that nothing here reads."""
    default, fields = type(config)().to_dict(), config.to_dict()
    known = {*_READ, *reads, *_HARMLESS, *_DROPOUTS}
    if dropped := [f"{key} {fields[key]}" for key in _DROPOUTS if fields.get(key)]:
        log.info("config: %s is not applied; adapters have lora_dropout", ", ".join(dropped))
    unread = {
        key: value
        for key, value in fields.items()
        if key not in known
        and value not in _ONLY.get(config.model_type, {}).get(key, ())
        and not (key in default and default[key] == value)
        and value is not None
        and value is not False
    }
    if unread:
        raise UserError(
            f"config: {config.model_type} fields that are not understood: "
            + ", ".join(f"{key}={value!r}" for key, value in sorted(unread.items()))
            + "; remove them from config.json if they do not change the model"
        )
