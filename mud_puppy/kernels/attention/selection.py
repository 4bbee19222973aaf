"""Which implementation of attention serves a call, said once in the log."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mud_puppy.kernels import choice, selfcheck, target, tuned
from mud_puppy.kernels.attention import cudnn, flash, reference, xla
from mud_puppy.kernels.attention.plan import Options

IMPLEMENTATIONS = ("pallas", "cudnn", "xla", "reference")


def choose(
    implementation: str | None,
    q: Any,
    k: Any,
    v: Any,
    q_segments: Any,
    k_segments: Any,
    options: Options,
    extras: dict,
    return_lse: bool,
) -> str:
    """The name of an implementation that can serve: the one asked for, or the fastest."""
    declines = {
        "cudnn": lambda: cudnn.declines(
            q, k, v, q_segments, k_segments, options, extras, return_lse
        ),
        "pallas": lambda: (
            flash.declines(q, v, extras) or choice.checked_by_shard_map(q, k, v) or fault(q, v)
        ),
    }
    order = _order(q.dtype, packed=q_segments is not None)
    # Without queries or keys there is nothing for blocks to cover.
    empty = not (q.size and k.size and v.size)
    return choice.choose("attention", implementation, IMPLEMENTATIONS, declines, order, empty)


def _order(dtype: Any, packed: bool) -> tuple[str, ...]:
    """What to try before XLA. cuDNN masks packed rows where our kernels skip their blocks; float32
    is left to XLA, whose products are the vendor's: ours would be without matrix instructions."""
    platform = target.current().platform
    if dtype == jnp.float32:
        return ()
    if platform == "cuda":
        first = tuned.tiles("flash_attention", "preferred")["packed" if packed else "plain"]
        return ("pallas", "cudnn") if first else ("cudnn", "pallas")
    return ("pallas",) if platform == "rocm" else ()


def fault(q: Any, v: Any) -> str | None:
    """What the self-check of the kernels for these dtypes and widths of head found."""
    D, Dv = q.shape[-1], v.shape[-1]
    return selfcheck.fault(_name(q.dtype, D, Dv), lambda: _case(q.dtype, D, Dv))


def _name(dtype: Any, D: int, Dv: int) -> str:
    return f"attention kernels for {dtype} heads of {D}, {Dv}"


def selfchecks(name: str) -> list[tuple[str, selfcheck.Case]]:
    """Cases that hold the implementation "pallas" or "xla" against the reference."""
    dtype = jnp.dtype(jnp.bfloat16)
    if name == "pallas":
        return [(_name(dtype, D, D), partial(_case, dtype, D, D)) for D in (64, 128)]
    by_xla = partial(_case, dtype, 128, 128, xla.attention)
    return [(f"attention by XLA for {dtype} heads of 128", by_xla)]


def _case(dtype: Any, D: int, Dv: int, attend: Any = None) -> tuple[float, float]:
    """(error, bound) of outputs and gradients on packed rows with grouped heads."""
    r = np.random.default_rng(0)
    T, H, K = 320, 4, 2
    shapes = (1, T, H, D), (1, T, K, D), (1, T, K, Dv), (1, T, H, Dv)
    q, k, v, g = (jnp.asarray(r.normal(size=s), dtype) for s in shapes)
    ids = jnp.asarray(np.arange(T)[None] // 200, jnp.int32)
    options = Options(causal=True, window=None, scale=D**-0.5)

    def results(attend: Any, dtype: Any) -> Any:
        def f(q: Any, k: Any, v: Any) -> Any:
            return attend(q, k, v, ids, ids, options=options)[0]

        out, pull = jax.vjp(f, *(x.astype(dtype) for x in (q, k, v)))
        return out, *pull(g.astype(dtype))

    got = jax.jit(lambda: results(attend or flash.attention, dtype))()
    want = jax.jit(lambda: results(reference.attention, jnp.float32))()
    pairs = zip(got, want, strict=True)
    errors = [abs(a.astype(jnp.float32) - b).max() / abs(b).max() for a, b in pairs]
    return float(jnp.stack(errors).max()), 4 * float(jnp.finfo(dtype).eps) + 1e-4
