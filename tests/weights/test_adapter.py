"""PEFT folders both ways: theirs gives our logits, ours gives theirs; the rest is refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mud_puppy.errors import UserError
from mud_puppy.model import load
from mud_puppy.weights import (
    Lora,
    add_lora,
    is_weight,
    load_adapter,
    merge_lora,
    quantize,
    save_adapter,
    strip_lora,
)

# PEFT calls what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "one target": {},
    "all linears": {"target_modules": ALL, "lora_alpha": 16},
    "rsLoRA": {"target_modules": ALL, "use_rslora": True},
    "DoRA": {"target_modules": ALL, "use_dora": True},
    "regex": {"target_modules": r".*\.[02]\.self_attn\.(q|v)_proj|.*\.1\.mlp\.down_proj"},
    "rank_pattern": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 8},
        "alpha_pattern": {r"model\.layers\.2\..*": 32},
    },
    "rank_pattern rsLoRA": {"use_rslora": True, "rank_pattern": {"0.self_attn.q_proj": 3}},
    "layers_to_transform": {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
}


def logits(model: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(model.__call__)(params, tokens))


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-5) -> bool:
    return bool(np.abs(a - b).max() <= tolerance * np.abs(b).max())


def loras(params: Any) -> list[Lora]:
    return [w for w in jax.tree.leaves(params, is_leaf=is_weight) if isinstance(w, Lora)]


@pytest.mark.parametrize("case", CASES)
def test_pefts_adapter_here_and_back(
    case: str, base: Path, make_adapter: Any, peft_logits: Any, tokens: Any, tmp_path: Path
) -> None:
    folder, expected = make_adapter(**CASES[case])
    model, params = load(base, dtype="float32")
    adapted = load_adapter(params, folder)
    assert close(logits(model, adapted, tokens), expected)
    assert not close(logits(model, params, tokens), expected, 1e-3)
    save_adapter(model, adapted, tmp_path)
    assert close(peft_logits(tmp_path), expected)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(base)


def test_a_wrong_scale_shows(base: Path, make_adapter: Any, tokens: Any, tmp_path: Path) -> None:
    folder, expected = make_adapter(use_rslora=True)
    wrong = shutil.copytree(folder, tmp_path / "wrong")
    config = json.loads((wrong / "adapter_config.json").read_text())
    (wrong / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": False}))
    model, params = load(base, dtype="float32")
    assert not close(logits(model, load_adapter(params, wrong), tokens), expected, 1e-3)


def test_our_adapter_in_peft(base: Path, peft_logits: Any, tokens: Any, tmp_path: Path) -> None:
    model, params = load(base, dtype="float32")
    key = jax.random.key(0)
    targets = ["q_proj", r"model\.layers\.[12]\.mlp\.up_proj"]
    params = add_lora(params, rank=3, alpha=5, targets=targets, rslora=True, key=key)
    params = jax.tree.map(trained, params, is_leaf=is_weight)
    save_adapter(model, params, tmp_path)
    assert close(peft_logits(tmp_path), logits(model, params, tokens))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ups = [f"model.layers.{i}.mlp.up_proj" for i in (1, 2)]
    assert config["target_modules"] == sorted([*ups, "q_proj"])
    assert config["r"] == 3 and config["rank_pattern"] == {}
    assert np.isclose(config["lora_alpha"] / 3, 5 / np.sqrt(3))


def trained(w: Any) -> Any:
    """An adapter as training leaves it: b is not zero."""
    if not isinstance(w, Lora):
        return w
    noise = 0.3 * jax.random.normal(jax.random.key(w.b.size), w.b.shape)
    return dataclasses.replace(w, b=noise)


def test_a_saved_adapter_loads_as_it_was(base: Path, tmp_path: Path) -> None:
    model, params = load(base, dtype="float32")
    adapted = add_lora(params, rank=4, alpha=8, dropout=0.1, dora=True, key=jax.random.key(1))
    adapted = jax.tree.map(trained, adapted, is_leaf=is_weight)
    save_adapter(model, adapted, tmp_path)
    again = load_adapter(params, tmp_path)
    assert jax.tree.structure(again) == jax.tree.structure(adapted)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(adapted), strict=True):
        assert np.array_equal(a, b)
    assert {w.dropout for w in loras(again)} == {0.1}


@pytest.mark.parametrize(
    ("source", "base_model", "revision"),
    [
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("org/name", "org/name", None),
        ("/models/name@v1", "/models/name@v1", None),
    ],
)
def test_a_base_model_of_a_revision(
    source: str, base_model: str, revision: str | None, base: Path, tmp_path: Path
) -> None:
    model, params = load(base)
    params = add_lora(params, 4, key=jax.random.key(0))
    save_adapter(dataclasses.replace(model, source=source), params, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (base_model, revision)


def test_stacked_adapters_are_written_as_one(
    base: Path, make_adapter: Any, peft_logits: Any, tokens: Any, tmp_path: Path
) -> None:
    first, _ = make_adapter(target_modules=["q_proj", "v_proj"])
    second, _ = make_adapter(1, target_modules=["q_proj", "o_proj"], r=2, use_rslora=True)
    model, params = load(base, dtype="float32")
    stacked = load_adapter(load_adapter(params, first), second)
    expected = peft_logits(first, second)
    assert close(logits(model, stacked, tokens), expected)
    save_adapter(model, stacked, tmp_path)
    assert close(peft_logits(tmp_path), expected)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {config["r"], *config["rank_pattern"].values()}
    assert ranks == {2, 4, 6}
    # The outermost adapters go: of q_proj, which has two, the first is left.
    (left,) = loras(strip_lora(stacked))
    q_proj, v_proj = loras(load_adapter(params, first))
    assert np.array_equal(left.a, q_proj.a) and not np.array_equal(left.a, v_proj.a)


def test_continuing_on_a_merged_base(
    base: Path, make_adapter: Any, peft_logits: Any, tokens: Any
) -> None:
    first, expected = make_adapter(target_modules=ALL)
    model, params = load(base, dtype="float32")
    merged = merge_lora(load_adapter(params, first))
    assert not loras(merged)
    assert close(logits(model, merged, tokens), expected)
    second, _ = make_adapter(2)
    assert close(logits(model, load_adapter(merged, second), tokens), peft_logits(first, second))


def test_dora_in_a_stack_is_refused(base: Path, make_adapter: Any, tmp_path: Path) -> None:
    folder, _ = make_adapter(use_dora=True)
    model, params = load(base, dtype="float32")
    stacked = add_lora(load_adapter(params, folder), 2, 2.0, "q_proj", key=jax.random.key(0))
    with pytest.raises(UserError, match="q_proj' has a DoRA in a stack"):
        save_adapter(model, stacked, tmp_path)
    beside = add_lora(load_adapter(params, folder), 2, 2.0, "v_proj", key=jax.random.key(0))
    with pytest.raises(UserError, match=r"q_proj' has a DoRA adapter and .*v_proj' a plain one"):
        save_adapter(model, beside, tmp_path)


def test_padding_stays_zero_in_training(base: Path, make_adapter: Any, tokens: Any) -> None:
    folder, _ = make_adapter(rank_pattern={"1.self_attn.q_proj": 2})
    model, params = load(base, dtype="float32")
    q = load_adapter(params, folder)["layers"][0][0]["self_attn"]["q_proj"]["weight"]
    assert q.a.shape == (3, 4, 32)
    assert not q.a[1, 2:].any() and not q.b[1, :, 2:].any()

    def loss(q: Lora) -> Any:
        block = params["layers"][0][0]
        attention = {**block["self_attn"], "q_proj": {"weight": q}}
        return model(
            {**params, "layers": [[{**block, "self_attn": attention}]]}, jnp.asarray(tokens)
        ).std()

    grads = jax.jit(jax.grad(lambda q: loss(q)))(q)
    assert not grads.a[1, 2:].any() and not grads.b[1, :, 2:].any()
    assert grads.a[1, :2].any() and grads.b[1, :, :2].any()


def test_a_saved_embedding_must_be_the_base_one(
    base: Path, make_adapter: Any, tmp_path: Path
) -> None:
    folder, _ = make_adapter(target_modules=["embed_tokens"])
    _, params = load(base, dtype="float32")
    path = tmp_path / "with-base"
    shutil.copytree(folder, path)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    embed = np.asarray(params["embed"])
    save_file(tensors | {name: embed}, path / "adapter_model.safetensors")
    assert len(loras(load_adapter(params, path))) == 1
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert len(loras(load_adapter(half, path))) == 1
    save_file(tensors | {name: embed + 1}, path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="trained or resized embedding"):
        load_adapter(params, path)
    with pytest.raises(UserError, match=r"'model\.embed_tokens' itself, which is in codes"):
        load_adapter(quantize(params, "int8", embed="int8"), path)


# --- what is refused -----------------------------------------------------------------------------

Q = "base_model.model.model.layers.1.self_attn.q_proj"
BAD_CONFIG = {
    "bias": ({"bias": "all"}, "bias is not 'none'"),
    "type": ({"peft_type": "LOHA"}, "peft_type is not LORA"),
    "init": ({"init_lora_weights": "pissa"}, "init_lora_weights changed the base"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not"),
    "lora_bias": ({"lora_bias": True}, "lora_bias=True is not supported"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "rank": ({"r": 8}, r"q_proj\.lora_A\.weight' is \(4, 32\).*\(8, 32\)"),
    "no magnitude": ({"use_dora": True}, "lora_magnitude_vector' is missing"),
    "no alpha": ({"lora_alpha": None}, "r and lora_alpha must be numbers"),
}


@pytest.mark.parametrize("bad", BAD_CONFIG)
def test_options_that_are_not_read_are_refused(
    bad: str, base: Path, make_adapter: Any, tmp_path: Path
) -> None:
    fields, message = BAD_CONFIG[bad]
    folder = shutil.copytree(make_adapter()[0], tmp_path / "bad")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(load(base)[1], folder)
    assert str(folder) in str(caught.value)


def rename(old: str, new: str) -> Any:
    return lambda tensors: {name.replace(old, new): x for name, x in tensors.items()}


BAD_TENSORS = {
    "other module": (rename("q_proj", "qkv_proj"), "'model.layers.0.self_attn.qkv_proj', which"),
    "other layer": (rename("layers.2", "layers.9"), "'model.layers.9.self_attn.q_proj', which"),
    "half": (
        lambda t: {name: x for name, x in t.items() if not name.startswith(f"{Q}.lora_B")},
        r"1\.self_attn\.q_proj\.lora_B\.weight' is missing",
    ),
    "unread": (
        lambda t: t | {f"{Q}.lora_A.bias": np.zeros(4, np.float32)},
        r"lora_A\.bias' \(4,\) is no part of a LoRA",
    ),
    "unused": (
        lambda t: t | {f"{Q}.lora_magnitude_vector": np.zeros(32, np.float32)},
        "lora_magnitude_vector' has no use here",
    ),
    "shape": (
        lambda t: t | {f"{Q}.lora_B.weight": np.zeros((31, 4), np.float32)},
        r"lora_B\.weight' is \(31, 4\).*\(32, 4\)",
    ),
}


@pytest.mark.parametrize("bad", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused(
    bad: str, base: Path, make_adapter: Any, tmp_path: Path
) -> None:
    change, message = BAD_TENSORS[bad]
    folder = shutil.copytree(make_adapter()[0], tmp_path / "bad")
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(load(base)[1], folder)
    assert str(folder) in str(caught.value)


def test_folders_that_are_no_adapter(base: Path, make_adapter: Any, tmp_path: Path) -> None:
    _, params = load(base)
    with pytest.raises(UserError, match=r"no adapter_config\.json here"):
        load_adapter(params, base)
    folder = shutil.copytree(make_adapter()[0], tmp_path / "bad")
    tensors = folder / "adapter_model.safetensors"
    with tensors.open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_adapter(params, folder)
    tensors.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickles are never opened"):
        load_adapter(params, folder)


def test_an_adapter_for_a_tied_head_is_refused(base: Path, make_adapter: Any) -> None:
    folder, _ = make_adapter(target_modules=["lm_head"])
    _, params = load(base)
    tied = {name: leaf for name, leaf in params.items() if name != "head"}
    with pytest.raises(UserError, match=r"'lm_head'.*tied to the embedding"):
        load_adapter(tied, folder)


def test_nothing_to_save_and_nowhere_to_save(base: Path, tmp_path: Path) -> None:
    model, params = load(base)
    with pytest.raises(UserError, match="no adapter to save"):
        save_adapter(model, params, tmp_path / "out")
    file = tmp_path / "file"
    file.write_text("")
    adapted = add_lora(params, rank=2, targets="q_proj", key=jax.random.key(0))
    with pytest.raises(UserError, match="cannot be written"):
        save_adapter(model, adapted, file)
