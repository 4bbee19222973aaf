"""Which chip the code being traced is for: the device at hand, unless `use` names another.

Kernels choose implementations and tiles by it while tracing. `use` is for compiling without the
card (rocm/): a function traced under one target must not be traced again under another in the same
process, for JAX keeps traces and does not know of targets.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Target:
    """platform: "cpu", "cuda", "rocm" or another of JAX's; arch: "cpu", "sm90", "gfx1100", ..."""

    platform: str
    arch: str


_override: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def current() -> Target:
    """The target of `use`, else that of JAX's default backend."""
    return _override.get() or _device()


def on_device() -> bool:
    """Whether the target is the device at hand, so that what is compiled can also be run."""
    return _override.get() is None


@contextlib.contextmanager
def use(target: Target) -> Iterator[None]:
    """Traces inside are for `target`, whatever this machine has."""
    token = _override.set(target)
    try:
        yield
    finally:
        _override.reset(token)


@functools.cache
def _device() -> Target:
    platform = jax.default_backend()
    if platform != "gpu":
        return Target(platform, platform)
    device = jax.devices()[0]
    if "rocm" in device.client.platform_version.lower():
        # "gfx942:sramecc+:xnack-" names features after the arch.
        return Target("rocm", str(device.compute_capability).split(":")[0])
    return Target("cuda", "sm" + str(device.compute_capability).replace(".", ""))
