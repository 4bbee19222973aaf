"""Embeddings with rows for added tokens: the mean of the old rows, and nothing else changes."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mud_puppy as mp
from mud_puppy.errors import UserError
from mud_puppy.model import abstract, init, load, resize_embeddings
from mud_puppy.model.names import flatten
from mud_puppy.parallel import make_mesh
from mud_puppy.weights import add_lora, quantize
from tests.tiny import SIZES, tiny_model

NEW = 70


def wide(params: Any, tied: bool) -> dict[str, Any]:
    return {name: params[name] for name in (("embed",) if tied else ("embed", "head"))}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_rows_are_the_mean_of_the_old(dtype: str, tied: bool) -> None:
    model, _ = abstract({"model_type": "llama", "tie_word_embeddings": tied} | SIZES)
    params = init(model.arch, jax.random.key(0), dtype)
    larger, resized = resize_embeddings(model, params, NEW)
    for name, old in wide(params, tied).items():
        new = np.asarray(resized[name])
        assert new.shape == (NEW, 32) and new.dtype == old.dtype
        assert np.array_equal(new[:64], old)
        mean = np.asarray(old, np.float64).mean(0)
        assert np.allclose(new[64:].astype(np.float64), mean, rtol=4e-3, atol=1e-7)
    others = {path: x for path, x in flatten(params).items() if path not in ("embed", "head")}
    assert all(flatten(resized)[path] is x for path, x in others.items())
    assert (larger.arch.vocab_size, json.loads(larger.arch.config)["vocab_size"]) == (NEW, NEW)
    # As a model of that size is made.
    assert larger == abstract(json.loads(larger.arch.config))[0]


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_resizes_to_the_same_logits(
    tied: bool, tiny: Any, tokens: np.ndarray, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    folder, before = tiny("llama", tie_word_embeddings=tied)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    theirs.resize_token_embeddings(NEW, mean_resizing=True)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    model, params = resize_embeddings(*load(folder, dtype=None), NEW)
    ours = np.asarray(model(params, jnp.asarray(tokens)))
    assert ours.shape == expected.shape == (*tokens.shape, NEW)
    assert np.abs(ours[..., :64] - before).max() <= 1e-5 * np.abs(before).max()
    # Their noise has 1e-9 of the rows' covariance.
    assert np.abs(ours - expected).max() <= 1e-3 * np.abs(before).max()
    mp.save_hf(model, params, tmp_path, dtype=None)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    new = np.where(tokens % 3 == 0, 64 + tokens % 6, tokens)
    with torch.no_grad():
        theirs_of_new = again(torch.tensor(new, dtype=torch.long)).logits.numpy()
    assert (
        np.abs(model(params, jnp.asarray(new)) - theirs_of_new).max()
        <= 1e-5 * np.abs(theirs_of_new).max()
    )


def test_another_row_would_show(tiny: Any, tokens: np.ndarray) -> None:
    """The partner of the test above: rows of zeros are seen by its second bound."""
    model, params = load(tiny("llama")[0], dtype=None)
    larger, resized = resize_embeddings(model, params, NEW)
    zeros = resized | {"head": resized["head"].at[64:].set(0)}
    right, wrong = (larger(p, jnp.asarray(tokens)) for p in (resized, zeros))
    assert np.abs(right - wrong).max() > 1e-2 * np.abs(right).max()


def test_shapes_and_shards_follow() -> None:
    model, params = tiny_model()
    _, shapes = abstract(json.loads(model.arch.config), dtype="float32")
    _, grown = resize_embeddings(model, shapes, NEW, pad_to=8)
    expected = jax.eval_shape(lambda: resize_embeddings(model, params, NEW, pad_to=8)[1])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), grown) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )
    assert grown["embed"].shape == (72, 32)


def test_sharded_arrays_stay_where_they_are(llama: Path) -> None:
    model, params = load(llama, mesh=make_mesh("fsdp=8"))
    _, whole = resize_embeddings(*load(llama), NEW)
    _, parts = resize_embeddings(model, params, NEW)
    for name in ("embed", "head"):
        assert parts[name].sharding == params[name].sharding
        assert {s.data.shape for s in parts[name].addressable_shards} == {(NEW, 4)}
        assert np.array_equal(parts[name], whole[name])


def test_rows_are_never_taken_away() -> None:
    model, params = tiny_model()
    for size, pad_to in ((64, None), (10, None), (10, 32)):
        assert resize_embeddings(model, params, size, pad_to) == (model, params)
    assert resize_embeddings(model, params, 10, 48)[1]["head"].shape == (96, 32)


def test_what_takes_no_rows_is_refused() -> None:
    model, params = tiny_model()
    adapted = add_lora(params, 2, targets=["lm_head"], key=jax.random.key(0))
    with pytest.raises(UserError, match=r"head: is a Lora, .*before adapters are added"):
        resize_embeddings(model, adapted, NEW)
    with pytest.raises(UserError, match=r"embed: is a Quantized, .*or weights are quantized"):
        resize_embeddings(model, quantize(params, "int8", embed="int8"), NEW)
    with pytest.raises(UserError, match="must be at least 1, not 0 and 8"):
        resize_embeddings(model, params, 0, 8)
    # Elsewhere they are no hindrance.
    layers = quantize(add_lora(params, 2, key=jax.random.key(0)), "int8")
    assert resize_embeddings(model, layers, NEW)[1]["embed"].shape == (NEW, 32)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_other_families(family: str) -> None:
    fields = {"model_type": family} | {k: v for k, v in SIZES.items() if "key_value" not in k}
    if family == "gpt2":
        fields |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
    model, _ = abstract(fields)
    params = init(model.arch, jax.random.key(0))
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    larger, resized = resize_embeddings(model, params, NEW)
    assert np.allclose(larger(resized, tokens)[..., :64], model(params, tokens), atol=1e-6)
    assert larger(resized, tokens + 58).shape == (1, 12, NEW)
    assert {k: v.shape for k, v in resized.items() if k in ("positions",)} == {
        k: v.shape for k, v in params.items() if k in ("positions",)
    }
