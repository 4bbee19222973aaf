"""AWQ (arXiv:2306.00978): which inputs of a weight to enlarge before it is rounded.

A weight w[:, j] s[j] with its input j divided by s[j] is the same product, but a grid that is
common to a group of inputs then errs less on those with a large s. s = mean|x|^alpha, with the
alpha whose rounded weight errs least on the inputs that were observed. `model.fold` divides the
inputs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mud_puppy.weights.gptq import round_to_nearest

ALPHAS = tuple(i / 10 for i in range(11))  # 0 is no scaling


def candidates(magnitude: Float[Array, " n"]) -> Float[Array, "A n"]:
    """Scales of the inputs for each of ALPHAS; magnitude: mean|x| of each, at any scale."""
    # A range of 1e8 at most: an input that was never seen says nothing of how large it may be.
    m = jnp.clip(magnitude / jnp.maximum(magnitude.mean(), 1e-30), 1e-4, 1e4)
    s = m ** jnp.asarray(ALPHAS)[:, None]
    return s / jnp.sqrt(s.max(1, keepdims=True) * s.min(1, keepdims=True))


def errors(
    w: Float[Array, "out n"],
    hessian: Float[Array, "n n"],
    scales: Float[Array, "A n"],
    *,
    bits: int,
    group: int | str,
    symmetric: bool,
    clip: bool = False,
) -> Float[Array, " A"]:
    """tr(dW H dW^T) for each of the scales, dW the error of w rounded to nearest with them."""
    return _errors(w, hessian, scales, (bits, group, symmetric, clip))


@partial(jax.jit, static_argnums=3)
@jax.default_matmul_precision("highest")
def _errors(w: Any, hessian: Any, scales: Any, grid: tuple) -> Any:
    bits, group, symmetric, clip = grid
    w = w.astype(jnp.float32)

    def one(s: Any) -> Any:
        codes, steps, zeros = round_to_nearest(
            w * s, bits=bits, group=group, symmetric=symmetric, clip=clip
        )
        zero = 1 << (bits - 1) if zeros is None else zeros.astype(jnp.float32)[..., None]
        parts = codes.reshape(*steps.shape, -1).astype(jnp.float32)
        d = ((parts - zero) * steps[..., None]).reshape(w.shape) / s - w
        return jnp.vdot(d @ hessian, d)

    return jax.lax.map(one, scales)
