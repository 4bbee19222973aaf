"""Eight simulated devices train as one; the second step neither traces nor compiles."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.config import Config
from mud_puppy.kernels import flash_attention
from mud_puppy.model import attention, axes
from mud_puppy.parallel import make_mesh, shardings
from mud_puppy.run.prepare import prepare
from mud_puppy.weights import add_lora, partition

STEPS = 5


def config(method: str, **keys) -> Config:
    given = dict(model="m", dataset="d", output="o", method=method, precision="fp32")
    # sgd: the parameters' path is the gradients' sum.
    return Config.load(given | dict(optimizer="sgd", learning_rate=0.1) | keys)


def start(tiny, method: str, spec: str, **keys):
    model, params = tiny
    mesh = make_mesh(spec)
    if method == "lora":
        params = add_lora(params, 8, 16, key=jax.random.key(1))
    # A copy: the step gives its inputs' buffers away.
    params = jax.tree.map(jnp.array, params)
    params = jax.device_put(params, shardings(mesh, axes(model.arch), params))
    return mesh, prepare(config(method, **keys), model, params, mesh, STEPS)


def run(tiny, random_batch, method: str, spec: str):
    mesh, run = start(tiny, method, spec)
    state, losses = run.state, []
    with jax.set_mesh(mesh):
        for i in range(STEPS):
            state, metrics = run.step(state, random_batch(i, 2, 8))
            losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return losses, jax.device_get(state.train), state


@pytest.fixture(scope="module", params=["full", "lora"])
def alone(request, tiny, random_batch):
    return request.param, *run(tiny, random_batch, request.param, "data=1,fsdp=1")[:2]


@pytest.mark.parametrize("spec", ["data=8", "fsdp=8", "data=4,fsdp=2"])
def test_eight_devices_train_as_one(tiny, random_batch, alone, spec):
    method, losses, train = alone
    ours, ours_train, state = run(tiny, random_batch, method, spec)
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(ours_train), jax.tree.leaves(train), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    if "fsdp" in spec:
        parts = [x for x in jax.tree.leaves(state.train) if not x.sharding.is_fully_replicated]
        assert parts and all(x.addressable_shards[0].data.size < x.size for x in parts), (
            "nothing is split"
        )


def test_another_batch_trains_otherwise(tiny, random_batch, alone):
    """The mutation: half of the rows lost, as by a device whose rows are not counted."""
    method, losses, _ = alone
    mesh, half = start(tiny, method, "data=1,fsdp=1")
    with jax.set_mesh(mesh):
        batch = {k: x[:, :4] for k, x in random_batch(0, 2, 8).items()}
        _, metrics = half.step(half.state, batch)
    assert abs(float(metrics["loss"][0] / metrics["loss"][1]) - losses[0]) > 1e-4


@pytest.mark.parametrize("spec", ["data=1,fsdp=1", "data=2,fsdp=4"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_moments_lie_with_their_weights(tiny, method, spec):
    mesh, run = start(tiny, method, spec, optimizer="adamw")
    moments = run.state.opt_state[0]
    for moment in (moments.mu, moments.nu):
        same = jax.tree.map(lambda m, w: m.sharding == w.sharding, moment, run.state.train)
        assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("spec", ["data=1,fsdp=1", "data=4,fsdp=2"])
def test_the_second_step_neither_traces_nor_compiles(tiny, random_batch, spec):
    mesh, run = start(tiny, "lora", spec, optimizer="adamw", precision="fp32")
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *a, **k: events.append(name))
    try:
        with jax.set_mesh(mesh):
            state, _ = run.step(run.state, random_batch(0, 2, 8))
            first, events[:] = list(events), []
            state, _ = run.step(state, random_batch(1, 2, 8))
            jax.block_until_ready(run.step(state, random_batch(2, 2, 8)))
    finally:
        jax.monitoring.clear_event_listeners()
    work = ("trace", "compile", "lower")
    assert any(word in name for name in first for word in work), "the listener hears nothing"
    assert [name for name in events if any(word in name for word in work)] == []


def test_frozen_weights_are_not_given_away(tiny, random_batch):
    mesh, run = start(tiny, "lora", "data=1,fsdp=1")
    with jax.set_mesh(mesh):
        run.step(run.state, random_batch(0, 2, 8))
    assert not any(x.is_deleted() for x in jax.tree.leaves(run.frozen))
    assert all(x.is_deleted() for x in jax.tree.leaves(partition(run.params(run.state))[0]))


def test_what_trains_is_not_copied(tiny):
    model, params = tiny
    params = jax.tree.map(jnp.array, add_lora(params, 8, 16, key=jax.random.key(1)))
    mesh = make_mesh("data=1,fsdp=1")
    params = jax.device_put(params, shardings(mesh, axes(model.arch), params))
    prepare(config("lora"), model, params, mesh, STEPS)
    train, frozen = partition(params)
    assert all(x.is_deleted() for x in jax.tree.leaves(train))
    assert not any(x.is_deleted() for x in jax.tree.leaves(frozen))


@pytest.mark.parametrize(("rows", "local"), [(8, 1), (4, 4)])
def test_attention_runs_on_each_devices_own_rows(tiny, random_batch, monkeypatch, rows, local):
    """XLA must not partition a kernel: cuDNN's gradients came out wrong when it did."""
    seen = []

    def flash(q, k, v, **options):
        seen.append(q.shape[0])
        return flash_attention(q, k, v, **options)

    monkeypatch.setattr(attention, "flash_attention", flash)
    model, params = tiny
    tokens = jnp.asarray(random_batch(0, 1, rows)["tokens"][0])
    with jax.set_mesh(make_mesh("data=4,fsdp=2")):
        sharded = jax.jit(model.__call__)(params, tokens)
    assert set(seen) == {local}
    np.testing.assert_allclose(sharded, model(params, tokens), atol=1e-4)


@pytest.mark.parametrize("spec", ["fsdp=8", "data=2,fsdp=4"])
def test_no_device_gathers_the_batch(tiny, random_batch, spec):
    """Weights are gathered, a layer at a time; activations and their gradients never are."""
    mesh, run = start(tiny, "full", spec)
    with jax.set_mesh(mesh):
        text = run.lower(random_batch(0, 1, 8)).compile().as_text()
    gathered = re.findall(r"= \(?(?:f32|bf16)\[([\d,]*)\].* all-gather\(", text)
    assert gathered and not any(shape.startswith("8,32,") for shape in gathered)  # [B, T, ...]
