"""`quantized_matmul`: x @ w.T for a weight that stays in its codes.

`pallas` decodes inside the product and reads each code once: best where a few rows of x meet the
weight (generation). `xla` decodes the weight to memory and multiplies it there: best from the
number of rows that the tuned table names. The gradient of x decodes the weight a second time; what
is kept between is the codes. Codes and scales get no gradient.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mud_puppy.kernels import choice, selfcheck, target
from mud_puppy.kernels.arguments import check_kind
from mud_puppy.kernels.encode import quantize
from mud_puppy.kernels.formats import Quantized, check_codes
from mud_puppy.kernels.matmul import matmul
from mud_puppy.kernels.quantized_matmul import fragment, reference, tile, vector, xla
from mud_puppy.kernels.quantized_matmul import plan as plans
from mud_puppy.kernels.varying import alike

__all__ = ["quantized_matmul"]

IMPLEMENTATIONS = ("pallas", "xla", "reference")
KERNELS = {"tile": tile, "vector": vector, "fragment": fragment}


def quantized_matmul(
    x: Float[Array, "*B n"], w: Quantized, implementation: str | None = None
) -> Float[Array, "*B m"]:
    """x[..., in] @ dequantize(w)[out, in].T -> [..., out] in x's dtype, summed in float32.

    Differentiable in x alone. `implementation` is "pallas", "xla" or "reference"; None takes the
    fastest that can serve the call. Raises ValueError for shapes that do not fit, and for a named
    implementation that cannot serve the call.
    """
    if not isinstance(w, Quantized):
        raise ValueError(
            f"quantized_matmul: expected a Quantized weight, got {type(w).__name__}: make one by "
            "quantize(w), or use matmul"
        )
    check_codes(w)
    if not x.ndim:
        raise ValueError("quantized_matmul: expected x [..., in], got a scalar")
    check_kind("quantized_matmul", "x", x)
    if len(w.shape) != 2 or w.shape[1] != x.shape[-1]:
        raise ValueError(f"expected a weight [out, {x.shape[-1]}], got {w.format} {w.shape}")
    rows: Any = x.reshape(-1, x.shape[-1])
    y: Any = _product(*alike((rows, w)), _choose(rows, w, implementation))
    return y.reshape(*x.shape[:-1], w.shape[0])


@matmul.register(Quantized)
def _(w: Quantized, x: Array) -> Array:
    return quantized_matmul(x, w)


def _choose(x: Any, w: Quantized, implementation: str | None) -> str:
    on_gpu = target.current().platform in ("cuda", "rocm")
    few = on_gpu and 0 < x.shape[0] <= plans.crossover()
    declines = {"pallas": lambda: _refusal(x, w)}
    order = ("pallas",) if few else ()
    return choice.choose("quantized_matmul", implementation, IMPLEMENTATIONS, declines, order)


def _refusal(x: Any, w: Quantized) -> str | None:
    """Why the Pallas kernel cannot serve the call."""
    if (split := choice.split_over_mesh(x, w)) is not None:
        return split
    found = _check(x, w)
    return found if isinstance(found, str) else selfcheck.fault(*found)


def _check(x: Any, w: Quantized) -> tuple[str, selfcheck.Case] | str:
    """The self-check of the kernel that x @ w.T would take, or why no kernel takes it."""
    plan = plans.plan(x, w)
    if isinstance(plan, str):
        return plan
    parts = [name for name in ("zeros", "minimum", "nested") if getattr(w, name) is not None]
    parts += [f"group {plan.span}", plan.kernel]
    rows = {"vector": 1, "tile": 17}.get(plan.kernel, plan.x_rows)  # which this kernel serves
    name = " ".join(["quantized_matmul", w.format, *parts, f"x{rows}"])
    return name, functools.partial(_case, w, rows)


def selfchecks(name: str) -> list[tuple[str, selfcheck.Case]]:
    """Cases that hold the implementation "pallas" or "xla" against the reference: a product of each
    format, of one row (decoding) and of several. A format without a kernel on this card has none.
    """
    w = jnp.zeros((128, 512))
    weights = [quantize(w, f) for f in ("nf4", "int4", "int8", "mxfp4", "fp8")]
    if name == "xla":
        cases = [functools.partial(_case, q, 17, "xla") for q in weights]
        names = [f"quantized_matmul by XLA for {q.format}" for q in weights]
        return list(zip(names, cases, strict=True))
    xs = [jnp.zeros((rows, 512), jnp.bfloat16) for rows in (1, 17)]
    found = [_check(x, q) for q in weights for x in xs]
    return list(dict((check[0], check) for check in found if not isinstance(check, str)).values())


def _case(w: Quantized, rows: int, implementation: str = "pallas") -> tuple[float, float]:
    """The largest error on a small product of this format, and what is allowed."""
    keys = jax.random.split(jax.random.key(0))
    size = max(512, 2 * w.group) if w.scales.shape[-1] > 1 else 512
    x = jax.random.normal(keys[0], (rows, size), jnp.bfloat16)
    options: dict[str, Any] = {"zero_points": w.zeros is not None, "double": w.nested is not None}
    if w.scales.shape[-1] > 1:
        options["group"] = w.group
    q = quantize(jax.random.normal(keys[1], (128, size)), w.format, **options)
    q = replace(q, scales=q.scales.astype(w.scales.dtype))
    if w.minimum is not None:
        q = replace(q, minimum=-8 * q.scales)
    got, want = (_run(x, q, i).astype(jnp.float32) for i in (implementation, "reference"))
    return float(jnp.abs(got - want).max()), 0.03 * float(jnp.abs(want).max())


def _run(x: Any, w: Quantized, implementation: str) -> Any:
    if implementation == "pallas":
        plan = plans.plan(x, w)
        assert not isinstance(plan, str), plan
        return KERNELS[plan.kernel].product(plan, x, w)
    return (xla if implementation == "xla" else reference).product(x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Any, w: Quantized, implementation: str) -> Any:
    return _run(x, w, implementation)


def _forward(x: Any, w: Quantized, implementation: str) -> Any:
    return _run(x, w, implementation), w


def _backward(implementation: str, w: Quantized, g: Any) -> Any:
    module = reference if implementation == "reference" else xla
    return module.transposed_product(g, w), None


_product.defvjp(_forward, _backward)
