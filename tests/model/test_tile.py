"""Projections and MLP tile after tile: the loss and gradients of all tokens at once."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.model import Inputs, block, make_cache, scan_layers, tile
from mud_puppy.run.methods import SFT
from mud_puppy.weights import Lora, add_lora, combine, is_weight, partition, quantize, with_dropout
from tests.tiny import tiny_model

TILE = 16


def model_of(family: str, kind: str):
    """(model, params) of a tiny one; adapters as after some steps, for a fresh one's b is zero."""
    model, params = tiny_model(model_type=family, intermediate_size=64)
    if kind == "qlora":
        params = quantize(params, "nf4", group=32, embed="int8", head="int8")
    if kind != "full":
        params = add_lora(params, 4, 8, key=jax.random.key(1), dropout=0.5)
        params = jax.tree.map(stepped, params, is_leaf=is_weight)
    return model, params


def stepped(w):
    if not isinstance(w, Lora):
        return w
    return replace(w, b=jax.random.normal(jax.random.key(2), w.b.shape) / 8)


def packed(rows: int, length: int) -> dict[str, jax.Array]:
    """Two examples a row, and padding at the end of it."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (2, rows, length)).astype(np.int32)
    place = np.arange(length)
    first = rng.integers(length // 4, length // 2, (rows, 1))
    last = rng.integers(3 * length // 4, length, (rows, 1))
    segments = np.where(place < first, 1, np.where(place < last, 2, 0)).astype(np.int32)
    positions = np.where(segments == 1, place, np.where(segments == 2, place - first, 0))
    batch = {
        "tokens": tokens[0],
        "targets": tokens[1],
        "positions": positions.astype(np.int32),
        "segment_ids": segments,
        "weights": (segments > 0).astype(np.float32),
    }
    return jax.tree.map(jnp.asarray, batch)


def results(model, params, batch, remat: str = "full"):
    """The loss and the gradients of all that trains."""
    return jax.jit(partial(step, model, remat))(params, batch)


def step(model, remat: str, params, batch):
    train, frozen = partition(params)
    run = partial(scan_layers, remat=remat)

    def loss(train):
        scores = SFT.score(model, combine(train, frozen), None, batch, run)
        return SFT.loss(scores, batch, batch["weights"].sum())[0]

    return jax.value_and_grad(loss)(train)


def same(got, want) -> bool:
    """To 1e-5 of the largest number of each array."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return all(np.abs(a - b).max() <= 1e-5 * np.abs(b).max() for a, b in pairs)


CASES = [  # family, what trains, rows, length, what is saved
    ("llama", "full", 1, 48, "full"),
    ("llama", "full", 2, 37, "offload"),  # 74 tokens: the last tile ends in zeros
    ("qwen2", "lora", 2, 41, "none"),
    ("qwen2", "full", 1, 50, "attention"),
    ("qwen3", "qlora", 1, 61, "projections"),
    ("qwen3", "lora", 2, 32, "offload"),
]


@pytest.mark.parametrize(("family", "kind", "rows", "length", "remat"), CASES)
def test_tiles_give_the_loss_and_gradients_of_the_whole(family, kind, rows, length, remat):
    model, params = model_of(family, kind)
    batch = packed(rows, length)
    tiled = results(replace(model, tile=TILE), params, batch, remat)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(tiled))
    assert same(tiled, results(model, params, batch, remat))


def without_residual(arch, p, x, out, *mask):
    y, routed = _from_attention(arch, p, x, out, *mask)
    return y - x, routed


def first_tiles_angles(x, devices, size):
    """Of cos and sin, whose last axis is half a head, every tile gets those of the first."""
    cut = _cut(x, devices, size)
    return jnp.broadcast_to(cut[:1], cut.shape) if x.shape[-1] == 4 else cut


def in_another_order(x, B, T):
    return _whole(x[::-1], B, T)


_from_attention, _cut, _whole = block._from_attention, tile._cut, tile._whole


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        (block, "_from_attention", without_residual),
        (tile, "_cut", first_tiles_angles),
        (tile, "_whole", in_another_order),
    ],
)
def test_wrong_tiles_are_seen(monkeypatch, module, name, wrong):
    model, params = model_of("llama", "full")
    batch = packed(1, 48)
    want = results(model, params, batch)
    monkeypatch.setattr(module, name, wrong)
    got = results(replace(model, tile=TILE), params, batch)
    assert not same(got[0], want[0]) and not same(got[1], want[1])


def test_what_tiles_name_is_still_saved():
    """ "projections" keeps q, k, v, gate and up of the whole sequence; "full" makes them again."""
    model, params = model_of("llama", "full")
    batch = packed(1, 48)

    def products(remat: str, size: int | None) -> int:
        run = partial(step, replace(model, tile=size), remat)
        return executed(jax.make_jaxpr(run)(params, batch).jaxpr)

    assert products("projections", TILE) == products("projections", None)
    assert products("full", TILE) == products("full", None) > products("projections", None)


def executed(jaxpr) -> int:
    """Multiplications in matrix products, those of a loop as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = [equation.invars[0].aval.shape[axis] for axis in contracted]
            total += int(np.prod(depth) * np.prod(equation.outvars[0].aval.shape))
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(executed(getattr(x, "jaxpr", x)) for x in inner if is_jaxpr(x))
    return total


def is_jaxpr(x) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def test_temporaries_are_those_of_a_tile():
    """A wide MLP over 4,096 tokens: with all of them gate and up alone are 64 MiB in float32."""
    model, params = tiny_model(intermediate_size=2048)
    batch = packed(1, 4096)

    def mib(size: int | None) -> float:
        run = jax.jit(partial(step, replace(model, tile=size), "full"))
        return run.lower(params, batch).compile().memory_analysis().temp_size_in_bytes / 2**20

    whole, quarter, small = mib(None), mib(1024), mib(256)
    assert whole > 96 and quarter < 0.5 * whole and small < 0.25 * whole


def test_every_tile_drops_other_elements():
    model, params = model_of("llama", "lora")
    weights = {"key": jax.random.key(0), "other": jnp.ones(())}

    def kept(weights, x):
        return x * weights["other"] * jax.random.bernoulli(weights["key"], 0.5, x.shape)

    one, other = tile.over_tiles(8, kept, weights, jnp.ones((1, 16, 32))).reshape(2, 8, 32)
    assert 0.3 < one.mean() < 0.7 and 0.3 < (one == other).mean() < 0.7
    # In a step: gradients that exist, of another mask for another key.
    found = [
        results(replace(model, tile=TILE), with_dropout(params, key), packed(1, 48))[0]
        for key in jax.random.split(jax.random.key(3))
    ]
    assert np.isfinite(found).all() and abs(found[0] - found[1]) > 1e-4


@pytest.mark.parametrize(
    ("tokens", "most", "size"),
    [(120832, 4096, 3776), (8192, 2048, 2048), (74, 16, 15), (10, 16, 10), (17, 16, 9)],
)
def test_tiles_divide_or_are_nearly_equal(tokens, most, size):
    assert tile.tile_size(tokens, most) == size <= most


def test_a_cache_takes_all_tokens_at_once():
    model, params = model_of("llama", "full")
    inputs = Inputs(jnp.arange(32)[None])
    cache = make_cache(model.arch, 1, 32, jnp.float32)

    def hidden(model):
        return model.forward(params, inputs, cache)[0]

    tiled = replace(model, tile=TILE)
    assert str(jax.make_jaxpr(lambda: hidden(tiled))()) == str(
        jax.make_jaxpr(lambda: hidden(model))()
    )
    np.testing.assert_array_equal(hidden(tiled), hidden(model))
