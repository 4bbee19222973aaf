"""cuDNN's fused attention on NVIDIA cards, packed sequences included, through JAX's bindings.

JAX gives the packed layout (a start and a length for each segment of a row) only in a private
module (jax/_src/cudnn/fused_attention_stablehlo.py, read at 0.10.2 and 0.11.2, the range this
project pins); the private backward rule is called as well, so that the residuals carry the name
"attention" and a remat policy that saves it does not run the forward twice.

Packed rows hold at most `max_segments(T)` segments in cuDNN's buffers. Whether a batch fits is
known on the device only: one that does not, or whose ids are not ascending, runs on `xla` inside
the same step (`lax.cond`), slower and never wrong.

Not partitioned by B for packed rows on several cards: wrap the call in `shard_map` there.
"""

from functools import partial
from typing import Any

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.ad_checkpoint import checkpoint_name

from mud_puppy.kernels.attention import xla

PACKED_CUDNN = 90600
# The branch that is hardly ever taken still counts in a step's peak memory: small blocks there.
FALLBACK_BLOCK = 256


def on_cuda() -> bool:
    """True on an NVIDIA card; JAX calls AMD's platform "gpu" as well."""
    if jax.default_backend() != "gpu":
        return False
    return "cuda" in jax.extend.backend.get_backend().platform_version.lower()


def max_segments(T: int) -> int:
    """Segments a packed row may hold here: a mean length of 32 tokens, and at least 16.

    cuDNN allots float32 [B * max_segments, H, T] for the softmax statistics and starts thread
    blocks for each, so the bound costs memory and time: 134 MB for 8 rows of 2048 and 32 heads.
    """
    return max(16, T // 32)


def declines(
    q: Any, k: Any, causal: bool, q_segments: Any, k_segments: Any, return_lse: bool
) -> str | None:
    """Why cuDNN cannot serve this call, or None if it can."""
    if not on_cuda():
        return f"the platform is {jax.default_backend()}, not cuda"
    T, H, D = q.shape[1:]
    S, K = k.shape[1:3]
    try:
        version = fused.check_cudnn_version()
    except RuntimeError as error:
        return str(error)
    hopper = fused.check_compute_capability("9.0")
    widest = 256 if hopper else 128
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {q.dtype} is neither bfloat16 nor float16"
    if D % 8 or widest < D:
        return f"head_dim {D} is not a multiple of 8 up to {widest}"
    if T % 2 or S % 2:
        return "a sequence length is odd"
    if causal and T != S:
        return "it aligns the causal diagonal with the first key, not the last, when T != S"
    if return_lse:
        return "its log-sum-exp is not differentiable"
    if q_segments is None:
        return None
    if k_segments is not q_segments:
        return "queries and keys have different segment ids"
    if version < PACKED_CUDNN or not hopper:
        return f"packed sequences need cuDNN 9.6 (found {version}) and a Hopper card or newer"
    if H != K and jax.__version_info__ < (0, 11, 2):
        # jax-ml/jax#39521: the offsets of K and V were scaled by the query heads' stride.
        return (
            f"jax {jax.__version__} misplaces packed keys when heads are grouped; 0.11.2 does not"
        )
    return None


def attention(
    q: Any,
    k: Any,
    v: Any,
    q_segments: Any = None,
    k_segments: Any = None,
    *,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Any, None]:
    """(out [B, T, H, D], None); only for calls that `declines` lets pass."""
    del k_segments  # the same as q_segments, or declined
    return _attention((causal, window, scale), q, k, v, q_segments), None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: tuple, q: Any, k: Any, v: Any, segments: Any) -> Any:
    return _forward(static, q, k, v, segments)[0]


def _forward(static: tuple, q: Any, k: Any, v: Any, segments: Any) -> Any:
    layout = _layout(segments)

    def fused_forward(q: Any, k: Any, v: Any) -> Any:
        return _fused_forward(static, q, k, v, layout)

    def xla_forward(q: Any, k: Any, v: Any) -> Any:
        B, T, H, _ = q.shape
        stats = jnp.zeros((B * max_segments(T), H, T), jnp.float32)
        return _on_xla(static, q, k, v, segments), stats

    if segments is None:
        out, stats = fused_forward(q, k, v)
    else:
        out, stats = jax.lax.cond(_fits(segments), fused_forward, xla_forward, q, k, v)
    out, stats = checkpoint_name(out, "attention"), checkpoint_name(stats, "attention")
    return out, (q, k, v, segments, out, stats)


def _backward(static: tuple, residuals: Any, d_out: Any) -> Any:
    q, k, v, segments, out, stats = residuals
    layout = _layout(segments)

    def fused_backward(q: Any, k: Any, v: Any) -> Any:
        return _fused_backward(static, q, k, v, layout, out, stats, d_out)

    def xla_backward(q: Any, k: Any, v: Any) -> Any:
        return jax.vjp(partial(_on_xla, static, segments=segments), q, k, v)[1](d_out)

    if segments is None:
        return *fused_backward(q, k, v), None
    return *jax.lax.cond(_fits(segments), fused_backward, xla_backward, q, k, v), None


_attention.defvjp(_forward, _backward)


def _on_xla(static: tuple, q: Any, k: Any, v: Any, segments: Any) -> Any:
    causal, window, scale = static
    return xla.attention(
        q, k, v, segments, segments,
        causal=causal, window=window, scale=scale, max_block=FALLBACK_BLOCK,
    )[0]  # fmt: skip


def _fused_forward(static: tuple, q: Any, k: Any, v: Any, layout: tuple) -> Any:
    """(out, softmax statistics)"""
    causal, window, scale = static
    starts, lengths = layout
    return fused.dot_product_attention(
        q, k, v,
        q_seqlen=lengths, kv_seqlen=lengths, q_offsets=starts, kv_offsets=starts,
        scale=scale, mask_type=_mask_type(causal, starts), sliding_window_length=window,
        return_residual=True,
    )  # fmt: skip


def _fused_backward(
    static: tuple, q: Any, k: Any, v: Any, layout: tuple, out: Any, stats: Any, d_out: Any
) -> Any:
    """(dq, dk, dv)"""
    causal, window, scale = static
    unused = jnp.zeros(0, q.dtype)  # what the binding passes for an absent operand
    starts, lengths = (unused if x is None else x for x in layout)
    residuals = (q, k, v, unused, lengths, lengths, starts, starts, unused, unused, stats, out)
    grads = fused._dot_product_attention_bwd_rule(
        scale, 42, 0.0, (False, False), _mask_type(causal, layout[0]),
        fused.AttentionLayout.BTNH.value, window, fused.check_cudnn_version(), False,
        residuals, d_out,
    )  # fmt: skip
    return tuple(grads[:3])


def _mask_type(causal: bool, starts: Any) -> Any:
    if starts is None:
        return fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK
    return fused.MaskType.PADDING_CAUSAL if causal else fused.MaskType.PADDING


def _fits(segments: Any) -> Any:
    """bool []: cuDNN's buffers hold every row's segments, and no id comes back after another one.

    Ascending ids with padding (0) before or after them; anything else is left to `xla`.
    """
    few = _first(segments).sum(1).max() <= max_segments(segments.shape[1])
    last = jnp.where(segments == 0, jnp.iinfo(segments.dtype).max, segments)
    ascending = [(x[:, 1:] >= x[:, :-1]).all(1) for x in (segments, last)]
    return few & (ascending[0] | ascending[1]).all()


def _layout(segments: Any) -> Any:
    """int32 (starts [B, M + 1], lengths [B, M]) of each row's runs of one id, -1 after the last.

    Padding is a run as any other: cuDNN leaves what no run covers unwritten, and a NaN there would
    reach the loss.
    """
    if segments is None:
        return None, None
    T = segments.shape[1]
    first = _first(segments)
    M = max_segments(T)
    rows = jax.vmap(lambda x: jnp.nonzero(x, size=M + 1, fill_value=T)[0])(first)
    starts = rows.astype(np.int32)
    lengths = starts[:, 1:] - starts[:, :-1]
    return jnp.where(starts < T, starts, -1), jnp.where(lengths > 0, lengths, -1)


def _first(segments: Any) -> Any:
    """bool [B, T]: the id differs from the one before."""
    change = segments[:, 1:] != segments[:, :-1]
    return jnp.pad(change, ((0, 0), (1, 0)), constant_values=True)
