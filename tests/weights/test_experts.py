"""Experts' products: the same as one `linear` for each expert, whatever the weight is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.errors import UserError
from mud_puppy.export import save_hf
from mud_puppy.kernels import Quantized, formats
from mud_puppy.model import Inputs, abstract, axes, init, load, make_cache
from mud_puppy.parallel import make_mesh, shardings
from mud_puppy.weights import (
    Lora,
    add_lora,
    fake_quant,
    finish_fake_quant,
    fp8,
    freeze_lora,
    int8_dynamic,
    is_weight,
    linear,
    merge_lora,
    merged_view,
    quantize,
    with_dropout,
)
from mud_puppy.weights.experts import expert_linear
from mud_puppy.weights.leaf import FakeQuant, Fp8, base_of
from mud_puppy.weights.merged import Merged
from mud_puppy.weights.observe import Moments, ObservedExperts, no_moments
from mud_puppy.weights.quantize import Scheme, quantizer

E, OUT, IN, M = 4, 32, 64, 24
SIZES = jnp.array([5, 0, 12, 4])  # three rows belong to no expert
rng = np.random.default_rng(0)
W = jnp.asarray(rng.normal(size=(E, OUT, IN)), jnp.float32)
X = jnp.asarray(rng.normal(size=(M, IN)), jnp.float32)
FIELDS = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def lora(base: Any, rank: int = 3, seed: int = 0) -> Lora:
    r = np.random.default_rng(seed)
    a, b = (jnp.asarray(r.normal(size=s), jnp.float32) for s in ((E, rank, IN), (E, OUT, rank)))
    return Lora(base, a, b, jnp.asarray(r.uniform(0.1, 1, E), jnp.float32))


def coded(format: str, **options: Any) -> Quantized:
    return quantizer(Scheme(format, **options))("layers/0/0/mlp/experts/up_proj/weight", W)


def with_minimums() -> Quantized:
    codes = jnp.asarray(rng.integers(0, 16, (E, OUT, IN)), jnp.uint8)
    scales, minimum = (jnp.asarray(rng.normal(size=(E, OUT, 2)), jnp.float32) for _ in range(2))
    return formats.int4(codes, scales, minimum=minimum)


WEIGHTS = {
    "array": W,
    "nf4": coded("nf4"),
    "nf4, plain scales": coded("nf4", double=False),
    "int4": coded("int4", group=32),
    "int4 with zeros": coded("int4", zero_points=True),
    "int4 with minimums": with_minimums(),
    "int8": coded("int8"),
    "mxfp4": coded("mxfp4"),
    "fp8": coded("fp8"),
    "lora": lora(W),
    "lora over nf4": lora(coded("nf4")),
    "two loras": lora(replace(lora(W), frozen=True), seed=1),
    "merged": Merged(lora(W), "float32"),
    "int8 rounded": FakeQuant(W),
    "int4 rounded, activations too": FakeQuant(lora(W), None, "int4", 16, "int8"),
    "int8 products": int8_dynamic(coded("int8")),
}


def one_by_one(x: Any, w: Any) -> Any:
    """The definition: each expert's rows through `linear`."""
    parts, start = [], 0
    for e, size in enumerate(np.asarray(SIZES)):
        own = jax.tree.map(lambda leaf, e=e: leaf[e], w)
        parts += [linear(x[start : start + size], own)] if size else []
        start += size
    return jnp.concatenate([*parts, jnp.zeros((M - start, OUT))])


@pytest.mark.parametrize("name", WEIGHTS)
def test_products_and_gradients_are_those_of_each_expert(name: str) -> None:
    w = WEIGHTS[name]
    g = jnp.asarray(rng.normal(size=(M, OUT)), jnp.float32)
    y, pull = jax.vjp(lambda x: expert_linear(x, w, SIZES), X)
    want, wanted_pull = jax.vjp(lambda x: one_by_one(x, w), X)
    np.testing.assert_allclose(y, want, atol=2e-5 * np.abs(want).max())
    np.testing.assert_allclose(pull(g)[0], wanted_pull(g)[0], atol=1e-4)
    shifted = expert_linear(X, w, jnp.roll(SIZES, 1))
    assert np.abs(shifted - want).max() > 0.1 * np.abs(want).max()


def test_gradients_of_adapters() -> None:
    def loss(f: Any, a: Any, b: Any) -> Any:
        return jnp.square(f(X, replace(WEIGHTS["lora over nf4"], a=a, b=b))).sum()

    w = WEIGHTS["lora over nf4"]
    own = jax.grad(lambda a, b: loss(lambda x, w: expert_linear(x, w, SIZES), a, b), (0, 1))
    want = jax.grad(lambda a, b: loss(one_by_one, a, b), (0, 1))(w.a, w.b)
    for x, y in zip(own(w.a, w.b), want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4 * np.abs(y).max())
    assert not want[0][1].any() and want[0][0].any()  # the second expert saw nothing


def test_dropout_is_of_the_adapters_input_alone() -> None:
    w = replace(lora(W), dropout=0.5, key=jax.random.split(jax.random.key(0), E))
    plain = expert_linear(X, W, SIZES)
    y = expert_linear(X, w, SIZES)
    assert np.abs(y - expert_linear(X, replace(w, key=None), SIZES)).max() > 0.1

    def one(seed: Any) -> Any:
        return expert_linear(X, replace(w, key=jax.random.split(jax.random.key(seed), E)), SIZES)

    mean = jax.jit(lambda seeds: jax.lax.map(one, seeds))(jnp.arange(400)).mean(0)
    want = expert_linear(X, replace(w, key=None), SIZES)
    assert np.abs(mean - want).max() < 0.2 * np.abs(want - plain).max()


def test_observed_rows_are_those_of_each_expert() -> None:
    def observe(first: int, count: int) -> Moments:
        refs = jax.tree.map(jax.new_ref, no_moments(IN, count))
        expert_linear(X, ObservedExperts(W, refs, jnp.int32(first)), SIZES)
        return jax.tree.map(jax.freeze, refs)

    whole, part = jax.jit(observe, static_argnums=(0, 1))(0, E), observe(2, 2)
    ends = np.cumsum(SIZES)
    for e in range(E):
        x = np.asarray(X[ends[e] - SIZES[e] : ends[e]], np.float64)
        np.testing.assert_allclose(whole.hessian[e], 2 * x.T @ x, atol=1e-4)
        np.testing.assert_allclose(whole.magnitude[e], np.abs(x).sum(0), atol=1e-4)
    assert whole.count.tolist() == SIZES.tolist()
    for a, b in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b[2:], atol=1e-4)


# --- in a model ----------------------------------------------------------------------------------


def make() -> tuple[Any, Any]:
    model, _ = abstract(FIELDS)
    return model, init(model.arch, jax.random.key(0))


TOKENS = jnp.asarray(rng.integers(0, 64, (8, 12)), jnp.int32)


def trained(w: Any) -> Any:
    """An adapter as training leaves it: b is not zero."""
    if not isinstance(w, Lora):
        return w
    return replace(w, b=0.2 * jax.random.normal(jax.random.key(w.b.size), w.b.shape))


def adapted(params: Any, **options: Any) -> Any:
    params = add_lora(params, rank=4, alpha=8, key=jax.random.key(1), **options)
    return jax.tree.map(trained, params, is_leaf=is_weight)


def test_all_linears_are_with_the_experts() -> None:
    model, params = make()
    leaf = adapted(params)["layers"][0][0]["mlp"]["experts"]["up_proj"]["weight"]
    assert leaf.a.shape == (2, 4, 4, 64) and leaf.scale.shape == (2, 4)
    one = add_lora(params, targets=r".*\.1\.mlp\.experts\.\d+\.up_proj", key=jax.random.key(0))
    loras = [w for w in jax.tree.leaves(one, is_leaf=is_weight) if isinstance(w, Lora)]
    assert [w.a.shape[:2] for w in loras] == [(1, 4)]
    with pytest.raises(UserError, match=r"experts\.3\.up_proj.*all experts of a layer"):
        add_lora(params, targets="mlp.experts.3.up_proj", key=jax.random.key(0))
    with pytest.raises(UserError, match="DoRA of experts"):
        add_lora(params, dora=True, key=jax.random.key(0))
    add_lora(params, dora=True, targets=["q_proj"], key=jax.random.key(0))


SLOW = pytest.mark.slow
KINDS = [pytest.param(k, marks=SLOW) for k in ("plain", "merged view", "dropout")]


@pytest.mark.parametrize("kind", [*KINDS, "lora over nf4"])
def test_eight_devices_give_the_logits_and_gradients_of_one(kind: str) -> None:
    model, params = make()
    params = quantize(params, "nf4") if "nf4" in kind else params
    params = adapted(params, dropout=0.5 if kind == "dropout" else 0.0)
    if kind == "plain":
        params = merge_lora(params)
    if kind == "merged view":
        params = merged_view(params, "float32")
    embed = params["embed"]

    def loss(embed: Any, params: Any) -> Any:
        params = {**params, "embed": embed}
        if kind == "dropout":
            params = with_dropout(params, jax.random.key(0))
        hidden, _, aux = model.forward(params, Inputs(TOKENS, segment_ids=jnp.sign(TOKENS)))
        return jnp.square(hidden).mean() + aux["load_balance"][0] / aux["load_balance"][1]

    run = jax.jit(jax.value_and_grad(loss))
    want, wanted = run(embed, params)
    mesh = make_mesh("data=2,fsdp=4")
    with jax.set_mesh(mesh):
        split = params
        if kind != "merged view":
            split = jax.device_put(params, shardings(mesh, axes(model.arch), params))
        value, gradient = run(split["embed"], split)
    if kind == "dropout":  # devices have masks of their own
        assert np.isfinite(value) and abs(value - want) < 0.1 * want
        return
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(gradient, wanted, atol=1e-5 * np.abs(wanted).max())


def test_codes_are_read_from_their_stack_under_a_cache() -> None:
    model, params = make()
    params = adapted(quantize(params, "nf4"))
    want, *_ = jax.jit(model.forward)(params, Inputs(TOKENS))
    positions = jnp.broadcast_to(jnp.arange(12), TOKENS.shape)
    cache = make_cache(model.arch, 8, 12, jnp.float32)
    got, *_ = jax.jit(model.forward)(params, Inputs(TOKENS, positions), cache)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_fp8_leaves_experts_as_they_are(caplog: Any) -> None:
    model, params = make()
    block = fp8(params, emulated=True)["layers"][0][0]
    assert isinstance(block["self_attn"]["q_proj"]["weight"], Fp8)
    assert not is_weight(block["mlp"]["experts"]["up_proj"]["weight"])
    assert caplog.text.count("experts' products stay") == 1


@pytest.mark.parametrize("activations", [pytest.param("none", marks=SLOW), "int8"])
def test_rounded_experts_ship_as_they_trained(activations: str) -> None:
    model, params = make()
    rounded = fake_quant(params, "int8", activations=activations, targets=["up_proj", "down_proj"])
    shipped = finish_fake_quant(rounded)
    leaf = shipped["layers"][0][0]["mlp"]["experts"]["up_proj"]["weight"]
    assert base_of(leaf).codes.shape == (2, 4, 64, 64)
    a, b, plain = (np.asarray(model(p, TOKENS)) for p in (rounded, shipped, params))
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())
    assert np.abs(a - plain).max() > 1e-3 * np.abs(a).max()


def test_float_copies_are_of_one_expert() -> None:
    """The encoder holds float32 of one matrix, not of the stack."""
    encode = jax.jit(lambda w: quantizer(Scheme("nf4"))("layers/0/0/mlp/up_proj/weight", w))
    sizes = {}
    for experts in (4, 64):
        stack = jax.ShapeDtypeStruct((2, experts, 256, 256), jnp.float32)
        sizes[experts] = encode.lower(stack).compile().memory_analysis().temp_size_in_bytes
    # The 16 distances of each number, on CPU.
    assert sizes[64] < sizes[4] + 2**20 < 18 * 256 * 256 * 4 + 2**20


def test_frozen_adapters_do_not_train() -> None:
    model, params = make()
    twice = adapted(freeze_lora(adapted(params)))
    leaf = twice["layers"][0][0]["mlp"]["experts"]["up_proj"]["weight"]
    assert leaf.base.frozen and not leaf.frozen
    merged = merge_lora(twice)
    a, b = (np.asarray(model(p, TOKENS)) for p in (twice, merged))
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())


def test_experts_are_encoded_as_they_are_read(tmp_path: Path) -> None:
    model, params = make()
    save_hf(model, params, tmp_path, dtype="float32")
    _, read = load(tmp_path, dtype="float32", on_leaf=quantizer(Scheme("nf4")))
    coded = quantize(params, "nf4")
    assert jax.tree.structure(read) == jax.tree.structure(coded)
    for x, y in zip(jax.tree.leaves(read), jax.tree.leaves(coded), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.5, marks=SLOW)])
def test_tiles_of_tokens(dropout: float) -> None:
    model, params = make()
    params = with_dropout(adapted(params, dropout=dropout), jax.random.key(0))
    whole = np.asarray(model(params, TOKENS))
    tiled = np.asarray(replace(model, tile=20)(params, TOKENS))
    same = np.abs(tiled - whole).max() < 1e-4 * np.abs(whole).max()
    assert np.isfinite(tiled).all() and same == (dropout == 0)
