"""An evaluation gives every figure of each source too, from the sums that make those of all."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import mud_puppy as mp
from mud_puppy.config import Config
from mud_puppy.data import Loader, batches_apart
from mud_puppy.model import abstract
from mud_puppy.parallel import make_mesh
from mud_puppy.run.datasets import load_data
from mud_puppy.run.loop import by_source, means
from mud_puppy.run.prepare import Prepared, load_params, prepare
from mud_puppy.run.vocabulary import run_tokenizer, with_scores

WORDS = "red blue green one two three cat dog".split()
NAMES = {"web/a b": "web_a_b", "": "no_source", "z": "z"}


def rows(method: str, source: Any) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for i, w in enumerate(WORDS):
        asked = {"prompt": f"say {w}", "source": source(i)}
        if method == "prm":
            made.append(asked | {"steps": [w, "no"], "labels": [True, i % 3 == 0]})
        else:
            made.append(asked | {"chosen": (1 + i % 4) * w, "rejected": "no", "margin": 0.1 * i})
    return made


def write(path: Path, made: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def three(i: int) -> str:
    return list(NAMES)[i % 3]


@pytest.fixture
def made(config: dict[str, Any], tmp_path: Path) -> Any:
    """made(method, held-out rows, **keys) -> (run, its held-out loader)."""

    def build(method: str, held: list[dict[str, Any]], **keys: Any) -> tuple[Prepared, Loader]:
        data = {"eval_dataset": write(tmp_path / "held.jsonl", held), "max_seq_length": 256}
        base = config | {"method": method, "dataset": write(tmp_path / "d.jsonl", held)}
        read = Config.load(base | data | keys)
        mesh, tokenizer = make_mesh(read.mesh), run_tokenizer(read)
        shaped, shapes = abstract(read.model)
        shaped, _ = with_scores(read, shaped, shapes, tokenizer.pad_token_id)
        found = load_data(read, shaped, tokenizer, 1)
        assert found.evaluation is not None
        with jax.set_mesh(mesh):
            model, params = load_params(read, mesh)
            return prepare(read, model, params, mesh, 1), found.evaluation

    return build


def evaluated(run: Prepared, held: Loader) -> dict[str, float]:
    apart = batches_apart(held)
    names = [name for name, _ in apart]
    with jax.set_mesh(make_mesh("data=1,fsdp=1")):
        return run.evaluate(run.state, (held.batch_of(rows) for _, rows in apart), names)


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["rm", "prm"])
def test_figures_of_a_source_are_those_of_its_rows_alone(
    made: Any, method: str, packed: bool
) -> None:
    held = rows(method, three)
    whole = evaluated(*made(method, held, pack_sequences=packed))
    plain = {name for name in whole if not any(name.endswith(f"/{n}") for n in NAMES.values())}
    assert set(whole) == plain | {f"{n}/{s}" for n in plain for s in NAMES.values()}
    for source, name in NAMES.items():
        own = [row for row in held if row["source"] == source]
        alone = evaluated(*made(method, own, pack_sequences=packed))
        assert set(alone) == plain
        for figure, value in alone.items():
            assert whole[f"{figure}/{name}"] == pytest.approx(value, abs=1e-5)
    # The same of all as without sources.
    without = evaluated(*made(method, [row | {"source": "z"} for row in held]))
    assert {n: whole[n] for n in plain} == pytest.approx(without, abs=1e-5)
    # The partner: other rows under a name give other figures.
    other = evaluated(*made(method, rows(method, lambda i: three(i + i // 4))))
    assert abs(other["eval_loss/z"] - whole["eval_loss/z"]) > 1e-4
    assert other["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-5)


def test_the_figures_of_all_are_the_sums_of_those_of_the_sources(made: Any) -> None:
    run, held = made("rm", rows("rm", three))
    found = evaluated(run, held)
    counts = {NAMES[three(k)]: sum(three(i) == three(k) for i in range(8)) for k in range(3)}
    for figure in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        total = sum(count * found[f"{figure}/{name}"] for name, count in counts.items())
        assert found[figure] == pytest.approx(total / 8, abs=1e-6)


def test_what_a_source_has_none_of_is_left_out() -> None:
    sums = [{"x": (2.0, 4.0), "y": (0.0, 0.0)}, {"x": (1.0, 1.0), "y": (3.0, 2.0)}]
    assert by_source(sums, ["a", "b"]) == {"x/a": 0.5, "x/b": 1.0, "y/b": 1.5}
    assert by_source(sums, ["", "b"]) == {"x/b": 1.0, "y/b": 1.5}
    assert means(sums) == {"x": 0.6, "y": 1.5}
    with pytest.raises(ValueError):
        by_source(sums, ["a"])


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_run_writes_them(config: dict[str, Any], tmp_path: Path, loss: str) -> None:
    held = rows("preference", lambda i: f"s{i % 2}")
    config |= {"method": "preference", "preference": loss, "max_steps": 1}
    config |= {"dataset": write(tmp_path / "d.jsonl", held)}
    if loss == "dpo":
        config |= {"reference": "cached", "merge_lora": True}
    result = mp.train(config | {"eval_dataset": config["dataset"]})
    lines = [json.loads(x) for x in (result.output / "metrics.jsonl").read_text().splitlines()]
    first, last = [line for line in lines if "eval_rewards/chosen" in line]
    for name in ("eval_loss", "eval_rewards/chosen"):
        assert {f"{name}/s0", f"{name}/s1"} <= set(first) & set(last)
        both = (last[f"{name}/s0"] + last[f"{name}/s1"]) / 2
        assert last[name] == pytest.approx(both, abs=1e-5)
    assert first["eval_loss/s0"] == pytest.approx(np.log(2) if loss == "dpo" else 0.5, abs=1e-4)
    report = (result.output / "report.html").read_text()
    assert "Last evaluation, by source" in report
