"""GGUF files of every type against transformers, whose model has the weights that the gguf package
decodes: our logits are its logits, with the weights as floats and in the file's codes.

Files are the gguf package's; blocks of Q4_K and Q6_K, which it cannot encode, are random ones.
"""

import re
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import load_file

import mud_puppy as mp
from mud_puppy.kernels import dequantize
from mud_puppy.model.names import flatten
from mud_puppy.weights import is_weight
from tests.model.conftest import make_torch
from tests.model.gguf_files import llama_tensors, permuted, write_gguf

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FIELDS = {
    "embedding_length": 256,
    "block_count": 2,
    "feed_forward_length": 256,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "context_length": 64,
    "vocab_size": 64,
}


def q4_k_m(name: str) -> Kind:
    six = ("token_embd", "output.", "0.attn_v", "0.ffn_down")
    return Kind.Q6_K if any(part in name for part in six) else Kind.Q4_K


# How tensors are stored: how many of the linears (7, the embedding and the head) stay in codes.
CASES = {
    "F16": (Kind.F16, None),
    "BF16": (Kind.BF16, None),
    "Q4_0": (Kind.Q4_0, 9),
    "Q4_1": (Kind.Q4_1, 9),
    "Q5_0": (Kind.Q5_0, 9),
    "Q8_0": (Kind.Q8_0, 9),
    "Q4_K": (Kind.Q4_K, 9),
    "Q6_K": (Kind.Q6_K, 9),
    "Q4_K_M": (q4_k_m, 7),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path, tokens: Any) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    kinds, kept = CASES[case]
    floats = make_torch("llama", **SIZES)
    weights = {name: x.numpy() / 2 for name, x in floats.state_dict().items()}
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", FIELDS, llama_tensors(weights, 4, 2), kinds)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    allowed, ids = 1e-4 * np.abs(expected).max(), jnp.asarray(tokens)

    model, params = mp.load(path, dtype="float32")
    assert np.abs(model(params, ids) - expected).max() <= allowed
    order = params["layers"][0][0]["mlp"]["up_proj"]["weight"]
    params["layers"][0][0]["mlp"]["up_proj"]["weight"] = order[:, ::-1]
    assert np.abs(model(params, ids) - expected).max() > 100 * allowed
    if kept is None:
        return
    _, params = mp.load(path, dtype="float32", keep_codes=True)
    assert sum(map(is_weight, flatten(params).values())) == kept
    assert np.abs(model(params, ids) - expected).max() <= allowed


# --- the other architectures, against transformers' model of the same weights --------------------

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
GEMMA = {"head_dim": 32, "tie_word_embeddings": True}
LONG = {
    "short_factor": [1.0 + i / 8 for i in range(12)],
    "long_factor": [1.0 + i for i in range(12)],
}
KEYS = {"attention.key_length": 32, "attention.value_length": 32}
# case: GGUF's name, transformers' class, its config, the metadata beside what all have
MODELS = {
    "qwen2": ("qwen2", "Qwen2", {}, {}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 32}, KEYS),
    "mixtral": (
        "llama",
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        {"expert_count": 4, "expert_used_count": 2, "rope.dimension_count": 16},
    ),
    "qwen2moe": (
        "qwen2moe",
        "Qwen2Moe",
        EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 64},
        {
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 32,
            "expert_shared_feed_forward_length": 64,
        },
    ),
    "qwen3moe": (
        "qwen3moe",
        "Qwen3Moe",
        EXPERTS | {"num_experts": 4, "head_dim": 32, "norm_topk_prob": True},
        KEYS | {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
    ),
    "gemma": ("gemma", "Gemma", GEMMA, KEYS),
    "gemma2": (
        "gemma2",
        "Gemma2",
        GEMMA | {"query_pre_attn_scalar": 32, "sliding_window": 5, "attn_logit_softcapping": 3.0},
        KEYS
        | {
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 30.0,
            "attention.sliding_window": 5,
        },
    ),
    "gemma3": (
        "gemma3",
        "Gemma3Text",
        GEMMA
        | {
            "query_pre_attn_scalar": 32,
            "sliding_window": 5,
            "num_hidden_layers": 8,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
        KEYS
        | {
            "attention.sliding_window": 5,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "phi3": (
        "phi3",
        "Phi3",
        {"sliding_window": 5, "original_max_position_embeddings": 64},
        {"attention.sliding_window": 5, "rope.scaling.original_context_length": 64},
    ),
    "phi4": (
        "phi3",
        "Phi3",
        {
            "head_dim": 32,
            "num_attention_heads": 2,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 16,
            "rope_parameters": LONG
            | {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 16,
            },
        },
        {
            "attention.sliding_window": 0,
            "rope.dimension_count": 24,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.attn_factor": float(np.sqrt(1 + np.log(64 / 16) / np.log(16))),
        },
    ),
    "starcoder2": ("starcoder2", "Starcoder2", {"sliding_window": None}, {}),
    "olmo2": ("olmo2", "Olmo2", {}, {}),
    "smollm3": ("smollm3", "SmolLM3", {"num_hidden_layers": 5}, {"rope.dimension_count": 16}),
    "granite": (
        "granite",
        "Granite",
        {
            "attention_multiplier": 0.25,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 2.0,
        },
        {
            "attention.scale": 0.25,
            "embedding_scale": 3.0,
            "residual_scale": 0.22,
            "logit_scale": 2.0,
            "rope.dimension_count": 16,
        },
    ),
}


FIELDS_OF_CONFIG = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def torch_model(name: str, **fields: Any) -> Any:
    """A random model of transformers' class: norms not what they start as, biases not zero."""
    import torch
    import transformers

    config = getattr(transformers, f"{name}Config")(**fields, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn_like(x) * (0.3 if x.ndim == 1 else 0.15))
    return model


def metadata(config: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes of every architecture."""
    norm = "attention.layer_norm_rms_epsilon"
    eps = getattr(config, "rms_norm_eps", None)
    if eps is None:
        norm, eps = "attention.layer_norm_epsilon", config.norm_epsilon
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": float(config.rope_parameters.get("rope_theta", 0)),
        norm: eps,
    }


def converted(arch: str, weights: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    """The tensors by GGUF's names (its package's table), as llama.cpp's converter changes them."""
    number = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    experts: dict[str, dict[int, np.ndarray]] = {}
    tensors = {}
    for name, w in weights.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch in ("llama", "smollm3", "granite") and (count := heads.get(name.split(".")[-2])):
            w = permuted(w, count)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            w = w + 1
        if found := re.search(r"experts\.(\d+)\.", name):
            name = name.replace(found[0], "experts.")
            experts.setdefault(name, {})[int(found[1])] = w
            w = np.stack([experts[name][e] for e in sorted(experts[name])])
        own = names.get_name(name, (".weight", ".bias"))
        assert own is not None, name
        tensors[own] = w
    return tensors


DEFAULT = ("mixtral", "gemma2", "phi4")  # the others as slow ones
CASES_OF_MODELS = [
    pytest.param(case, marks=() if case in DEFAULT else pytest.mark.slow) for case in MODELS
]


@pytest.mark.parametrize("case", CASES_OF_MODELS)
def test_architectures(case: str, tmp_path: Path, tokens: Any) -> None:
    torch = pytest.importorskip("torch")
    arch, name, options, extra = MODELS[case]
    theirs = torch_model(name, **FIELDS_OF_CONFIG | options)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    theirs.save_pretrained(tmp_path / "hf")
    tensors = converted(arch, load_file(tmp_path / "hf/model.safetensors"), theirs.config)
    if case == "phi4":
        for kind in ("short", "long"):
            values = np.array(LONG[f"{kind}_factor"], np.float32)
            tensors[f"rope_factors_{kind}.weight"] = values
    path = tmp_path / "tiny.gguf"
    write_gguf(path, arch, metadata(theirs.config) | extra, tensors)
    model, params = mp.load(path, dtype="float32")
    run, ids = jax.jit(model.__call__), jnp.asarray(tokens)
    largest = np.abs(expected).max()
    assert np.abs(run(params, ids) - expected).max() <= 2e-5 * largest
    params["final_norm"] = params["final_norm"] + 0.01
    assert np.abs(run(params, ids) - expected).max() > 1e-3 * largest
    write_gguf(path, arch, metadata(theirs.config) | extra, tensors, Kind.Q8_0)
    (_, floats), (_, coded) = (
        mp.load(path, dtype="float32", keep_codes=keep) for keep in (False, True)
    )
    for leaf, w in flatten(coded).items():
        kept = leaf.endswith("/weight") or leaf in ("embed", "head")
        assert is_weight(w) == kept, leaf
        got = dequantize(w) if kept else w
        np.testing.assert_array_equal(got, flatten(floats)[leaf], err_msg=leaf)
