"""Contract of run/checkpoint.py: exact, atomic, keep-N; what has another structure is named."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mud_puppy.errors import UserError
from mud_puppy.run.checkpoint import Checkpoints


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Leaf:
    """Stands for `weights.Lora`: a registered dataclass with None holes."""

    base: Any
    a: Any
    key: Any


def small(step: int) -> dict:
    return {"w": jnp.full((4, 4), step, jnp.float32), "step": step}


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings only, as the loop has them before it restores."""

    def leaf_of(x):
        if not isinstance(x, jax.Array):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    return jax.tree.map(leaf_of, tree)


def bits(x: Any) -> bytes:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


def assert_same(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if isinstance(w, (bool, int, float, str)):
            assert type(g) is type(w) and repr(g) == repr(w)
        else:
            assert (g.dtype, g.shape, bits(g)) == (w.dtype, w.shape, bits(w))
        if isinstance(w, jax.Array):
            assert g.sharding == w.sharding


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("data", "fsdp"))


def everything() -> dict:
    """Every kind of leaf that a run's state may hold."""
    place = NamedSharding(mesh(), PartitionSpec("fsdp", "data"))
    copies = NamedSharding(mesh(), PartitionSpec())
    train = {
        "layers": [[{"q.proj": Leaf(None, jnp.linspace(0, 1, 24).reshape(2, 3, 4), None)}]],
        "norm": jnp.array([jnp.nan, jnp.inf, -0.0, 1e-42], jnp.float32),
    }
    return {
        "train": train,
        "opt": optax.adamw(1e-3).init(train),
        "sharded": jax.device_put(jnp.arange(64, dtype=jnp.bfloat16).reshape(8, 8) / 3, place),
        "replicated": jax.device_put(jnp.arange(3.0), copies),
        "dtypes": [
            jnp.arange(5).astype(t)
            for t in [
                "bool",
                "int8",
                "uint8",
                "int16",
                "int32",
                "uint32",
                "float16",
                "bfloat16",
                "float8_e4m3fn",
            ]
        ],
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(7, impl="rbg"), 3),
        "spread_keys": jax.device_put(
            jax.random.split(jax.random.key(1), 8), NamedSharding(mesh(), PartitionSpec("data"))
        ),
        "empty": jnp.zeros((0, 4), jnp.bfloat16),
        "scalar": jnp.float32(0.1),
        "numpy": [np.arange(3, dtype=np.int64), np.float64(1 / 3)],
        "python": [True, 10**20, 1 / 3, float("nan"), "text"],
        "hole": None,
    }


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    state = everything()
    Checkpoints(tmp_path).save(5, state, {"epoch": 2, "name": "ä"})
    saved = Checkpoints(tmp_path)
    while not saved.steps():  # another object: nothing but the disk connects the two
        time.sleep(0.01)
    got = saved.restore(abstract(state))
    assert (got.step, got.meta) == (5, {"epoch": 2, "name": "ä"})
    assert_same(got.state, state)


def test_comparison_sees_one_changed_bit():
    state = {"x": np.zeros(3, np.float32)}
    with pytest.raises(AssertionError):
        assert_same({"x": np.array([0, -0.0, 0], np.float32)}, state)


def test_restores_into_another_sharding(tmp_path):
    place = NamedSharding(mesh(), PartitionSpec(("data", "fsdp")))
    x = jax.device_put(jnp.arange(16.0), place)
    store = Checkpoints(tmp_path)
    store.save(1, {"x": x})
    for other in (
        NamedSharding(mesh(), PartitionSpec("fsdp")),
        jax.sharding.SingleDeviceSharding(jax.devices()[3]),
    ):
        target = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=other)}
        got = store.restore(target).state["x"]
        assert got.sharding == other and bits(got) == bits(x)
    free = store.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}).state["x"]
    assert not free.committed and bits(free) == bits(x)
    assert not store.restore({"x": jnp.zeros(16)}).state["x"].committed


def test_buffers_may_be_donated_and_changed_right_after_save(tmp_path):
    x, n = jnp.arange(1 << 20, dtype=jnp.float32), np.arange(1 << 16)
    spoil = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    store = Checkpoints(tmp_path)
    store.save(1, {"x": x, "n": n})
    spoil(x).block_until_ready()
    n[:] = -1
    got = store.restore({"x": jnp.zeros(1 << 20), "n": n}).state
    np.testing.assert_array_equal(got["x"], np.arange(1 << 20, dtype=np.float32))
    np.testing.assert_array_equal(got["n"], np.arange(1 << 16))


def test_keeps_the_newest_and_the_best(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for step, score in ((1, 3.0), (2, 1.0), (3, float("nan")), (4, 2.0), (5, 1.0), (6, None)):
        store.save(step, small(step), score=score)
    assert (store.latest(), store.best()) == (6, 2)
    assert store.steps() == [2, 5, 6]
    again = Checkpoints(tmp_path, keep=2)  # the best is known from the disk
    assert again.restore(small(0), step=again.best()).state["step"] == 2
    again.save(7, small(7), score=0.5)
    again.wait()
    assert again.steps() == [2, 7]  # 5 and 6 came after 2, from which this run went on
    assert again.best() == 7


def test_a_run_that_went_back_replaces_what_came_later(tmp_path):
    first = Checkpoints(tmp_path, keep=3)
    for step in (10, 20, 30):
        first.save(step, small(step), score=1 / step)
    first.wait()
    second = Checkpoints(tmp_path, keep=3)
    assert second.restore(small(0), step=10).step == 10
    assert second.latest() == 30  # nothing goes before something new is on the disk
    second.save(20, {"w": jnp.full((4, 4), -1.0), "step": -1})
    assert (second.latest(), second.steps(), second.best()) == (20, [10, 20], 10)
    assert second.restore(small(0)).state["step"] == -1


def test_a_fresh_run_does_not_touch_another_runs_checkpoints(tmp_path):
    first = Checkpoints(tmp_path)
    first.save(10, small(10))
    first.wait()
    with pytest.raises(UserError, match=r"holds checkpoints of another run \(newest: step 10\)"):
        Checkpoints(tmp_path).save(5, small(5))
    assert first.steps() == [10]


def test_a_step_is_written_once_by_a_run(tmp_path):
    store = Checkpoints(tmp_path)
    store.save(1, small(1))
    store.save(1, small(99))
    assert store.restore(small(0)).state["step"] == 1


def test_other_names_are_not_checkpoints(tmp_path):
    store = Checkpoints(tmp_path / "run")
    assert (store.latest(), store.best(), store.steps()) == (None, None, [])
    for name in ("checkpoint-9.tmp", "checkpoint-8.removed.tmp", "checkpoint-x", "my-checkpoint-7"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-6").write_text("a file")
    assert store.latest() is None
    with pytest.raises(UserError, match="nothing to resume"):
        store.restore(small(0))
    store.save(1, small(1))
    store.wait()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoint-1",
        "checkpoint-6",
        "checkpoint-x",
        "my-checkpoint-7",
    ]


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least 1, not 0"):
        Checkpoints(tmp_path, keep=0)


def test_replace_frees_what_it_replaces(tmp_path: Path) -> None:
    state = {"w": jnp.arange(8.0), "key": jax.random.key(3)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    other = jax.tree.map(jnp.copy, {"w": jnp.zeros(8), "key": jax.random.key(0)})
    assert_same(checkpoints.replace(other).state, state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(other))


# --- structure ------------------------------------------------------------------------------------


def lora(rank: int, *names: str) -> dict:
    return {n: Leaf(None, jnp.zeros((2, rank, 8)), None) for n in names}


@pytest.mark.parametrize(
    ("saved", "wanted", "message"),
    [
        (
            {"train": lora(8, "q", "v")},
            {"train": lora(16, "q", "v")},
            r"train/q/a is float32\[2,8,8\] in the checkpoint and float32\[2,16,8\] here",
        ),
        (
            {"train": lora(8, "q", "v")},
            {"train": lora(8, "q")},
            r"train/v/a is float32\[2,8,8\] in the checkpoint and absent here",
        ),
        (
            {"train": lora(8, "q")},
            {"train": lora(8, "q", "v")},
            r"train/v/a is absent in the checkpoint and float32\[2,8,8\] here",
        ),
        (
            {"opt": optax.sgd(0.1, momentum=0.9).init({"w": jnp.zeros(2)})},
            {"opt": optax.adam(0.1).init({"w": jnp.zeros(2)})},
            r"opt/0/count is absent in the checkpoint and int32\[\] here",
        ),
        (
            {"x": jnp.zeros(2, jnp.bfloat16)},
            {"x": jnp.zeros(2)},
            r"x is bfloat16\[2\] in the checkpoint and float32\[2\] here",
        ),
        (
            {"k": jax.random.key(0, impl="rbg")},
            {"k": jax.random.key(0)},
            r"k is key<rbg>\[\] in the checkpoint and key<fry>\[\] here",
        ),
        (small(3), small(3) | {"step": 3.0}, "step is int in the checkpoint and float here"),
    ],
)
def test_another_structure_is_one_line_that_names_the_first_difference(
    tmp_path, saved, wanted, message
):
    store = Checkpoints(tmp_path)
    store.save(1, saved)
    with pytest.raises(UserError, match=message) as caught:
        store.restore(wanted)
    assert "\n" not in str(caught.value)
    assert_same(store.restore(saved).state, saved)


def test_two_leaves_of_one_path_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one path"):
        Checkpoints(tmp_path).save(1, {"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}})
