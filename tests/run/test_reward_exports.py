"""Runs of methods rm and prm, exported: transformers' own classes give the same scores."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import mud_puppy as mp
from mud_puppy import cli
from tests.model.family_cases import CASES, FIELDS

# Of transformers and PEFT: what they have renamed.
pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = "red blue green one two three cat dog".split()
PAIRS = [{"prompt": f"say {w}", "chosen": f"{w} {w}", "rejected": "no"} for w in WORDS]
STEPS = [
    {"prompt": f"say {w}", "steps": steps, "labels": [step != "no" for step in steps]}
    for w in WORDS
    for steps in ([w, "no"], [w, w, "no", w])
]
TEXTS = [{"prompt": f"say {w}", "completion": n * f"{w} "} for n, w in enumerate(WORDS, start=1)]
AUTO = {
    "rm": transformers.AutoModelForSequenceClassification,
    "prm": transformers.AutoModelForTokenClassification,
}
FAST = {("llama", "prm"), ("gpt2", "rm")}
EACH = [(f, m) for f in ("llama", "gpt2", "gemma2") for m in AUTO]
RUNS = [k if k in FAST else pytest.param(*k, marks=pytest.mark.slow) for k in EACH]


def base(family: str, chat_model: Path, folder: Path) -> Path:
    """A language model of the family, made by transformers, with the tests' tokenizer."""
    tokenizer = mp.load_tokenizer(chat_model)
    name, own = CASES[family]
    fields = FIELDS | {"num_hidden_layers": 2, "max_position_embeddings": 256} | own
    # No pad_token_id: the run takes the tokenizer's.
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    config = getattr(transformers, f"{name}Config")(**fields | ids | {"vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trained(config: dict[str, Any], model: Path, folder: Path, method: str, **keys: Any) -> Path:
    """The output folder of two steps."""
    data = lines(folder / f"{method}.jsonl", PAIRS if method == "rm" else STEPS)
    named = {"model": str(model), "dataset": data, "method": method, "output": str(folder / "run")}
    fields = {name: value for name, value in config.items() if name != "lora_r"}
    return mp.train(fields | named | {"max_steps": 2, "learning_rate": 1e-2} | keys).output


def scored(model: Any, rows: list[Any], folder: Path, *flags: str) -> list[Any]:
    """What `mud-puppy score` writes."""
    out = folder / "scores.jsonl"
    out.unlink(missing_ok=True)
    words = ["score", str(model), lines(folder / "rows.jsonl", rows), "--output", str(out)]
    assert cli.main([*words, "--precision", "fp32", *flags]) == 0
    return [json.loads(line)["score"] for line in out.read_text().splitlines()]


def logits(model: Any, tokenizer: Any, texts: list[str]) -> np.ndarray:
    """transformers' scores of one padded batch."""
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return found.logits.float().numpy()


def read(folder: Path, method: str) -> Any:
    return AUTO[method].from_pretrained(folder, attn_implementation="eager").eval()


def of_template(tokenizer: Any, row: dict[str, str]) -> str:
    turns = [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]
    return tokenizer.apply_chat_template(turns, tokenize=False)


@pytest.mark.parametrize(("family", "method"), RUNS)
def test_transformers_gives_the_scores_of_a_run(
    family: str, method: str, chat_model: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    model = base(family, chat_model, tmp_path / "base")
    out = trained(config, model, tmp_path, method, tune="full")
    tokenizer, theirs = mp.load_tokenizer(out), read(out, method)
    if method == "prm":
        check_steps(theirs, tokenizer, out, tmp_path)
        return
    texts = [of_template(tokenizer, row) for row in TEXTS]
    found = np.array(scored(out, TEXTS, tmp_path))
    assert found.std() > 0.05
    np.testing.assert_allclose(found, logits(theirs, tokenizer, texts)[:, 0], atol=1e-3)
    # Without the template texts end with EOS, which pads: the score is that of the token before.
    ended = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in TEXTS]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == theirs.config.pad_token_id
    found = np.array(scored(out, TEXTS, tmp_path, "--no-chat-template"))
    np.testing.assert_allclose(found, logits(theirs, tokenizer, ended)[:, 0], atol=1e-3)
    # It can fail: the token after would have another.
    theirs.config.pad_token_id = 0
    one = logits(theirs, tokenizer, ended[-1:])[0, 0]
    assert abs(found[-1] - one) > 5e-3


def check_steps(theirs: Any, tokenizer: Any, out: Path, folder: Path) -> None:
    found = scored(out, STEPS, folder)
    start = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    heads = [start.format(row["prompt"]) for row in STEPS]
    texts = [h + "".join(f"{s}\n" for s in r["steps"]) for h, r in zip(heads, STEPS, strict=True)]
    all_logits = torch.tensor(logits(theirs, tokenizer, texts))
    chances = torch.softmax(all_logits, -1)[..., 1].numpy()
    assert chances.std() > 0.05
    for row, head, ours, chance in zip(STEPS, heads, found, chances, strict=True):
        first = len(tokenizer(head)["input_ids"])
        # A byte is a token.
        ends = first - 1 + np.cumsum([len(step) + 1 for step in row["steps"]])
        np.testing.assert_allclose(ours, chance[ends], atol=1e-3)
        assert np.abs(ours - chance[ends - 1]).max() > 5e-3  # it can fail: a token before


@pytest.mark.parametrize("method", ["rm", pytest.param("prm", marks=pytest.mark.slow)])
def test_an_adapter_exported_and_merged(
    method: str, chat_model: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    """The run's adapter, its checkpoint's, and both merged, here, in transformers and in PEFT."""
    rows = TEXTS if method == "rm" else STEPS

    def flat(model: Path, *flags: Any) -> np.ndarray:
        return np.concatenate(
            [np.atleast_1d(x) for x in scored(model, rows, tmp_path, *map(str, flags))]
        )

    out = trained(config, chat_model, tmp_path, method, lora_r=4, save_steps=1)
    want = flat(chat_model, "--adapter", out)
    for name, flags in (("adapter", []), ("whole", ["--merge-lora"])):
        assert cli.main(["export", str(out), "--output", str(tmp_path / name), *flags]) == 0
    words = ["merge", str(chat_model), str(out), "--output", str(tmp_path / "merged")]
    assert cli.main([*words, "--merge-precision", "fp32"]) == 0
    found = flat(chat_model, "--adapter", tmp_path / "adapter")
    np.testing.assert_allclose(found, want, atol=1e-5)
    tokenizer = mp.load_tokenizer(out)
    for name in ("merged", "whole"):
        np.testing.assert_allclose(flat(tmp_path / name), want, atol=1e-4)
        theirs = read(tmp_path / name, method)
        check(theirs, tokenizer, want, tmp_path / name, tmp_path)
    fields = {"num_labels": len(theirs.config.id2label), "pad_token_id": tokenizer.pad_token_id}
    theirs = AUTO[method].from_pretrained(chat_model, **fields)
    theirs = peft.PeftModel.from_pretrained(theirs, str(out)).eval()
    check(theirs, tokenizer, want, tmp_path / "whole", tmp_path)
    # The first step's checkpoint is another model.
    words = ["export", str(out), "--output", str(tmp_path / "first"), "--step", "1"]
    assert cli.main(words) == 0
    first = flat(chat_model, "--adapter", tmp_path / "first")
    assert np.abs(first - want).max() > 5e-3


def check(theirs: Any, tokenizer: Any, want: np.ndarray, folder: Path, work: Path) -> None:
    """transformers' model gives the scores of the texts; of steps, those of the folder's model."""
    if len(want) > len(TEXTS):
        check_steps(theirs, tokenizer, folder, work)
        return
    texts = [of_template(tokenizer, row) for row in TEXTS]
    np.testing.assert_allclose(logits(theirs, tokenizer, texts)[:, 0], want, atol=1e-3)
