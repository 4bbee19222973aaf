"""Fake quantization: torch's values and gradients, exact codes at the end, adapters, partition."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized, dequantize, quantize
from mud_puppy.parallel import make_mesh, shardings
from mud_puppy.weights import (
    FakeQuant,
    Int8Dynamic,
    Lora,
    add_lora,
    base_of,
    combine,
    dense,
    fake_quant,
    finish_fake_quant,
    is_weight,
    linear,
    linears,
    merge_lora,
    partition,
    strip_fake_quant,
    strip_lora,
    with_dropout,
)
from mud_puppy.weights.tree import at_repeat

OUT, IN, T = 24, 64, 10
KINDS = [("int8", None), ("int4", 32)]
kinds = pytest.mark.parametrize(("format", "group"), KINDS)
jit_dense = jax.jit(dense)
ranged = pytest.mark.parametrize("ranges", ["dynamic", "learned"])


def array(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def leaf(w: Any, format: str, group: int | None, ranges: str, acts: str = "none") -> FakeQuant:
    """A leaf as training leaves it: learned ranges clip some weights, and one group is all zero."""
    *lead, out, size = base_of(w).shape
    spans = array(7, *lead, out, size // (group or size))
    learned = 1.2 + 0.3 * spans if ranges == "learned" else None
    return FakeQuant(w, learned, format, group, acts)


def params(n: int = 2) -> Any:
    block = {
        "attn_norm": jnp.ones((n, IN)),
        "mlp": {"up_proj": {"weight": array(1, n, OUT, IN), "bias": jnp.ones((n, OUT))}},
        "self_attn": {"q_proj": {"weight": array(2, n, OUT, IN)}},
    }
    return {"embed": array(3, 8, IN), "final_norm": jnp.ones(IN), "layers": [[block]]}


def trained(params: Any) -> Any:
    """Adapters with a b that is not zero."""

    def change(w: Any) -> Any:
        return replace(w, b=0.3 * array(5, *w.b.shape)) if isinstance(w, Lora) else w

    return jax.tree.map(change, params, is_leaf=is_weight)


# --- values --------------------------------------------------------------------------------------


@kinds
def test_an_untrained_weight_is_rounded_as_quantize_does(format: str, group: int | None) -> None:
    w = array(0, 3, OUT, IN)
    want = quantize(w, format, group=group or IN)
    fake = leaf(w, format, group, "dynamic")
    np.testing.assert_array_equal(dense(fake), dequantize(want, jnp.float32))
    np.testing.assert_array_equal(finish_fake_quant(fake).codes, want.codes)


@pytest.mark.parametrize(
    ("format", "group", "acts", "ranges"),
    [
        ("int8", None, "none", "dynamic"),
        ("int8", 32, "int8", "learned"),
        ("int4", 32, "none", "learned"),
        ("int4", None, "int8", "dynamic"),
    ],
)
def test_the_codes_at_the_end_are_the_weights_of_the_last_forward(
    format: str, group: int | None, acts: str, ranges: str
) -> None:
    w = array(0, 3, OUT, IN).at[1, 2].set(0)
    for base in (w, w.astype(jnp.bfloat16)):
        fake = leaf(base, format, group, ranges, acts)
        done = finish_fake_quant({"w": fake})["w"]
        assert isinstance(done, Int8Dynamic if acts == "int8" else Quantized)
        q = base_of(done)
        assert (q.format, q.dtype, q.shape) == (format, base.dtype, w.shape)
        assert q.group == (group or IN)
        np.testing.assert_array_equal(jit_dense(done), jit_dense(fake))


@ranged
@kinds
def test_rounding_twice_is_rounding_once(format: str, group: int | None, ranges: str) -> None:
    once = leaf(array(0, OUT, IN), format, group, ranges)
    twice = replace(once, base=dense(once))
    q, again = finish_fake_quant(once), finish_fake_quant(twice)
    np.testing.assert_array_equal(again.codes, q.codes)
    # A range found anew may differ in its last bit: 127 * (r / 127) is not always r.
    np.testing.assert_allclose(again.scales, q.scales, rtol=0 if ranges == "learned" else 2e-7)


def test_every_code_of_the_grids_is_used() -> None:
    w = jnp.linspace(-2, 2, 4096).reshape(1, -1)
    for format, low, high in (("int8", -127, 127), ("int4", -8, 7)):
        q = finish_fake_quant(FakeQuant(w, jnp.ones((1, 1)), format))
        codes = dequantize(q, jnp.float32) / q.scales
        assert sorted({round(float(c)) for c in codes[0]}) == list(range(low, high + 1))


# --- torch ---------------------------------------------------------------------------------------


def torch_fake(w: np.ndarray, scales: np.ndarray, format: str) -> tuple[Any, Any, Any]:
    """torch's fake-quantized rows of groups, with what collects the gradients of w and scales."""
    low, high = {"int8": (-127, 127), "int4": (-8, 7)}[format]
    rows = torch.tensor(w.reshape(scales.size, -1), requires_grad=True)
    s = torch.tensor(scales.reshape(-1), requires_grad=True)
    zero = torch.zeros(scales.size)
    factor = (rows.shape[1] * high) ** -0.5
    learnable = torch._fake_quantize_learnable_per_channel_affine
    return learnable(rows, s, zero, 0, low, high, factor), rows, s


@kinds
def test_values_and_gradients_are_torchs(format: str, group: int | None) -> None:
    w, g = array(0, OUT, IN), array(1, OUT, IN)
    fake = leaf(w, format, group, "learned")
    scales = np.array(finish_fake_quant(fake).scales)
    theirs, rows, s = torch_fake(np.array(w), scales, format)
    theirs.backward(torch.tensor(np.array(g)).reshape(theirs.shape))
    values, back = jax.vjp(lambda w, r: dense(replace(fake, base=w, range=r)), w, fake.range)
    of_w, of_range = back(g)
    np.testing.assert_allclose(values, theirs.detach().numpy().reshape(OUT, IN), rtol=1e-6)
    np.testing.assert_array_equal(of_w, rows.grad.numpy().reshape(OUT, IN))
    of_scales = s.grad.numpy().reshape(scales.shape) / {"int8": 127, "int4": 7}[format]
    np.testing.assert_allclose(of_range, of_scales, rtol=1e-4, atol=1e-6)
    clipped = np.asarray(of_w) == 0
    assert 0.02 < clipped.mean() < 0.6
    # The mutation: straight through without a look at the clipping.
    assert not np.array_equal(g, rows.grad.numpy().reshape(OUT, IN))
    plain = torch.fake_quantize_per_channel_affine(
        rows.detach(), s.detach(), torch.zeros(s.numel(), dtype=torch.int32), 0,
        *{"int8": (-127, 127), "int4": (-8, 7)}[format],
    )  # fmt: skip
    np.testing.assert_allclose(values, plain.numpy().reshape(OUT, IN), rtol=1e-6)


def straight_through(x: Any, rounded: Any) -> Any:
    return x + (rounded - x).detach()


def torch_linear(x: Any, w: Any, format: str, group: int | None, acts: str) -> Any:
    """torchao's way of dynamic ranges, in torch's own operations."""
    high = {"int8": 127, "int4": 7}[format]
    groups = w.reshape(OUT, -1, group or IN)
    s = groups.detach().abs().amax(-1, keepdim=True) / high
    values = straight_through(groups, torch.round(groups / s).clamp(-high, high) * s)
    if acts == "int8":
        s = x.detach().abs().amax(-1, keepdim=True) / 127
        x = straight_through(x, torch.round(x / s) * s)
    return x @ values.reshape(OUT, IN).T


@pytest.mark.parametrize("acts", ["none", "int8"])
@kinds
def test_a_dynamic_linear_is_torchs(format: str, group: int | None, acts: str) -> None:
    x, w, g = array(0, T, IN), array(1, OUT, IN), array(2, T, OUT)
    fake = FakeQuant(w, None, format, group, acts)
    ours, back = jax.vjp(lambda x, w: linear(x, replace(fake, base=w)), x, w)
    tx, tw = (torch.tensor(np.array(a), requires_grad=True) for a in (x, w))
    theirs = torch_linear(tx, tw, format, group, acts)
    theirs.backward(torch.tensor(np.array(g)))
    for a, b in zip((ours, *back(g)), (theirs.detach(), tx.grad, tw.grad), strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=2e-5)
    other = torch_linear(tx, tw, format, None if group else 32, acts).detach().numpy()
    assert np.abs(other - ours).max() > 1e-2, "another group is another function"
    assert np.abs(np.asarray(x @ w.T) - ours).max() > 1e-2


# --- adapters and trees --------------------------------------------------------------------------


@ranged
def test_it_is_the_merged_weight_that_is_rounded(ranges: str) -> None:
    tree = trained(add_lora(params(), 4, 8, key=jax.random.key(0)))
    fake = fake_quant(tree, "int4", group=32, ranges=ranges)
    w = fake["layers"][0][0]["mlp"]["up_proj"]["weight"]
    merged = dense(w.base)
    assert np.abs(merged - w.base.base).max() > 0.1
    np.testing.assert_array_equal(dense(w), dense(replace(w, base=merged)))
    done = finish_fake_quant(fake)["layers"][0][0]["mlp"]["up_proj"]["weight"]
    np.testing.assert_array_equal(dense(done), dense(w))
    assert fake["embed"] is tree["embed"] and is_weight(w) and base_of(w) is w.base.base


def names(tree: Any) -> set[str]:
    paths = [path for path, _ in jax.tree.leaves_with_path(tree)]
    return {jax.tree_util.keystr(path[-1:], simple=True) for path in paths}


@ranged
def test_adapters_and_learned_ranges_train_and_nothing_else(ranges: str) -> None:
    tree = add_lora(params(), 4, 8, "q_proj", key=jax.random.key(0))
    fake = fake_quant(tree, "int4", group=32, ranges=ranges)
    train, frozen = partition(fake)
    learned = {"range"} if ranges == "learned" else set()
    assert names(train) == {"a", "b"} | learned and not names(frozen) & names(train)
    # up_proj has no adapter: its range learns, its weight does not.
    up = train["layers"][0][0]["mlp"]["up_proj"]["weight"]
    assert up.base is None and (up.range is not None) == (ranges == "learned")
    back = combine(train, frozen)
    assert jax.tree.structure(back) == jax.tree.structure(fake)
    pairs = zip(jax.tree.leaves(back), jax.tree.leaves(fake), strict=True)
    assert all(a is b for a, b in pairs)
    whole, nothing = partition(fake_quant(params(), ranges=ranges))
    assert jax.tree.leaves(nothing) == [] and names(whole) >= {"base", "final_norm"} | learned


def test_gradients_reach_the_adapter_through_the_rounding() -> None:
    w = fake_quant(trained(add_lora(params(1), 4, 8, key=jax.random.key(0))), "int8")
    w = jax.tree.map(lambda x: x[0], w["layers"][0][0]["self_attn"]["q_proj"]["weight"])
    x, g = array(0, T, IN), array(1, T, OUT)
    ours = jax.vjp(lambda a, b: linear(x, replace(w, base=replace(w.base, a=a, b=b))),
                   w.base.a, w.base.b)[1](g)  # fmt: skip
    through = (x.T @ g).T  # the gradient of the merged weight
    scale = w.base.scale
    want = scale * w.base.b.T @ through, scale * through @ w.base.a.T
    for a, b in zip(ours, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_transforms_go_through() -> None:
    tree = trained(add_lora(params(), 4, 8, key=jax.random.key(0)))
    fake = fake_quant(tree, "int4", ranges="learned", activations="int8")
    first = lambda tree: tree["layers"][0][0]["mlp"]["up_proj"]["weight"]  # noqa: E731
    merged = first(merge_lora(fake))
    assert isinstance(merged, FakeQuant) and not isinstance(merged.base, Lora)
    np.testing.assert_allclose(dense(merged), dense(first(fake)), atol=1e-6)
    stripped = first(strip_lora(fake))
    assert isinstance(stripped, FakeQuant) and stripped.base is first(tree).base
    assert jax.tree.structure(strip_fake_quant(fake)) == jax.tree.structure(tree)
    assert with_dropout(fake, jax.random.key(0)) == fake
    one = first({"layers": [at_repeat(fake["layers"][0], 1)]})
    np.testing.assert_array_equal(dense(one), dense(first(fake))[1])
    x = array(0, T, IN)
    both = [one, replace(one, base=one.base.base)]
    for y, w in zip(linears(x, both), both, strict=True):
        np.testing.assert_array_equal(y, linear(x, w))


def test_only_the_targets_are_rounded() -> None:
    fake = fake_quant(params(3), targets=[r"model\.layers\.[12]\.mlp\.up_proj"])
    kinds = [type(group[0]["mlp"]["up_proj"]["weight"]) for group in fake["layers"]]
    assert len(kinds) == 2 and kinds[0] is not FakeQuant and kinds[1] is FakeQuant
    assert not isinstance(fake["layers"][1][0]["self_attn"]["q_proj"]["weight"], FakeQuant)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int5"}, "qat format 'int5' is not one of int8, int4"),
        ({"activations": "fp8"}, "qat activations 'fp8'"),
        ({"ranges": "static"}, "qat ranges 'static' is not one of dynamic, learned"),
        ({"ranges": "ema"}, "use 'dynamic', or 'learned'"),
        ({"group": 48}, r"rows of 64 .* not whole groups of 48; groups that fit: 32, 64"),
        ({"targets": "k_proj"}, "qat target 'k_proj' matches no module"),
        ({"targets": ".*embed.*"}, "qat target"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, message: str) -> None:
    tree = params() | {"head": array(4, 8, IN)}
    with pytest.raises(UserError, match=message):
        fake_quant(tree, **options)


def test_weights_that_cannot_train_are_refused() -> None:
    with pytest.raises(UserError, match="fake-quantized already"):
        fake_quant(fake_quant(params()))
    dropped = add_lora(params(), 4, 8, key=jax.random.key(0), dropout=0.1)
    with pytest.raises(UserError, match="set lora_dropout to 0"):
        fake_quant(dropped)
    coded = params()
    coded["layers"][0][0]["mlp"]["up_proj"]["weight"] = quantize(array(0, 2, OUT, IN), "int8")
    with pytest.raises(UserError, match=r"up_proj' is stored in codes"):
        fake_quant(coded)


def test_parts_lie_with_the_weight() -> None:
    mesh = make_mesh("data=2,fsdp=4")
    adapted = Lora(array(0, OUT, 128), array(1, 4, 128), array(2, OUT, 4), jnp.float32(2))
    fake = leaf(adapted, "int4", 32, "learned")
    for axes, spec in ((("mlp", "embed"), P(None, "fsdp")), (("embed", "mlp"), P("fsdp", None))):
        places = shardings(mesh, {"w": axes}, {"w": fake})["w"]
        assert places.base.base.spec == spec and places.range.spec == spec
        done = finish_fake_quant(replace(fake, activations="int8"))
        codes = shardings(mesh, {"w": axes}, {"w": done})["w"].base
        assert codes.codes.spec == spec and codes.scales.spec == spec
        x = array(3, 8, 128)
        with jax.set_mesh(mesh):
            there = jax.jit(linear)(x, jax.device_put(fake, places))
        np.testing.assert_allclose(there, linear(x, fake), rtol=1e-4, atol=1e-4)
