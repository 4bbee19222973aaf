"""The decoder beyond plain logits: cache, packed rows, given embeddings, Flax skeleton, remat."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from mud_puppy.config.keys import Checkpointing
from mud_puppy.kernels import Quantized, dequantize, quantize, target
from mud_puppy.model import Decoder, Inputs, load, make_cache, scan_layers
from mud_puppy.model.decoder import logits
from mud_puppy.model.module import params_of
from mud_puppy.weights import add_lora
from mud_puppy.weights.tree import map_modules

SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "num_hidden_layers": 4,
    "head_dim": 8,
}


def close(a: Any, b: Any, tolerance: float = 1e-5) -> bool:
    return bool(np.abs(np.asarray(a) - np.asarray(b)).max() <= tolerance * np.abs(b).max())


def chunked(model: Any, params: Any, tokens: np.ndarray, shift: int = 0) -> np.ndarray:
    """Logits by 8 tokens at a time through the cache; `shift` puts positions wrong by that much."""

    @jax.jit
    def step(tokens: Any, positions: Any, cache: Any) -> Any:
        hidden, cache, _ = model.forward(params, Inputs(tokens, positions), cache)
        return logits(model.arch, params, hidden), cache

    cache, out = make_cache(model.arch, 2, 40, jnp.float32), []
    for start in range(0, tokens.shape[1], 8):
        positions = np.broadcast_to(np.arange(start, start + 8, dtype=np.int32), (2, 8))
        positions = positions + shift * (start > 0)
        part, cache = step(tokens[:, start : start + 8], positions, cache)
        out.append(np.asarray(part))
    return np.concatenate(out, axis=1)


def test_cache_in_chunks_equals_one_forward(tiny: Any, tokens: np.ndarray) -> None:
    folder, expected = tiny("qwen3", **SLIDING)
    model, params = load(folder, dtype="float32")
    assert close(chunked(model, params, tokens), expected)
    assert not close(chunked(model, params, tokens, shift=1), expected, 1e-3)


def test_packed_examples_do_not_see_each_other(llama: Path) -> None:
    model, params = load(llama, dtype="float32")
    call = jax.jit(model.__call__)
    first, second = np.arange(1, 11, dtype=np.int32)[None], np.arange(30, 44, dtype=np.int32)[None]
    packed = np.concatenate([first, second], axis=1)
    positions = np.concatenate([np.arange(10), np.arange(14)])[None].astype(np.int32)
    segments = np.repeat([1, 2], [10, 14])[None].astype(np.int32)
    apart = np.concatenate([call(params, first), call(params, second)], axis=1)
    assert close(call(params, packed, positions, segments), apart)
    one_segment = np.ones_like(segments)
    assert not close(call(params, packed, positions, one_segment), apart, 1e-3)


def test_dynamic_rope_stretches_each_packed_example_alone(llama: Path) -> None:
    model, params = load(llama, dtype="float32")
    stretched = model.arch.replace(ropes=(replace(model.arch.ropes[0], dynamic=(1e4, 4.0, 12)),))
    model = replace(model, arch=stretched)
    call = jax.jit(model.__call__)
    first, second = np.arange(1, 11, dtype=np.int32)[None], np.arange(30, 54, dtype=np.int32)[None]
    packed = np.concatenate([first, second], axis=1)
    positions = np.concatenate([np.arange(10), np.arange(24)])[None].astype(np.int32)
    segments = np.repeat([1, 2], [10, 24])[None].astype(np.int32)
    apart = np.concatenate([call(params, first), call(params, second)], axis=1)
    assert close(call(params, packed, positions, segments), apart)
    plain = replace(
        model, arch=stretched.replace(ropes=(replace(stretched.ropes[0], dynamic=None),))
    )
    assert not close(jax.jit(plain.__call__)(params, second), apart[:, 10:], 1e-3), "not beyond"


def test_padding_changes_nothing(llama: Path, tokens: np.ndarray) -> None:
    model, params = load(llama, dtype="float32")
    call = jax.jit(model.__call__)
    segments = np.repeat([1, 0], [20, 4])[None].repeat(2, 0).astype(np.int32)
    other = tokens.copy()
    other[:, 20:] = 7
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), (2, 24))
    a, b = (call(params, x, positions, segments)[:, :20] for x in (tokens, other))
    assert np.array_equal(a, b)
    assert np.isfinite(call(params, tokens, positions, segments)).all()


def test_given_embeddings_replace_tokens(llama: Path, tokens: np.ndarray) -> None:
    model, params = load(llama, dtype="float32")
    index = np.where(tokens == tokens[0, 3], 0, -1).astype(np.int32)
    embeds = params["embed"][tokens[0, 3]][None]
    blanked = np.where(index == 0, 5, tokens)
    forward = jax.jit(lambda inputs: model.forward(params, inputs)[0])
    plain = forward(Inputs(tokens))
    assert close(forward(Inputs(blanked, embeds=embeds, embed_index=index)), plain)
    assert not close(forward(Inputs(blanked)), plain, 1e-3)


def test_the_flax_module_holds_the_same_leaves(llama: Path, tokens: np.ndarray) -> None:
    model, params = load(llama, dtype="float32")
    module = Decoder(model.arch, params)
    assert close(module(jnp.asarray(tokens)), model(params, jnp.asarray(tokens)))
    again = params_of(module)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True))
    assert hash(model) == hash(load(llama, dtype="float32")[0])


def test_remat_does_not_change_gradients(llama: Path, tokens: np.ndarray) -> None:
    model, params = load(llama, dtype="float32")

    def grads(kind: str) -> Any:
        def run(*args: Any) -> Any:
            return scan_layers(*args, remat=kind)

        def loss(params: Any) -> Any:
            inputs = Inputs(jnp.asarray(tokens))
            return jnp.sum(model.forward(params, inputs, run_layers=run)[0] ** 2)

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    expected = grads("none")
    for kind in set(get_args(Checkpointing)) - {"none"}:
        for a, b in zip(grads(kind), expected, strict=True):
            assert np.abs(a - b).max() <= 1e-5 * max(1e-3, np.abs(b).max())


def test_a_second_call_neither_traces_nor_compiles(llama: Path, tokens: np.ndarray) -> None:
    model, params = load(llama, dtype="float32")
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *a, **k: events.append(name))
    try:
        model(params, jnp.asarray(tokens[:, :7]))
        first, events[:] = list(events), []
        model(params, jnp.asarray(tokens[:, :7]))
    finally:
        jax.monitoring.clear_event_listeners()
    assert any("trace" in name for name in first), "the listener hears nothing"
    assert [name for name in events if "trace" in name or "compile" in name] == []


def test_codes_are_read_in_place_behind_a_cache(
    tiny: Any, tokens: np.ndarray, monkeypatch: Any
) -> None:
    """What a slice of a layer's codes costs (a copy for the kernel) is more than the product."""
    folder, _ = tiny("llama", hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    model, params = load(folder, dtype="float32")

    def encode(names: list[str], w: Any) -> Any:
        return quantize(w, "nf4") if ".layers." in names[0] else w

    def decode(w: Any) -> Any:
        return dequantize(w) if isinstance(w, Quantized) else w

    coded = map_modules(encode, lambda name: None, params)
    coded = add_lora(coded, rank=4, key=jax.random.key(0))
    plain = jax.tree.map(decode, coded, is_leaf=lambda w: isinstance(w, Quantized))
    assert close(chunked(model, coded, tokens), chunked(model, plain, tokens))
    assert not close(chunked(model, coded, tokens), chunked(model, params, tokens), 1e-3)

    stacked = []

    def run(x: Any, w: Quantized, implementation: str) -> Any:
        assert implementation == "pallas"
        stacked.append(w.layer is not None and w.codes.shape[0] == 4)
        return jnp.zeros((len(x), w.shape[0]), x.dtype)

    def copied(layers: Callable, group: Any, x: Any, cache: Any, start: int) -> Any:
        def body(carry: Any, step: Any) -> Any:
            x, cache, _ = layers(step[0], *carry, start + step[1] * len(group))
            return (x, cache), None

        return *jax.lax.scan(body, (x, cache), (group, jnp.arange(4)))[0], None

    # The package's attribute of this name is the function.
    monkeypatch.setattr(sys.modules["mud_puppy.kernels.quantized_matmul"], "_run", run)
    bf16 = replace(model, dtype="bfloat16")
    one = Inputs(jnp.ones((2, 1), jnp.int32), jnp.zeros((2, 1), jnp.int32))
    cache = make_cache(model.arch, 2, 40, jnp.bfloat16)
    with target.use(target.Target("cuda", "sm90")):
        jax.eval_shape(lambda p: bf16.forward(p, one, cache)[0], coded)
        assert len(stacked) == 7 and all(stacked)
        jax.eval_shape(lambda p: bf16.forward(p, one, cache, copied)[0], coded)
        assert not any(stacked[7:])
