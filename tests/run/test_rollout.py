"""Rollouts: which steps sample, what a batch holds then, and that a resume samples the same."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mud_puppy as mp
from mud_puppy.config import Config
from mud_puppy.data import EncodeOptions, Example, Loader, encode, read_rows
from mud_puppy.parallel import make_mesh
from mud_puppy.run.prepare import load_params, prepare
from mud_puppy.run.rollout import _most, answered, prompt_of, rollouts
from mud_puppy.sampling import Reply
from tests.run.test_distillation import losses, run, teacher

__all__ = ["run", "teacher"]  # fixtures
COLD = {"rollout_temperature": 1e-4}


def example(*weights: int) -> Example:
    tokens = np.arange(10, 10 + len(weights), dtype=np.int32)
    return Example(tokens, np.array(weights, np.float32), "here:1")


def test_the_prompt_is_what_stands_before_the_last_answer() -> None:
    assert prompt_of(example(0, 0, 1, 1)).tolist() == [10, 11]
    assert prompt_of(example(0, 1, 0, 0, 1, 1, 0)).tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize(
    ("sizes", "room", "most"),
    [([3, 9, 5], 17, 9), ([3, 9, 5], 16, 8), ([3, 9, 5], 10, 3), ([4], 2, 2)],
)
def test_the_longest_are_cut(sizes: list[int], room: int, most: int) -> None:
    assert _most(sizes, room) == most
    assert sum(min(size, most) for size in sizes) <= room
    assert most == max(sizes) or sum(min(size, most + 1) for size in sizes) > room


def test_all_of_an_answer_is_trained_on_and_nothing_else() -> None:
    row = [example(0, 0, 1, 1), example(0, 0, 0, 1)]
    replies = iter([Reply([1, 2, 3, 4], np.zeros(4)), Reply([5], np.zeros(1))])
    first, second = answered(row, replies, 9)
    assert first.tokens.tolist() == [10, 11, 1, 2, 3]
    assert first.weights.tolist() == [0, 0, 1, 1, 1]
    assert second.tokens.tolist() == [10, 11, 12, 5]


def test_a_step_samples_by_its_number(chat_model: Path, chats: Path, teacher: Path) -> None:
    keys = {"model": str(chat_model), "dataset": "-", "output": "-", "precision": "fp32"}
    keys |= {"method": "distill", "teacher": str(teacher), "mesh": "data=2,fsdp=1", "lora_r": 4}
    config = Config.load(keys | {"distill_on_policy": 0.5, "rollout_max_new_tokens": 8} | COLD)
    tokenizer, mesh = mp.load_tokenizer(chat_model), make_mesh(config.mesh)
    examples = encode(read_rows(chats).rows, tokenizer, EncodeOptions()).examples
    loader = Loader(examples, 2, accumulation=2, max_seq_length=128)
    with jax.set_mesh(mesh):
        run = prepare(config, *load_params(config, mesh), mesh, 4)
        sample = rollouts(config, run, loader, tokenizer)
        assert sample is not None
        given = [loader.batch_at(step) for step in range(24)]
        made = [sample(run.state, step, batch) for step, batch in enumerate(given)]
        steps = [i for i in range(24) if made[i] is not given[i]]
        assert 6 <= len(steps) <= 18
        i = steps[0]
        again = sample(run.state, i, given[i])
        assert all(np.array_equal(again[name], made[i][name]) for name in again)
        sampled, data = made[i], given[i]
        assert {n: (x.shape, x.dtype) for n, x in sampled.items()} == {
            n: (x.shape, x.dtype) for n, x in data.items()
        }
        assert not np.array_equal(sampled["tokens"], data["tokens"])
        # The same prompts: what stands before the first target that counts.
        for a, b in np.ndindex(2, 2):
            first = int(np.argmax(data["weights"][a, b] > 0)) + 1
            assert np.array_equal(sampled["tokens"][a, b, :first], data["tokens"][a, b, :first])
        assert (
            0 < sampled["weights"].sum() <= 8 * sum(len(loader.rows[r]) for r in loader.rows_at(i))
        )
        # At this temperature they are what the policy itself finds the likeliest.
        flat = {name: jnp.asarray(x.reshape(4, -1)) for name, x in sampled.items()}
        inputs = (flat[name] for name in ("tokens", "positions", "segment_ids"))
        likeliest = run.model(run.params(run.state), *inputs).argmax(-1)
        assert (likeliest == flat["targets"])[flat["weights"] > 0].all()


def test_a_resumed_run_samples_the_same(run: Any, tmp_path: Path) -> None:
    keys = {"distill_on_policy": 0.7, "rollout_max_new_tokens": 8, "save_steps": 2}
    keys |= {"lr_scheduler": "constant", "eval_split": 0.25, "max_seq_length": 128}
    _, whole = run(**keys, max_steps=6, output=str(tmp_path / "a"))
    run(**keys, max_steps=2, output=str(tmp_path / "b"))
    _, parts = run(**keys, max_steps=6, output=str(tmp_path / "b"), resume=True)
    assert losses(parts) == losses(whole)
    _, other = run(**keys, seed=1, max_steps=2, output=str(tmp_path / "c"))
    assert losses(other) != losses(whole)[:2]


def test_what_cannot_be_sampled(run: Any, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"distill_on_policy": 0.5}
    with pytest.raises(mp.UserError, match=r"chats.jsonl:1 has a prompt of \d+ tokens"):
        run(**keys, rollout_max_new_tokens=500)
    with pytest.raises(mp.UserError, match=r"\(and 230 may be sampled\), but the teacher"):
        run(**keys, rollout_max_new_tokens=230)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "red red red"}\n')
    with pytest.raises(mp.UserError, match="has no prompt that the student could answer"):
        run(**keys, dataset=str(texts))
    for refused in ({"distill_sft": 0.1}, {"train_on_prompt": True}, {"teacher_logits": "t"}):
        with pytest.raises(mp.UserError, match="distill_on_policy needs method distill with teac"):
            run(**keys, **refused)
