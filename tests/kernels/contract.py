"""What every kernel's test shares: results and gradients, the float64 reference, tolerances."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Of a test that draws shapes: eight parts of six draws, four of them by default. Hypothesis begins
# each part with the simplest shape, so that forty-one differ of all.
PARTS = [*range(4), *(pytest.param(i, marks=pytest.mark.slow) for i in range(4, 8))]


def results(f: Callable, args: tuple, cotangents: Any) -> list:
    """Leaves of f(*args) and then of its VJP at `cotangents` (a tree like the output)."""
    y, pull = jax.vjp(f, *args)
    grads = pull(jax.tree.map(lambda g, y: g.astype(y.dtype), cotangents, y))
    return [*jax.tree.leaves(y), *jax.tree.leaves(grads)]


def compiled(f: Callable, args: tuple, cotangents: Any) -> list[np.ndarray]:
    run = _jit(lambda args, cotangents: results(f, args, cotangents))
    return [np.asarray(x) for x in run(args, cotangents)]


def _jit(f: Callable) -> Callable:
    """On the CPU without LLVM's optimizer, which takes half of a test's time."""
    cpu = jax.default_backend() == "cpu"
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0} if cpu else None)


def in_float64(f: Callable, args: tuple, cotangents: Any) -> list[np.ndarray]:
    """`results` in float64 from the same rounded inputs, on the CPU whatever the device is."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        run = _jit(lambda args, cotangents: results(f, args, cotangents))
        return [np.asarray(x) for x in run(*jax.tree.map(wide, (args, cotangents)))]


def wide(x: Any) -> Any:
    """A floating array in float64, any other as it is."""
    x = np.asarray(x)
    return jnp.asarray(x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x)


def tolerance(dtype: Any, length: int) -> float:
    """For sums of `length` terms in float32 with factors and results rounded to dtype."""
    half = 0 if dtype == jnp.float32 else 3 * float(jnp.finfo(dtype).eps)
    return 4 * float(jnp.finfo(jnp.float32).eps) * length**0.5 + half


def differences(got: Any, want: Any) -> Iterator[float]:
    """The largest difference of each result over its size; -inf must meet -inf, NaN nothing."""
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape, (g.shape, w.shape)
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.array_equal(np.isneginf(g), np.isneginf(w)) and not np.isnan(w).any()
        g, w = g[np.isfinite(w)], w[np.isfinite(w)]
        assert np.isfinite(g).all()
        yield np.abs(g - w).max(initial=0) / max(np.abs(w).max(initial=0), 1e-3)
