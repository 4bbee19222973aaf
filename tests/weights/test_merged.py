"""Merged models without a copy, and merged into codes: the same numbers as merging and encoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mud_puppy as mp
from mud_puppy.kernels import Quantized
from mud_puppy.model.names import flatten
from mud_puppy.weights import Lora, Scheme, dense, is_weight, merge_quantized, merged_view

GROUP = 16  # the tiny model's rows are 32 and 48
ALL = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def adapted(base, targets, format=None):
    """The tiny model with trained adapters (b is not 0)."""
    model, params = mp.load(base, dtype="float32")
    if format is not None:
        params = mp.quantize(params, format, group=GROUP)
    params = mp.add_lora(params, 4, targets=targets, key=jax.random.key(0))
    rng = np.random.default_rng(1)

    def trained(path, x):
        b = jax.tree_util.keystr(path[-1:], simple=True) == "b"
        return jnp.asarray(rng.normal(size=x.shape) * 0.1, x.dtype) if b else x

    return model, jax.tree.map_with_path(trained, params)


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj"], ["embed_tokens", "lm_head", "up_proj"]], ids=str
)
@pytest.mark.parametrize("format", [None, "int4"])
def test_the_view_is_the_merged_model(base, tokens, targets, format):
    model, params = adapted(base, targets, format)
    tokens = jnp.asarray(tokens)
    got = model(merged_view(params, "bfloat16"), tokens)

    def rounded(w):
        return dense(w).astype(jnp.bfloat16).astype(jnp.float32) if isinstance(w, Lora) else w

    want = model(jax.tree.map(rounded, params, is_leaf=is_weight), tokens)
    assert np.abs(got - want).max() < 1e-4
    assert np.abs(model(params, tokens) - want).max() > 1e-4  # the rounding is seen


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=str)
def test_every_weight_of_the_scheme_is_in_codes_whoever_has_an_adapter(base, targets):
    _, params = adapted(base, targets)
    merged = flatten(merge_quantized(params, Scheme("int4", GROUP, head="int8"), "float32"))
    want = flatten(mp.quantize(mp.merge_lora(params), "int4", group=GROUP, head="int8"))
    assert {p.split("/")[-2] for p, w in merged.items() if w_format(w) == "int4"} == set(ALL)
    assert w_format(merged["head"]) == "int8"
    for path, w in want.items():
        assert w_format(merged[path]) == w_format(w)
        if is_weight(w):
            np.testing.assert_allclose(dense(merged[path]), dense(w), atol=1e-6)
    bare = flatten(mp.quantize(mp.strip_lora(params), "int4", group=GROUP))
    q = next(path for path in merged if "q_proj" in path)
    assert np.abs(dense(merged[q]) - dense(bare[q])).max() > 0.01


def w_format(w):
    return w.format if isinstance(w, Quantized) else None


def test_codes_without_an_adapter_stay_or_change_their_format(base):
    _, params = adapted(base, ["q_proj"], "nf4")
    kept = merge_quantized(params, Scheme("nf4", GROUP), "float32")
    before, after = flatten(params), flatten(kept)
    up = next(path for path in after if "up_proj" in path)
    assert after[up] is before[up]
    again = flatten(merge_quantized(params, Scheme("nf4", 2 * GROUP // 2, double=False), "float32"))
    assert again[up].nested is None and after[up].nested is not None
    np.testing.assert_allclose(dense(again[up]), dense(after[up]), atol=1e-6)
    changed = flatten(merge_quantized(params, Scheme("int8"), "float32"))
    assert {w.format for w in changed.values() if isinstance(w, Quantized)} == {"int8"}
    np.testing.assert_allclose(dense(changed[up]), dense(before[up]), atol=0.01)


def test_no_group_of_the_scheme_divides_the_rows(base):
    _, params = adapted(base, ["q_proj"])
    with pytest.raises(mp.UserError, match=r"layers/0/0/.*_proj/weight cannot be quantized: rows"):
        merge_quantized(params, Scheme("int4"), "bfloat16")
