"""`mud-puppy score`: what is written, what is printed, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mud_puppy as mp
from mud_puppy import cli
from mud_puppy.export import save_merged
from mud_puppy.run import rewards as room
from mud_puppy.run.calibration import of_labels, of_pairs, of_steps
from mud_puppy.run.rewards import rewards

WORDS = "red blue green one two three cat dog sun moon".split()


def made(chat_model: Path, folder: Path, task: str, labels: int) -> Path:
    model, params = mp.load(chat_model, dtype="float32")
    key = jax.random.key(1)
    model, params = mp.with_score_head(model, params, labels, task, key=key)
    params["score"]["weight"] *= 20  # scores that differ
    mp.save_hf(model, params, folder, dtype="float32", tokenizer=mp.load_tokenizer(chat_model))
    return folder


@pytest.fixture(scope="module")
def reward_model(chat_model: Path, tmp_path_factory: Any) -> Path:
    return made(chat_model, tmp_path_factory.mktemp("rm"), "sequence", 1)


@pytest.fixture(scope="module")
def step_model(chat_model: Path, tmp_path_factory: Any) -> Path:
    return made(chat_model, tmp_path_factory.mktemp("prm"), "token", 2)


@pytest.fixture
def score(tmp_path: Path, capsys: Any) -> Callable[..., tuple[list[dict[str, Any]], str]]:
    """score(model, rows, *flags) -> (rows written, what was printed)."""

    def run(model: Path, rows: list[Any], *flags: str) -> Any:
        data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        out.unlink(missing_ok=True)
        words = ["score", str(model), str(data), "--output", str(out), "--precision", "fp32"]
        assert cli.main([*words, *flags]) == 0
        return [json.loads(line) for line in out.read_text().splitlines()], capsys.readouterr().out

    return run


def of_template(question: str, answer: str) -> str:
    turns = (("user", question), ("assistant", answer))
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def by_hand(folder: Path, text: str) -> float:
    """The score of one text, alone, at its last token that does not pad."""
    model, params = mp.load(folder, dtype="float32")
    tokens = np.array(mp.load_tokenizer(folder)(text)["input_ids"])
    end = np.flatnonzero(tokens != mp.load_tokenizer(folder).pad_token_id)[-1]
    return float(model(params, jnp.asarray(tokens[None]))[0, end, 0])


PAIRS = [
    {"prompt": f"say {w}", "chosen": f"{w} {w}", "rejected": "no " * i, "source": "ab"[i % 2]}
    for i, w in enumerate(WORDS, start=1)
]


def test_pairs(score: Any, reward_model: Path) -> None:
    found, printed = score(reward_model, PAIRS, "--batch-size", "2", "--max-seq-length", "128")
    assert [{k: v for k, v in row.items() if k != "score"} for row in found] == PAIRS
    first = found[0]["score"]
    for name in ("chosen", "rejected"):
        want = by_hand(reward_model, of_template("say red", PAIRS[0][name]))
        assert first[name] == pytest.approx(want, rel=1e-5)
    chosen, rejected = (np.array([r["score"][n] for r in found]) for n in ("chosen", "rejected"))
    want = of_pairs(chosen, rejected)
    lines = printed.splitlines()
    assert lines[0] == (
        f"10 pairs: accuracy {want['accuracy']:.4f}, mean margin {want['margin']:.4f}, "
        f"log loss {want['log_loss']:.4f}, ECE (10 bins) {want['ece']:.4f}"
    )
    of_a = of_pairs(chosen[1::2], rejected[1::2])
    assert lines[1].startswith(f"  a: 5 pairs: accuracy {of_a['accuracy']:.4f}, mean margin")
    assert lines[2].startswith("  b: 5 pairs: accuracy")
    assert len(lines) == 4 and lines[3].startswith("scores: ")


def test_answers_are_ranked(score: Any, reward_model: Path) -> None:
    texts = ["one", "two two", "three three three"]
    given = [
        {"prompt": "say", "completions": texts, "kept": None},
        {
            "prompt": [{"role": "user", "content": "say"}],
            "responses": [texts[2], [{"role": "assistant", "content": texts[0]}]],
        },
        {"prompt": "say", "answers": [texts[1]]},
    ]
    found, printed = score(reward_model, given, "--column", "mine")
    a, b, c = (row["mine"] for row in found)
    assert found[0] == given[0] | {"mine": a, "mine_ranking": found[0]["mine_ranking"]}
    assert [a[i] for i in found[0]["mine_ranking"]] == sorted(a, reverse=True)
    assert (b[0], b[1], c[0]) == pytest.approx((a[2], a[0], a[1]), rel=1e-5)
    assert len(set(a)) == 3
    assert printed.startswith("6 texts: mean ")


def test_texts_with_labels(score: Any, reward_model: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "say", "completion": w, "label": i % 4} for i, w in enumerate(WORDS)
    ]
    rows[1] = {"text": of_template("say", "blue"), "label": True}
    turns = [{"role": r, "content": c} for r, c in (("user", "say"), ("assistant", "green"))]
    rows[2] = {"messages": turns, "label": 2}
    found, printed = score(reward_model, rows)
    scores = np.array([row["score"] for row in found])
    for i in (0, 1, 2):
        want = by_hand(reward_model, of_template("say", WORDS[i]))
        assert scores[i] == pytest.approx(want, rel=1e-5)
    want = of_labels(scores, np.array([0.0, 1, 2, 3, 0, 1, 2, 3, 0, 1]))
    words = {"pearson": "pearson", "spearman": "spearman", "mae": "mean absolute error"}
    told = ", ".join(f"{word} {want[name]:.4f}" for name, word in words.items())
    assert printed.startswith(f"10 texts: {told}\n")


def test_steps(score: Any, step_model: Path) -> None:
    steps = [["red", "blue blue"], ["one"], ["cat", "dog", "no"], ["sun", "sun"]]
    labels = [[True, False], [True], [False, True, False], [True, True]]
    rows = [{"prompt": "say", "steps": s, "labels": x} for s, x in zip(steps, labels, strict=True)]
    found, printed = score(step_model, rows)
    assert [len(row["score"]) for row in found] == [2, 1, 3, 2]
    model, params = mp.load(step_model, dtype="float32")
    text = "<|im_start|>user\nsay<|im_end|>\n<|im_start|>assistant\nred\nblue blue\n"
    tokens = mp.load_tokenizer(step_model)(text)["input_ids"]
    logits = model(params, jnp.asarray([tokens]))[0]
    ends = [len(tokens) - len("blue blue\n") - 1, len(tokens) - 1]
    want = jax.nn.softmax(logits[jnp.array(ends)])[:, 1]
    assert found[0]["score"] == pytest.approx(np.asarray(want), rel=1e-5)
    figures = of_steps([np.array(row["score"]) for row in found], list(map(np.array, labels)))
    assert printed.startswith(
        f"4 rows, 8 steps: accuracy {figures['accuracy']:.4f}, first wrong step found "
    )
    bare, printed = score(step_model, [{k: v for k, v in r.items() if k != "labels"} for r in rows])
    assert [row["score"] for row in bare] == [row["score"] for row in found]
    assert printed.startswith("8 steps: mean ")


@pytest.mark.parametrize("task", ["sequence", "token"])
def test_packed_scores_are_those_of_single_texts(
    task: str, reward_model: Path, step_model: Path
) -> None:
    from mud_puppy.data.example import Example, RatedExample, StepsExample

    rng = np.random.default_rng(0)
    examples: list[Any] = []
    for n in (5, 40, 17, 64, 3, 33, 28, 9):
        tokens = rng.integers(0, 256, n).astype(np.int32)
        weights = np.zeros(n, np.float32)
        weights[[n // 2, n - 1]] = 1
        one = Example(tokens, weights, "x")
        if task == "token":
            examples.append(StepsExample(one, np.zeros(n, np.int32)))
        else:
            examples.append(RatedExample(one, 1, 0.0))
    model, params = mp.load(step_model if task == "token" else reward_model, dtype="float32")
    compiled: Any = room._scores
    programs = compiled._cache_size()
    packed = rewards(model, params, examples, 64, 3)
    assert compiled._cache_size() == programs + 1  # of one shape
    alone = [rewards(model, params, [example], 64, 1)[0] for example in examples]
    assert [len(x) for x in packed] == [2 if task == "token" else 1] * len(examples)
    for a, b in zip(packed, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # It can fail: positions and segments decide the score.
    swapped = rewards(model, params, examples[::-1], 64, 3)
    assert np.abs(np.concatenate(swapped) - np.concatenate(alone)).max() > 1e-2


def test_an_adapter_of_a_reward_model(
    score: Any, chat_model: Path, reward_model: Path, tmp_path: Path
) -> None:
    """Beside its base, and merged into it, it scores as the whole does."""
    model, params = mp.load(reward_model, dtype="float32")
    params = mp.add_lora(params, 4, 8, key=jax.random.key(2))
    params = jax.tree.map(lambda x: x + 0.01 if x.ndim == 3 and x.shape[-1] == 4 else x, params)
    mp.save_adapter(model, params, tmp_path / "adapter")
    save_merged(model, params, tmp_path / "whole", "float32", mp.load_tokenizer(chat_model))
    want, _ = score(tmp_path / "whole", PAIRS)
    plain, _ = score(reward_model, PAIRS)
    assert abs(plain[0]["score"]["chosen"] - want[0]["score"]["chosen"]) > 1e-3
    found, _ = score(chat_model, PAIRS, "--adapter", str(tmp_path / "adapter"))
    words = ["merge", str(chat_model), str(tmp_path / "adapter"), "--output", str(tmp_path / "m")]
    assert cli.main([*words, "--merge-precision", "fp32"]) == 0
    merged, _ = score(tmp_path / "m", PAIRS)
    for a, b, c in zip(want, found, merged, strict=True):
        for name in ("chosen", "rejected"):
            assert b["score"][name] == pytest.approx(a["score"][name], abs=1e-4)
            assert c["score"][name] == pytest.approx(a["score"][name], abs=1e-4)
    words = [*words[:-1], str(tmp_path / "codes"), "--merge-precision", "int8"]
    assert cli.main(words) == 0
    coded, _ = score(tmp_path / "codes", PAIRS)
    spread = np.std([row["score"]["chosen"] for row in want])
    for a, b in zip(want, coded, strict=True):
        assert 0 < abs(a["score"]["chosen"] - b["score"]["chosen"]) < spread / 5
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["pad_token_id"] == mp.load_tokenizer(chat_model).pad_token_id


def test_rows_are_written_as_they_were(score: Any, reward_model: Path) -> None:
    rows = [
        {"text": "Wörter 中文", "half": "\ud800", "list": [{"a": None}], "source": "s"},
        {"text": "b", "none": None, "number": 0.1},
    ]
    found, printed = score(reward_model, rows)
    assert [{k: v for k, v in row.items() if k != "score"} for row in found] == rows
    lines = printed.splitlines()
    assert lines[0] == "columns not used: half, list, number"
    assert lines[1].startswith("2 texts: mean ")
    assert lines[2].startswith("  (no source): 1 texts: mean")
    assert lines[3].startswith("  s: 1 texts: mean")


def test_bad_rows_are_left_out_where_that_is_asked_for(score: Any, reward_model: Path) -> None:
    rows = [PAIRS[0], {"chosen": "a"}, PAIRS[1] | {"chosen": "x" * 200}, PAIRS[2]]
    found, printed = score(reward_model, rows, "--on-bad-rows", "skip", "--max-seq-length", "100")
    assert [row["prompt"] for row in found] == ["say red", "say green"]
    assert "2 bad rows left out" in printed
    assert "its answer alone is longer than max_seq_length 100" in printed
    assert "2 pairs: " in printed


BAD = {
    "language model": ("lm", PAIRS, [], "chat_model0: has a head of words; score takes a reward m"),
    "three labels": ("three", PAIRS, [], "has 3 scores of each token; score takes a reward model"),
    "pairs to a process reward model": (
        "prm",
        PAIRS,
        [],
        "rows.jsonl:1: a process reward model scores prompt and steps (or completions)",
    ),
    "steps to a reward model": (
        "rm",
        [{"prompt": "p", "completions": ["a"], "labels": [True]}],
        [],
        "rows.jsonl:1: completions with labels are the steps of an answer",
    ),
    "no answer": ("rm", [{"prompt": "p"}], [], "rows.jsonl:1: a reward model scores chosen and"),
    "no prompt": ("rm", [{"answers": ["a"]}], [], "rows.jsonl:1: answers need a prompt"),
    "no answers": (
        "rm",
        [{"prompt": "p", "answers": []}],
        [],
        "rows.jsonl:1: answers must be a list with at least one answer, not an empty list",
    ),
    "an answer of another kind": (
        "rm",
        [{"prompt": "p", "answers": ["a", 3]}],
        [],
        "rows.jsonl:1: answers[1]: prompt and completion must both be text or both messages",
    ),
    "two forms": ("rm", [PAIRS[0], {"text": "a"}], [], "rows.jsonl:2: is of the form texts, but"),
    "some labels": (
        "rm",
        [{"text": "a", "label": 1}, {"text": "b"}],
        [],
        "rows.jsonl:2: has no label, but",
    ),
    "a column that is there": (
        "rm",
        [{"text": "a", "score": 1}],
        [],
        "rows.jsonl:1: has a column 'score' already; give the scores another name",
    ),
    "a long answer": (
        "rm",
        [{"prompt": "p", "completion": "a" * 200}],
        ["--max-seq-length", "100"],
        "rows.jsonl:1: its answer alone is longer than max_seq_length 100; raise it",
    ),
    "more than the model's positions": (
        "rm",
        [{"prompt": "p", "completion": "a" * 600}],
        [],
        "max_seq_length 2048: ",
    ),
    "no data": ("rm", [], [], "rows.jsonl holds no rows"),
    "adapter of words": ("lm", PAIRS, ["--adapter", "words"], "words: has a head of words; score"),
    "no adapter": ("lm", PAIRS, ["--adapter", "missing"], "missing: no such adapter folder"),
}


@pytest.fixture(scope="module")
def models(
    chat_model: Path, reward_model: Path, step_model: Path, tmp_path_factory: Any
) -> dict[str, Path]:
    three = made(chat_model, tmp_path_factory.mktemp("three"), "token", 3)
    return {"lm": chat_model, "rm": reward_model, "prm": step_model, "three": three}


def refused(capsys: Any, *words: Any) -> str:
    assert cli.main(list(map(str, words))) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err.removeprefix("mud-puppy: error: ")


@pytest.mark.parametrize(("model", "rows", "flags", "line"), BAD.values(), ids=list(BAD))
def test_what_cannot_be_scored(
    model: str,
    rows: list[Any],
    flags: list[str],
    line: str,
    models: dict[str, Path],
    capsys: Any,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "words" in flags:
        lm, params = mp.load(models["lm"], dtype="float32")
        mp.save_adapter(lm, mp.add_lora(params, 2, 4, key=jax.random.key(0)), "words")
    data = Path("rows.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(mp, "load", None)  # no weights are read
    said = refused(capsys, "score", models[model], data, "--output", "d/out.jsonl", *flags)
    assert line in said
    assert not Path("d").exists()


def test_outputs_that_cannot_be_used(capsys: Any, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    words = ["score", "m", "d.jsonl", "--output"]
    assert refused(capsys, *words, file) == f"output {file}: exists; name another file.\n"
    assert "is a folder; name a file" in refused(capsys, *words, tmp_path)
    assert "cannot be written (Not a directory)" in refused(capsys, *words, file / "out.jsonl")


def test_what_needs_words_refuses_a_model_of_scores(
    capsys: Any, models: dict[str, Path], chats: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    model, params = mp.load(models["rm"], dtype="float32")
    adapter = tmp_path / "a"
    mp.save_adapter(model, mp.add_lora(params, 2, 4, key=jax.random.key(0)), adapter)
    monkeypatch.setattr(mp, "load", None)
    for words in (
        ["generate", models["rm"], "--prompt", "a"],
        ["chat", models["prm"]],
        ["eval", models["rm"], "--dataset", chats],
    ):
        assert "mud-puppy score" in refused(capsys, *words)
    for method in ("lora", "preference"):
        words = [models["rm"], chats, "--method", method, "--output", tmp_path / "o"]
        assert f"no words, which method {method} needs" in refused(capsys, *words)
    assert not list((tmp_path / "o").iterdir())
    words = ["generate", models["lm"], "--adapter", adapter, "--prompt", "a"]
    assert f"{adapter}: is the adapter of a model that gives scores" in refused(capsys, *words)
