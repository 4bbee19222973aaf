"""8-bit moments against float32 ones: one step, three hundred, memory, shards, checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mud_puppy.config import Config
from mud_puppy.model import axes
from mud_puppy.parallel import make_mesh, shardings
from mud_puppy.run import eight_bit
from mud_puppy.run.checkpoint import Checkpoints
from mud_puppy.run.eight_bit import scale_by_adam_8bit, scale_by_lion_8bit
from mud_puppy.run.prepare import prepare
from mud_puppy.weights import add_lora
from tests.tiny import tiny_model

V, T = 256, 32
ADAM = optax.scale_by_adam(0.9, 0.999, 1e-8), scale_by_adam_8bit(0.9, 0.999, 1e-8)
LION = optax.scale_by_lion(0.9, 0.99), scale_by_lion_8bit(0.9, 0.99)


@pytest.fixture(scope="module")
def wide():
    """(model, params): a llama of 2 layers of 64, whose matrices are not small."""
    return tiny_model(hidden_size=64, intermediate_size=128, vocab_size=V, initializer_range=0.1)


def batch(seed: int, accumulation: int = 1, rows: int = 8) -> dict:
    """Sequences in which a token follows from the one before, with one in five at random."""
    rng = np.random.default_rng(seed)
    step = np.random.default_rng(0).permutation(V)
    x = np.empty((accumulation, rows, T + 1), np.int32)
    x[..., 0] = rng.integers(0, V, x.shape[:2])
    for t in range(T):
        random = rng.integers(0, V, x.shape[:2])
        x[..., t + 1] = np.where(rng.random(x.shape[:2]) < 0.2, random, step[x[..., t]])
    shape = (*x.shape[:2], T)
    return {
        "tokens": x[..., :-1],
        "targets": x[..., 1:],
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
        "weights": np.ones(shape, np.float32),
    }


def start(wide, optimizer: str, spec: str = "data=1,fsdp=1", lora: bool = False, **keys):
    model, params = wide
    mesh = make_mesh(spec)
    if lora:
        params = add_lora(params, 64, 64, key=jax.random.key(1))
    params = jax.device_put(
        jax.tree.map(jnp.array, params), shardings(mesh, axes(model.arch), params)
    )
    given = dict(model="m", dataset="d", output="o", precision="fp32", learning_rate=3e-3) | keys
    config = Config.load(given | dict(method="lora" if lora else "full", optimizer=optimizer))
    return mesh, prepare(config, model, params, mesh, 300)


def train(wide, optimizer: str, steps: int, spec: str = "data=1,fsdp=1", **options):
    mesh, run = start(wide, optimizer, spec, **options)
    state, losses = run.state, []
    with jax.set_mesh(mesh):
        for i in range(steps):
            state, metrics = run.step(state, batch(i, 2 if spec != "data=1,fsdp=1" else 1))
            losses.append(metrics["loss"])
    return np.array([float(a / b) for a, b in losses]), state


def tree(seed: int, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {"big": (2, 64, 512), "b": (2, 256, 16), "norm": (512,)}
    return {k: jnp.asarray(scale * rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


@pytest.mark.parametrize(("plain", "ours"), [ADAM, LION], ids=["adam", "lion"])
def test_small_leaves_are_optaxs(plain, ours):
    params = tree(0)
    states, moves = [plain.init(params), ours.init(params)], [None, None]
    for i in range(3):
        for j, tx in enumerate((plain, ours)):
            moves[j], states[j] = tx.update(tree(i), states[j], params)
    assert states[1].mu["norm"].dtype == jnp.float32 and states[1].mu_absmax["norm"] is None
    assert states[1].mu["big"].dtype == states[1].mu["b"].dtype == jnp.uint8
    np.testing.assert_allclose(moves[1]["norm"], moves[0]["norm"], rtol=1e-5, atol=1e-7)
    assert np.abs(np.asarray(moves[1]["big"] - moves[0]["big"])).max() > 1e-4


@pytest.mark.parametrize("seed", [0, 1])
def test_the_second_step_differs_by_what_one_rounding_allows(seed):
    """The first is exact, for its moments are fresh; the second has them rounded once."""
    params = tree(seed)
    plain, ours = ADAM
    states = [tx.init(params) for tx in ADAM]
    g1, g2 = tree(seed + 10), tree(seed + 20)
    first = [tx.update(g1, s, params) for tx, s in zip(ADAM, states, strict=True)]
    np.testing.assert_allclose(first[1][0]["big"], first[0][0]["big"], rtol=1e-5)
    want, _ = plain.update(g2, first[0][1], params)
    got, _ = ours.update(g2, first[1][1], params)
    # Roundings of 0.45/64 and 0.45/128 of a block's largest mean and square, carried through.
    m = 0.9 * 0.1 * np.abs(g1["big"]).max() * 0.45 / 64
    v = 0.999e-3 * np.abs(g1["big"]).max() ** 2 * 0.45 / 128
    c1, c2 = 1 - 0.9**2, 1 - 0.999**2
    mean = np.asarray(0.9 * 0.1 * g1["big"] + 0.1 * g2["big"])
    square = np.asarray(0.999e-3 * g1["big"] ** 2 + 1e-3 * g2["big"] ** 2)
    low = np.maximum(square - v, 1e-3 * np.asarray(g2["big"]) ** 2)
    bound = (np.abs(mean) + m) / c1 / np.sqrt(low / c2) - np.abs(mean) / c1 / np.sqrt(square / c2)
    error = np.abs(np.asarray(got["big"] - want["big"]))
    assert (error <= bound + 1e-5).all() and error.max() > 1e-3
    assert np.median(error) < 0.01


@pytest.fixture(scope="module")
def curve(wide):
    """The losses of 300 steps of AdamW in 8 bits."""
    return train(wide, "adamw_8bit", 300)[0]


def test_three_hundred_steps_of_adamw_reach_the_same_loss(wide, curve):
    losses, _ = train(wide, "adamw", 300)
    assert losses[-30:].mean() < 0.5 * losses[0]
    assert abs(curve[-30:].mean() / losses[-30:].mean() - 1) < 0.005
    assert np.abs(curve - losses).max() > 0, "the same states"


@pytest.mark.slow
def test_two_hundred_of_lion_too(wide):
    ours, losses = (train(wide, o, 200, learning_rate=3e-4)[0] for o in ("lion_8bit", "lion"))
    assert losses[-30:].mean() < 0.8 * losses[0]
    assert abs(ours[-30:].mean() / losses[-30:].mean() - 1) < 0.005
    assert np.abs(ours - losses).max() > 0, "the same states"


def test_a_coarser_code_would_be_seen(wide, curve, monkeypatch):
    """The mutation: eight codes in place of 256."""
    encode = eight_bit.encode

    def coarse(x, signed):
        codes, absmax = encode(x, signed)
        return codes & 0xE0, absmax

    monkeypatch.setattr(eight_bit, "encode", coarse)
    losses, _ = train(wide, "adamw_8bit", 60)
    assert losses[-10:].mean() > 1.02 * curve[50:60].mean()


@pytest.mark.parametrize(
    ("layers", "width", "mlp", "kv", "rank"),
    [(30, 576, 1536, 192, None), (32, 4096, 14336, 1024, 16), (16, 2048, 8192, 512, 8)],
    ids=["smollm2-135m full", "8b lora r16", "1b lora r8"],
)
def test_moments_take_a_quarter(layers, width, mlp, kv, rank):
    pairs = [(width, width), (kv, width), (kv, width), (width, width), (mlp, width), (mlp, width)]
    pairs += [(width, mlp)]
    if rank is None:
        shapes = [(layers, *p) for p in pairs] + [(49152, width)] + [(layers, width)] * 2
    else:
        shapes = [s for o, i in pairs for s in ((layers, rank, i), (layers, o, rank))]
    params = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]

    def size(tx):
        state = jax.eval_shape(tx.init, params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))

    assert 0.25 < size(ADAM[1]) / size(ADAM[0]) <= 0.26
    assert 0.25 < size(LION[1]) / size(LION[0]) <= 0.26


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_eight_devices_train_as_one(wide, lora):
    mesh, run = start(wide, "adamw_8bit", "data=2,fsdp=4", lora)
    moments = run.state.opt_state[0]
    for moment in (moments.mu, moments.nu):
        same = jax.tree.map(lambda m, w: m.sharding == w.sharding, moment, run.state.train)
        assert all(jax.tree.leaves(same))
    split, state = train(wide, "adamw_8bit", 4, "data=2,fsdp=4", lora=lora)
    alone, other = train(wide, "adamw_8bit", 4, "data=8,fsdp=1", lora=lora)
    np.testing.assert_allclose(split, alone, rtol=1e-4)
    codes = [x for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.uint8]
    assert codes and any(not x.sharding.is_fully_replicated for x in codes)
    # Sums in another order move a code now and then, by one.
    others = [x for x in jax.tree.leaves(other.opt_state) if x.dtype == jnp.uint8]
    for a, b in zip(codes, others, strict=True):
        assert np.mean(np.asarray(a) != np.asarray(b)) < 0.02


def test_a_run_goes_on_from_its_checkpoint(wide, tmp_path):
    mesh, run = start(wide, "adamw_8bit", "data=2,fsdp=4")
    with jax.set_mesh(mesh):
        state, _ = run.step(run.state, batch(0))
        checkpoints = Checkpoints(tmp_path, 2)
        checkpoints.save(1, state)
        checkpoints.wait()
        want, _ = run.step(state, batch(1))
        back = checkpoints.restore(want)
        for x in jax.tree.leaves(back.state.opt_state):
            assert x.dtype in (jnp.uint8, jnp.float32, jnp.int32)
        got, _ = run.step(back.state, batch(1))
    for a, b in zip(jax.tree.leaves(got.opt_state), jax.tree.leaves(want.opt_state), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(a, b)


def test_fp16_skips_a_step_that_overflows(wide):
    _, run = start(wide, "adamw_8bit", precision="fp16")
    state, _ = run.step(run.state, batch(0))
    before = jax.device_get(state.opt_state)
    huge = batch(1) | {"weights": np.full((1, 8, T), 1e30, np.float32)}
    huge["weights"][0, 0, 0] = np.inf
    state, _ = run.step(state, huge)
    for a, b in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
    state, _ = run.step(state, batch(1))
    moved = [
        (np.asarray(a) != b).any()
        for a, b in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(before), strict=True)
    ]
    assert all(moved)


BITSANDBYTES = """
import sys
sys.path.insert(0, sys.argv[1])
import bitsandbytes as bnb, numpy as np, torch
given = np.load(sys.argv[2])
out = {}
for name in ("AdamW8bit", "Lion8bit"):
    p = torch.nn.Parameter(torch.tensor(given["p"]))
    tx = getattr(bnb.optim, name)([p], lr=0.01, weight_decay=0.0)
    for g in given["g"]:
        p.grad = torch.tensor(g)
        tx.step()
    out[name] = p.detach().numpy()
np.savez(sys.argv[3], **out)
"""


@pytest.mark.slow
def test_ten_steps_are_bitsandbytes(tmp_path):
    """MUD_PUPPY_BNB names a folder that has it; it has these optimizers on the CPU too."""
    folder = os.environ.get("MUD_PUPPY_BNB", "")
    if not (Path(folder) / "bitsandbytes").exists():
        pytest.fail("pip install --no-deps --target FOLDER bitsandbytes, then MUD_PUPPY_BNB=FOLDER")
    rng = np.random.default_rng(0)
    p, g = (rng.normal(size=s).astype(np.float32) for s in ((64, 512), (10, 64, 512)))
    np.savez(tmp_path / "in.npz", p=p, g=g)
    command = [sys.executable, "-c", BITSANDBYTES, folder, tmp_path / "in.npz", tmp_path / "o.npz"]
    subprocess.run(command, check=True, capture_output=True)
    theirs = np.load(tmp_path / "o.npz")
    for name, pair in (("AdamW8bit", ADAM), ("Lion8bit", LION)):
        moved = []
        for tx in pair:
            ours, state = jnp.asarray(p), tx.init(jnp.asarray(p))
            for x in g:
                move, state = tx.update(jnp.asarray(x), state)
                ours = ours - 0.01 * move
            moved.append(np.abs(np.asarray(ours) - theirs[name]).mean())
        # Nearer to bitsandbytes' 8 bits than float32 states are: the same codes, and few ties.
        assert moved[1] < 0.2 * moved[0], (name, moved)
