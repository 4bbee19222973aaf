"""A tiny llama made by transformers, and adapters for it made by PEFT with random B."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import SIZES

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 16), dtype=np.int32)


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    return TOKENS


@pytest.fixture(scope="session")
def base(tmp_path_factory: Any) -> Path:
    """The folder of a tiny llama of three layers, untied, float32. Read only."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 3, "initializer_range": 0.25})
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def peft_logits(base: Path) -> Callable[..., np.ndarray]:
    """peft_logits(folder, ...): float32 logits of the base with these adapters merged in."""

    def run(*folders: Path) -> np.ndarray:
        import torch
        from peft import PeftModel
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(base).eval()
        for folder in folders:
            model = PeftModel.from_pretrained(model, folder).merge_and_unload()
        with torch.no_grad():
            return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()

    return run


@pytest.fixture(scope="session")
def make_adapter(base: Path, tmp_path_factory: Any) -> Callable[..., tuple[Path, np.ndarray]]:
    """make_adapter(seed, **LoraConfig fields) -> (folder, logits of base + adapter)."""

    def make(seed: int = 0, **fields: Any) -> tuple[Path, np.ndarray]:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaForCausalLM

        torch.manual_seed(seed)
        config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | fields))
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base).eval(), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_magnitude" in name:
                    parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
                elif "lora_" in name:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
            logits = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
        folder = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(folder, save_embedding_layers=False)
        return folder, logits

    return make
