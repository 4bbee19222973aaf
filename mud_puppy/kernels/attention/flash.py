"""Attention by the Pallas-Triton kernels: the custom VJP around them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mud_puppy.kernels import target
from mud_puppy.kernels.attention import pallas_backward, pallas_forward
from mud_puppy.kernels.attention.plan import Options, Plan
from mud_puppy.kernels.attention.prepare import (
    WIDTHS,
    Tiles,
    inputs_of,
    layouts,
    pad,
    plan_of,
    tuned_tiles,
)
from mud_puppy.kernels.attention.tile import LOG2E


def declines(q: Any, v: Any, extras: dict) -> str | None:
    """Why the kernels cannot serve this call, or None if they can."""
    if target.current().platform not in ("cuda", "rocm", "cpu"):
        return f"Pallas-Triton has no backend for {target.current().platform}"
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"dtype {q.dtype} is none of bfloat16, float16, float32"
    if max(q.shape[-1], v.shape[-1]) > WIDTHS[-1]:
        return f"a head is wider than {WIDTHS[-1]}"
    if extras["bias"] is not None and extras["prefixes"] is not None:
        return "a bias and prefixes come together"
    return None


def attention(
    q: Any,
    k: Any,
    v: Any,
    q_ids: Any = None,
    k_ids: Any = None,
    *,
    options: Options,
    sinks: Any = None,
    bias: Any = None,
    seed: Any = None,
    prefixes: tuple[Any, Any] | None = None,
    tiles: Tiles | None = None,
) -> tuple[Any, Any]:
    """(out [B, T, H, Dv] in q's dtype, float32 log-sum-exp [B, T, H])."""
    tiles = tiles or tuned_tiles(q, v, packed=q_ids is not None)
    D = q.shape[-1], v.shape[-1]
    q, k, v = (pad(x, 3, -x.shape[3] % 16) for x in (q, k, v))
    inputs = {"sinks": sinks, "bias": bias, "seed": seed, "prefixes": prefixes}
    inputs |= {"q_ids": q_ids, "k_ids": k_ids}
    result: Any = _attention((options, tiles), q, k, v, inputs)
    out, lse = result
    return out[..., : D[1]], lse.transpose(0, 2, 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: tuple[Options, Tiles], q: Any, k: Any, v: Any, extra: dict) -> Any:
    return _forward(static, q, k, v, extra)[0]


def _forward(static: tuple[Options, Tiles], q: Any, k: Any, v: Any, extra: dict) -> Any:
    out, lse = _forward_pass(*static, q, k, v, extra)
    # Named here, where they are residuals: see xla.py.
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return (out, lse), (q, k, v, extra, out, lse)


def _backward(static: tuple[Options, Tiles], residuals: Any, cotangents: Any) -> Any:
    q, k, v, extra, out, lse = residuals
    d_out, d_lse = cotangents
    empty = lse == -jnp.inf
    lse, d_lse = (jnp.where(empty, 0, x) for x in (lse, d_lse))
    passes = _Backward(*static, q, k, v, extra, d_out, lse * LOG2E)
    dq, row = passes.d_queries(out, d_lse)
    passes = replace(passes, row=row)
    rest: dict = dict.fromkeys(extra)
    if extra["sinks"] is not None:
        # A sink is a key whose value is 0: d p = 0.
        sinks = extra["sinks"].astype(jnp.float32)[None, :, None]
        d_sinks = (jnp.exp(sinks - lse) * -row).sum((0, 2))
        rest["sinks"] = d_sinks.astype(extra["sinks"].dtype)
    if extra["bias"] is not None:
        rest["bias"] = passes.d_bias()
    return dq, *passes.d_keys_values(), rest


_attention.defvjp(_forward, _backward)


def _forward_pass(options: Options, tiles: Tiles, q: Any, k: Any, v: Any, extra: dict) -> tuple:
    """(out [B, T, H, Dv], lse [B, H, T])"""
    T = q.shape[1]
    plan = plan_of(options, tiles.forward, T, k.shape[1])
    inputs = inputs_of(plan, q, k, v, extra)
    if extra["sinks"] is not None:
        inputs["sinks"] = extra["sinks"].astype(jnp.float32)
    inputs = layouts(plan, inputs, transposed=("v",), streamed=("q",))
    if plan.transposed:
        del inputs["v"]
    out, lse = pallas_forward.forward(plan, inputs)
    return out[:, :T], lse[..., :T]


@dataclass(frozen=True)
class _Backward:
    """The arrays of a backward pass; lse (base 2) and row [B, H, T] as pallas_backward says.

    d_queries makes the row that the others take.
    """

    options: Options
    tiles: Tiles
    q: Any
    k: Any
    v: Any
    extra: dict
    d_out: Any
    lse: Any
    row: Any = None

    def d_queries(self, out: Any, d_lse: Any) -> tuple[Any, Any]:
        """(d_q, row)"""
        plan = self._plan(self.tiles.d_queries)
        t = -plan.T % plan.q_block
        given = self._inputs(plan) | {"out": pad(out, 1, t), "d_lse": pad(d_lse, 2, t)}
        given = layouts(plan, given, transposed=("k",), streamed=("q", "d_out"))
        dq, row = pallas_backward.d_queries(plan, given)
        return dq[:, : plan.T], row[..., : plan.T]

    def d_keys_values(self) -> tuple[Any, Any]:
        if self.tiles.d_values is not None:
            return self.d_keys(), self.d_values()
        plan = self._plan(self.tiles.d_keys)
        given = self._by_key(plan, ("q", "d_out"), ("k", "v"))
        dk, dv = pallas_backward.d_keys_values(plan, given)
        return dk[:, : plan.S], dv[:, : plan.S]

    def d_keys(self) -> Any:
        plan = self._plan(self.tiles.d_keys)
        given = self._by_key(plan, ("q",), ("k", "v"))
        return pallas_backward.d_keys_values(plan, given, ("k",))[0][:, : plan.S]

    def d_values(self) -> Any:
        plan = self._plan(self.tiles.d_values or self.tiles.d_keys)
        given = self._by_key(plan, ("d_out",), ("k",))
        return pallas_backward.d_keys_values(plan, given, ("v",))[0][:, : plan.S]

    def d_bias(self) -> Any:
        # Its loop reads four operands, which more than one stage would hold several times.
        plan = replace(self._plan(self.tiles.d_queries), num_stages=1)
        return pallas_backward.d_bias(plan, self._inputs(plan))[:, :, : plan.T, : plan.S]

    def _plan(self, tile: tuple) -> Plan:
        plan = plan_of(self.options, tile, self.q.shape[1], self.k.shape[1])
        fewer = self.extra["bias"] is not None and plan.num_stages > 2  # it takes room in each
        return replace(plan, num_stages=plan.num_stages - 1) if fewer else plan

    def _by_key(self, plan: Plan, transposed: tuple, streamed: tuple) -> dict[str, Any]:
        given = self._inputs(plan, by_key=True)
        return layouts(plan, given, transposed=transposed, streamed=streamed)

    def _inputs(self, plan: Plan, by_key: bool = False) -> dict[str, Any]:
        t = -plan.T % plan.q_block
        more = {"d_out": pad(self.d_out, 1, t), "lse": pad(self.lse, 2, t)}
        given = inputs_of(plan, self.q, self.k, self.v, self.extra, by_key=by_key)
        return given | more | ({} if self.row is None else {"row": pad(self.row, 2, t)})


def one_pass(name: str, options: Options, tiles: Tiles) -> Callable:
    """One kernel with what its tile needs beside it, as a function of (q, k, v[, d_out, lse,
    row]), for tuning and measuring. "d_keys" gives d_values as well where tiles have none for it;
    d_queries takes d_out for out and row for d_lse, too.
    """
    extra = dict.fromkeys(("sinks", "bias", "seed", "prefixes", "q_ids", "k_ids"))
    if name == "forward":
        return lambda q, k, v: _forward_pass(options, tiles, q, k, v, extra)
    if name == "d_keys" and tiles.d_values is None:
        name = "d_keys_values"

    def run(q: Any, k: Any, v: Any, d_out: Any, lse: Any, row: Any) -> Any:
        passes = _Backward(options, tiles, q, k, v, extra, d_out, lse)
        if name == "d_queries":
            return passes.d_queries(d_out, row)
        return getattr(replace(passes, row=row), name)()

    return run
