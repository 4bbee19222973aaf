"""mud_puppy: fine-tune Hugging Face language models in JAX, for AMD GPUs first.

    import mud_puppy as mp

    model, params = mp.load("HuggingFaceTB/SmolLM2-135M-Instruct")
    params = mp.add_lora(params, rank=16, alpha=32, key=jax.random.key(0))
    result = mp.train({"model": ..., "dataset": ..., "output": ...})

Names are imported when they are first used, so that `mud-puppy --help` does not wait for JAX.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from mud_puppy.rocm import settings as _settings

# transformers is used for configs and tokenizers; it need not tell that PyTorch is absent.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
_settings.at_import()  # JAX reads them when it starts the card

if TYPE_CHECKING:
    from mud_puppy import kernels, losses
    from mud_puppy.config import Config
    from mud_puppy.errors import UserError
    from mud_puppy.export import save_hf
    from mud_puppy.model import (
        Cache,
        Inputs,
        Model,
        abstract,
        load,
        load_tokenizer,
        resize_embeddings,
        with_score_head,
    )
    from mud_puppy.model.mha import FlashMHA
    from mud_puppy.parallel import make_mesh
    from mud_puppy.sampling import generate
    from mud_puppy.train import Result, train
    from mud_puppy.weights import (
        Lora,
        add_lora,
        combine,
        fake_quant,
        load_adapter,
        merge_lora,
        partition,
        quantize,
        save_adapter,
        strip_lora,
        with_dropout,
    )

__version__ = "0.1.0"

_HOME = {
    "Cache": "model",
    "Config": "config",
    "FlashMHA": "model.mha",
    "Inputs": "model",
    "Lora": "weights",
    "Model": "model",
    "Result": "train",
    "UserError": "errors",
    "abstract": "model",
    "add_lora": "weights",
    "combine": "weights",
    "fake_quant": "weights",
    "generate": "sampling",
    "load": "model",
    "load_adapter": "weights",
    "load_tokenizer": "model",
    "make_mesh": "parallel",
    "merge_lora": "weights",
    "partition": "weights",
    "quantize": "weights",
    "resize_embeddings": "model",
    "save_adapter": "weights",
    "save_hf": "export",
    "strip_lora": "weights",
    "train": "train",
    "with_dropout": "weights",
    "with_score_head": "model",
}
_ROOMS = ("kernels", "losses")
__all__ = [*_HOME, *_ROOMS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"mud_puppy.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'mud_puppy' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"mud_puppy.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
