"""Whether this device can keep arrays in pinned host memory, tried once in a process.

`gradient_checkpointing: offload` needs it. Of some cards it is not known (gfx1100), and a device
that lacks it fails only when the step is compiled, after the weights were loaded.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mud_puppy.errors import UserError

MEMORY = "pinned_host"


@functools.cache
def pinned_host_fault() -> str | None:
    """Why a compiled computation cannot move an array to pinned host memory and back, or None."""
    x = np.arange(1024, dtype=np.float32)
    try:
        got = np.asarray(there_and_back(jax.devices()[0], x))
    except Exception as problem:  # whatever the compiler or the driver raises: it cannot be used
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        return lines[0]
    return None if np.array_equal(got, 2 * x + 2) else "what came back from it is not what went"


def there_and_back(device: Any, x: np.ndarray) -> jax.Array:
    """2 * (x + 1), of which x + 1 waits in the host's memory."""
    here = jax.sharding.SingleDeviceSharding(device)
    there = jax.sharding.SingleDeviceSharding(device, memory_kind=MEMORY)

    def f(x: jax.Array) -> jax.Array:
        away = jax.device_put(jnp.add(x, 1), there)
        return 2 * jax.device_put(away, here)

    return jax.jit(f, out_shardings=here)(jax.device_put(x, here))


def check_offload() -> None:
    """UserError where `gradient_checkpointing: offload` cannot work on this device."""
    if (fault := pinned_host_fault()) is not None:
        raise UserError(
            f"gradient_checkpointing: offload needs {MEMORY} memory, which "
            f"{jax.devices()[0].device_kind} does not offer ({fault}); use full, "
            "or see mud-puppy doctor"
        )
