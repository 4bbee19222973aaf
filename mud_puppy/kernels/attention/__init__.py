"""`flash_attention`: one contract, the fastest implementation that can serve the call.

`cudnn` (NVIDIA), `pallas` (AMD, NVIDIA), `xla`; `reference` only where a test asks for it. An
implementation declines with a reason, the next one runs, and the log says so once for each reason.
A forced implementation that cannot serve the call raises ValueError.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mud_puppy.kernels.arguments import INTEGERS, check_array, check_static, check_window
from mud_puppy.kernels.attention import cudnn, flash, reference, xla
from mud_puppy.kernels.attention.decode import decode_attention
from mud_puppy.kernels.attention.dropout import seed_of
from mud_puppy.kernels.attention.plan import Options
from mud_puppy.kernels.attention.selection import choose

__all__ = ["decode_attention", "flash_attention"]


def flash_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K Dv"],
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    prefix_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " H"] | None = None,
    bias: Float[Array, "#B #H T S"] | None = None,
    dropout: float = 0.0,
    dropout_seed: Any = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Any:
    """softmax(scores) v over the visible keys -> out [B, T, H, Dv] in q's dtype.

    scores = softcap tanh(scale q k^T / softcap) + bias; `scale` is D ** -0.5 when None, and without
    `softcap` there is no tanh. K divides H; query head h reads key head h // (H // K).

    Query i (counted so that the last query sits on the last key) sees key j if j <= i (causal) and
    i - window < j (window, with causal only) and both carry the same segment id; padding is segment
    0 and sees itself. Ids may come in any order; the kernels skip blocks whose ids do not meet. The
    ids of the keys default to those of the queries. A bias below -1e30 hides a key. A query that
    sees no key gives 0. Softmax and sums are float32.

    `prefix_ids`, beside segment ids and for T = S: n > 0 on the keys of prefix n, -n on the queries
    of other segments that see these keys beside their own segment's, 0 elsewhere. The kernels visit
    a query's prefix in a loop of its own: a prompt before two answers costs no more than it has.

    `sinks` are logits that join each row's denominator and have no value. `dropout` is the
    probability that a weight is set to 0 (the others grow by 1 / (1 - dropout)), decided by a hash
    of the integer `dropout_seed`, which it needs, and the weight's place (b, h, i, j): the same in
    all implementations. q, k, v, sinks and bias are differentiable, the same bits each time.

    With `return_lse` also float32 [B, T, H], the log-sum-exp of the visible scores and the sink
    (-inf if there are none), which is differentiable: parts of a sequence merge by it, if one of
    them has the sinks. Raises ValueError for shapes that do not fit and for an `implementation`
    ("pallas", "cudnn", "xla", "reference") that cannot serve the call.
    """
    if kv_segment_ids is None:
        kv_segment_ids = segment_ids
    check_static(
        "attention", causal=causal, window=window, scale=scale, softcap=softcap, dropout=dropout
    )
    _check(q, k, v, causal, window, segment_ids, kv_segment_ids)
    _check_extras(q, k, softcap, sinks, bias, dropout, dropout_seed)
    prefixes = None if prefix_ids is None else _prefixes(prefix_ids, segment_ids, k)
    if window is not None and window >= k.shape[1]:
        window = None
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    options = Options(causal, window, factor, softcap, dropout)
    extras = {"sinks": sinks, "bias": bias, "seed": seed_of(dropout_seed) if dropout else None}
    extras |= {"prefixes": prefixes}
    name = choose(implementation, q, k, v, segment_ids, kv_segment_ids, options, extras, return_lse)
    attend = {"xla": xla, "pallas": flash, "cudnn": cudnn, "reference": reference}[name].attention
    out, lse = attend(q, k, v, segment_ids, kv_segment_ids, options=options, **extras)
    return (out, lse) if return_lse else out


def _check(
    q: Any, k: Any, v: Any, causal: bool, window: Any, q_segments: Any, k_segments: Any
) -> None:
    for name, x, axes in (("q", q, "B T H D"), ("k", k, "B S K D"), ("v", v, "B S K Dv")):
        check_array("attention", name, x, axes)
    for name, x, axes in (("", q_segments, "B T"), ("kv_", k_segments, "B S")):
        if x is not None:
            check_array("attention", f"{name}segment_ids", x, axes, (*INTEGERS, jnp.bool_))
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    fits = k.shape[:3] == v.shape[:3] and k.shape[0] == B and k.shape[3] == D
    if not fits or not K or not D or H % K:
        raise ValueError(
            f"attention needs q [B, T, H, D], k [B, S, K, D] and v [B, S, K, Dv] with K dividing "
            f"H; got q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention needs one dtype; got q {q.dtype}, k {k.dtype}, v {v.dtype}")
    check_window("attention", window, causal)
    if (q_segments is None) != (k_segments is None):
        raise ValueError("kv_segment_ids came without segment_ids")
    if q_segments is not None and (q_segments.shape, k_segments.shape) != ((B, T), (B, S)):
        raise ValueError(
            f"expected segment ids {(B, T)} and {(B, S)}; got {q_segments.shape} and "
            f"{k_segments.shape}: with T != S pass kv_segment_ids"
        )


def _prefixes(ids: Any, segment_ids: Any, k: Any) -> tuple[Any, Any]:
    """(what queries read, what keys are read as): what has no part in it never meets."""
    check_array("attention", "prefix_ids", ids, "B T", INTEGERS)
    if segment_ids is None or not ids.shape == segment_ids.shape == k.shape[:2]:
        raise ValueError(
            f"prefix_ids need segment_ids beside them and T = S; got {ids.shape} for keys {k.shape}"
        )
    return jnp.maximum(-ids, 0), jnp.where(ids > 0, ids, -1)


def _check_extras(
    q: Any, k: Any, softcap: float | None, sinks: Any, bias: Any, dropout: float, seed: Any
) -> None:
    B, T, H, _ = q.shape
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive; got {softcap}")
    if sinks is not None:
        check_array("attention", "sinks", sinks, "H")
        if sinks.shape != (H,):
            raise ValueError(f"expected sinks {(H,)}, one for each query head; got {sinks.shape}")
    if bias is not None:
        check_array("attention", "bias", bias, "B|1 H|1 T S")
        b, h, *rest = bias.shape
        if b not in (1, B) or h not in (1, H) or rest != [T, k.shape[1]]:
            raise ValueError(
                f"expected a bias [{B} or 1, {H} or 1, {T}, {k.shape[1]}]; got {bias.shape}"
            )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is a probability below 1; got {dropout}")
    if dropout and seed is None:
        raise ValueError("dropout needs a dropout_seed: an integer, another one each step")
