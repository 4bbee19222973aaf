"""Ten steps of GKD, step by step, beside TRL's trainer on the same models and tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.experimental.gkd import GKDConfig, GKDTrainer

import mud_puppy as mp
from mud_puppy.config import Config
from mud_puppy.data import EncodeOptions, Example, Loader, encode, read_rows
from mud_puppy.parallel import make_mesh
from mud_puppy.run.loop import means
from mud_puppy.run.prepare import load_params, prepare
from tests.run.test_trl_runs import SHARED, in_order
from tests.tiny import tiny_model

STEPS, ROWS = 10, 4


@pytest.fixture(scope="module")
def teacher(chat_model: Path, tmp_path_factory: Any) -> Path:
    tokenizer = mp.load_tokenizer(chat_model)
    model, params = tiny_model(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=32, head_dim=16
    )
    folder = tmp_path_factory.mktemp("wide")
    mp.save_hf(model, params, folder, dtype="float32", tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def examples(chat_model: Path, chats: Path) -> Sequence[Example]:
    """Of several lengths, so that rows are padded."""
    return encode(read_rows(chats).rows, mp.load_tokenizer(chat_model), EncodeOptions()).examples


def collated(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    most = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + (most - len(row[name])) * [fill] for row in rows])

    names = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {name: padded(name, fill) for name, fill in names.items()}


def trls(student: Path, teacher: Path, examples: Any, out: Path, beta: float) -> list[float]:
    rows = [
        {
            "input_ids": one.tokens.tolist(),
            "labels": [t if w else -100 for t, w in zip(one.tokens, one.weights, strict=True)],
            "attention_mask": [1] * one.size,
        }
        for one in examples
    ]
    settings = SHARED | {"max_steps": STEPS, "learning_rate": 1e-3, "beta": beta}
    model, other = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (student, teacher)
    )
    made = in_order(GKDTrainer)(
        model=model,
        teacher_model=other,
        args=GKDConfig(output_dir=str(out), lmbda=0.0, seq_kd=False, **settings),
        data_collator=collated,
        train_dataset=Dataset.from_list(rows),
        processing_class=mp.load_tokenizer(student),
    )
    made.train()
    return [line["loss"] for line in made.state.log_history if "loss" in line]


def ours(student: Path, teacher: Path, examples: Any, beta: float) -> list[float]:
    config = Config.load(
        {
            "model": str(student),
            "dataset": "-",
            "output": "-",
            "method": "distill",
            "teacher": str(teacher),
            "tune": "full",
            "precision": "fp32",
            "learning_rate": 1e-3,
            "lr_scheduler": "constant",
            "distill_beta": beta,
            "mesh": "data=1,fsdp=1",
        }
    )
    loader = Loader(examples, ROWS, pack=False, shuffle=False)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        run = prepare(config, *load_params(config, mesh), mesh, STEPS)
        state, found = run.state, []
        for step in range(STEPS):
            state, metrics = run.step(state, loader.batch_at(step))
            found.append(means([metrics])["loss"])
    return found


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(one, other, strict=True))


# TRL's, of what transformers has renamed.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_ten_steps_are_trls(
    beta: float, chat_model: Path, teacher: Path, examples: Any, tmp_path: Path
) -> None:
    wanted = trls(chat_model, teacher, examples, tmp_path, beta)
    found = ours(chat_model, teacher, examples, beta)
    assert wanted[-1] < 0.95 * wanted[0]  # it has learned
    assert apart(found, wanted) < 2e-4
    if beta == 0.3:
        assert apart(ours(chat_model, teacher, examples, 0.31), wanted) > 2e-3
