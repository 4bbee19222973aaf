"""Tiny random models: some made by transformers, whose logits ours must equal, one made here; and
folders of quantized ones, written by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mud_puppy.export import save_hf
from mud_puppy.model import abstract
from mud_puppy.model.names import flatten, hf_names
from mud_puppy.weights import is_weight
from tests.tiny import SIZES

FIELDS = SIZES | {
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.02,  # the default: a GGUF file does not say it
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 24), dtype=np.int32)


def make_torch(family: str, **fields: Any) -> Any:
    """A model whose every number matters: norms not one, biases not zero, attention not flat."""
    torch = pytest.importorskip("torch")
    import transformers

    name = CLASSES[family]
    fields = FIELDS | {"attn_implementation": "eager"} | fields
    config = getattr(transformers, f"{name}Config")(**fields)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if path.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise * (0.5 if path.endswith("bias") else 0.25))
    return model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: Any) -> Callable[..., tuple[Path, np.ndarray]]:
    """tiny(family, **config fields) -> (folder, its float32 logits of `tokens`); made once each."""
    made: dict[str, tuple[Path, np.ndarray]] = {}

    def make(family: str, **fields: Any) -> tuple[Path, np.ndarray]:
        key = f"{family} {fields}"
        if key not in made:
            model = make_torch(family, **fields)
            import torch

            with torch.no_grad():
                logits = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            made[key] = folder, logits
        return made[key]

    return make


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """int32 [2, 24], the tokens of `tiny`'s logits."""
    return TOKENS


@pytest.fixture(scope="session")
def llama(tmp_path_factory: Any) -> Path:
    """The folder of a tiny llama, untied, float32, one file, made without torch. Read only."""
    folder = tmp_path_factory.mktemp("llama")
    model, shapes = abstract(FIELDS | {"model_type": "llama"})
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: jax.numpy.asarray(0.25 * random.standard_normal(leaf.shape), "float32"), shapes
    )
    save_hf(model, params, folder, dtype=None)
    return folder


@pytest.fixture
def write_quantized(tmp_path: Path) -> Callable[..., None]:
    """write_quantized(model, params, pack, config): `tmp_path` as transformers reads a llama.

    pack(leaf) -> the tensors of one linear by suffix; config({module: leaf}) -> what config.json
    says of them.
    """

    def write(model: Any, params: Any, pack: Callable, config: Callable) -> None:
        tensors, quantized, leaves = {}, {}, flatten(params)
        for path, names in hf_names(model.arch, params).items():
            for i, name in enumerate(names):
                leaf = leaves[path]
                if path.startswith("layers/"):
                    leaf = jax.tree.map(lambda x, i=i: x[i], leaf)
                if not is_weight(leaf):
                    tensors[name] = np.asarray(leaf)
                    continue
                module = name.removesuffix(".weight")
                quantized[module] = leaf
                tensors |= {f"{module}.{suffix}": x for suffix, x in pack(leaf).items()}
        fields = json.loads(model.arch.config) | {"quantization_config": config(quantized)}
        fields |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    return write
