"""The families: which leaves a decoder has, what Hugging Face calls them, how its config reads.

A family is a table, not a class. `rows(arch)` maps each of our paths to a `Row`; loading, saving,
adapters and sharding all read the same row. `read_config` turns a transformers config into an
`Arch` and refuses any field that it neither reads nor knows to be harmless, so that a setting that
changes the mathematics is never dropped in silence.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mud_puppy.errors import UserError
from mud_puppy.model.arch import Arch
from mud_puppy.model.rope import read_rope


@dataclass(frozen=True)
class Row:
    """One leaf: logical axes (without the layer axis) and HF tensor name, `{i}` for the layer."""

    axes: tuple[str, ...]
    hf: str


def rows(arch: Arch) -> dict[str, Row]:
    """Every leaf of `arch` by path; paths under `layers/` are those inside one block."""
    table = {
        "embed": Row(("vocab", "embed"), "model.embed_tokens.weight"),
        "final_norm": Row(("embed",), "model.norm.weight"),
        "layers/attn_norm": Row(("embed",), _layer("input_layernorm.weight")),
        "layers/mlp_norm": Row(("embed",), _layer("post_attention_layernorm.weight")),
    }
    if not arch.tied:
        table["head"] = Row(("vocab", "embed"), "lm_head.weight")
    for name, axes in _LINEARS.items():
        table[f"layers/{name}/weight"] = Row(axes, _layer(name.replace("/", ".") + ".weight"))
        if name.split("/")[1] in arch.biases:
            table[f"layers/{name}/bias"] = Row(axes[:1], _layer(name.replace("/", ".") + ".bias"))
    if arch.qk_norm:
        for name in ("q_norm", "k_norm"):
            row = Row(("head_dim",), _layer(f"self_attn.{name}.weight"))
            table[f"layers/self_attn/{name}"] = row
    return table


# Tensors that old checkpoints carry and that hold nothing to learn.
IGNORED_TENSORS = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

_LINEARS = {
    "self_attn/q_proj": ("heads", "embed"),
    "self_attn/k_proj": ("kv_heads", "embed"),
    "self_attn/v_proj": ("kv_heads", "embed"),
    "self_attn/o_proj": ("embed", "heads"),
    "mlp/gate_proj": ("mlp", "embed"),
    "mlp/up_proj": ("mlp", "embed"),
    "mlp/down_proj": ("embed", "mlp"),
}


def _layer(name: str) -> str:
    return "model.layers.{i}." + name


def read_config(config: Any) -> Arch:
    """`config`: a transformers PreTrainedConfig of a known family."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"model_type '{config.model_type}' has no table here; "
            f"families that load: {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[config.model_type]
    _refuse_unread(config, family.reads)
    for name in _SIZES:
        if config.to_dict()[name] < 1:
            raise UserError(f"config: {name} must be at least 1, not {config.to_dict()[name]}")
    heads, width = config.num_attention_heads, config.hidden_size
    kv_heads = config.num_key_value_heads or heads
    head_dim = config.head_dim if "head_dim" in config.to_dict() else None
    head_dim = head_dim or width // heads
    if heads % kv_heads:
        raise UserError(
            f"config: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}"
        )
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(
            f"config: hidden_act '{config.hidden_act}' is not supported; "
            f"supported: {', '.join(ACTIVATIONS)}"
        )
    return Arch(
        family=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=width,
        mlp_size=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope=read_rope(config.rope_parameters, head_dim, config.max_position_embeddings),
        windows=family.windows(config),
        max_positions=config.max_position_embeddings,
        act=config.hidden_act,
        norm_eps=config.rms_norm_eps,
        qk_norm=family.qk_norm,
        biases=family.biases(config),
        tied=bool(config.tie_word_embeddings),
        init_std=config.initializer_range,
        config=json.dumps(config.to_dict(), sort_keys=True, default=str),
    )


_SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "max_position_embeddings"
).split()
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True)
class _Family:
    hf_class: str
    reads: tuple[str, ...]
    biases: Callable[[Any], tuple[str, ...]]
    windows: Callable[[Any], tuple[int | None, ...]]
    qk_norm: bool = False


_QKV, _MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")


def _no_window(config: Any) -> tuple[int | None, ...]:
    return (None,) * config.num_hidden_layers


def _same_window(config: Any) -> tuple[int | None, ...]:
    return (_window(config),) * config.num_hidden_layers


def _window_by_layer(config: Any) -> tuple[int | None, ...]:
    kinds = {"full_attention": None, "sliding_attention": _window(config)}
    if unknown := set(config.layer_types) - set(kinds):
        raise UserError(f"config: layer_types {sorted(unknown)} are not supported")
    return tuple(kinds[kind] for kind in config.layer_types)


def _window(config: Any) -> int | None:
    window = config.sliding_window
    if window is not None and window < 1:
        raise UserError(f"config: sliding_window must be at least 1 or null, not {window}")
    return window


def _llama_biases(config: Any) -> tuple[str, ...]:
    attention = (*_QKV, "o_proj") if config.attention_bias else ()
    return attention + (_MLP if config.mlp_bias else ())


_SLIDING = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
FAMILIES = {
    "llama": _Family(
        "LlamaForCausalLM", ("attention_bias", "mlp_bias", "head_dim"), _llama_biases, _no_window
    ),
    "mistral": _Family(
        "MistralForCausalLM", ("sliding_window", "head_dim"), lambda config: (), _same_window
    ),
    "qwen2": _Family("Qwen2ForCausalLM", _SLIDING, lambda config: _QKV, _window_by_layer),
    "qwen3": _Family(
        "Qwen3ForCausalLM",
        (*_SLIDING, "attention_bias", "head_dim"),
        lambda config: (*_QKV, "o_proj") if config.attention_bias else (),
        _window_by_layer,
        qk_norm=True,
    ),
}

_READ = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers "
    "num_attention_heads num_key_value_heads hidden_act rms_norm_eps rope_parameters "
    "tie_word_embeddings max_position_embeddings initializer_range"
).split()
# Fields that do not change the forward pass, or belong to tokenizers, exports and other programs.
_HARMLESS = (
    "architectures dtype torch_dtype transformers_version _name_or_path name_or_path "
    "use_cache bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id "
    "cls_token_id pretraining_tp id2label label2id problem_type output_attentions "
    "output_hidden_states return_dict torchscript chunk_size_feed_forward "
    "is_encoder_decoder tokenizer_class task_specific_params finetuning_task prefix "
    "unsloth_fixed unsloth_version is_llama_config transformers.js_config auto_map "
    "_attn_implementation_autoset model_max_length"
).split()


def _refuse_unread(config: Any, reads: tuple[str, ...]) -> None:
    """UserError on a field that would change the model and that nothing here reads."""
    default = type(config)().to_dict()
    known = {*_READ, *reads, *_HARMLESS}
    unread = {
        key: value
        for key, value in config.to_dict().items()
        if key not in known
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
