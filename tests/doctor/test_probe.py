"""The probe on this machine: all of it is right, and each check sees what is made wrong."""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy import kernels
from mud_puppy.doctor import probe, watch
from mud_puppy.doctor.faults import diagnose
from mud_puppy.doctor.watch import Probe
from mud_puppy.errors import UserError
from mud_puppy.kernels import selfcheck, target
from mud_puppy.kernels.attention import selection, xla
from mud_puppy.kernels.quantized_matmul import _refusal
from mud_puppy.parallel import host
from tests.doctor.machine import NOBODY, ON_CPU, Machine


@pytest.fixture(autouse=True)
def fresh():
    host.pinned_host_fault.cache_clear()
    yield
    host.pinned_host_fault.cache_clear()


def found(tmp_path, *checks):
    """Faults that a machine without a GPU has, where these checks were made."""
    facts = Machine(tmp_path, NOBODY, {}).facts()
    here = replace(ON_CPU, checks=checks)
    return [(f.name, f.fix) for f in diagnose(facts, here) if f.severity == "fault"]


def steps(kind, word=""):
    return [s for s in probe.steps() if s.kind == kind and word in s.name]


def test_every_op_is_checked_on_every_device():
    ops = {"attention", "decode_attention", "cross-entropy", "grouped_matmul", "quantized_matmul",
           "int8"}  # fmt: skip
    names = [name for name, _ in kernels.selfchecks()]
    assert all(any(op in name for name in names) for op in ops)
    assert all("XLA" in name for name in names)
    for of in (target.Target("rocm", "gfx1100"), target.Target("cuda", "sm90")):
        with target.use(of):
            names = [name for name, _ in kernels.selfchecks()]
        assert all(any(op in name for name in names) for op in ops), (of, names)
        assert sum("quantized_matmul" in name for name in names) >= 5
        assert len(set(names)) == len(names) and not any("by XLA" in name for name in names)


def test_a_kernel_is_known_by_one_name(monkeypatch):
    """What the doctor calls wrong is what the log says was refused."""
    monkeypatch.setattr(target, "_device", lambda: target.Target("cuda", "sm90"))
    names = {name for name, _ in kernels.selfchecks()}
    monkeypatch.setattr(selfcheck, "_faults", dict.fromkeys(names, "seen"))
    q = jnp.zeros((1, 8, 2, 128), jnp.bfloat16)
    assert selection.fault(q, q) == "seen"
    w = kernels.quantize(jnp.zeros((128, 512)), "nf4")
    assert _refusal(jnp.zeros((1, 512), jnp.bfloat16), w) == "seen"


def test_a_kernel_made_wrong(monkeypatch, tmp_path):
    (step,) = steps("kernel", "attention by XLA for bfloat16 heads of 128")[:1]
    right = xla.attention
    assert probe.check(step).problem is None

    def wrong(q, k, v, q_ids, k_ids, **options):
        return right(q, k, v, 0 * q_ids, 0 * k_ids, **options)  # sees other documents

    monkeypatch.setattr(xla, "attention", wrong)
    (step,) = steps("kernel", "attention by XLA for bfloat16 heads of 128")[:1]
    check = probe.check(step)
    assert "failed its self-check: error" in check.problem
    ((name, fix),) = found(tmp_path, check)
    assert name == "kernel-wrong" and "do not train here" in fix


def test_a_kernel_that_does_not_compile():
    def case():
        raise RuntimeError("no such instruction\nmore")

    step = probe.Step("kernel", "k", lambda: probe.kernel("k", case))
    assert probe.check(step).problem.endswith("RuntimeError: no such instruction")


def test_pinned_host(monkeypatch, tmp_path):
    (step,) = steps("pinned_host")
    assert probe.check(step).problem is None
    host.check_offload()
    host.pinned_host_fault.cache_clear()

    def refused(device, x):
        raise ValueError("Could not find memory addressable by device cpu: pinned_host\nmore")

    monkeypatch.setattr(host, "there_and_back", refused)
    check = probe.check(step)
    assert check.problem == "Could not find memory addressable by device cpu: pinned_host"
    ((name, fix),) = found(tmp_path, check)
    assert name == "no-pinned-host" and "gradient_checkpointing: full" in fix
    assert "not tried" in probe.check(steps("offload")[0]).note
    with pytest.raises(UserError, match=r"offload needs pinned_host.*use full") as error:
        host.check_offload()
    assert "\n" not in str(error.value)


def test_pinned_host_that_loses_what_it_holds(monkeypatch):
    monkeypatch.setattr(host, "there_and_back", lambda device, x: jnp.asarray(x))
    assert "what came back" in (host.pinned_host_fault() or "")


def test_offloaded_gradients(monkeypatch, tmp_path):
    (step,) = steps("offload")
    assert probe.check(step) == watch.Check("offload", step.name, None)
    right = probe.scan_layers

    def wrong(layers, group, x, cache, start, remat):
        scale = 1.01 if remat == "offload" else 1
        return right(layers, group, scale * x, cache, start, remat)

    monkeypatch.setattr(probe, "scan_layers", wrong)
    assert "gradients differ" in probe.check(step).problem
    assert found(tmp_path, probe.check(step))[0][0] == "offload-wrong"


def test_all_reduce(monkeypatch, tmp_path):
    (step,) = steps("all-reduce")
    assert jax.local_device_count() == 8 and "8 device" in step.name
    assert probe.check(step).problem is None
    monkeypatch.setattr(jax.lax, "psum", jax.lax.pmax)
    assert probe.check(step).problem == "8 of 8 devices got another sum"
    assert found(tmp_path, probe.check(step))[0][0] == "all-reduce-wrong"


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_products(monkeypatch, tmp_path, name):
    (step,) = steps("matmul", name)
    check = probe.check(step)
    assert check.problem is None and check.note.startswith("error ")
    right = jnp.matmul
    coarse = jnp.float8_e4m3fn if name == "bfloat16" else jnp.bfloat16

    def wrong(a, b):
        return right(*(x.astype(coarse).astype(a.dtype) for x in (a, b)))

    monkeypatch.setattr(jnp, "matmul", wrong)
    assert "allowed" in probe.check(step).problem
    assert found(tmp_path, probe.check(step))[0][0] == "matmul-wrong"
    monkeypatch.setattr(jnp, "matmul", lambda a, b: np.nan * a)
    assert probe.check(step).problem is not None


# The process.


def run(code, timeout_s=30.0):
    return watch.probe(timeout_s, [sys.executable, "-c", code])


ONE = 'import os, sys; print(\'{"doing": "kernel k"}\', flush=True); '


def test_a_process_that_is_killed():
    got = run(ONE + "print('{\"check\": {', end=''); sys.stderr.write('last\\n'); os.abort()")
    assert got == Probe((), (), "it was ended by SIGABRT", "kernel k", ("last",))


def test_a_process_that_raises():
    got = run("raise ValueError('no device')")
    assert (got.crash, got.doing) == ("it ended with status 1", "starting JAX")
    assert got.said == ("ValueError: no device",)


def test_a_process_that_hangs():
    got = run(ONE + "import time; time.sleep(60)", 2.0)
    assert (got.crash, got.doing) == ("it took longer than 2 s", "kernel k")
