"""Export: byte-identical round trips, shards, files that other programs read, merged adapters."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mud_puppy.errors import UserError
from mud_puppy.export import save_hf, save_merged
from mud_puppy.model import abstract, load, load_tokenizer
from mud_puppy.parallel import make_mesh
from mud_puppy.results import merge_adapter
from mud_puppy.weights import add_lora, load_adapter, merge_lora
from tests.tiny import SIZES

FIELDS = SIZES | {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 16), dtype=np.int32)


def make_model(folder: Path, dtype: Any, **fields: Any) -> Path:
    """A model folder with random tensors, written by the safetensors library."""
    from mud_puppy.model.names import flatten, hf_names

    model, shapes = abstract(FIELDS | fields)
    random = np.random.default_rng(0)
    leaves, tensors = flatten(shapes), {}
    for path, names in hf_names(model.arch, shapes).items():
        shape = leaves[path].shape[1:] if path.startswith("layers/") else leaves[path].shape
        for name in names:
            tensors[name] = (0.2 * random.standard_normal(shape)).astype(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(FIELDS | fields))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.7}')
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: Any) -> Path:
    return make_model(tmp_path_factory.mktemp("source"), np.float32)


def tensors_of(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("model*.safetensors"))
    return {name: x for file in files for name, x in load_file(file).items()}


def identical(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_saved_untouched_is_byte_identical(dtype: Any, tied: bool, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    make_model(folder, dtype, tie_word_embeddings=tied)
    original = tensors_of(folder)
    for mesh, shard_bytes in ((None, 10**9), (make_mesh("data=2,fsdp=4"), 9000)):
        model, params = load(folder, dtype=None, mesh=mesh)
        out = tmp_path / f"out-{shard_bytes}"
        save_hf(model, params, out, dtype=None, max_shard_bytes=shard_bytes)
        assert identical(tensors_of(out), original)
        again, _ = load(out, dtype=None)
        assert again.arch.replace(config="") == model.arch.replace(config="")


def test_shards_hold_what_the_index_says(source: Path, tmp_path: Path) -> None:
    model, params = load(source, dtype="float32")
    save_hf(model, params, tmp_path, max_shard_bytes=9000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    sizes = []
    for file in files:
        tensors = load_file(file)
        sizes.append(sum(x.nbytes for x in tensors.values()))
        assert {index["weight_map"][name] for name in tensors} == {file.name}
        with safe_open(file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert max(sizes) <= 9000 and index["metadata"]["total_size"] == sum(sizes)
    assert not list(tmp_path.glob("*.tmp"))
    # Loading what was sharded, and the other way round.
    half = load(source, dtype="bfloat16")[1]
    pairs = zip(jax.tree.leaves(load(tmp_path)[1]), jax.tree.leaves(half), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


def test_an_older_model_in_the_folder_is_replaced(source: Path, tmp_path: Path) -> None:
    model, params = load(source, dtype=None)
    save_hf(model, params, tmp_path, dtype=None)
    for mine in ("notes.txt", "model_ema.safetensors"):
        (tmp_path / mine).write_text("mine")
    save_hf(model, params, tmp_path, dtype=None, max_shard_bytes=9000)
    assert not (tmp_path / "model.safetensors").exists()
    save_hf(model, params, tmp_path, dtype=None)
    left = sorted(p.name for p in tmp_path.glob("*.safetensors*"))
    assert left == ["model.safetensors", "model_ema.safetensors"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_crash_leaves_nothing_that_loads(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params = load(source, dtype=None)
    real, renamed = os.replace, []

    def replace(a: Any, b: Any) -> None:
        if len(renamed) == crash_at:
            raise KeyboardInterrupt
        renamed.append(real(a, b))

    save_hf(model, params, tmp_path / "whole", dtype=None, max_shard_bytes=9000)
    monkeypatch.setattr(os, "replace", replace)
    for crash_at in range(5):
        renamed.clear()
        out = tmp_path / f"crash-{crash_at}"
        shutil.copytree(tmp_path / "whole", out)  # an older model that is being replaced
        with pytest.raises(KeyboardInterrupt):
            save_hf(model, params, out, dtype=None, max_shard_bytes=9000)
        with pytest.raises(UserError):
            load(out)


def test_configs_say_what_was_written(source: Path, tmp_path: Path) -> None:
    model, params = load(source, dtype=None)
    save_hf(model, params, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["LlamaForCausalLM"]
    # The old names too: transformers 4 knows no rope_parameters and would take its own theta.
    assert config["rope_theta"] == 5e5 and config["rope_scaling"]["rope_type"] == "llama3"
    assert config["rope_scaling"]["factor"] == 8.0
    copied = json.loads((tmp_path / "generation_config.json").read_text())
    assert copied == {"eos_token_id": 2, "temperature": 0.7}
    assert abstract(tmp_path)[0].arch.ropes == model.arch.ropes
    unknown, _ = abstract(FIELDS)
    save_hf(unknown, params, tmp_path / "b")
    made = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert made == {"bos_token_id": 1, "eos_token_id": 2}


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = "{{ messages[0].content }}"
    return fast


def test_tokenizers_go_along(source: Path, tmp_path: Path) -> None:
    model, params = load(source, dtype=None)
    save_hf(model, params, tmp_path / "a", tokenizer=make_tokenizer())
    given = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert given["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = load_tokenizer(tmp_path / "a")
    assert again("hello world")["input_ids"] == [3, 4]
    assert again.eos_token == "</s>" and again.chat_template == "{{ messages[0].content }}"
    # The files of the folder that the model came from, as they are.
    model, params = load(tmp_path / "a", dtype=None)
    save_hf(model, params, tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_what_a_revision_of_the_hub_carries_goes_along(
    source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Tokenizer, added tokens and chat template, asked for at the revision that was loaded."""
    tokenizer, asked = make_tokenizer(), []
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    snapshot = shutil.copytree(source, tmp_path / "snapshot")
    tokenizer.save_pretrained(snapshot)

    def download(repo: str, revision: str | None, patterns: list[str]) -> Path:
        asked.append((repo, revision, "*.safetensors" in patterns))
        return snapshot

    monkeypatch.setattr("mud_puppy.model.files._download", download)
    model, params = load("org/name@v1", dtype=None)
    save_hf(model, params, tmp_path / "out", dtype=None, max_shard_bytes=20_000)
    assert asked == [("org/name", "v1", True), ("org/name", "v1", False)]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (snapshot / name).read_bytes()
    again, text = load_tokenizer(tmp_path / "out"), "<think>hello</think><|im_start|>world"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"] == [5, 3, 6, 7, 4]
    assert again.decode([7, 4], skip_special_tokens=True) == "world"
    assert again.chat_template == tokenizer.chat_template
    _, saved = load(tmp_path / "out", dtype=None)
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(saved)))


def test_a_model_without_tokenizer_says_so(source: Path) -> None:
    with pytest.raises(UserError, match="the tokenizer does not load"):
        load_tokenizer(source)


def test_adapters_must_be_merged_first(source: Path, tmp_path: Path) -> None:
    model, params = load(source)
    adapted = add_lora(params, rank=2, targets="q_proj", key=jax.random.key(0))
    with pytest.raises(UserError, match="have adapters: merge"):
        save_hf(model, adapted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    model, params = load(source)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_hf(model, params, tmp_path / "file")
    with pytest.raises(UserError, match="dtype 'int8' is not one of"):
        save_hf(model, params, tmp_path / "out", dtype="int8")


def test_split_groups_are_written_whole(source: Path, tmp_path: Path) -> None:
    model, params = load(source, dtype=None)
    targets = r".*\.1\.mlp\.up_proj"
    split = merge_lora(add_lora(params, rank=2, targets=targets, key=jax.random.key(0)))
    assert len(split["layers"]) == 3
    save_hf(model, split, tmp_path, dtype=None)
    assert identical(tensors_of(tmp_path), tensors_of(source))


# --- against transformers and PEFT ---------------------------------------------------------------


def reference(folder: Path, adapter: Path | None = None) -> np.ndarray:
    """float32 logits of transformers, with a PEFT adapter on top."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


@pytest.fixture(scope="module")
def adapter(source: Path, tmp_path_factory: Any) -> Path:
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(source)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def test_transformers_reads_what_we_write(source: Path, tmp_path: Path) -> None:
    model, params = load(source, dtype="float32")
    save_hf(model, params, tmp_path, dtype=None, max_shard_bytes=9000)
    ours = np.asarray(jax.jit(model.__call__)(params, TOKENS))
    assert error(ours, reference(tmp_path)) <= 1e-5
    # Without the rope of the config it would be another model.
    (tmp_path / "config.json").write_text(json.dumps(FIELDS | {"rope_parameters": None}))
    assert error(ours, reference(tmp_path)) > 1e-3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_merged_model_is_base_plus_adapter(source: Path, adapter: Path, tmp_path: Path) -> None:
    expected = reference(source, adapter)
    merge_adapter(source, adapter, tmp_path / "a", dtype="float32")
    assert error(reference(tmp_path / "a"), expected) <= 1e-5
    assert error(reference(source), expected) > 1e-2
    merge_adapter(source, adapter, tmp_path / "b", dtype="bfloat16")
    assert error(reference(tmp_path / "b"), expected) <= 0.05
    # Merged while writing is merged before writing.
    model, params = load(source, dtype=None)
    save_hf(model, merge_lora(load_adapter(params, adapter)), tmp_path / "c", dtype=None)
    assert identical(tensors_of(tmp_path / "c"), tensors_of(tmp_path / "a"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_sum_is_rounded_once(source: Path, adapter: Path, tmp_path: Path) -> None:
    _, params = load(source, dtype="float32")
    merge_adapter(source, adapter, tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    exact = merge_lora(load_adapter(params, adapter))["layers"][0][0]["mlp"]["up_proj"]["weight"]
    assert np.array_equal(tensors_of(tmp_path)[name], exact[1].astype(jnp.bfloat16))


def test_sharded_params_are_merged_and_saved(source: Path, adapter: Path, tmp_path: Path) -> None:
    for mesh in (None, make_mesh("fsdp=8")):
        model, params = load(source, dtype="float32", mesh=mesh)
        out = tmp_path / str(mesh is None)
        save_merged(model, load_adapter(params, adapter), out, dtype="float32")
    a, b = tensors_of(tmp_path / "True"), tensors_of(tmp_path / "False")
    assert all(np.allclose(a[name], b[name], atol=1e-6) for name in a)
