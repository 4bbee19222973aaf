"""Who serves a call, what is refused, and the self-check and tiles of each chip."""

import inspect
import logging

import jax.numpy as jnp
import pytest

from mud_puppy.kernels import choice, flash_attention, selfcheck, target, tuned
from mud_puppy.kernels.attention import cudnn, flash, prepare, selection
from mud_puppy.kernels.attention.plan import Options
from tests.kernels.attention.calls import qkv, segments


@pytest.fixture
def cpu():
    with target.use(target.Target("cpu", "cpu")):
        yield


def test_says_once_who_serves_and_why(cpu, caplog):
    choice.say.cache_clear()
    args = qkv()
    with caplog.at_level(logging.INFO, logger="mud_puppy"):
        flash_attention(*args)
        flash_attention(*args, window=3)
    assert caplog.messages == ["attention: xla on cpu"]


def test_refuses_bad_calls(cpu):
    f = inspect.unwrap(flash_attention)  # as users have it, without the type checks of tests
    q, k, v = qkv()
    with pytest.raises(ValueError, match="cudnn cannot serve this call: the platform is cpu"):
        f(q, k, v, implementation="cudnn")
    with pytest.raises(ValueError, match="'triton' is none of"):
        f(q, k, v, implementation="triton")
    with pytest.raises(ValueError, match="K dividing H"):
        f(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="one dtype"):
        f(q, k, v.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="a window needs causal attention"):
        f(q, k, v, window=0)
    with pytest.raises(ValueError, match="a window needs causal attention"):
        f(q, k, v, window=2, causal=False)
    with pytest.raises(ValueError, match="pass kv_segment_ids"):
        f(q[:, 1:], k, v, segment_ids=segments(2, 39))
    with pytest.raises(ValueError, match="without segment_ids"):
        f(q, k, v, kv_segment_ids=segments(2, 40))
    with pytest.raises(ValueError, match="softcap must be positive"):
        f(q, k, v, softcap=0.0)
    with pytest.raises(ValueError, match=r"expected sinks \(4,\)"):
        f(q, k, v, sinks=jnp.zeros(2))
    with pytest.raises(ValueError, match=r"expected a bias \[2 or 1, 4 or 1, 40, 40\]"):
        f(q, k, v, bias=jnp.zeros((1, 2, 40, 40)))
    with pytest.raises(ValueError, match="a probability below 1"):
        f(q, k, v, dropout=1.0, dropout_seed=0)
    with pytest.raises(ValueError, match="needs a dropout_seed"):
        f(q, k, v, dropout=0.1)
    with pytest.raises(ValueError, match="pallas cannot serve this call: a head is wider"):
        f(*qkv(D=272), implementation="pallas")


def chosen(arch, monkeypatch, ids=None, fault=None, implementation=None, **shape):
    """The implementation that is chosen for a call on that chip."""
    monkeypatch.setattr(selfcheck, "fault", lambda name, case: fault)
    q, k, v = qkv(**{"dtype": jnp.bfloat16} | shape)
    platform = "cuda" if arch.startswith("sm") else "rocm"
    extras = dict.fromkeys(("sinks", "bias", "seed", "prefixes"))
    with target.use(target.Target(platform, arch)):
        return selection.choose(
            implementation, q, k, v, ids, ids, Options(True, None, 1.0), extras, False
        )


def test_chooses_by_chip_and_call(hopper, monkeypatch):
    ids = segments(2, 40)
    assert chosen("sm90", monkeypatch) == "cudnn"
    assert chosen("sm90", monkeypatch, ids) == "pallas"  # which skips blocks; cuDNN masks
    assert chosen("sm90", monkeypatch, T=39) == "pallas"
    assert chosen("sm90", monkeypatch, D=272) == "xla"
    assert chosen("sm90", monkeypatch, dtype=jnp.float32) == "xla"
    monkeypatch.setattr(cudnn, "on_cuda", lambda: False)
    for arch in ("gfx1100", "gfx942"):
        assert chosen(arch, monkeypatch) == chosen(arch, monkeypatch, ids) == "pallas"
        assert chosen(arch, monkeypatch, D=272) == "xla"


def test_a_wrong_kernel_is_refused_by_name(monkeypatch, caplog):
    choice.say.cache_clear()
    wrong = "attention kernels failed"
    assert chosen("gfx1100", monkeypatch, fault=wrong) == "xla"
    assert caplog.records[0].levelname == "WARNING" and wrong in caplog.text
    with pytest.raises(ValueError, match="pallas cannot serve this call: attention kernels failed"):
        chosen("gfx1100", monkeypatch, fault=wrong, implementation="pallas")


def test_the_self_check_sees_a_wrong_kernel(monkeypatch):
    error, bound = selection._case(jnp.float32, 16, 16)
    assert error < bound / 20
    right = flash.attention

    def wrong(q, k, v, q_ids, k_ids, **options):
        return right(q, k, v, 0 * q_ids, 0 * k_ids, **options)

    monkeypatch.setattr(flash, "attention", wrong)
    error, bound = selection._case(jnp.float32, 16, 16)
    assert error > 10 * bound


def test_every_chip_has_every_tile():
    table = tuned._table("flash_attention")
    assert set(table) == {"sm90", "gfx1100", "gfx1201", "gfx90a", "gfx942", "gfx950"}
    wanted = {f"{p} {d} {w}" for p in prepare.PASSES for d in prepare.KINDS for w in prepare.WIDTHS}
    for entry in table.values():
        assert wanted <= set(entry["tiles"])
        assert all(entry[note] for note in ("device", "versions", "date", "method"))
