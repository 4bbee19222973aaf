"""Learning rates over a run, with the formulas of transformers' `get_scheduler`.

`schedule(...)` returns `step -> rate`, step counted from 0 (so with a warmup the first update has
rate 0, as in transformers). Traced inside the step: no Python state.
"""

import math
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

POLYNOMIAL_END = 1e-7


def schedule(
    name: str, peak: float, total: int, warmup: int, restarts: int = 1, power: float = 1.0
) -> optax.Schedule:
    """name: linear, cosine, cosine_with_restarts, polynomial or constant; `total` updates."""
    decays = {
        "linear": lambda t: 1 - t,
        "cosine": lambda t: 0.5 * (1 + jnp.cos(math.pi * t)),
        "cosine_with_restarts": lambda t: 0.5 * (1 + jnp.cos(math.pi * ((restarts * t) % 1.0))),
        "polynomial": lambda t: (
            ((1 - t) ** power * (peak - POLYNOMIAL_END) + POLYNOMIAL_END) / peak
        ),
        "constant": lambda t: jnp.ones_like(t),
    }
    decay = decays[name]
    # As floats: an int beyond int32 cannot enter the step.
    ramp, end = float(warmup), float(total)

    def rate(step: Any) -> Array:
        s = jnp.asarray(step, jnp.float32)
        t = jnp.clip((s - ramp) / max(1.0, end - ramp), 0.0, 1.0)
        # At the very end a restart would begin; transformers says 0.
        after = jnp.where((name == "cosine_with_restarts") & (t >= 1.0), 0.0, decay(t))
        return peak * jnp.where(s < ramp, s / max(1.0, ramp), after)

    return rate
