"""`flash_attention`: one contract, the fastest implementation that can serve the call.

`cudnn` (NVIDIA), else `xla`; `reference` only where a test asks for it. An implementation declines
with a reason, the next one runs, and the log says so once for each reason. A forced implementation
that cannot serve the call raises ValueError.
"""

import functools
import logging
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from mud_puppy.kernels.attention import cudnn, reference, xla
from mud_puppy.kernels.attention.decode import decode_attention

__all__ = ["decode_attention", "flash_attention"]

IMPLEMENTATIONS = ("xla", "cudnn", "reference")


def flash_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Any:
    """softmax(scale q k^T) v over the visible keys -> out [B, T, H, D] in q's dtype.

    K divides H; query head h reads key head h // (H // K). `scale` is D ** -0.5 when None. Query i
    (counted so that the last query sits on the last key) sees key j if j <= i (causal) and
    i - window < j (window, with causal only) and both carry the same segment id; padding is segment
    0 and sees itself. The ids of the keys default to those of the queries. A query that sees no
    key gives 0. Softmax and sums are float32.

    With `return_lse` also float32 [B, T, H], the log-sum-exp of the visible scores (-inf if there
    are none), which is differentiable: parts of a sequence merge by it. Raises ValueError for
    shapes that do not fit and for an `implementation` that cannot serve the call.
    """
    if kv_segment_ids is None:
        kv_segment_ids = segment_ids
    _check(q, k, v, causal, window, segment_ids, kv_segment_ids)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if window is not None and window >= k.shape[1]:
        window = None
    name = _choose(implementation, q, k, causal, segment_ids, kv_segment_ids, return_lse)
    attend = {"xla": xla, "cudnn": cudnn, "reference": reference}[name].attention
    out, lse = attend(
        q, k, v, segment_ids, kv_segment_ids, causal=causal, window=window, scale=scale
    )
    return (out, lse) if return_lse else out


def _choose(
    implementation: str | None,
    q: Any,
    k: Any,
    causal: bool,
    q_segments: Any,
    k_segments: Any,
    return_lse: bool,
) -> str:
    if implementation in ("xla", "reference"):
        return implementation
    if implementation not in (None, "cudnn"):
        raise ValueError(
            f"attention implementation {implementation!r} is none of {IMPLEMENTATIONS}"
        )
    reason = cudnn.declines(q, k, causal, q_segments, k_segments, return_lse)
    if reason is None:
        _say(logging.INFO, "attention: cudnn")
        return "cudnn"
    if implementation == "cudnn":
        raise ValueError(f"attention: cudnn cannot serve this call: {reason}")
    # Not having an NVIDIA card is no news; declining on one costs speed.
    level = logging.WARNING if cudnn.on_cuda() else logging.INFO
    _say(level, f"attention: xla on {jax.default_backend()} (cudnn declined: {reason})")
    return "xla"


@functools.cache
def _say(level: int, message: str) -> None:
    """Logs each message once in a process."""
    logging.getLogger("mud_puppy").log(level, message)


def _check(
    q: Any, k: Any, v: Any, causal: bool, window: int | None, q_segments: Any, k_segments: Any
) -> None:
    B, T, H, D = q.shape
    S, K = k.shape[1], k.shape[2]
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != D or H % K:
        raise ValueError(
            f"attention needs q [B, T, H, D] and k, v [B, S, K, D] with K dividing H; "
            f"got q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention needs one dtype; got q {q.dtype}, k {k.dtype}, v {v.dtype}")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"a window needs causal attention and at least 1 key; got {window}")
    if (q_segments is None) != (k_segments is None):
        raise ValueError("kv_segment_ids came without segment_ids")
    if q_segments is not None and (q_segments.shape, k_segments.shape) != ((B, T), (B, S)):
        raise ValueError(
            f"expected segment ids {(B, T)} and {(B, S)}; got {q_segments.shape} and "
            f"{k_segments.shape}: with T != S pass kv_segment_ids"
        )
