"""Thirty steps of DPO and KTO, step by step, beside TRL's trainers on the same model and rows."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

import mud_puppy as mp
from mud_puppy.config import Config
from mud_puppy.data import EncodeOptions, Loader, read_rows
from mud_puppy.parallel import make_mesh
from mud_puppy.run.kinds import kind_of
from mud_puppy.run.loop import means
from mud_puppy.run.prepare import load_params, prepare

STEPS, ROWS = 30, 4
WORDS = "red blue green one two three cat dog sun moon tea milk".split()
SHARED = {
    "max_steps": STEPS,
    "learning_rate": 3e-4,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": ROWS,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "beta": 0.3,
}


def pairs() -> list[dict[str, Any]]:
    """Answers of several lengths, so that rows are padded."""
    words = [WORDS[i % len(WORDS)] for i in range(3 * len(WORDS))]
    return [
        {
            "prompt": f"say {w}: ",
            "chosen": " ".join((1 + i % 4) * [w]),
            "rejected": (1 + i % 3) * "no",
        }
        for i, w in enumerate(words)
    ]


def rated() -> list[dict[str, Any]]:
    """The same answers one by one, good and bad ones not in turn."""
    return [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for i, row in enumerate(pairs())
        for name in (("chosen",), ("rejected",), ("chosen", "rejected"))[i % 3]
    ]


def in_order(trainer: type) -> type:
    """A trainer of TRL's that takes the rows as they come."""

    def sampler(self: Any, dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    return type(trainer.__name__, (trainer,), {"_get_train_sampler": sampler})


def trls(
    kind: str, folder: Path, tokenizer: Any, out: Path, **settings: Any
) -> list[dict[str, float]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer, config = {"dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig)}[kind]
    rows = pairs() if kind == "dpo" else rated()
    made = in_order(trainer)(
        model=model,
        args=config(output_dir=str(out), **SHARED, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    made.train()
    return [line for line in made.state.log_history if "loss" in line]


def ours(kind: str, folder: Path, tokenizer: Any, out: Path, **keys: Any) -> list[dict[str, float]]:
    path = out / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (pairs() if kind == "dpo" else rated())))
    config = Config.load(
        {
            "model": str(folder),
            "dataset": str(path),
            "output": str(out),
            "method": "preference",
            "preference": kind,
            "tune": "full",
            "precision": "fp32",
            "learning_rate": SHARED["learning_rate"],
            "lr_scheduler": "constant",
            "beta": SHARED["beta"],
            "mesh": "data=1,fsdp=1",
        }
        | keys
    )
    data = kind_of(config)
    rows = list(read_rows(path, convert=data.convert).rows)
    examples = data.encode(rows, tokenizer, EncodeOptions(chat_template=False)).examples
    loader = Loader(examples, ROWS, pack=False, shuffle=False, collate=data.collate_of(examples))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        run = prepare(config, *load_params(config, mesh), mesh, STEPS)
        state, found = run.state, []
        for step in range(STEPS):
            state, metrics = run.step(state, loader.batch_at(step))
            found.append(means([metrics]))
    return found


NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")


def apart(one: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """The largest difference of any number that both log at a step."""
    assert len(one) == len(other) == STEPS
    return max(
        abs(a[name] - b[name])
        for a, b in zip(one, other, strict=True)
        for name in NAMES
        if name in a and name in b
    )


@pytest.fixture(scope="module")
def tokenizer(chat_model: Path) -> Any:
    return mp.load_tokenizer(chat_model)


# TRL's, of what transformers has renamed.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_thirty_steps_are_trls(kind: str, chat_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    wanted = trls(kind, chat_model, tokenizer, tmp_path / "trl")
    found = ours(kind, chat_model, tokenizer, tmp_path)
    assert wanted[-1]["loss"] < 0.8 * wanted[0]["loss"]  # it has learned
    assert apart(found, wanted) < 1e-3
    other = ours(kind, chat_model, tokenizer, tmp_path, beta=0.31)
    assert apart(other, wanted) > 1e-3
