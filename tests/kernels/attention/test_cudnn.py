"""cuDNN without the card: what it declines, what it is asked for, and which call segments take."""

import re

import jax
import jax.numpy as jnp
import pytest

from mud_puppy.kernels import flash_attention
from mud_puppy.kernels.attention import cudnn, reference
from mud_puppy.kernels.attention.plan import Options
from tests.kernels import contract
from tests.kernels.attention.calls import inputs, qkv, segments, wanted
from tests.kernels.contract import differences, tolerance

# Forward and backward, each plain and with the mask (which JAX calls a scale bias).
BOTH = ["", "Backward", "ScaleBias", "ScaleBiasBackward"]


def test_cudnn_declines_by_name(hopper, monkeypatch):
    def reason(shape=None, ids=None, kv_ids=None, causal=True, return_lse=False, extras=None):
        q, k, v = qkv(**{"dtype": jnp.bfloat16, "K": 4, **(shape or {})})
        kv_ids = ids if kv_ids is None else kv_ids
        options = Options(causal, None, 1.0)
        return cudnn.declines(q, k, v, ids, kv_ids, options, extras or {}, return_lse)

    ids = segments(2, 40)
    assert reason() is None and reason(ids=ids) is None
    assert reason({"S": 50}, causal=False) is None
    assert "float32" in reason({"dtype": jnp.float32})
    assert "head_dim 12" in reason({"D": 12})
    assert "head_dim 264" in reason({"D": 264})
    assert "odd" in reason({"T": 39})
    assert "diagonal" in reason({"S": 50})
    assert "log-sum-exp" in reason(return_lse=True)
    assert "different segment ids" in reason(ids=ids, kv_ids=ids + 1)
    assert "values are 16 wide" in reason({"Dv": 16})
    for name in ("sinks", "bias"):
        assert name in reason(extras={name: jnp.zeros(4)})
    assert "dropout" in reason(extras={"seed": jnp.uint32(1)})
    monkeypatch.setattr(cudnn, "MASK_BYTES", 2 * 40 * 40 * 2 - 1)
    assert "mask" in reason(ids=ids) and reason() is None


@pytest.mark.parametrize(
    ("options", "asked", "calls"),
    [
        ({}, ("CAUSAL", 0), ["", "Backward"]),
        ({"causal": False}, ("NO_MASK", 0), ["", "Backward"]),
        ({"window": 7}, ("CAUSAL", 7), ["", "Backward"]),
        ({"window": 40}, ("CAUSAL", 0), ["", "Backward"]),
        ({"segment_ids": segments(2, 40)}, ("CAUSAL", 0), BOTH),
        ({"segment_ids": segments(2, 40), "window": 7}, ("CAUSAL", 7), BOTH),
        ({"segment_ids": segments(2, 40), "causal": False}, ("NO_MASK", 0), BOTH),
    ],
)
def test_cudnn_is_asked_for_the_right_mask(hopper, options, asked, calls):
    args = qkv(K=2, dtype=jnp.bfloat16)

    def loss(*args):
        return flash_attention(*args, implementation="cudnn", **options).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*args)
    text = traced.lower(lowering_platforms=("cuda",)).as_text().replace("\\22", '"')
    found = re.findall(r"@__cudnn\$fmha(\w*)Softmax(\w*)", text)
    assert sorted(bias + backward for bias, backward in found) == calls
    masks = re.findall(r'"mask_type": "(\w+)"', text)
    windows = re.findall(r'"sliding_window_length": (\d+)', text)
    assert [set(masks), set(windows)] == [{str(x)} for x in asked]


def fake_forward(q, k, v, *, mask, scale, mask_type, **rest):
    """What cuDNN computes, by way of the reference; a mask stands for segment ids."""
    ids = None if mask is None else jnp.argmax(mask[:, 0], axis=-1)
    window, causal = rest["sliding_window_length"], mask_type == cudnn.fused.MaskType.CAUSAL
    options = Options(causal, window, scale)
    out, _ = reference.attention(q, k, v, ids, ids, options=options)
    B, T, H, _ = q.shape
    return out, jnp.full((B, H, T), 7.0)


def fake_backward(scale, seed, dropout, variadic, mask_type, layout, window, version, res, *last):
    del seed, dropout, layout, version, res
    (q, k, v, bias, *_, stats, _), d_out = last
    assert variadic == (bias.size > 0, False)
    options = {"scale": scale, "mask_type": mask_type, "sliding_window_length": window}

    def f(q, k, v):
        return fake_forward(q, k, v, mask=bias == 0 if bias.size else None, **options)[0]

    grads = jax.vjp(f, q, k, v)[1](d_out)
    # NaN if the statistics are not those of the forward pass.
    return *(g * jnp.where(stats.min() == 7, 1, jnp.nan).astype(g.dtype) for g in grads), None


@pytest.mark.parametrize("kind", ["packed", "alone", "unordered"])
def test_segments_through_cudnn(hopper, monkeypatch, kind):
    monkeypatch.setattr(cudnn.fused, "dot_product_attention", fake_forward)
    monkeypatch.setattr(cudnn.fused, "_dot_product_attention_bwd_rule", fake_backward)
    args, (d_out, d_lse) = inputs(K=4, dtype=jnp.bfloat16)
    ids = segments(2, 40)
    ids = {"packed": ids, "alone": ids * 0 + 5, "unordered": jnp.where(ids == 3, 1, ids)}[kind]

    def f(args):
        q, k, v = (args[name] for name in "qkv")
        return flash_attention(q, k, v, segment_ids=ids, implementation="cudnn")

    got = contract.compiled(f, (args,), d_out)

    def expected(ids):
        out, _, *grads = wanted(args, (d_out, jnp.zeros_like(d_lse)), segment_ids=ids)
        return [out, *grads]

    assert max(differences(got, expected(ids))) < tolerance(jnp.bfloat16, 40)
    other = segments(2, 40) if kind == "alone" else None
    assert min(differences(got, expected(other))) > tolerance(jnp.bfloat16, 40)
