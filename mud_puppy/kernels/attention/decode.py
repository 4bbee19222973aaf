"""Attention of new tokens to a cache whose slot s holds the token at position s.

`pallas` (a flash decode, for a few new tokens on an AMD or NVIDIA card), else `xla`; `reference`
only where a test asks for it. The cache may be pages, int8 codes, or all layers at once.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from mud_puppy.kernels import choice, selfcheck, target
from mud_puppy.kernels.arguments import (
    FLOATS,
    INTEGERS,
    check_array,
    check_static,
    check_window,
)
from mud_puppy.kernels.attention import decode_pallas, decode_reference, decode_xla
from mud_puppy.kernels.attention.decode_pallas import Cache

IMPLEMENTATIONS = ("pallas", "xla", "reference")


def decode_attention(
    q: Float[Array, "B T H D"],
    k: Num[Array, "..."],
    v: Num[Array, "..."],
    positions: Int[Array, "B T"],
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    k_scales: Float[Array, "..."] | None = None,
    v_scales: Float[Array, "..."] | None = None,
    page_table: Int[Array, "B n"] | None = None,
    layer: Any = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """out [B, T, H, D] in q's dtype; slot j is seen iff positions - window < j <= positions.

    k, v: [B, S, K, D], where K divides H. With `page_table` they are pages [P, page, K, D], and
    slot j of row b is k[page_table[b, j // page], j % page]. With `layer` (int32 scalar) they have
    a leading axis of layers, of which that one is read where it lies. int8 codes stand for
    code * scale, k_scales and v_scales float32 of k's shape without D.

    Slots past a row's position may hold anything finite; a position of -1 switches a row off (its
    result is finite and means nothing). `scale` is D ** -0.5 when None; `softcap` c makes the
    scores c tanh(scores / c); `sinks` are a logit for each head that takes part in the softmax and
    has no value. With `return_lse` also float32 [B, T, H], the log-sum-exp of what is seen.

    The gradient is in q, k, v and sinks. Raises ValueError for shapes that do not fit and for an
    `implementation` that cannot serve the call.
    """
    cache = Cache(k, v, k_scales, v_scales, page_table, layer)
    check_static("decode_attention", window=window, scale=scale, softcap=softcap)
    _check(q, cache, positions)
    _check_options(q, window, softcap, sinks)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    options: dict[str, Any] = dict(window=window, scale=factor, softcap=softcap)
    name = _choose(implementation, q, cache)
    if not q.size:  # no rows: nothing for a kernel to do
        out = jnp.zeros((*q.shape[:3], v.shape[-1]), q.dtype)
        found: Any = out, jnp.zeros(q.shape[:3], jnp.float32)
    elif name == "pallas":
        found = _flash(q, cache, positions, sinks, tuple(options.items()))
    else:
        module = decode_xla if name == "xla" else decode_reference
        found = _plain(module.attention, q, cache, positions, sinks, options)
    return found if return_lse else found[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q: Any, cache: Any, positions: Any, sinks: Any, options: tuple) -> Any:
    return decode_pallas.attention(q, cache, positions, sinks=sinks, **dict(options))


def _flash_forward(q: Any, cache: Any, positions: Any, sinks: Any, options: tuple) -> Any:
    return _flash(q, cache, positions, sinks, options), (q, cache, positions, sinks)


def _flash_backward(options: tuple, residuals: Any, g: Any) -> Any:
    """That of the XLA implementation: generation, which this kernel is for, needs none."""
    q, cache, positions, sinks = residuals

    def attend(*args: Any) -> Any:
        q, cache, sinks = args
        return _plain(decode_xla.attention, q, cache, positions, sinks, dict(options))

    d_q, d_cache, d_sinks = jax.vjp(attend, q, cache, sinks)[1](g)
    return d_q, d_cache, None, d_sinks


_flash.defvjp(_flash_forward, _flash_backward)


def _plain(
    attend: Callable, q: Any, cache: Cache, positions: Any, sinks: Any, options: dict
) -> Any:
    """`attend` on the cache as [B, S, K, D]: one layer, its pages in order, codes decoded."""
    dtype = q.dtype if attend is decode_xla.attention else jnp.promote_types(q.dtype, jnp.float32)
    k = _decoded(_in_order(cache.k, cache), _in_order(cache.k_scales, cache), dtype)
    v = _decoded(_in_order(cache.v, cache), _in_order(cache.v_scales, cache), dtype)
    return attend(q, k, v, positions, sinks=sinks, **options)


def _in_order(x: Any, cache: Cache) -> Any:
    if x is not None and cache.layer is not None:
        x = x[cache.layer]
    if x is None or cache.page_table is None:
        return x
    x = x[cache.page_table]
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _decoded(x: Any, scales: Any, dtype: Any) -> Any:
    return x if scales is None else (x.astype(scales.dtype) * scales[..., None]).astype(dtype)


def _choose(implementation: str | None, q: Any, cache: Cache) -> str:
    order = ("pallas",) if target.current().platform in ("cuda", "rocm") else ()
    declines = {"pallas": lambda: decode_pallas.declines(q, cache) or _fault(q, cache)}
    return choice.choose(
        "decode_attention", implementation, IMPLEMENTATIONS, declines, order, empty=not q.size
    )


def _fault(q: Any, cache: Cache) -> str | None:
    """What the self-check of the kernel for these dtypes and heads found."""
    D, codes = q.shape[-1], cache.k_scales is not None
    return selfcheck.fault(_name(q.dtype, D, codes), lambda: _case(q.dtype, D, codes))


def _name(dtype: Any, D: int, codes: bool) -> str:
    return f"decode_attention's kernel for {dtype} heads of {D}{', int8 cache' * codes}"


def selfchecks(name: str) -> list[tuple[str, selfcheck.Case]]:
    """Cases that hold the implementation "pallas" or "xla" against the reference."""
    of = jnp.dtype(jnp.bfloat16), 128
    if name == "pallas":
        return [
            (_name(*of, codes), functools.partial(_case, *of, codes)) for codes in (False, True)
        ]
    plain = functools.partial(_case, *of, False, functools.partial(_plain, decode_xla.attention))
    return [(f"decode_attention by XLA for {of[0]} heads of {of[1]}", plain)]


def _pallas(q: Any, cache: Cache, positions: Any, sinks: Any, options: dict) -> Any:
    return decode_pallas.attention(q, cache, positions, sinks=sinks, **options)


def _case(dtype: Any, D: int, codes: bool, attend: Any = _pallas) -> tuple[float, float]:
    r = np.random.default_rng(0)
    B, T, H, K, S = 2, 2, 4, 2, 600
    q = jnp.asarray(r.normal(size=(B, T, H, D)), dtype)
    k, v = jnp.asarray(r.normal(size=(2, B, S, K, D)) * (40 if codes else 1), dtype)
    k_scales, v_scales = jnp.asarray(r.uniform(0.02, 0.03, size=(2, B, S, K)), jnp.float32)
    cache = Cache(k, v)
    if codes:
        cache = Cache(k.astype(jnp.int8), v.astype(jnp.int8), k_scales, v_scales)
    positions = jnp.array([[598, 599], [100, 101]])
    options: dict[str, Any] = dict(window=300, scale=D**-0.5, softcap=None)
    # Arrays go in as arguments, or XLA would compute with them while it compiles.
    run = jax.jit(lambda *args: attend(*args, None, options)[0])
    got = run(q, cache, positions)
    want = _plain(decode_reference.attention, q, cache, positions, None, options)[0]
    error = jnp.abs(got.astype(jnp.float32) - want.astype(jnp.float32)).max()
    return float(error / jnp.abs(want).max()), 4 * float(jnp.finfo(dtype).eps) + 1e-4


def _check(q: Any, cache: Cache, positions: Any) -> None:
    layers = "" if cache.layer is None else "layers "
    axes = layers + ("B S K D" if cache.page_table is None else "P page K D")
    check_array("decode_attention", "q", q, "B T H D")
    for name, x in (("k", cache.k), ("v", cache.v)):
        check_array("decode_attention", name, x, axes, (*FLOATS, jnp.int8))
    check_array("decode_attention", "positions", positions, "B T", INTEGERS)
    B, T, H, D = q.shape
    lead = len(axes.split()) - 4
    rows, S, K, _ = cache.k.shape[lead:]
    fits = cache.k.shape[-1] == D and cache.v.shape[:-1] == cache.k.shape[:-1]
    if not fits or not (S and K and D) or H % K or (cache.page_table is None and rows != B):
        raise ValueError(
            f"decode needs q [B, T, H, D] and k, v [B, S, K, D] (or pages [P, page, K, D], and "
            f"layers in front with `layer`) with K dividing H; got q {q.shape}, k {cache.k.shape}, "
            f"v {cache.v.shape}"
        )
    if positions.shape != (B, T):
        raise ValueError(f"expected positions {(B, T)}, got {positions.shape}")
    if cache.page_table is not None:
        check_array("decode_attention", "page_table", cache.page_table, "B n", INTEGERS)
        if len(cache.page_table) != B or not cache.page_table.size:
            raise ValueError(f"expected a page_table [{B}, n], got {cache.page_table.shape}")
    if cache.layer is not None:
        number = isinstance(cache.layer, int)
        if jnp.ndim(cache.layer) or (number and not 0 <= cache.layer < cache.k.shape[0]):
            raise ValueError(
                f"expected `layer` to be one integer below {cache.k.shape[0]}, got {cache.layer}"
            )
    for name, x, scales in (("k", cache.k, cache.k_scales), ("v", cache.v, cache.v_scales)):
        if (x.dtype == jnp.int8) != (scales is not None):
            raise ValueError(f"{name} is {x.dtype}, and int8 codes, no others, have {name}_scales")
        if scales is not None and scales.shape != x.shape[:-1]:
            raise ValueError(f"expected {name}_scales {x.shape[:-1]}, got {scales.shape}")


def _check_options(q: Any, window: Any, softcap: Any, sinks: Any) -> None:
    check_window("decode_attention", window)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive; got {softcap}")
    if sinks is not None:
        check_array("decode_attention", "sinks", sinks, "H")
        if sinks.shape != q.shape[2:3]:
            raise ValueError(f"expected sinks {q.shape[2:3]}, one a query head; got {sinks.shape}")
