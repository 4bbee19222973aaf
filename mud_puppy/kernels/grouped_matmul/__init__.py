"""`grouped_matmul`: rows sorted by expert, each times its expert's weight, as in a MoE layer.

`pallas` on GPUs, else `xla`; `reference` only where a test asks for it. No row is dropped, and
groups may be empty.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mud_puppy.kernels import choice, selfcheck, target
from mud_puppy.kernels.arguments import INTEGERS, check_array
from mud_puppy.kernels.formats import Quantized, dequantize, sliced
from mud_puppy.kernels.grouped_matmul import pallas, reference, xla
from mud_puppy.kernels.varying import alike

OP = "grouped_matmul"
IMPLEMENTATIONS = ("pallas", "xla", "reference")


def grouped_matmul(
    x: Float[Array, "M n"],
    w: Any,
    group_sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M m"]:
    """[M, out] in x's dtype: the first group_sizes[0] rows times w[0].T, the next w[1].T, ...

    w is [E, out, in], an array or `Quantized`; of a quantized one, one expert is decoded at a time.
    Rows after the last group give 0; what the sizes count beyond M is left out. Sums are float32.
    Differentiable in x and in an array w; both gradients are sums in a fixed order. Raises
    ValueError for shapes and dtypes that do not fit and for an `implementation` that cannot serve
    the call.
    """
    check_array(OP, "x", x, "M in")
    check_array(OP, "group_sizes", group_sizes, "E", INTEGERS)
    if not isinstance(w, Quantized):
        check_array(OP, "w", w, "E out in")
    if (
        w.ndim != 3
        or w.shape[2] != x.shape[1]
        or group_sizes.shape != w.shape[:1]
        or not w.shape[0]
    ):
        raise ValueError(
            f"expected x [M, in], w [E, out, in], group_sizes [E]; got x {x.shape}, "
            f"w {tuple(w.shape)}, group_sizes {group_sizes.shape}"
        )
    w = sliced(w) if isinstance(w, Quantized) else w
    group_sizes = _within(group_sizes, len(x))
    name = _choose(implementation, x, w)
    if name == "reference":
        w = dequantize(w, jnp.float32) if isinstance(w, Quantized) else w
        return reference.grouped(x, w, group_sizes)
    x, w, group_sizes = alike((x, w, group_sizes))
    return _core(x, w, group_sizes, {"pallas": pallas, "xla": xla}[name])


def _within(sizes: Any, M: int) -> Any:
    """int32 sizes of what the groups have of M rows: a kernel would read past them."""
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(sizes.astype(jnp.int32), 0)), M)
    return jnp.diff(ends, prepend=0)


def _choose(implementation: str | None, x: Any, w: Any) -> str:
    order = ("pallas",) if _wins(x.dtype) else ()
    declines = {"pallas": lambda: _declines(x, w)}
    return choice.choose(OP, implementation, IMPLEMENTATIONS, declines, order)


def _wins(dtype: Any) -> bool:
    """Whether the kernels are taken by themselves: on GPUs, but for float32.

    XLA has nothing good for this there: its loops wait for the host, and `ragged_dot` computes
    every expert for every row (docs/kernels.md).
    """
    return target.current().platform in ("cuda", "rocm") and dtype != jnp.float32


def _declines(x: Any, w: Any) -> str | None:
    return pallas.declines(x, w) or _fault(x.dtype)


def _fault(dtype: Any) -> str | None:
    """What the self-check of the kernels for this dtype found."""
    return selfcheck.fault(_name(dtype), lambda: _case(dtype))


def _name(dtype: Any) -> str:
    return f"grouped_matmul's kernels for {dtype}"


def selfchecks(name: str) -> list[tuple[str, selfcheck.Case]]:
    """Cases that hold the implementation "pallas" or "xla" against the reference."""
    dtype = jnp.dtype(jnp.bfloat16)
    if name == "pallas":
        return [(_name(dtype), partial(_case, dtype))]
    return [(f"grouped_matmul by XLA for {dtype}", partial(_case, dtype, xla))]


def _case(dtype: Any, module: Any = pallas) -> tuple[float, float]:
    """(error, bound) of the product and both gradients."""
    r = np.random.default_rng(0)
    x, w, g = (
        jnp.asarray(r.normal(size=s), dtype) for s in ((500, 256), (4, 384, 256), (500, 384))
    )
    sizes = jnp.array([100, 0, 337, 50])

    def results(f: Any, *args: Any) -> Any:
        y, pull = jax.vjp(f, *args)
        return y, *pull(g.astype(y.dtype))

    # Arrays go in as arguments, or XLA would compute with them while it compiles.
    got = jax.jit(partial(results, lambda x, w: _core(x, w, sizes, module)))(x, w)
    wide = (a.astype(jnp.float32) for a in (x, w))
    want = results(lambda x, w: reference.grouped(x, w, sizes), *wide)
    pairs = zip(got, want, strict=True)
    errors = [abs(a.astype(jnp.float32) - b).max() / abs(b).max() for a, b in pairs]
    return float(jnp.stack(errors).max()), 4 * float(jnp.finfo(dtype).eps) + 1e-4


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _core(x: Any, w: Any, sizes: Any, module: Any) -> Any:
    return module.grouped(x, w, sizes)


def _core_forward(x: Any, w: Any, sizes: Any, module: Any) -> Any:
    leaves = jax.tree.leaves(w)
    args = x.value, jax.tree.map(lambda leaf: leaf.value, w), sizes.value
    # The scales of a quantized weight do not train.
    trains = len(leaves) == 1 and leaves[0].perturbed
    return module.grouped(*args), (args, () if trains else None)


def _core_backward(module: Any, residuals: Any, dy: Any) -> Any:
    (x, w, sizes), trains = residuals
    dx = module.grouped(dy, w, sizes, transpose=True)
    return dx, None if trains is None else module.weight_gradient(x, dy, w, sizes), None


_core.defvjp(_core_forward, _core_backward, symbolic_zeros=True)
