"""Parity: logits of every family and option equal transformers'; each knob, turned, breaks it."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from mud_puppy.model import load
from mud_puppy.model.arch import Layer

TOLERANCE = 1e-5  # of the largest logit, float32

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 5}
ALTERNATING = ["full_attention", "sliding_attention"] * 2

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha-tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 12, "hidden_act": "gelu"}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    "llama-old-rope-fields": ("llama", {"rope_theta": 300.0}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}},
    ),
    "llama-dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0},
            "max_position_embeddings": 16,
        },
    ),
    "llama-dynamic-short": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0}},
    ),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-options": (
        "llama",
        {"rope_parameters": YARN | {"attention_factor": 1.3, "truncate": False, "beta_slow": 2.0}},
    ),
    "llama-yarn-mscale": (
        "llama",
        {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}},
    ),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "mistral-no-window": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": ("qwen2", SLIDING | {"max_window_layers": 1}),
    "qwen2-alternating-tied": (
        "qwen2",
        SLIDING | {"layer_types": ALTERNATING, "num_hidden_layers": 4, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3-bias-sliding": (
        "qwen3",
        SLIDING | {"max_window_layers": 2, "head_dim": 8, "attention_bias": True},
    ),
    "qwen3-alternating": (
        "qwen3",
        SLIDING | {"layer_types": ALTERNATING, "num_hidden_layers": 4, "head_dim": 8},
    ),
}


def error(model: Any, params: Any, tokens: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference of logits, relative to the largest logit."""
    ours = np.asarray(jax.jit(model.__call__)(params, tokens))
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tiny: Any, tokens: np.ndarray) -> None:
    family, fields = CASES[case]
    folder, expected = tiny(family, **fields)
    model, params = load(folder, dtype="float32")
    assert error(model, params, tokens, expected) <= TOLERANCE


def test_bfloat16_is_close(tiny: Any, tokens: np.ndarray) -> None:
    folder, expected = tiny("llama")
    model, params = load(folder)
    assert params["embed"].dtype == "bfloat16"
    assert error(model, params, tokens, expected) <= 0.05


def arch(**changes: Any) -> Any:
    """A mutation that replaces fields of the Arch."""
    return lambda model, params: (
        dataclasses.replace(model, arch=model.arch.replace(**changes)),
        params,
    )


def rope(**changes: Any) -> Any:
    def mutate(model: Any, params: Any) -> Any:
        changed = dataclasses.replace(model.arch.ropes[0], **changes)
        return arch(ropes=(changed,))(model, params)

    return mutate


def leaf(part: str, name: str, change: Any) -> Any:
    """A mutation of one leaf of every block."""

    def mutate(model: Any, params: Any) -> Any:
        groups = [[{**b, part: change({**b[part]}, name)} for b in g] for g in params["layers"]]
        return model, {**params, "layers": groups}

    return mutate


def dropped(modules: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in modules.items() if key != name}


def unbiased(modules: dict[str, Any], name: str) -> dict[str, Any]:
    return {**modules, name: {"weight": modules[name]["weight"]}}


def rotated_heads(modules: dict[str, Any], name: str) -> dict[str, Any]:
    """Heads in another order: wrong grouping of queries over keys, or of outputs."""
    w = modules[name]["weight"]
    return {**modules, name: {**modules[name], "weight": np.roll(np.asarray(w), 8, axis=1)}}


PLAIN = ((10000.0 ** -(np.arange(0, 8, 2) / 8)).tolist(), 1.0)
MUTATIONS: dict[str, tuple[str, Any]] = {
    "act": ("llama-head-dim", arch(act="gelu_pytorch_tanh")),
    "act-silu": ("llama-head-dim", arch(act="silu")),
    "norm-eps": ("llama", arch(norm_eps=1e-3)),
    "theta": ("llama-theta", rope(inv_freq=tuple(PLAIN[0]))),
    "old-theta": ("llama-old-rope-fields", rope(inv_freq=tuple(PLAIN[0]))),
    "linear": ("llama-linear", rope(inv_freq=tuple(1000.0 ** -(np.arange(0, 8, 2) / 8)))),
    "llama3": ("llama-llama3", rope(inv_freq=tuple(1000.0 ** -(np.arange(0, 8, 2) / 8)))),
    "yarn": ("llama-yarn", rope(inv_freq=tuple(1000.0 ** -(np.arange(0, 8, 2) / 8)))),
    "yarn-scale": ("llama-yarn", rope(scale=1.0)),
    "dynamic": ("llama-dynamic", rope(dynamic=None)),
    "dynamic-limit": ("llama-dynamic", rope(dynamic=(1000.0, 2.0, 17))),
    "window": ("mistral-window", arch(kinds=(Layer(6),) * 3)),
    "window-none": ("mistral-window", arch(kinds=(Layer(),) * 3)),
    "window-layers": ("qwen2-alternating-tied", arch(kinds=(Layer(5), Layer()) * 2)),
    "q-norm": ("qwen3", leaf("self_attn", "q_norm", dropped)),
    "q-bias": ("qwen2", leaf("self_attn", "q_proj", unbiased)),
    "v-bias": ("qwen2", leaf("self_attn", "v_proj", unbiased)),
    "o-bias": ("llama-biases", leaf("self_attn", "o_proj", unbiased)),
    "up-bias": ("llama-biases", leaf("mlp", "up_proj", unbiased)),
    "kv-groups": ("llama", leaf("self_attn", "q_proj", rotated_heads)),
    "kv-order": ("llama", leaf("self_attn", "v_proj", rotated_heads)),
    "untied": ("llama", lambda model, params: (model, dropped(params, "head"))),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_turned_knob_shows(mutation: str, tiny: Any, tokens: np.ndarray) -> None:
    case, mutate = MUTATIONS[mutation]
    family, fields = CASES[case]
    folder, expected = tiny(family, **fields)
    model, params = mutate(*load(folder, dtype="float32"))
    assert error(model, params, tokens, expected) > 3 * TOLERANCE
