"""`quantize(params)`: which weights, with which numbers; loading never holds the model twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mud_puppy as mp
from mud_puppy import kernels, weights
from mud_puppy.kernels import Quantized
from mud_puppy.model.names import flatten
from mud_puppy.parallel import make_mesh
from mud_puppy.weights import Lora, Scheme, dense, embed, linear, quantizer

LINEARS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
GROUP = 16  # the tiny model's rows are 32 and 48


def equal(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs
    )


def loaded(base, **options):
    return mp.load(base, dtype="float32", **options)


def test_the_layers_linear_weights_and_nothing_else(base):
    _, params = loaded(base)
    found = flatten(mp.quantize(params, "nf4", group=GROUP))
    assert {p.split("/")[-2] for p, w in found.items() if isinstance(w, Quantized)} == set(LINEARS)
    for path, w in flatten(params).items():
        if not path.endswith("proj/weight"):
            assert found[path] is w
            continue
        for r in range(3):
            want = kernels.quantize(w[r], "nf4", group=GROUP, double=True)
            got = jax.tree.map(lambda x, r=r: x[r], found[path])
            assert np.array_equal(got.codes, want.codes) and got.nested is not None
            np.testing.assert_allclose(dense(got), dense(want), rtol=1e-6)


@pytest.mark.parametrize("format", ["nf4", "int4", "int8", "mxfp4", "fp8"])
def test_embedding_and_head_only_when_asked(base, format):
    _, params = loaded(base)
    if format in ("nf4", "int4"):  # rows of 32 have no group of 64
        with pytest.raises(mp.UserError, match=r"embed cannot be quantized: rows of 32 .*16"):
            mp.quantize(params, "int8", embed=format)
        return
    q = mp.quantize(params, "int8", embed=format, head="int8")
    tokens = jnp.asarray([[3, 0, 63], [7, 7, 1]])
    want = kernels.dequantize(q["embed"])[tokens]
    assert np.array_equal(embed(q["embed"], tokens), want)
    assert isinstance(q["head"], Quantized) and q["final_norm"] is params["final_norm"]


@pytest.mark.parametrize("options", [{"double": True}, {"group": "tensor"}])
def test_rows_of_a_quantized_embedding(options):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(48, 128)), jnp.float32)
    q = kernels.quantize(w, "nf4" if "double" in options else "int8", **options)
    tokens = jnp.asarray([[3, 0, 47]])
    assert np.array_equal(embed(q, tokens), kernels.dequantize(q)[tokens])


def test_under_an_adapter_and_only_once(base):
    _, params = loaded(base)
    key = jax.random.key(0)
    over = mp.add_lora(mp.quantize(params, "int8"), 4, key=key)
    under = mp.quantize(mp.add_lora(params, 4, key=key), "int8")
    assert equal(over, under)
    assert isinstance(over["layers"][0][0]["mlp"]["up_proj"]["weight"], Lora)
    with pytest.raises(mp.UserError, match=r"is int8 already: quantize the model it was made from"):
        mp.quantize(under, "int8")
    with pytest.raises(mp.UserError, match=r"'nf5' is no format of weights.*Did you mean 'nf4'"):
        mp.quantize(params, "nf5")


def test_the_model_runs_on_codes_as_on_what_they_stand_for(base, tokens):
    model, params = loaded(base)
    q = mp.quantize(params, "int4", group=GROUP, embed="int8", head="int8")
    decoded = jax.tree.map(
        lambda w: dense(w) if isinstance(w, Quantized) else w,
        q,
        is_leaf=lambda w: isinstance(w, Quantized),
    )
    tokens = jnp.asarray(tokens)
    got, want = model(q, tokens), model(decoded, tokens)
    assert np.abs(got - want).max() < 1e-4
    assert np.abs(want - model(params, tokens)).max() > 1e-2  # the format is seen at all


@pytest.mark.parametrize("mesh", [None, "data=2,fsdp=4"])
def test_loading_into_codes_equals_quantizing_what_was_loaded(base, mesh):
    """With and without a mesh; and an adapter trains on it (the founders' QLoRA)."""
    over = None if mesh is None else make_mesh(mesh)
    scheme = Scheme("int4", GROUP, embed="int8")
    _, params = loaded(base, mesh=over, on_leaf=quantizer(scheme))
    _, whole = loaded(base)
    assert equal(params, mp.quantize(whole, "int4", group=GROUP, embed="int8"))
    up = params["layers"][0][0]["mlp"]["up_proj"]["weight"]
    assert up.codes.shape == (3, 48, 16) and up.scales.shape == (3, 48, 2)
    if over is not None:
        assert {s.data.shape for s in up.codes.addressable_shards} == {(3, 48, 4)}


def test_leaves_that_are_no_plain_weights_are_refused(base):
    _, params = loaded(base)
    for wrapped in (mp.fake_quant(params, "int8"), weights.fp8(params, emulated=True)):
        with pytest.raises(mp.UserError, match=r"_proj/weight is a (FakeQuant|Fp8): "):
            mp.quantize(wrapped, "int8")


def test_merging_is_base_plus_adapter(base):
    """A merged QLoRA keeps its adapter: the product is that of base and adapter to 1e-3."""
    _, params = loaded(base)
    params = mp.add_lora(mp.quantize(params, "int4", group=GROUP), 4, key=jax.random.key(0))
    rng = np.random.default_rng(1)

    def trained(path, x):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return jnp.asarray(rng.normal(size=x.shape), x.dtype) if name == "b" else x

    params = jax.tree.map_with_path(trained, params)
    w = jax.tree.map(lambda x: x[1], params["layers"][0][0]["mlp"]["up_proj"]["weight"])
    merged = mp.merge_lora(params)["layers"][0][0]["mlp"]["up_proj"]["weight"][1]
    assert merged.dtype == jnp.float32
    x = jnp.asarray(rng.normal(size=(5, 32)), jnp.float32)
    want = linear(x, w)
    assert np.abs(linear(x, merged) - want).max() < 1e-3 * np.abs(want).max()
    assert np.abs(linear(x, dense(w.base)) - want).max() > 0.1 * np.abs(want).max()
