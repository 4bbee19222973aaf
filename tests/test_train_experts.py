"""lora and qlora of models with experts through `train`; what they write, in transformers too."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import mud_puppy as mp
from mud_puppy.kernels import Quantized
from mud_puppy.weights.leaf import base_of
from tests.model.family_models import difference, torch_model

CASES = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32},
    "gpt_oss": {"num_hidden_layers": 2, "intermediate_size": 32, "head_dim": 16},
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: Any, chat_model: Path) -> dict[str, Path]:
    """A model of each case with the tokenizer of `chat_model`."""
    made = {}
    for case, fields in CASES.items():
        folder = made[case] = tmp_path_factory.mktemp(case)
        size = json.loads((chat_model / "config.json").read_text())["vocab_size"]
        torch_model(case, vocab_size=size, **fields).save_pretrained(folder)
        for path in [*chat_model.glob("*token*"), *chat_model.glob("*.jinja")]:
            shutil.copy(path, folder)
    return made


@pytest.fixture
def run(config: dict[str, Any], folders: dict[str, Path]) -> Any:
    def train(case: str, **keys: Any) -> tuple[Any, list[dict[str, Any]]]:
        own = {"model": str(folders[case]), "precision": "fp32", "learning_rate": 1e-2}
        own |= {"max_steps": 3, "lora_alpha": 32.0, "batch_size": 8}
        result = mp.train(config | own | keys)
        lines = (result.output / "metrics.jsonl").read_text().splitlines()
        return result, [json.loads(line) for line in lines]

    return train


def in_transformers(folder: Path, tokens: Any) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("case", "keys"),
    [
        pytest.param(
            "qwen3_moe",
            {"method": "lora", "router_aux_loss_coef": 0.01},
            marks=pytest.mark.slow,
        ),
        ("gpt_oss", {"method": "qlora", "quant_backend": "mxfp4"}),
        pytest.param("gpt_oss", {"method": "lora"}, marks=pytest.mark.slow),
        pytest.param("qwen3_moe", {"method": "qlora", "quant_group": 16}, marks=pytest.mark.slow),
    ],
)
def test_training_and_an_exact_merge(
    case: str, keys: dict[str, Any], run: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    result, lines = run(case, **keys)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    assert all(line["load_balance"] >= 1 for line in lines if "loss" in line)
    assert all(line["router_z"] > 0 for line in lines if "loss" in line)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 16))
    model, _ = mp.load(folders[case], dtype="float32")
    ours = model(result.params, tokens_of(tokens))
    last = "gate_up_proj" if case == "gpt_oss" else "up_proj"
    leaf = result.params["layers"][0][0]["mlp"]["experts"][last]["weight"]
    assert np.abs(leaf.b).max() > 0  # the experts' adapters trained
    assert isinstance(base_of(leaf), Quantized) == (keys["method"] == "qlora")
    # The adapter that was written, on the weights as they were trained on.
    base = mp.strip_lora(result.params)
    assert difference(model(mp.load_adapter(base, result.output), tokens_of(tokens)), ours) < 1e-5
    mp.save_hf(model, mp.merge_lora(result.params), tmp_path / "merged", dtype="float32")
    merged = in_transformers(tmp_path / "merged", tokens)
    # Codes decode to the dtype that they were made from: float32 here.
    assert difference(merged, ours) < 1e-5
    assert difference(in_transformers(folders[case], tokens), ours) > 1e-2


def tokens_of(tokens: Any) -> Any:
    return jnp.asarray(tokens, jnp.int32)


def test_router_losses_of_a_model_without_experts_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(mp.UserError, match="has no experts, and so no router losses"):
        mp.train(config | {"router_z_loss_coef": 0.1})
