"""What every op asks of its arguments, in one wording: arrays with axes and dtypes, static options.

Everything is a ValueError that names the op and the argument, before JAX sees the call.
"""

import operator
from typing import Any

import jax.numpy as jnp
from jax.core import Tracer

FLOATS: tuple = (jnp.floating,)
INTEGERS: tuple = (jnp.integer,)


def check_array(op: str, name: str, x: Any, axes: str, kinds: tuple = FLOATS) -> None:
    """`x` is an array with these axes ("B T H D") whose dtype is of one of `kinds`."""
    wanted = f"{op}: expected {name} [{', '.join(axes.split())}]"
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise ValueError(f"{wanted}, a JAX or NumPy array; got {type(x).__name__}")
    if len(x.shape) != len(axes.split()):
        raise ValueError(f"{wanted}; got {_shown(x)}")
    check_kind(op, name, x, kinds)


def check_kind(op: str, name: str, x: Any, kinds: tuple = FLOATS) -> None:
    """The dtype of the array `x` is of one of `kinds`: nothing is cast to fit."""
    if not any(jnp.issubdtype(x.dtype, kind) for kind in kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{op}: expected {name} of a {names} dtype; got {_shown(x)}: cast it")


def check_static(op: str, **options: Any) -> None:
    """No option is a tracer: what is compiled depends on their values."""
    for name, value in options.items():
        if isinstance(value, Tracer):
            raise ValueError(
                f"{op}: {name} must be a Python number, and is traced: close over it, or name it "
                "in jit's static_argnames"
            )


def check_window(op: str, window: Any, causal: bool = True) -> None:
    """`window` is None or a whole number of keys from 1, which only causal attention has."""
    if window is not None and (not _whole(window) or window < 1 or not causal):
        raise ValueError(
            f"{op}: a window needs causal attention and at least 1 key; got {window!r}"
        )


def _whole(number: Any) -> bool:
    try:
        operator.index(number)
    except TypeError:
        return False
    return True


def _shown(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"
