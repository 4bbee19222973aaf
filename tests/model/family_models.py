"""Tiny models of transformers' of every case, with every number of them one that matters."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.model import abstract
from mud_puppy.model.module import layout
from tests.model.family_cases import CASES, FIELDS

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 24), dtype=np.int32)
_CLASSES = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


def torch_model(case: str, **fields: Any) -> Any:
    """A model of a case: norms not one, biases not zero, attention not flat, routers not even."""
    torch = pytest.importorskip("torch")
    import transformers

    name, own = CASES[case]
    fields = FIELDS | {"attn_implementation": "eager"} | own | fields
    config = getattr(transformers, f"{name}Config")(**fields)
    torch.manual_seed(0)
    made = getattr(transformers, _CLASSES.get(name, f"{name}ForCausalLM"))
    model = made(config).eval()
    with torch.no_grad():
        for path, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in path or "embed_scale" in path or parameter.dtype != torch.float32:
                continue
            noise = torch.randn_like(parameter)
            if ("norm" in path or "ln_" in path) and path.endswith("weight"):
                parameter.copy_((0 if "emma" in name else 1) + 0.3 * noise)
            else:
                parameter.copy_(noise * (0.5 if "bias" in path else 0.25))
    return model


def saved(case: str, folder: Path, **fields: Any) -> Any:
    """`torch_model`, also in a folder."""
    model = torch_model(case, **fields)
    model.save_pretrained(folder)
    return model


def logits_of(model: Any) -> np.ndarray:
    """A torch model's, of TOKENS."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.float().numpy()


def difference(ours: Any, theirs: Any) -> float:
    """The largest, as a share of the largest number."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def ours(case: str, **fields: Any) -> tuple[Any, Any]:
    """(model, float32 params) of a case, made without torch, norms and biases random too."""
    import transformers

    name, own = CASES[case]
    config = getattr(transformers, f"{name}Config")(**FIELDS | own | fields)
    model, _ = abstract(config, "float32")
    rng = np.random.default_rng(0)
    one = 0.0 if model.arch.norm_offset else 1.0

    def fill(path: str, shape: tuple[int, ...]) -> Any:
        noise = 0.25 * rng.normal(size=shape)
        return jnp.asarray(noise + one if "norm" in path[-10:] else noise, jnp.float32)

    return model, layout(model.arch, fill)
