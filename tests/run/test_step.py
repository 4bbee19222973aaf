"""The step's contract: any split of a batch is the same batch; fp16 skips what overflows."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from mud_puppy.model import scan_layers
from mud_puppy.run.methods import SFT
from mud_puppy.run.optimizer import make_optimizer
from mud_puppy.run.schedule import schedule
from mud_puppy.run.step import FIRST_SCALE, init_state, make_eval, make_step
from mud_puppy.weights import add_lora, partition

T = 32


def run(model, params, batches, *, fp16=False, tx=None, remat="full", clip=1.0):
    """(states, metrics) of one update for each batch."""
    rate = schedule("constant", 1e-2, 100, 0)
    train, frozen = partition(params)
    tx = tx or optax.sgd(1e-2)
    step = jax.jit(make_step(model, SFT, tx, rate, partial(scan_layers, remat=remat), clip))
    state, seen = init_state(train, tx, jax.random.key(1), fp16), []
    for batch in batches:
        state, metrics = step(state, frozen, None, batch)
        seen.append(metrics)
    return state, seen


def difference(a, b) -> float:
    return max(
        float(jnp.abs(x - y).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def loss(metrics) -> float:
    total, count = metrics["loss"]
    return float(total / count)


def test_accumulation_is_the_large_batch(tiny, random_batch):
    model, params = tiny
    whole = random_batch(0, 1, 8)
    parts = {k: x.reshape(4, 2, T) for k, x in whole.items()}
    one, seen_one = run(model, params, [whole], clip=None)
    four, seen_four = run(model, params, [parts], clip=None)
    assert difference(one.train, four.train) <= 1e-6
    assert loss(seen_one[0]) == pytest.approx(loss(seen_four[0]), rel=1e-6)
    assert difference(one.train, params) > 1e-4


def test_a_mean_of_means_would_differ(tiny, random_batch):
    """The mutation: parts weighted alike although they hold different numbers of tokens."""
    model, params = tiny
    whole = random_batch(0, 1, 8)
    halves = [{k: x[:, i : i + 4] for k, x in whole.items()} for i in (0, 4)]
    halves[1]["weights"] = halves[1]["weights"] * (np.arange(T) < 6)
    whole["weights"] = np.concatenate([h["weights"] for h in halves], axis=1)
    _, seen = run(model, params, [whole])
    naive = np.mean([loss(run(model, params, [half])[1][0]) for half in halves])
    assert abs(loss(seen[0]) - naive) > 1e-4


def unpack(batch):
    """The same examples, one a row."""
    rows = []
    for b in range(batch["tokens"].shape[1]):
        for segment in range(1, batch["segment_ids"][0, b].max() + 1):
            here = batch["segment_ids"][0, b] == segment
            row = {}
            for name, x in batch.items():
                row[name] = np.zeros(T, x.dtype)
                row[name][: here.sum()] = x[0, b, here]
            row["segment_ids"] = np.minimum(row["segment_ids"], 1)
            rows.append(row)
    return {name: np.stack([row[name] for row in rows])[None] for name in batch}


def test_packing_changes_neither_loss_nor_gradient(tiny, random_batch):
    model, params = tiny
    packed = random_batch(3, 1, 4, examples=3)
    apart = unpack(packed)
    assert apart["tokens"].shape[1] == 12
    a, seen_a = run(model, params, [packed], clip=None)
    b, seen_b = run(model, params, [apart], clip=None)
    assert float(seen_a[0]["loss"][0]) == pytest.approx(float(seen_b[0]["loss"][0]), rel=1e-5)
    gradient = (seen_a[0]["grad_norm"][0], seen_b[0]["grad_norm"][0])
    assert float(gradient[0]) == pytest.approx(float(gradient[1]), rel=1e-5)
    assert difference(a.train, b.train) <= 1e-2 * 1e-5 * float(gradient[0]) + 1e-7


@pytest.mark.parametrize("field", ["segment_ids", "positions"])
def test_packing_without_segments_or_positions_is_another_loss(tiny, random_batch, field):
    model, params = tiny
    packed = random_batch(3, 1, 4, examples=3)
    wrong = {**packed, "segment_ids": np.ones_like(packed["segment_ids"])}
    if field == "positions":
        # Rotary attention sees differences only, so a position error must break them.
        wrong = {**packed, "positions": packed["positions"] * 2}
    right, other = (run(model, params, [b])[1][0] for b in (packed, wrong))
    assert abs(loss(right) - loss(other)) > 1e-4


@pytest.mark.parametrize("remat", ["none", "attention", "projections"])
def test_remat_policies_change_nothing(tiny, random_batch, remat):
    model, params = tiny
    batch = random_batch(5, 1, 2)
    full, _ = run(model, params, [batch])
    other, _ = run(model, params, [batch], remat=remat)
    assert difference(full.train, other.train) <= 1e-6


def test_clipping_is_torchs(tiny, random_batch):
    model, params = tiny
    batch = random_batch(6, 1, 2)
    free, seen = run(model, params, [batch], clip=None)
    clipped, _ = run(model, params, [batch], clip=0.1)
    moves = jax.tree.leaves(jax.tree.map(lambda x, y: np.asarray(x - y), free.train, params))
    tensors = [torch.nn.Parameter(torch.zeros(m.shape)) for m in moves]
    for t, m in zip(tensors, moves, strict=True):
        t.grad = torch.tensor(m / -1e-2)
    norm = torch.nn.utils.clip_grad_norm_(tensors, 0.1)
    assert float(seen[0]["grad_norm"][0]) == pytest.approx(float(norm), rel=1e-4)
    after = jax.tree.leaves(jax.tree.map(lambda x, y: np.asarray(x - y), clipped.train, params))
    for t, move in zip(tensors, after, strict=True):
        np.testing.assert_allclose(move / -1e-2, t.grad.numpy(), atol=2e-5)


def test_fp16_skips_an_overflow_and_halves_the_scale(tiny, random_batch):
    model, params = tiny
    model = replace(model, dtype="float16")
    batch = random_batch(7, 1, 2)
    good, seen = run(model, params, [batch], fp16=True)
    assert float(good.loss_scale.scale) == FIRST_SCALE and difference(good.train, params) > 0
    exact, _ = run(replace(model, dtype="float32"), params, [batch])
    assert difference(good.train, exact.train) < 1e-4
    # 1e9 times the loss overflows float16 gradients at any scale near 2 ** 16.
    huge = replace(SFT, loss=lambda s, b, w: (SFT.loss(s, b, w)[0] * 1e9, SFT.loss(s, b, w)[1]))
    train, frozen = partition(params)
    tx = optax.sgd(1e-2)
    step = jax.jit(make_step(model, huge, tx, lambda s: s * 0.0, scan_layers, None))
    state, _ = step(init_state(train, tx, jax.random.key(1), True), frozen, None, batch)
    assert difference(state.train, params) == 0 and int(state.step) == 1
    assert float(state.loss_scale.scale) == FIRST_SCALE / 2


def test_lora_trains_adapters_only_and_dropout_only_in_training(tiny, random_batch):
    model, params = tiny
    params = add_lora(params, 4, 8, key=jax.random.key(2), dropout=0.5)
    batch = random_batch(8, 1, 2)
    tx = optax.sgd(1.0)
    state, first = run(model, params, [batch, batch], tx=tx)
    names = {jax.tree_util.keystr((p[-1],)) for p, _ in jax.tree.leaves_with_path(state.train)}
    assert names == {".a", ".b"}
    train, frozen = partition(params)
    evaluate = jax.jit(make_eval(model, SFT, scan_layers))
    once, again = (evaluate(state.train, frozen, None, batch) for _ in range(2))
    assert difference(once, again) == 0
    other, second = run(model, params, [batch, batch], tx=tx)
    assert difference(state.train, other.train) == 0, "dropout is a function of seed and step"
    dry = add_lora(tiny[1], 4, 8, key=jax.random.key(2))
    assert abs(loss(run(model, dry, [batch, batch], tx=tx)[1][1]) - loss(first[1])) > 1e-5


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd", "muon"])
def test_every_optimizer_learns(tiny, random_batch, name):
    model, params = tiny
    batch = random_batch(9, 1, 2)
    rate = schedule("constant", {"sgd": 0.5, "lion": 1e-3}.get(name, 1e-2), 100, 0)
    for start in (params, add_lora(params, 4, 8, key=jax.random.key(2))):
        train, frozen = partition(start)
        tx = make_optimizer(name, rate, train)
        step = jax.jit(make_step(model, SFT, tx, rate, scan_layers, 1.0))
        state, seen = init_state(train, tx, jax.random.key(1), False), []
        for _ in range(12):
            state, metrics = step(state, frozen, None, batch)
            seen.append(loss(metrics))
        assert seen[-1] < seen[0] - 0.05, (name, seen)
