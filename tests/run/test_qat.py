"""QAT by the common step: it learns, eight devices train as one, what is finished is what ran."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.config import Config
from mud_puppy.model import axes, scan_layers
from mud_puppy.parallel import make_mesh, shardings
from mud_puppy.run.methods import SFT
from mud_puppy.run.optimizer import make_optimizer
from mud_puppy.run.prepare import prepare
from mud_puppy.run.step import make_eval
from mud_puppy.weights import (
    FakeQuant,
    add_lora,
    fake_quant,
    finish_fake_quant,
    is_weight,
    strip_fake_quant,
)

KINDS = {
    "full w8a8": {"format": "int8", "activations": "int8", "ranges": "learned"},
    "lora w4": {"format": "int4", "group": 16},
    "lora w4a8": {"format": "int4", "group": 16, "activations": "int8", "ranges": "learned"},
}


def start(tiny, kind: str, spec: str, **keys):
    model, params = tiny
    mesh, method = make_mesh(spec), kind.split()[0]
    if method == "lora":
        params = add_lora(params, 8, 16, key=jax.random.key(1))
    params = fake_quant(jax.tree.map(jnp.array, params), **KINDS[kind])
    params = jax.device_put(params, shardings(mesh, axes(model.arch), params))
    given = dict(model="m", dataset="d", output="o", method=method, precision="fp32")
    return mesh, prepare(Config.load(given | keys), model, params, mesh, 20)


def mean(metrics) -> float:
    return float(metrics["loss"][0] / metrics["loss"][1])


def loss(model, params, batch) -> float:
    nothing = jax.tree.map(lambda x: None, params)
    evaluate = jax.jit(make_eval(model, SFT, scan_layers))
    return mean(evaluate(params, nothing, None, jax.tree.map(jnp.asarray, batch)))


@pytest.mark.parametrize("kind", ["full w8a8", "lora w4"])
def test_it_learns_and_what_is_finished_is_what_ran(tiny, random_batch, kind):
    model, _ = tiny
    mesh, run = start(tiny, kind, "data=1,fsdp=1", optimizer="adamw", learning_rate=5e-3)
    batch, state, losses = random_batch(0, 1, 8), run.state, []
    before = jax.device_get(state.train)
    with jax.set_mesh(mesh):
        for _ in range(8):
            state, metrics = run.step(state, batch)
            losses.append(mean(metrics))
        during = run.evaluate(state, [batch])["eval_loss"]
        fake = run.params(state)
        done = finish_fake_quant(fake)
        after, floats = (loss(model, tree, batch) for tree in (done, strip_fake_quant(fake)))
    assert losses[-1] < losses[0] - 0.1
    # The last bit of a sum may move the code of an activation.
    assert after == pytest.approx(during, rel=1e-4 if "a8" in kind else 1e-5)
    assert abs(floats - during) > 1e-4, "the mutation: without rounding the loss is another"
    assert not any(isinstance(w, FakeQuant) for w in jax.tree.leaves(done, is_leaf=is_weight))
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, jax.device_get(state.train))
    assert all(jax.tree.leaves(moved)), "something that trains did not move"


def test_eight_devices_train_as_one(tiny, random_batch):
    seen = []
    for spec in ("data=1,fsdp=1", "data=2,fsdp=4"):
        mesh, run = start(tiny, "lora w4a8", spec, optimizer="sgd", learning_rate=0.1)
        state, losses = run.state, []
        with jax.set_mesh(mesh):
            for i in range(3):
                state, metrics = run.step(state, random_batch(i, 2, 8))
                losses.append(mean(metrics))
        seen.append((losses, jax.device_get(state.train)))
    (alone, train), (ours, ours_train) = seen
    np.testing.assert_allclose(ours, alone, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(ours_train), jax.tree.leaves(train), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_learned_ranges_are_neither_decayed_nor_orthogonalised(tiny):
    w = fake_quant(tiny[1], ranges="learned")["layers"][0][0]["mlp"]["up_proj"]["weight"]
    train = {"layers": [[{"weight": w}]]}
    still = jax.tree.map(jnp.zeros_like, train)
    tx = make_optimizer("adamw", lambda step: 0.1, train, weight_decay=0.5)
    moved = jax.tree.leaves(tx.update(still, tx.init(train), train)[0])
    assert moved[0].any() and not moved[1].any()  # base, range
    ones = jax.tree.map(jnp.ones_like, train)
    tx = make_optimizer("muon", lambda step: 0.1, train)
    moved = jax.tree.leaves(tx.update(ones, tx.init(train), train)[0])
    np.testing.assert_allclose(moved[1], -0.1, rtol=1e-3)  # Adam's first step
    assert np.abs(moved[0]).max() < 0.09


def test_remat_changes_nothing(tiny, random_batch):
    """The backward pass rounds again, to the same codes."""
    model, params = tiny
    params = fake_quant(params, "int4", group=16, activations="int8", ranges="learned")
    batch = {k: jnp.asarray(x[0]) for k, x in random_batch(1, 1, 4).items()}

    def total(params, remat):
        layers = partial(scan_layers, remat=remat)
        scores = SFT.score(model, params, None, batch, layers)
        return SFT.loss(scores, batch, batch["weights"].sum())[0]

    saved, again = (jax.jit(jax.grad(partial(total, remat=r)))(params) for r in ("none", "full"))
    for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
