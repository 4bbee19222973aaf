"""LoRA transforms: which modules a target means, and what adding, dropping and merging do."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.errors import UserError
from mud_puppy.weights import (
    Lora,
    add_lora,
    is_weight,
    linear,
    lora,
    match_targets,
    merge_lora,
    module_names,
    partition,
    strip_lora,
    with_dropout,
)
from mud_puppy.weights.linear import embed, linears

KEY = jax.random.key(0)


def make_params(layers: int = 4, pattern: int = 1, head: bool = True) -> Any:
    """A small tree with stacked random leaves: one group of `pattern` blocks."""
    random = np.random.default_rng(7)

    def leaf(*shape: int) -> Any:
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    def block(n: int) -> Any:
        attention = {name: {"weight": leaf(n, 8, 8)} for name in ("q_proj", "o_proj")}
        mlp = {"up_proj": {"weight": leaf(n, 12, 8), "bias": leaf(n, 12)}}
        return {"attn_norm": leaf(n, 8), "self_attn": attention, "mlp": mlp}

    params = {
        "embed": leaf(16, 8),
        "final_norm": leaf(8),
        "layers": [[block(layers // pattern) for _ in range(pattern)]],
    }
    return params | ({"head": leaf(16, 8)} if head else {})


def adapted(params: Any) -> dict[tuple[int, int], list[str]]:
    """{(group, block): names of the modules with an adapter}"""
    return {
        (g, j): [
            name
            for part in ("self_attn", "mlp")
            for name, module in block[part].items()
            if isinstance(module["weight"], Lora)
        ]
        for g, group in enumerate(params["layers"])
        for j, block in enumerate(group)
    }


def test_names_are_those_of_hf() -> None:
    names = module_names(make_params(4, pattern=2))
    assert names[:2] == ["model.embed_tokens", "lm_head"]
    assert len(names) == 2 + 4 * 3
    assert {f"model.layers.{i}.mlp.up_proj" for i in range(4)} <= set(names)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 12),
        ("q_proj", 4),
        (["q_proj", "up_proj"], 8),
        ("self_attn.q_proj", 4),
        ("layers.1.self_attn.q_proj", 1),
        (r"model\.layers\.[0-2]\..*_proj", 9),
        ([r".*\.3\.mlp\.up_proj", "o_proj"], 5),
        (["lm_head", "embed_tokens"], 2),
    ],
)
def test_targets_mean_exactly_these(targets: Any, count: int) -> None:
    assert len(match_targets(module_names(make_params()), targets)) == count


def test_all_linear_leaves_embedding_and_head_alone() -> None:
    params = add_lora(make_params(), rank=2, key=KEY)
    assert not isinstance(params["embed"], Lora) and not isinstance(params["head"], Lora)
    assert adapted(params) == {(0, 0): ["q_proj", "o_proj", "up_proj"]}


def test_a_target_in_some_layers_splits_the_group() -> None:
    params = make_params()
    split = add_lora(params, rank=2, targets=r".*\.[12]\.self_attn\.q_proj", key=KEY)
    assert adapted(split) == {(0, 0): [], (1, 0): ["q_proj"], (2, 0): []}
    sizes = [group[0]["attn_norm"].shape[0] for group in split["layers"]]
    assert sizes == [1, 2, 1]
    assert sorted(module_names(split)) == sorted(module_names(params))
    joined = np.concatenate([group[0]["attn_norm"] for group in split["layers"]])
    assert np.array_equal(joined, params["layers"][0][0]["attn_norm"])


def test_a_target_in_one_block_of_a_pattern_splits_nothing() -> None:
    params = add_lora(make_params(4, 2), rank=2, targets=r".*\.[13]\.mlp\.up_proj", key=KEY)
    assert adapted(params) == {(0, 0): [], (0, 1): ["up_proj"]}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_porj", r"'q_porj' matches no module\. Did you mean 'q_proj'\?"),
        (["q_proj", "layers.9.mlp.up_proj"], r"'layers\.9\.mlp\.up_proj' matches no module"),
        ("*_proj", "no regular expression"),
    ],
)
def test_unknown_targets_are_refused(targets: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_lora(make_params(), targets=targets, key=KEY)


def test_tied_heads_are_refused_by_name() -> None:
    params = make_params(head=False)
    with pytest.raises(UserError, match=r"'lm_head'.*tied"):
        add_lora(params, targets="lm_head", key=KEY)
    with pytest.raises(UserError, match=r"'embed_tokens'.*tied"):
        add_lora(params, targets="embed_tokens", key=KEY)
    with pytest.raises(UserError, match="rank must be at least 1"):
        add_lora(params, rank=0, key=KEY)


def test_a_fresh_adapter_is_pefts() -> None:
    q = add_lora(make_params(), rank=4, alpha=8, key=KEY)["layers"][0][0]["self_attn"]["q_proj"]
    w = q["weight"]
    assert w.a.shape == (4, 4, 8) and w.b.shape == (4, 8, 4)
    assert not w.b.any() and np.abs(w.a).max() <= 8**-0.5 and np.abs(w.a).max() > 0.8 * 8**-0.5
    assert np.array_equal(w.scale, [2.0] * 4)
    again = add_lora(make_params(), rank=4, targets=["up_proj", "q_proj"], key=KEY)
    same = again["layers"][0][0]["self_attn"]["q_proj"]["weight"]
    assert np.array_equal(same.a, w.a)  # whatever else is a target
    rs = add_lora(make_params(), rank=4, alpha=8, rslora=True, key=KEY)
    assert np.array_equal(rs["layers"][0][0]["mlp"]["up_proj"]["weight"].scale, [4.0] * 4)


def filled(w: Any) -> Any:
    """An adapter whose b is not zero and whose magnitude is not the norm."""
    if not isinstance(w, Lora):
        return w
    magnitude = None if w.magnitude is None else w.magnitude * 1.5
    b = jax.random.normal(jax.random.key(3), w.b.shape)
    return dataclasses.replace(w, b=b, magnitude=magnitude)


def fill(params: Any) -> Any:
    return jax.tree.map(filled, params, is_leaf=is_weight)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_weights_do_what_the_adapter_does(dora: bool) -> None:
    params = fill(add_lora(make_params(), rank=2, dora=dora, key=KEY))
    w = jax.tree.map(lambda x: x[1], params["layers"][0][0]["mlp"]["up_proj"]["weight"])
    m = merge_lora(params)["layers"][0][0]["mlp"]["up_proj"]["weight"]
    assert m.shape == (4, 12, 8)
    x = jax.random.normal(KEY, (5, 8))
    by_hand = w.base + w.scale * w.b @ w.a
    if dora:
        by_hand *= (w.magnitude / jnp.linalg.norm(by_hand, axis=1))[:, None]
    assert np.allclose(m[1], by_hand, atol=1e-5)
    assert np.allclose(linear(x, w), x @ by_hand.T, atol=1e-4)
    assert not np.allclose(linear(x, w), x @ w.base.T, atol=1e-1)


def test_an_embedding_adapter_adds_to_its_rows() -> None:
    w = fill(add_lora(make_params(), rank=2, targets="embed_tokens", key=KEY))["embed"]
    tokens = jnp.array([[3, 0, 15]])
    by_hand = (w.base + w.scale * w.b @ w.a)[tokens]
    assert np.allclose(embed(w, tokens), by_hand, atol=1e-5)
    assert not np.allclose(embed(w, tokens), w.base[tokens], atol=1e-2)


def test_modules_computed_together_are_those_apart() -> None:
    block = fill(add_lora(make_params(), rank=2, key=KEY))["layers"][0][0]
    ws = [block["self_attn"]["q_proj"]["weight"], block["mlp"]["up_proj"]["weight"]]
    ws = jax.tree.map(lambda x: x[0], ws)
    x = jax.random.normal(KEY, (2, 3, 8))
    for together, w in zip(linears(x, ws), ws, strict=True):
        assert np.allclose(together, linear(x, w), atol=1e-4)
    first, second = linears(x, ws)
    assert not np.allclose(first[..., :8], second[..., :8], atol=1e-2)


def test_stripping_and_merging_back() -> None:
    params = make_params()
    once = add_lora(params, rank=2, key=KEY)
    twice = add_lora(once, rank=3, targets="q_proj", key=KEY)
    base = strip_lora(once)
    assert all(a is b for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(params), strict=True))
    assert isinstance(strip_lora(twice)["layers"][0][0]["self_attn"]["q_proj"]["weight"], Lora)
    w = merge_lora(fill(twice))["layers"][0][0]["self_attn"]["q_proj"]["weight"]
    inner = fill(twice)["layers"][0][0]["self_attn"]["q_proj"]["weight"]
    by_hand = (
        params["layers"][0][0]["self_attn"]["q_proj"]["weight"]
        + jnp.einsum("nor,nri->noi", inner.base.b, inner.base.a) * 16
        + jnp.einsum("nor,nri->noi", inner.b, inner.a) * 32 / 3
    )
    # fill reaches only the outer adapter; the inner one's b is zero.
    assert not inner.base.b.any()
    assert np.allclose(w, by_hand, atol=1e-4)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert merge_lora(add_lora(half, rank=2, key=KEY))["embed"].dtype == jnp.bfloat16


def test_only_the_outer_adapter_trains() -> None:
    params = add_lora(make_params(), rank=2, key=KEY)
    params = add_lora(params, rank=3, targets="q_proj", dora=True, key=KEY)
    train, frozen = partition(params)
    q = train["layers"][0][0]["self_attn"]["q_proj"]["weight"]
    assert q.a.shape[1] == 3 and q.magnitude is not None and q.scale is None
    assert jax.tree.leaves(q.base) == []
    up = train["layers"][0][0]["mlp"]["up_proj"]
    assert up["weight"].a.shape[1] == 2 and up["bias"] is None
    kept = frozen["layers"][0][0]["self_attn"]["q_proj"]["weight"]
    assert kept.a is None and isinstance(kept.base, Lora) and kept.base.a is not None


def test_dropout_keeps_the_mean_and_only_touches_the_adapter() -> None:
    params = fill(add_lora(make_params(1), rank=2, dropout=0.25, key=KEY))
    x = jax.random.normal(KEY, (3, 8))
    off = jax.tree.map(lambda x: x[0], params["layers"][0][0]["mlp"]["up_proj"]["weight"])

    @jax.jit
    def run(seed: Any) -> Any:
        keyed = with_dropout(params, jax.random.key(seed))
        w = keyed["layers"][0][0]["mlp"]["up_proj"]["weight"]
        return linear(x, jax.tree.map(lambda x: x[0], w))

    samples = jax.vmap(run)(jnp.arange(8000))
    adapter = linear(x, off) - x @ off.base.T
    deviation = samples.std(0) / np.sqrt(len(samples))
    assert np.abs(samples.mean(0) - x @ off.base.T - adapter).max() <= 6 * deviation.max()
    assert not np.array_equal(samples[0], samples[1])
    assert np.array_equal(run(5), run(5))
    # Eight inputs, each dropped or scaled: some sample keeps them all.
    assert samples.std(0).min() > 0.01
    none = with_dropout(with_dropout(params, KEY), None)
    assert jax.tree.structure(none) == jax.tree.structure(params)


def test_every_layer_and_weight_has_its_own_dropout() -> None:
    params = with_dropout(add_lora(make_params(), rank=2, dropout=0.5, key=KEY), KEY)
    ws = [w for w in jax.tree.leaves(params, is_leaf=is_weight) if isinstance(w, Lora)]
    keys = np.concatenate([jax.random.key_data(w.key).reshape(-1, 2) for w in ws])
    assert len(np.unique(keys, axis=0)) == 4 * 3


def test_dora_on_an_embedding_is_refused() -> None:
    with pytest.raises(UserError, match="DoRA is not defined for embeddings"):
        add_lora(make_params(), targets="embed_tokens", dora=True, key=KEY)


def test_magnitudes_are_made_without_a_float32_copy() -> None:
    w = jax.ShapeDtypeStruct((4, 256, 256), jnp.bfloat16)
    plan = lora._row_norms.lower(w).compile().memory_analysis()
    assert plan is not None and plan.temp_size_in_bytes < 4 * 256 * 256


def test_targets_may_be_what_the_family_or_peft_calls_them() -> None:
    names = [f"model.layers.{i}.attn.{m}" for i in range(2) for m in ("c_attn", "c_proj")]
    experts = [f"model.layers.0.mlp.experts.{e}.gate_proj" for e in range(3)]
    top = ["model.embed_tokens", "lm_head"]

    def chosen(*targets: str) -> list[str]:
        return sorted(match_targets([*top, *names, *experts], list(targets)))

    assert chosen("transformer.h.1.attn.c_attn") == ["model.layers.1.attn.c_attn"]
    assert chosen("gpt_neox.layers.0.attn.c_proj") == ["model.layers.0.attn.c_proj"]
    assert chosen("wte", "embed_out") == sorted(top)
    assert chosen("mlp.experts.gate_proj") == experts
    with pytest.raises(UserError, match="matches no module"):
        chosen("transformer.h.2.attn.c_attn")
