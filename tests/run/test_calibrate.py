"""GPTQ of a tiny model: against a plain walk through it that looks at every input, and resuming."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized, dequantize, matmul
from mud_puppy.model import Inputs, axes
from mud_puppy.model.names import flatten, unflatten
from mud_puppy.parallel import make_mesh, shardings
from mud_puppy.run import calibrate, gptq_block
from mud_puppy.run.calibrate import GptqOptions, quantize_gptq
from mud_puppy.weights import add_lora, is_weight
from mud_puppy.weights.gptq import gptq, round_to_nearest, to_quantized
from mud_puppy.weights.quantize import is_rounded
from tests.model.family_cases import CASES
from tests.model.family_models import ours as family
from tests.tiny import tiny_model

FIELDS = {
    "intermediate_size": 32,  # so that few programs are compiled
    "max_position_embeddings": 64,
}
MODELS = {
    "llama": {"model_type": "llama", "num_hidden_layers": 2},
    # Biases, and two kinds of layers by turns.
    "qwen2": {
        "model_type": "qwen2",
        "num_hidden_layers": 4,
        "intermediate_size": 48,
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "qwen3": {"model_type": "qwen3", "num_hidden_layers": 2, "head_dim": 8},
}
ORDER = (
    ("self_attn", "q_proj k_proj v_proj"),
    ("self_attn", "o_proj"),
    ("mlp", "gate_proj up_proj"),
    ("mlp", "down_proj"),
)
OPTIONS = GptqOptions(group=16, act_order=False, clip=False)


def make(name: str):
    model, params = tiny_model(**FIELDS | MODELS[name])
    rng = np.random.default_rng(1)
    noise = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.1, x.dtype)  # noqa: E731
    # Norms that are not one and biases that are not zero.
    return model, jax.tree.map(lambda x: x + noise(x) if x.ndim < 3 else x, params)


@pytest.fixture(scope="module")
def llama():
    return make("llama")


@pytest.fixture
def batches(random_batch):
    return [random_batch(seed, 1, 4) for seed in range(2)]


def codes_of(params):
    leaves = jax.tree.leaves(params["layers"], is_leaf=is_weight)
    return [leaf for leaf in leaves if isinstance(leaf, Quantized)]


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Spy:
    base: Any


SEEN: list = []


@matmul.register(Spy)
def _(w: Spy, x):
    SEEN.append(np.asarray(x, np.float64))
    return matmul(x, w.base)


def inputs_of(model, params, blocks, layer, path, batches):
    """Every input [n, in] that is not padding, of one linear, by running the whole model."""
    part, name = path
    module = blocks[layer][part][name]
    spied = {**module, "weight": Spy(module["weight"])}
    blocks = list(blocks)
    blocks[layer] = {**blocks[layer], part: {**blocks[layer][part], name: spied}}

    def one_by_one(layers, group, x, cache, start):
        for at in range(0, layer + 1, len(group)):
            x, cache, routed = layers(blocks[at : at + len(group)], x, cache, jnp.int32(at))
        return x, cache, routed

    out = []
    for batch in batches:
        given = [jnp.asarray(batch[k][0]) for k in ("tokens", "positions", "segment_ids")]
        SEEN.clear()
        model.forward(params, Inputs(*given), run_layers=one_by_one)
        (x,) = SEEN
        out.append(x[np.asarray(given[2]) > 0])
    return np.concatenate(out)


def by_hand(model, params, batches, options):
    """{(layer, name): decoded weight}"""
    (group,) = params["layers"]
    n = len(group[0]["attn_norm"])
    blocks = [
        jax.tree.map(lambda x, r=r: jnp.asarray(np.asarray(x)[r]), block)
        for r in range(n)
        for block in group
    ]
    found = {}
    for layer, block in enumerate(blocks):
        for part, names in ORDER:
            x = inputs_of(model, params, blocks, layer, (part, names.split()[0]), batches)
            h = jnp.asarray(x.T @ x, jnp.float32)
            modules = [block[part][name] for name in names.split()]
            own = gptq(
                jnp.concatenate([m["weight"] for m in modules]),
                h,
                act_order=options.act_order,
                **options.grid,
            )
            values = np.asarray(dequantize(to_quantized(*own, options.bits, jnp.float32)))
            ends = np.cumsum([len(m["weight"]) for m in modules])
            parts = np.split(values, ends[:-1])
            for name, module, part_values in zip(names.split(), modules, parts, strict=True):
                module["weight"] = found[layer, name] = jnp.asarray(part_values)
    return found


BY_HAND: dict = {}  # of a model's name and options: it takes seconds


def shares(name, batches, options):
    """Of each linear, the share of codes that are those of `by_hand`."""
    model, params = make(name)
    if (name, options) not in BY_HAND:
        BY_HAND[name, options] = by_hand(model, params, batches, options)
    (group,) = quantize_gptq(model, params, batches, options)["layers"]
    out = {}
    for (layer, linear), want in BY_HAND[name, options].items():
        r, j = divmod(layer, len(group))
        part = next(part for part, names in ORDER if linear in names)
        # Decoded values compare codes and scales at once.
        got = np.asarray(dequantize(group[j][part][linear]["weight"]))[r]
        out[layer, linear] = float((np.abs(got - want) < 1e-3 * np.abs(want).max()).mean())
    return out


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", OPTIONS),
        ("qwen2", replace(OPTIONS, bits=3, symmetric=False)),
        ("qwen3", replace(OPTIONS, bits=8, act_order=True)),
    ],
)
def test_codes_are_those_of_a_walk_through_the_model(name, options, batches):
    found = shares(name, batches, options)
    assert len(found) == 7 * MODELS[name]["num_hidden_layers"]
    # float32 sums in another order move a code now and then, and what follows it.
    assert min(found.values()) > 0.97, found


@pytest.mark.parametrize("fault", ["padding", "parallel"])
def test_the_comparison_fails_when_the_walk_is_another(fault, batches, monkeypatch):
    if fault == "padding":
        monkeypatch.setattr(gptq_block, "mask_of", lambda x: None)
    else:  # each group observed before the others are in codes
        whole = calibrate.quantize_block

        def parallel(arch, run, source, *rest):
            return whole(arch, lambda block, *x: run(source, *x), source, *rest)

        monkeypatch.setattr(calibrate, "quantize_block", parallel)
    gptq_block.run_or_observe.clear_cache()
    found = shares("llama", batches, OPTIONS)
    gptq_block.run_or_observe.clear_cache()
    assert min(found.values()) < 0.9


def logits(model, params, batches):
    b = {k: jnp.concatenate([batch[k][0] for batch in batches]) for k in batches[0]}
    out = model(params, b["tokens"], b["positions"], b["segment_ids"])
    return np.asarray(out)[np.asarray(b["segment_ids"]) > 0]


def rounded(params, options):
    def change(w):
        if w.ndim < 3:
            return w
        return jnp.stack([
            dequantize(to_quantized(*round_to_nearest(x, **options.grid), options.bits, x.dtype))
            for x in w
        ])  # fmt: skip

    return {**params, "layers": jax.tree.map(change, params["layers"])}


def error(a, b):
    return float(np.square(a - b).mean() / np.square(b).mean())


def test_logits_err_less_than_by_rounding(llama, batches):
    model, params = llama
    want = logits(model, params, batches)
    done = quantize_gptq(model, params, batches, OPTIONS)
    own = error(logits(model, done, batches), want)
    plain = error(logits(model, rounded(params, OPTIONS), batches), want)
    assert own < 0.9 * plain
    leaves = codes_of(done)
    assert len(leaves) == 7 and {leaf.format for leaf in leaves} == {"int4"}
    assert all(leaf.codes.shape[0] == 2 and leaf.group == 16 for leaf in leaves)
    for name in ("embed", "final_norm", "head"):
        assert done[name] is params[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_model_that_is_split_over_devices_gives_the_same_codes(name, batches):
    fields = {"moe_intermediate_size": 32, "num_hidden_layers": 2}
    model, params = make(name) if name == "llama" else family(name, **fields)
    mesh = make_mesh("data=2,fsdp=4")
    whole = quantize_gptq(model, params, batches, OPTIONS)
    with jax.set_mesh(mesh):
        split = jax.device_put(params, shardings(mesh, axes(model.arch), params))
        done = quantize_gptq(model, split, batches, OPTIONS)
    assert not done["embed"].sharding.is_fully_replicated
    for a, b in zip(codes_of(done), codes_of(whole), strict=True):
        # Sums in another order move a code now and then.
        assert (np.asarray(a.codes) == np.asarray(b.codes)).mean() > 0.97


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("float32", OPTIONS), ("bfloat16", replace(OPTIONS, awq=True, symmetric=False))],
)
def test_a_killed_pass_goes_on_where_it_was(dtype, options, llama, batches, tmp_path):
    model, params = llama
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    whole = quantize_gptq(model, params, batches, options)
    # Norms that AWQ divided have the dtype that they had.
    assert {leaf.dtype for leaf in jax.tree.leaves(whole, is_leaf=is_weight)} == {jnp.dtype(dtype)}
    assert error(logits(model, whole, batches), logits(model, params, batches)) < 0.15
    seen = []

    def kill(done, total):
        seen.append((done, total))
        if done == 1:
            raise Killed

    with pytest.raises(Killed):
        quantize_gptq(model, params, batches, options, folder=tmp_path, progress=kill)
    assert seen == [(1, 2)]
    first = (tmp_path / "layer-00000.safetensors").stat().st_mtime_ns
    (tmp_path / "layer-00001.tmp").write_bytes(b"torn")
    again = quantize_gptq(model, params, batches, options, folder=tmp_path)
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    assert_same(again, whole)
    assert (tmp_path / "layer-00000.safetensors").stat().st_mtime_ns == first
    # All is done: nothing is run any more.
    third = quantize_gptq(model, params, batches, options, folder=tmp_path)
    assert_same(third, whole)
    for changed, word in [
        (replace(options, bits=3), "options"),
        (replace(options, damp=0.1), "opt"),
    ]:
        with pytest.raises(UserError, match=f"of other .*: {word}"):
            quantize_gptq(model, params, batches, changed, folder=tmp_path)
    with pytest.raises(UserError, match=r"of other .*: data"):
        quantize_gptq(model, params, batches[:1], options, folder=tmp_path)
    other = jax.tree.map(lambda x: x * 2, params)
    with pytest.raises(UserError, match="other weights"):
        quantize_gptq(model, other, batches, options, folder=tmp_path)
    (tmp_path / "layer-00001.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"layer-00001.*cannot be read"):
        quantize_gptq(model, params, batches, options, folder=tmp_path)


def test_what_padding_holds_does_not_matter(llama, batches):
    model, params = llama
    other = [dict(batch) for batch in batches]
    for batch in other:
        batch["tokens"] = np.where(batch["segment_ids"] > 0, batch["tokens"], 7)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(batches, other, strict=True))
    assert_same(*(quantize_gptq(model, params, b, OPTIONS) for b in (batches, other)))


def test_bad_calls(llama, batches):
    model, params = llama
    with pytest.raises(UserError, match=r"layers.0.*_proj: rows of 32 are no mul.* group of 64"):
        quantize_gptq(model, params, batches, GptqOptions())
    lora = add_lora(params, rank=2, key=jax.random.key(0))
    with pytest.raises(UserError, match=r"_proj is a Lora, not a plain weight: merge"):
        quantize_gptq(model, lora, batches, OPTIONS)
    empty = [{"tokens": np.zeros((1, 8), np.int32), "segment_ids": np.zeros((1, 8), np.int32)}]
    for none in ([], empty):
        with pytest.raises(UserError, match="has no tokens"):
            quantize_gptq(model, params, none, OPTIONS)
    broken = jax.tree.map(lambda x: x, params)
    broken["layers"][0][0]["mlp_norm"] = broken["layers"][0][0]["mlp_norm"].at[1].set(jnp.inf)
    with pytest.raises(UserError, match=r"layers.1.mlp.gate_proj.*not finite"):
        quantize_gptq(model, broken, batches, OPTIONS)


# --- every family, and experts -------------------------------------------------------------------

FAST = (("gpt2", True),)
EACH = [
    (case, awq) if (case, awq) in FAST else pytest.param(case, awq, marks=pytest.mark.slow)
    for case in CASES
    for awq in (False, True)
]


@pytest.mark.parametrize(("case", "awq"), EACH)
def test_every_family(case, awq, batches):
    model, params = family(case)
    options = replace(OPTIONS, group=2 if "deepseek" in case else 4, bits=4, awq=awq)
    done = quantize_gptq(model, params, batches, options)
    want = logits(model, params, batches)
    own = error(logits(model, done, batches), want)
    plain = error(logits(model, quantize_plain(params, options), batches), want)
    assert own < plain, (own, plain)
    for path, leaf in flatten(done).items():
        assert isinstance(leaf, Quantized) == is_rounded(path)


def quantize_plain(params, options):
    def change(path, w):
        if not is_rounded(path):
            return w
        flat = w.reshape(-1, *w.shape[-2:])
        own = [
            dequantize(to_quantized(*round_to_nearest(x, **options.grid), options.bits, x.dtype))
            for x in flat
        ]
        return jnp.stack(own).reshape(w.shape)

    return unflatten(params, {path: change(path, w) for path, w in flatten(params).items()})


def given_to(model, params, batches, expert):
    """Rows that an expert of the one layer was given, and what a shared one reads beside it."""
    (block,) = params["layers"][0]
    shared = block["mlp"]["shared_expert"]["gate_proj"]
    spied = {**shared, "weight": Spy(shared["weight"])}
    mlp = {**block["mlp"], "shared_expert": {**block["mlp"]["shared_expert"], "gate_proj": spied}}
    one = jax.tree.map(lambda x: x[0], {**block, "mlp": mlp})
    rows = []
    for batch in batches:
        given = [jnp.asarray(batch[k][0]) for k in ("tokens", "positions", "segment_ids")]
        SEEN.clear()
        model.forward(
            params, Inputs(*given), run_layers=lambda f, _, x, c, at: f([one], x, c, jnp.int32(at))
        )
        rows.append(SEEN[0][np.asarray(given[2]) > 0])
    x = np.concatenate(rows)
    best = np.argsort(-(x @ np.asarray(block["mlp"]["router"][0], np.float64).T), axis=1)
    return x[(best[:, : model.arch.experts.per_token] == expert).any(1)]


def test_an_expert_is_rounded_for_its_own_rows(batches, monkeypatch):
    monkeypatch.setattr(gptq_block, "_HESSIAN_BYTES", 4 * 32 * 32 * 2)  # two experts at a time
    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    model, params = family("qwen2_moe", num_hidden_layers=1, mlp_only_layers=[], **sizes)
    done = quantize_gptq(model, params, batches, OPTIONS)
    experts, floats = (p["layers"][0][0]["mlp"]["experts"] for p in (done, params))
    names = ("gate_proj", "up_proj")
    rows = [given_to(model, done, batches, e) for e in range(6)]

    def same(e, x):
        w = jnp.concatenate([floats[name]["weight"][0, e] for name in names])
        own = gptq(w, jnp.asarray(x.T @ x, jnp.float32), act_order=False, **OPTIONS.grid)
        want = np.asarray(dequantize(to_quantized(*own, OPTIONS.bits, jnp.float32)))
        got = np.concatenate([np.asarray(dequantize(experts[n]["weight"]))[0, e] for n in names])
        return (np.abs(got - want) < 1e-3 * np.abs(want).max()).mean()

    for e in (0, 3):
        assert len(rows[e]) > 20
        assert same(e, rows[e]) > 0.97
        assert same(e, np.concatenate(rows)) < 0.97  # those of all experts are others


def test_an_expert_without_rows_is_rounded_to_nearest(batches, caplog):
    model, params = family("qwen3_moe", num_hidden_layers=1, moe_intermediate_size=32)
    block = params["layers"][0][0]
    # No token prefers the second expert to the others.
    block["mlp"]["router_bias"] = jnp.zeros((1, 6)).at[0, 1].set(-1e6)
    with caplog.at_level("INFO", logger="mud_puppy"):
        done = quantize_gptq(model, params, batches, OPTIONS)
    assert "2 weights of experts that no calibration token was given to" in caplog.text
    w = block["mlp"]["experts"]["up_proj"]["weight"][0, 1]
    nearest = to_quantized(*round_to_nearest(w, **OPTIONS.grid), OPTIONS.bits, w.dtype)
    got = done["layers"][0][0]["mlp"]["experts"]["up_proj"]["weight"]
    np.testing.assert_array_equal(dequantize(got)[0, 1], dequantize(nearest))
