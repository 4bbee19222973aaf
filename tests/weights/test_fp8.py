"""float8 weights in a model: LoRA and full training, scanning, sharding, saving, refusals."""

import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import mud_puppy as mp
from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized, dequantize, target
from mud_puppy.kernels.fp8 import OCP, fp8_matmul, scale_of
from mud_puppy.model import axes
from mud_puppy.parallel import make_mesh, shardings
from mud_puppy.weights import (
    Fp8,
    add_lora,
    base_of,
    combine,
    dense,
    fp8,
    fp8_types,
    is_weight,
    linear,
    merge_lora,
    partition,
    strip_fp8,
    with_scales,
)
from mud_puppy.weights.fp8 import fp8_codes
from tests.tiny import tiny_model

H100 = target.Target("cuda", "sm90")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 16), dtype=np.int32))


def real(params):
    """`fp8` as for a chip that has float8 products; traced for this one."""
    with target.use(H100):
        return fp8(params)


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


def leaves(params, kind):
    return [w for w in jax.tree.leaves(params, is_leaf=is_weight) if isinstance(w, kind)]


def loss_of(model, train, frozen, tokens):
    params = with_scales(combine(train, frozen))
    logits = model(params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def trained(model, params, steps=6, tokens=TOKENS):
    """Plain descent: Adam's first steps have the gradient's sign, and with it its rounding."""
    train, frozen = partition(params)
    tx = optax.sgd(0.1)

    @jax.jit
    def step(train, state, frozen, tokens):
        loss, grads = jax.value_and_grad(partial(loss_of, model))(train, frozen, tokens)
        move, state = tx.update(grads, state)
        return optax.apply_updates(train, move), state, loss

    state, losses = tx.init(train), []
    for _ in range(steps):
        train, state, loss = step(train, state, frozen, tokens)
        losses.append(float(loss))
    return np.array(losses), combine(train, frozen)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_training_is_close_to_the_plain_one(tiny, lora):
    model, params = tiny
    params = add_lora(params, 4, 8, key=jax.random.key(1)) if lora else params
    plain, _ = trained(model, params)
    ours, after = trained(model, real(params))
    emulated, _ = trained(model, fp8(params, emulated=True))
    assert ours[-1] < ours[0] - 0.2
    np.testing.assert_allclose(ours, plain, rtol=0.03)
    np.testing.assert_allclose(emulated, ours, rtol=1e-3)
    assert np.abs(ours - plain).max() > 1e-4, "nothing was rounded"
    weights = leaves(after, Fp8) or [w.base for w in leaves(after, mp.Lora)]
    assert len(weights) == 7
    frozen = [isinstance(w.base, Quantized) for w in weights]
    assert frozen == [lora] * 7 and all(w.scale is None for w in weights)


def test_a_wrong_scale_would_be_seen(tiny, monkeypatch):
    """The mutation: weights that saturate at an eighth of their largest."""
    model, params = tiny
    plain, _ = trained(model, params, steps=4)
    # By name: the package has a function `fp8` in front of the module.
    module = sys.modules["mud_puppy.weights.fp8"]
    monkeypatch.setattr(module, "scale_of", lambda *a, **k: scale_of(*a, **k) / 8)
    wrong, _ = trained(model, real(params), steps=4)
    assert np.abs(wrong / plain - 1).max() > 0.03


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_layers_products_are_float8s(tiny, lora):
    """Seven linears: forward, again in the backward pass but the last, dx, and dw if they train."""
    model, params = tiny
    params = real(add_lora(params, 4, 8, key=jax.random.key(1)) if lora else params)
    train, frozen = partition(params)
    text = jax.jit(jax.grad(partial(loss_of, model))).lower(train, frozen, TOKENS).as_text()
    products = re.findall(r"dot_general.*: \(tensor<[^>]*x(\w+)>, tensor<[^>]*x(\w+)>\)", text)
    forward = [p for p in products if p == ("f8E4M3FN", "f8E4M3FN")]
    backward = [p for p in products if p == ("f8E5M2", "f8E4M3FN")]
    assert len(forward) == 13 and len(backward) == (7 if lora else 14)
    # Beside them there are the head's, attention's and the adapters' small ones.
    matrix = r"tensor<(?:16|32|48)x(?:32|48)xf32>"
    wide = re.findall(rf"dot_general.*: \(tensor<[^>]*f32>, {matrix}", text)
    assert not wide, "the same product in float32 too"


@pytest.mark.parametrize("shape", [(48, 32), (2, 48, 32)])
def test_a_frozen_base_is_a_byte_a_weight(shape):
    w = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.bfloat16)
    q = fp8_codes(w)
    assert q.codes.dtype == jnp.uint8 and q.codes.shape == shape
    assert q.scales.shape == (*shape[:-2], 1, 1) and q.dtype == jnp.bfloat16
    powers = np.log2(np.asarray(q.scales))
    np.testing.assert_array_equal(powers, np.round(powers))
    back = dequantize(q, jnp.float32)
    np.testing.assert_allclose(back, w.astype("float32"), rtol=2**-4, atol=1e-2)
    assert np.abs(np.asarray(back - w.astype("float32"))).max() > 1e-3


def test_a_quantized_fp8_base_is_multiplied_as_it_is(tiny):
    """qlora with quant_backend fp8 has a scale for each row, of any value."""
    model, params = tiny
    coded = mp.quantize(params, "fp8")
    ours = real(add_lora(coded, 4, 8, key=jax.random.key(1)))
    base = leaves(ours, mp.Lora)[0].base
    assert isinstance(base, Fp8) and base.base.codes is leaves(coded, Quantized)[0].codes
    got, want = model(ours, TOKENS), model(coded, TOKENS)
    assert 1e-3 < float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 0.15
    again = real(ours)
    assert leaves(again, mp.Lora)[0].base is base
    with pytest.raises(UserError, match=r"layers.0.*' is stored as nf4"):
        real(mp.quantize(params, "nf4", group=16))


def test_a_stack_is_read_at_its_layer(tiny):
    """Generation reads codes in their stack (`tree.at_repeat`)."""
    model, params = tiny
    for given in (params, add_lora(params, 4, 8, key=jax.random.key(1))):
        ours = real(given)
        texts = model(ours, TOKENS[:, :6])
        cached, *_ = mp.model.decoder.decode(
            model.arch,
            ours,
            mp.model.Inputs(jnp.asarray(TOKENS[:, :6])),
            mp.model.decoder.make_cache(model.arch, 8, 6, jnp.float32),
            mp.model.scan_layers,
        )
        logits = mp.model.decoder.logits(model.arch, ours, cached)
        np.testing.assert_allclose(logits, texts, atol=1e-4)


def test_scales_found_once_are_the_same_step(tiny):
    model, params = tiny
    ours = real(params)
    scaled = with_scales(ours)
    w = leaves(scaled, Fp8)[0]
    assert w.scale.shape == (2,)
    np.testing.assert_array_equal(model(scaled, TOKENS), model(ours, TOKENS))
    train, frozen = partition(ours)
    a = jax.grad(partial(loss_of, model))(train, frozen, TOKENS)
    assert jax.tree.structure(a) == jax.tree.structure(train)


def test_it_is_a_leaf_like_the_others(tiny):
    _, params = tiny
    w = params["layers"][0][0]["mlp"]["up_proj"]["weight"][0]
    leaf = Fp8(w, types=OCP)
    assert is_weight(leaf) and base_of(leaf) is w and dense(leaf) is w
    x = jnp.ones((2, 32))
    np.testing.assert_array_equal(linear(x, leaf), fp8_matmul(x, w))
    stripped = strip_fp8(real(params))
    for a, b in zip(jax.tree.leaves(stripped), jax.tree.leaves(params), strict=True):
        assert a is b
    assert jax.tree.structure(stripped) == jax.tree.structure(params)
    adapted = real(add_lora(params, 4, 8, key=jax.random.key(1)))
    merged = merge_lora(adapted)["layers"][0][0]["mlp"]["up_proj"]["weight"]
    assert merged.dtype == w.dtype
    np.testing.assert_allclose(merged[0], w, rtol=2**-4, atol=2e-3)
    assert not leaves(strip_fp8(adapted), Fp8)


def test_embedding_head_and_norms_stay(tiny):
    _, params = tiny
    ours = real(params)
    assert len(leaves(ours, Fp8)) == 7
    assert ours["embed"] is params["embed"] and ours["head"] is params["head"]


@pytest.mark.parametrize("spec", ["fsdp=8", "data=2,fsdp=4"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_eight_devices_train_as_one(tiny, lora, spec):
    model, params = tiny
    ours = real(add_lora(params, 4, 8, key=jax.random.key(1)) if lora else params)
    want, _ = trained(model, ours, steps=3)
    mesh = make_mesh(spec)
    places = shardings(mesh, axes(model.arch), ours)
    w = places["layers"][0][0]["mlp"]["up_proj"]["weight"]
    if lora:
        assert w.base.base.codes.spec == P(None, None, "fsdp")
        assert w.base.base.scales.spec == P(None, None, None)
    else:
        assert w.base.spec == P(None, None, "fsdp")
    placed = jax.device_put(ours, places)
    with jax.set_mesh(mesh):
        got, after = trained(model, placed, steps=3)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    split = [x for x in jax.tree.leaves(after) if not x.sharding.is_fully_replicated]
    assert len(split) > 7


def test_devices_exchange_rounded_weights(tiny):
    """Of the layers' matrices no float32 one is gathered (the embedding's and norms' are)."""
    model, params = tiny
    mesh = make_mesh("fsdp=8")

    def gathered(params):
        placed = jax.device_put(params, shardings(mesh, axes(model.arch), params))
        with jax.set_mesh(mesh):
            lowered = jax.jit(jax.grad(partial(loss_of, model))).lower(*partition(placed), TOKENS)
            text = lowered.compile().as_text()
        return re.findall(r"= \(?(f32\[(?:16|32|48),(?:32|48)\]).* all-gather(?:-start)?\(", text)

    assert gathered(real(params)) == [] and gathered(params)


@pytest.mark.parametrize("chip", [("rocm", "gfx1100"), ("rocm", "gfx90a"), ("cpu", "cpu")])
def test_chips_without_float8_refuse(chip):
    with target.use(target.Target(*chip)):
        with pytest.raises(UserError, match=f"{chip[1]} has no float8.*--precision fp8-emulated"):
            fp8_types()
        assert fp8_types(emulated=True).emulated
    with target.use(target.Target("rocm", "gfx942")):
        assert fp8_types().forward == "float8_e4m3fnuz"


def test_adapters_over_codes_are_saved_as_any(tiny, tmp_path):
    model, params = tiny
    adapted = add_lora(params, 4, 8, key=jax.random.key(1))
    mp.save_adapter(model, real(adapted), tmp_path / "fp8")
    mp.save_adapter(model, adapted, tmp_path / "plain")
    a, b = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("fp8", "plain"))
    assert a == b
