"""`matmul(x, w)`: x[..., in] @ w[out, in].T for whatever a weight is.

Arrays are served here; other rooms register their leaf types:

    @matmul.register(Lora)
    def _(w: Lora, x): ...

so that a kernel that takes a weight (the head of `token_logps`) serves leaves it does not know.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.singledispatch
def _matmul(w: Any, x: Any) -> Any:
    # Arrays and tracers have no common class that singledispatch could find: they are the default.
    if not isinstance(w, jax.Array) and not hasattr(w, "__array__"):
        raise TypeError(
            f"matmul has no rule for a weight of type {type(w).__name__}: "
            "pass an array, or give the type one with @matmul.register"
        )
    if w.ndim != 2 or w.shape[1] != x.shape[-1]:
        raise ValueError(f"expected a weight [out, {x.shape[-1]}], got {tuple(w.shape)}")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(
            f"expected a float weight, got {w.dtype}: codes need a leaf type of their own"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"expected a float x, got {x.dtype}: the weight would be cast to it")
    # No preferred_element_type: GPU and CPU GEMMs accumulate half precision in float32 and round
    # once; asking for float32 out would write twice the bytes and cast in a second pass.
    return contract_last(x, jnp.asarray(w, x.dtype))


def contract_last(x: Any, w: Any, out_dtype: Any = None) -> Any:
    """x[..., n] @ w[m, n].T as one dot_general; `out_dtype` is that of sum and result."""
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(
        x, w, dims, precision=exact(x.dtype), preferred_element_type=out_dtype
    )


def exact(dtype: Any) -> Any:
    """The precision of a product of this dtype: XLA's default would make float32 TF32 on NVIDIA.

    As torch does, for whoever asks for float32 asks for its digits (1e-3 against 1e-7).
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class _Matmul:
    """A function with a `register`; only its name is public."""

    def __call__(self, x: Float[Array, "*B n"], w: Any) -> Float[Array, "*B m"]:
        """x[..., in] @ w[out, in].T -> [..., out] in x's dtype, summed in float32 at least.

        A float array of another dtype is cast to x's first. Raises TypeError for a weight without a
        rule and for an x of integers, ValueError for shapes that do not fit.
        """
        return _matmul(w, x)

    def register(self, cls: type) -> Callable[[Callable], Callable]:
        """Decorator: `f(w, x)` computes the product for weights of this class."""
        return _matmul.register(cls)


matmul = _Matmul()
