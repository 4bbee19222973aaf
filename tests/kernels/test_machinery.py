"""The kernels' emitter, targets, tuned tables and self-check."""

import ast
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mud_puppy
from mud_puppy.kernels import choice, grouped_matmul, linear_cross_entropy, selfcheck, target, tuned
from mud_puppy.kernels import pallas as pl
from mud_puppy.kernels.target import Target

PACKAGE = Path(mud_puppy.__file__).parent
TABLES = sorted((PACKAGE / "kernels" / "tables").glob("*.json"))
ARCHS = ["gfx1100", "gfx1101", "gfx1201", "gfx90a", "gfx942", "gfx950", "sm90"]


def test_only_the_emitter_imports_pallas():
    files = list(PACKAGE.rglob("*.py"))
    assert any(file.name == "pallas.py" for file in files)
    for file in files:
        names = []
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names += [a.name for a in node.names]
            if isinstance(node, ast.ImportFrom):
                names += [f"{node.module}.{a.name}" for a in node.names]
        found = [n for n in names if n.startswith("jax") and "pallas" in n]
        assert not found or file.name == "pallas.py", f"{file} imports {found}"


def double(x, out):
    out[...] = pl.exp2(pl.dot(x[...], x[...], trans_b=True))


def call_double(x):
    n = len(x) // 16
    return pl.call(
        double,
        grid=(n,),
        in_specs=[pl.BlockSpec((16, 16), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((16, 16), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((16 * n, 16), jnp.float32),
        num_warps=4,
        num_stages=1,
        name="double",
    )(x)


def test_a_kernel_runs_here():
    x = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32) / 4
    blocks = x.reshape(4, 16, 16).astype(np.float64)
    want = np.exp2(blocks @ blocks.transpose(0, 2, 1)).reshape(64, 16)
    assert np.allclose(call_double(jnp.asarray(x)), want, rtol=1e-5)


def test_target_can_be_named():
    here = target.current()
    assert target.on_device()
    with target.use(Target("rocm", "gfx1100")):
        assert target.current() == Target("rocm", "gfx1100")
        assert not target.on_device()
    assert target.current() == here


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "TABLES", tmp_path)
    tuned._table.cache_clear()
    choice.say.cache_clear()
    rows = {arch: {"tiles": {"forward 64": {"block": i}}} for i, arch in enumerate(ARCHS)}
    del rows["gfx1101"]
    (tmp_path / "op.json").write_text(json.dumps(rows))
    yield
    tuned._table.cache_clear()


@pytest.mark.parametrize(
    "arch, known",
    [("gfx1100", "gfx1100"), ("gfx1151", "gfx1100"), ("gfx1200", "gfx1201"), ("gfx908", "gfx942"),
     ("gfx950", "gfx950"), ("sm100", "sm90"), ("cpu", "gfx1100")],
)  # fmt: skip
def test_tiles_of_a_chip_or_its_relative(table, caplog, arch, known):
    with target.use(Target("rocm", arch)), caplog.at_level("INFO", "mud_puppy"):
        assert tuned.tiles("op", "forward 64") == {"block": ARCHS.index(known)}
        tuned.tiles("op", "forward 64")
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == (arch not in (known, "cpu"))
    assert all(arch in line and known in line for line in said)


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_tables_name_their_source(path):
    for arch, entry in json.loads(path.read_text()).items():
        assert re.fullmatch(r"gfx\d+a?|sm\d+", arch), arch
        for key in ("device", "versions", "date", "method"):
            assert isinstance(entry[key], str) and entry[key], (arch, key)
        assert entry["tiles"], arch


@pytest.fixture
def on_rocm(monkeypatch):
    monkeypatch.setattr(target, "_device", lambda: Target("rocm", "gfx1100"))
    monkeypatch.setattr(selfcheck, "_faults", {})


@pytest.mark.parametrize(
    "error, wrong", [(0.1, False), (0.3, True), (float("nan"), True), (float("inf"), True)]
)
def test_selfcheck_refuses_by_name(on_rocm, error, wrong):
    calls = []
    fault = [selfcheck.fault("some_op", lambda: calls.append(1) or (error, 0.2)) for _ in "ab"]
    assert len(calls) == 1 and fault[0] == fault[1]
    assert (fault[0] is not None) == wrong
    assert not wrong or "some_op failed its self-check" in fault[0]


def test_selfcheck_of_a_kernel_that_does_not_compile(on_rocm):
    def broken():
        raise RuntimeError("no such instruction")

    assert "no such instruction" in selfcheck.fault("some_op", broken)


def test_selfcheck_inside_a_trace(on_rocm):
    def case():
        x = jnp.ones(3)
        return float(jnp.abs(x - 1).max()), 0.0

    @jax.jit
    def f(x):
        assert selfcheck.fault("some_op", case) is None
        return x

    f(jnp.ones(2))


def test_no_selfcheck_without_a_device(on_rocm):
    with target.use(Target("rocm", "gfx1100")):
        assert selfcheck.fault("some_op", lambda: 1 / 0) is None


NAMES = ("pallas", "xla")


def choose(forced, reason, order=("pallas",)):
    choice.say.cache_clear()
    return choice.choose("some_op", forced, NAMES, {"pallas": lambda: reason}, order)


@pytest.mark.parametrize(
    "forced, reason, order, name, level, words",
    [
        (None, None, ("pallas",), "pallas", "INFO", "some_op: pallas"),
        (None, "it is odd", ("pallas",), "xla", "WARNING", "pallas declined: it is odd"),
        (None, "it is odd", (), "xla", "INFO", "some_op: xla on"),
        ("xla", "it is odd", ("pallas",), "xla", "INFO", "some_op: xla, as asked for"),
    ],
)
def test_what_serves_is_said(caplog, forced, reason, order, name, level, words):
    with caplog.at_level("INFO", "mud_puppy"):
        assert choose(forced, reason, order) == name
    [record] = caplog.records
    assert record.levelname == level and words in record.getMessage()


def test_a_forced_implementation_does_not_fall_back():
    with pytest.raises(ValueError, match="some_op: pallas cannot serve this call: it is odd"):
        choose("pallas", "it is odd")
    with pytest.raises(ValueError, match="some_op: implementation 'cuda' is none of"):
        choose("cuda", None)


@pytest.mark.parametrize("op", ["cross-entropy", "grouped_matmul"])
def test_a_kernel_that_fails_its_check_is_named(monkeypatch, caplog, op):
    monkeypatch.setattr(target, "_device", lambda: Target("cuda", "sm90"))
    monkeypatch.setattr(selfcheck, "fault", lambda name, case: f"{name} failed its self-check")
    choice.say.cache_clear()
    x = jnp.ones((1, 16, 16), jnp.bfloat16)
    with caplog.at_level("WARNING", "mud_puppy"):
        if op == "cross-entropy":
            linear_cross_entropy(x, jnp.ones((32, 16), x.dtype), jnp.zeros((1, 16), jnp.int32))
        else:
            grouped_matmul(x[0], jnp.ones((1, 16, 16), x.dtype), jnp.array([16]))
    assert any(op in r.getMessage() and "self-check" in r.getMessage() for r in caplog.records)
