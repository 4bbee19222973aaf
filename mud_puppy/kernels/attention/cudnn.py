"""cuDNN's fused attention on NVIDIA cards, packed sequences included, through JAX's bindings.

Packed rows are masked: segment ids become one additive mask [B, 1, T, T] in q's dtype. cuDNN's own
packed layout (a start and a length for each segment) is faster, but its backward pass allots
float32 [B * M, H, T, D] twice over for a bound of M segments a row: 16.7 GiB at B 8, T 2048, H 32,
D 64, M 64 against 0.4 GiB with the mask (H100, cuDNN 9.19; forward 0.34 against 0.75 ms, forward
and backward 2.5 against 2.7 ms, XLA 12.8 ms). A batch whose rows hold one segment each needs no
mask; that is known on the device only, so both kinds stand in a `lax.cond`.

The backward rule of a private module (jax/_src/cudnn/fused_attention_stablehlo.py, read at 0.10.2
and 0.11.2, the range this project pins) is called, so that the residuals carry the name
"attention" and a remat policy that saves it does not run the forward twice.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.ad_checkpoint import checkpoint_name

from mud_puppy.kernels import target
from mud_puppy.kernels.attention.plan import Options

# The largest mask that a call may make; longer packed rows are XLA's, whose memory is linear in T.
MASK_BYTES = 2**30


def on_cuda() -> bool:
    """True when the target is an NVIDIA card."""
    return target.current().platform == "cuda"


def declines(
    q: Any,
    k: Any,
    v: Any,
    q_segments: Any,
    k_segments: Any,
    options: Options,
    extras: dict,
    return_lse: bool,
) -> str | None:
    """Why cuDNN cannot serve this call, or None if it can."""
    if not on_cuda():
        return f"the platform is {target.current().platform}, not cuda"
    T, _, D = q.shape[1:]
    S = k.shape[1]
    try:
        fused.check_cudnn_version()
    except RuntimeError as error:
        return str(error)
    widest = 256 if fused.check_compute_capability("9.0") else 128
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtype {q.dtype} is neither bfloat16 nor float16"
    if D % 8 or widest < D:
        return f"head_dim {D} is not a multiple of 8 up to {widest}"
    if T % 2 or S % 2:
        return "a sequence length is odd"
    if v.shape[-1] != D:
        return f"values are {v.shape[-1]} wide, queries {D}"
    for name, given in (*extras.items(), ("softcap", options.softcap)):
        if given is not None:
            return f"it is not asked for {'dropout' if name == 'seed' else name}"
    if options.causal and T != S:
        return "it aligns the causal diagonal with the first key, not the last, when T != S"
    if return_lse:
        return "its log-sum-exp is not differentiable"
    if q_segments is None:
        return None
    if k_segments is not q_segments:
        return "queries and keys have different segment ids"
    if (mask := q.shape[0] * T * T * q.dtype.itemsize) > MASK_BYTES:
        return f"the mask of packed rows would take {mask / 2**30:.1f} GiB"
    return None


def attention(
    q: Any,
    k: Any,
    v: Any,
    q_segments: Any = None,
    k_segments: Any = None,
    *,
    options: Options,
    **extras: None,
) -> tuple[Any, None]:
    """(out [B, T, H, D], None); only for calls that `declines` lets pass."""
    del k_segments, extras  # the same as q_segments, and None, or declined
    static = options.causal, options.window, options.scale
    return _attention(static, q, k, v, q_segments), None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: tuple, q: Any, k: Any, v: Any, segments: Any) -> Any:
    return _forward(static, q, k, v, segments)[0]


def _forward(static: tuple, q: Any, k: Any, v: Any, segments: Any) -> Any:
    run = partial(_either, segments, partial(_fused_forward, static))
    out, stats = run((q, k, v))
    out, stats = checkpoint_name(out, "attention"), checkpoint_name(stats, "attention")
    return out, (q, k, v, segments, out, stats)


def _backward(static: tuple, residuals: Any, d_out: Any) -> Any:
    q, k, v, segments, out, stats = residuals
    run = partial(_either, segments, partial(_fused_backward, static))
    return *run((q, k, v, out, stats, d_out)), None


_attention.defvjp(_forward, _backward)


def _either(segments: Any, call: Callable, arrays: tuple) -> Any:
    """`call(arrays, mask)`, with a mask only for a batch that has a row of several segments."""
    if segments is None:
        return call(arrays, None)

    def masked(arrays: tuple) -> Any:
        return call(arrays, segments[:, None, :, None] == segments[:, None, None, :])

    alone = (segments == segments[:, :1]).all()
    return jax.lax.cond(alone, lambda arrays: call(arrays, None), masked, arrays)


def _fused_forward(static: tuple, arrays: tuple, mask: Any) -> Any:
    """(out, softmax statistics float32 [B, H, T])"""
    causal, window, scale = static
    return fused.dot_product_attention(
        *arrays,
        mask=mask,
        scale=scale,
        mask_type=_mask_type(causal),
        sliding_window_length=window,
        return_residual=True,
    )


def _fused_backward(static: tuple, arrays: tuple, mask: Any) -> Any:
    """(dq, dk, dv)"""
    causal, window, scale = static
    q, k, v, out, stats, d_out = arrays
    unused = jnp.zeros(0, q.dtype)  # what the binding passes for an absent operand
    bias = unused if mask is None else fused.combine_bias_and_mask(None, mask, q.dtype)
    residuals = (q, k, v, bias, *(unused,) * 6, stats, out)
    # (a bias is there, its gradient is not wanted): with it, 2.4 GiB more at the shape above.
    variadic = (mask is not None, False)
    grads = fused._dot_product_attention_bwd_rule(
        scale, 42, 0.0, variadic, _mask_type(causal), fused.AttentionLayout.BTNH.value, window,
        fused.check_cudnn_version(), False, residuals, d_out,
    )  # fmt: skip
    return tuple(grads[:3])


def _mask_type(causal: bool) -> Any:
    return fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK
