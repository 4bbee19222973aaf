"""Which implementation of an op serves a call, said once in the log: no silent fallback."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mud_puppy.kernels import target


def choose(
    op: str,
    forced: str | None,
    implementations: Sequence[str],
    declines: dict[str, Callable[[], str | None]],
    order: Sequence[str],
    empty: bool = False,
) -> str:
    """`forced`, or the first of `order` that can serve, or "xla".

    declines: for each name in `order`, and each that may be unable, why it cannot serve this call,
    or None. `empty`: there is nothing to compute, and "reference" serves whoever was asked for.
    Raises ValueError for a forced implementation that is unknown or declines.
    """
    if forced not in (None, *implementations):
        raise ValueError(f"{op}: implementation {forced!r} is none of {tuple(implementations)}")
    if empty:
        say(logging.INFO, f"{op}: no kernel, an array is empty")
        return "reference"
    if forced is not None:
        if forced in declines and (reason := declines[forced]()):
            raise ValueError(f"{op}: {forced} cannot serve this call: {reason}")
        say(logging.INFO, f"{op}: {forced}, as asked for")
        return forced
    declined: list[str] = []
    for name in order:
        if (reason := declines[name]()) is None:
            say(logging.INFO, f"{op}: {name}{_because(declined)}")
            return name
        declined.append(f"{name} declined: {reason}")
    # Not having a card is no news; declining on one costs speed.
    level = logging.WARNING if declined else logging.INFO
    say(level, f"{op}: xla on {target.current().platform}{_because(declined)}")
    return "xla"


def split_over_mesh(*arrays: Any) -> str | None:
    """Why a kernel that does not partition itself declines under the ambient mesh, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual:
        return checked_by_shard_map(*arrays)
    return f"arrays may be split over the mesh's {mesh.size} devices"


def checked_by_shard_map(*arrays: Any) -> str | None:
    """Why a Pallas kernel declines: JAX wants to be told how its results vary over the mesh."""
    if any(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays)):
        return "shard_map checks how arrays vary over the mesh: pass it check_vma=False"
    return None


@functools.cache
def say(level: int, message: str) -> None:
    """Logs each message once in a process."""
    logging.getLogger("mud_puppy").log(level, message)


def _because(declined: list[str]) -> str:
    return f" ({'; '.join(declined)})" if declined else ""
