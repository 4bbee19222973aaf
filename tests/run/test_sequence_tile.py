"""The key `sequence_tile`: on a mesh, in a run, and where it is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import mud_puppy as mp
from mud_puppy.config import Config
from mud_puppy.errors import UserError
from mud_puppy.model import axes, block, tile
from mud_puppy.parallel import make_mesh, shardings
from mud_puppy.run.prepare import prepare
from mud_puppy.weights import add_lora

TILE = 16


def start(tiny, method: str, spec: str, size: int | None):
    model, params = tiny
    mesh = make_mesh(spec)
    if method == "lora":
        params = add_lora(params, 8, 16, key=jax.random.key(1))
    params = jax.tree.map(jax.numpy.array, params)  # the step gives its inputs' buffers away
    params = jax.device_put(params, shardings(mesh, axes(model.arch), params))
    keys = dict(model="m", dataset="d", output="o", method=method, precision="fp32")
    config = Config.load(keys | dict(optimizer="sgd", learning_rate=0.1, mesh=spec))
    return mesh, prepare(config, replace(model, tile=size), params, mesh, 2)


def after_two_steps(mesh, run, batches):
    state, losses = run.state, []
    with jax.set_mesh(mesh):
        for batch in batches:
            state, metrics = run.step(state, batch)
            losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return [np.array(losses), *jax.tree.leaves(jax.device_get(state.train))]


@pytest.mark.parametrize(
    ("method", "spec", "rows"),
    [("full", "fsdp=8", 8), ("lora", "data=4,fsdp=2", 16)],
)
def test_tiles_on_eight_devices_train_as_the_whole_on_one(tiny, random_batch, method, spec, rows):
    batches = [random_batch(i, 2, rows) for i in range(2)]
    tiled = after_two_steps(*start(tiny, method, spec, TILE), batches)
    alone = after_two_steps(*start(tiny, method, "data=1,fsdp=1", None), batches)
    for got, want in zip(tiled, alone, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_tiles_in_another_order_train_otherwise(tiny, random_batch, monkeypatch):
    """The mutation of the above."""
    batches = [random_batch(0, 2, 16)]
    right = after_two_steps(*start(tiny, "lora", "data=4,fsdp=2", TILE), batches)
    monkeypatch.setattr(tile, "_whole", lambda x, B, T: _whole(x[::-1], B, T))
    wrong = after_two_steps(*start(tiny, "lora", "data=4,fsdp=2", TILE), batches)
    assert abs(wrong[0] - right[0]) > 1e-4


_whole = tile._whole


@pytest.mark.parametrize(("spec", "rows"), [("fsdp=8", 8), ("data=2,fsdp=4", 16)])
def test_no_device_gathers_the_batch(tiny, random_batch, spec, rows):
    """Tiles leave every row where it is: what is gathered is what was, the weights of a layer."""

    def gathered(size: int | None) -> set[str]:
        mesh, run = start(tiny, "full", spec, size)
        with jax.set_mesh(mesh):
            text = run.lower(random_batch(0, 1, rows)).compile().as_text()
        moved = re.findall(
            r"= \(?(?:f32|s32)\[([\d,]*)\].* (?:all-gather|all-to-all|collective-permute)\(", text
        )
        assert moved
        return set(moved)

    assert gathered(TILE) <= gathered(None)


def test_a_run_in_tiles_is_the_run(config, monkeypatch):
    """Two steps of `mp.train` with layer inputs in the host's memory."""
    seen = []

    def noted(size, *rest):
        seen.append(size)
        return tile.over_tiles(size, *rest)

    monkeypatch.setattr(block, "over_tiles", noted)
    keys = config | {"max_steps": 2, "method": "lora", "overwrite": True}
    losses = []
    for more in ({}, {"sequence_tile": 32, "gradient_checkpointing": "offload"}):
        mp.train(keys | more)
        lines = Path(config["output"], "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert len(losses[0]) == 2 and set(seen) == {None, 32}
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"method": "gptq", "sequence_tile": 64}, "sequence_tile needs a method other than gptq"),
        ({"sequence_tile": 0}, "sequence_tile: 0 is not a whole number at least 1"),
        ({"precision": "fp8", "sequence_tile": 64}, "one scale for all tokens"),
    ],
)
def test_a_tile_that_cannot_be_is_refused(keys, said):
    with pytest.raises(UserError, match=said):
        Config.load(dict(model="m", dataset="d", output="o") | keys)
