"""Model folders that are damaged, or that no table here describes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bad_inputs.damage import (
    ADAPTER_CONFIG,
    TENSORS,
    content,
    cut,
    edit,
    gone,
    renamed,
    tensors,
)

INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


# name: (fields of config.json that change; None removes, what the line says)
CONFIG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "architecture": (
        {"model_type": "bloom"},
        ("m/config.json: model_type 'bloom' has no table", "families that load: "),
    ),
    "no architecture": ({"model_type": None}, ("m/config.json: model_type 'None' has no table",)),
    "unread field": (
        {"attn_logit_softcapping": 30.0},
        ("llama fields that are not understood: attn_logit_softcapping=30.0", "remove them from"),
    ),
    "quantized": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        ("config.json has a quantization_config, but no tensor is quantized",),
    ),
    "kv heads": (
        {"num_key_value_heads": 3},
        ("num_attention_heads 4 is not a multiple of num_key_value_heads 3",),
    ),
    "head_dim": (
        {"head_dim": 16},
        ("tensor 'model.layers.0.self_attn.q_proj.weight' has shape (32, 32)", "(64, 32)"),
    ),
    "odd head_dim": ({"head_dim": 5}, ("m/config.json: ", "head_dim`=5")),
    "text for a number": ({"hidden_size": "32"}, ("m/config.json: ", "'hidden_size' expected int")),
    "negative": ({"hidden_size": -32}, ("hidden_size must be a whole number from 1, not -32",)),
    "window": (
        {"model_type": "mistral", "sliding_window": -3},
        ("sliding_window must be at least 1, not -3",),
    ),
    "rope kind": (
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}, "rope_scaling": None},
        ("m/config.json: ", "longrope"),
    ),
    "rope theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}, "rope_theta": None},
        ("rope_parameters: rope_theta must be a number, not 'x'",),
    ),
    "activation": ({"hidden_act": "swish2"}, ("hidden_act 'swish2' is not supported", "silu")),
    "layers": (
        {"num_hidden_layers": 3},
        ("tensor 'model.layers.2.input_layernorm.weight' (32,) is missing",),
    ),
    "untied": ({"tie_word_embeddings": False}, ("tensor 'lm_head.weight' (258, 32) is missing",)),
    "vocabulary": (
        {"vocab_size": 257},
        ("d.jsonl:1: token 257 ('<|im_end|>') is outside the model's vocabulary of 257",),
    ),
    "positions": (
        {"max_position_embeddings": 16},
        ("max_seq_length 64: ", "d.jsonl:1 has 35 tokens", "16 positions; set max_seq_length to"),
    ),
}


@pytest.mark.parametrize(("fields", "says"), CONFIG.values(), ids=list(CONFIG))
def test_model_configs(fields, says, bench, refused):
    edit(bench.model / "config.json", fields)
    refused(bench.train(), *says)


def index(shard: Any) -> Any:
    return content(INDEX, json.dumps({"weight_map": {"a": shard, UP: "b.safetensors"}}).encode())


def template(text: str) -> Any:
    return content("chat_template.jinja", text.encode())


# name: (damage to the model's folder, what the line says)
MODEL: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no config": (gone("config.json"), ("m/config.json: no such file", "no model folder")),
    "config is no JSON": (content("config.json", b'{"a":'), ("config.json: not readable as JSON",)),
    "config is a list": (content("config.json", b"[]"), ("config.json: expected a JSON object",)),
    "missing tensor": (
        tensors(lambda t: {k: v for k, v in t.items() if k != UP}),
        (f"tensor '{UP}' (48, 32) is missing", "the checkpoint is incomplete"),
    ),
    "wrong shape": (
        tensors(lambda t: t | {UP: np.zeros((48, 31), np.float32)}),
        (f"tensor '{UP}' has shape (48, 31), but the config says (48, 32)",),
    ),
    "tensor left over": (
        tensors(lambda t: t | {"model.x": np.zeros(2, np.float32)}),
        ("tensor 'model.x' (2,) has no place in this llama model",),
    ),
    "dtype": (
        tensors(lambda t: t | {UP: np.zeros((48, 32), np.int8)}),
        (f"tensor '{UP}' is stored as I8", "BF16, F16, F32"),
    ),
    "truncated": (cut(TENSORS, 100), (TENSORS, "not a whole safetensors file", "download it")),
    "no safetensors": (content(TENSORS, b"<html>"), ("not a whole safetensors file",)),
    "pickle": (
        renamed(TENSORS, "pytorch_model.bin"),
        ("only pickled weights (pytorch_model.bin)", "never opened", "convert it"),
    ),
    "no weights": (gone(TENSORS), (f"no {TENSORS}", "download the model again")),
    "missing shard": (
        index("b.safetensors"),
        (f"{INDEX}: shard b.safetensors is missing; download the model again",),
    ),
    "escaping shard": (index("../b.safetensors"), (f"{INDEX}: '../b", "beside the index")),
    "shard is a number": (index(3), (f"{INDEX}: '3' is no safetensors file",)),
    "shard is a list": (index([]), (f"{INDEX}: '[]' is no safetensors file",)),
    "no weight map": (content(INDEX, b"{}"), (f"{INDEX}: has no 'weight_map'", "download")),
    "no tokenizer": (
        gone("tokenizer.json", "tokenizer_config.json"),
        ("m: the tokenizer does not load", "copy or download them again"),
    ),
    "tokenizer is no JSON": (content("tokenizer.json", b"{"), ("m: the tokenizer does not load",)),
    "template syntax": (template("{% for m in %}"), ("d.jsonl:1: the chat template refuses",)),
    "template fails": (template("{{ 1 / 0 }}"), ("d.jsonl:1: ", "division by zero")),
    "template hides the turns": (
        template("hello"),
        ("d.jsonl:1: cannot tell which part", "messages[1]", "or train without it"),
    ),
    "adapter only": (
        renamed("config.json", ADAPTER_CONFIG),
        ("m: a PEFT adapter, not a model: load its base model",),
    ),
}


@pytest.mark.parametrize(("damage", "says"), MODEL.values(), ids=list(MODEL))
def test_model_files(damage, says, bench, refused):
    damage(bench.model)
    refused(bench.train(), *says)


def test_generation_config_is_read_before_the_run_begins(bench, refused):
    path = bench.model / "generation_config.json"
    path.write_text("{")
    refused(bench.train(sample_prompts=1), "generation_config.json: not readable as JSON")
    path.write_text('{"eos_token_id": ["x"]}')
    refused(bench.train(sample_prompts=1), "m: eos_token_id ['x'] is no token id")
