"""Loading: dtypes, shards, shapes from the config alone, memory, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mud_puppy.errors import UserError
from mud_puppy.export import save_hf
from mud_puppy.model import abstract, load
from mud_puppy.model.names import flatten
from mud_puppy.parallel import make_mesh
from tests.tiny import SIZES, tiny_model


def equal(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def test_dtype_none_keeps_what_is_stored(llama: Path, tmp_path: Path) -> None:
    assert {x.dtype.name for x in jax.tree.leaves(load(llama, dtype=None)[1])} == {"float32"}
    half = shutil.copytree(llama, tmp_path / "half")
    stored = load_file(llama / "model.safetensors")
    cast = {name: x.astype(jnp.bfloat16) for name, x in stored.items()}
    save_file(cast, half / "model.safetensors", metadata={"format": "pt"})
    assert equal(load(half, dtype=None)[1], load(llama, dtype="bfloat16")[1])
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), load(half, dtype=None)[1])
    assert equal(load(half, dtype="float32")[1], widened)


def test_layers_in_two_dtypes_are_read_in_the_wider(llama: Path, tmp_path: Path) -> None:
    mixed = shutil.copytree(llama, tmp_path / "mixed")
    stored = load_file(llama / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(stored | {name: stored[name].astype(np.float16)}, mixed / "model.safetensors")
    up = load(mixed, dtype=None)[1]["layers"][0][0]["mlp"]["up_proj"]["weight"]
    assert up.dtype == jnp.float32
    assert np.array_equal(up[1], stored[name].astype(np.float16).astype(np.float32))


def test_abstract_has_the_shapes_of_load(llama: Path) -> None:
    model, params = load(llama)
    fields = json.loads((llama / "config.json").read_text())
    for source in (llama, fields):
        other, shapes = abstract(source)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
            lambda x: (x.shape, x.dtype), shapes
        )
        assert other.arch == model.arch


def test_on_leaf_replaces_each_tensor_as_it_comes(llama: Path) -> None:
    seen = []

    def on_leaf(path: str, array: jax.Array) -> Any:
        seen.append((path, array.shape))
        return {"twice": 2 * array} if path.endswith("q_proj/weight") else array

    _, plain = load(llama)
    _, params = load(llama, on_leaf=on_leaf)
    q_proj = params["layers"][0][0]["self_attn"]["q_proj"]
    twice = q_proj.pop("weight")["twice"]
    assert equal(twice, 2 * plain["layers"][0][0]["self_attn"]["q_proj"].pop("weight"))
    assert equal(params, plain)
    assert seen.count(("layers/0/0/self_attn/q_proj/weight", (32, 32))) == 3
    assert {path for path, _ in seen} >= {"embed", "head", "final_norm", "layers/0/0/mlp_norm"}


@pytest.mark.parametrize("mesh", ["fsdp=8", "data=2,fsdp=4", "data=8,fsdp=1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sharded_load_equals_a_whole_one(mesh: str, dtype: str, llama: Path) -> None:
    _, whole = load(llama, dtype=dtype)
    devices = make_mesh(mesh)
    _, sharded = load(llama, dtype=dtype, mesh=devices)
    assert equal(whole, sharded)
    up = sharded["layers"][0][0]["mlp"]["up_proj"]["weight"]
    assert len(up.addressable_shards) == 8
    parts = {shard.data.shape for shard in up.addressable_shards}
    assert parts == {(3, 48, 32 // devices.shape["fsdp"])}


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("deepseek")
    fields = {name: 8 for name in ("kv_lora_rank", "q_lora_rank", "v_head_dim", "n_routed_experts")}
    fields |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "num_key_value_heads": 4}
    fields |= {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    model, params = tiny_model(model_type="deepseek_v3", first_k_dense_replace=1, **fields)
    save_hf(model, params, folder, dtype=None)
    return folder


def test_every_weight_of_a_latent_attention_is_sharded(deepseek: Path) -> None:
    _, params = load(deepseek, dtype="float32", mesh=make_mesh("fsdp=4", jax.devices()[:4]))
    attention = flatten(params["layers"][0][0]["self_attn"])
    whole = {p for p, x in attention.items() if x.addressable_shards[0].data.shape == x.shape}
    linears = {path for path in attention if "_proj" in path}
    assert len(linears) == 5 and not linears & whole


def test_layers_that_predict_further_are_left_out_and_named(
    deepseek: Path, tmp_path: Path, caplog: Any
) -> None:
    params = load(deepseek)[1]
    assert not caplog.messages
    copy = shutil.copytree(deepseek, tmp_path / "more")
    stored, last = load_file(copy / "model.safetensors"), SIZES["num_hidden_layers"]
    norm = {"enorm.weight": np.ones(4, np.float32), "eh_proj.weight": np.ones((4, 8), np.float32)}
    more = {f"model.layers.{last}.{name}": x for name, x in norm.items()}
    save_file(stored | more, copy / "model.safetensors")
    assert equal(load(copy)[1], params)
    (line,) = caplog.messages
    assert f"2 tensors are not read, as 'model.layers.{last}." in line
    save_file(
        stored | {"model.layers.9.enorm.weight": norm["enorm.weight"]}, copy / "model.safetensors"
    )
    with pytest.raises(UserError, match=r"model\.layers\.9\.enorm"):
        load(copy)


def test_donating_loaded_shards_leaves_their_copies_alone(llama: Path) -> None:
    # Copies of one shard share host memory on CPU: an update in place would reach the others.
    _, params = load(llama, dtype="float32", mesh=make_mesh("data=8,fsdp=1"))
    before = np.array(params["embed"])
    doubled = jax.jit(lambda x: x * 2, donate_argnums=0)(params["embed"])
    for shard in doubled.addressable_shards:
        assert np.array_equal(shard.data, 2 * before)


def test_a_tied_head_in_the_file_must_be_the_embedding(tiny: Any, tmp_path: Path) -> None:
    folder, _ = tiny("llama", tie_word_embeddings=True)
    copy = shutil.copytree(folder, tmp_path / "tied")
    stored = load_file(folder / "model.safetensors")
    embed = stored["model.embed_tokens.weight"]
    save_file(stored | {"lm_head.weight": embed}, copy / "model.safetensors")
    assert "head" not in load(copy)[1]
    save_file(stored | {"lm_head.weight": embed + 1}, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight' differs.*tie_word_embeddings"):
        load(copy)


def test_old_rotary_tensors_are_ignored(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "old")
    stored = load_file(llama / "model.safetensors")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(stored | {name: np.ones(4, np.float32)}, copy / "model.safetensors")
    assert equal(load(copy)[1], load(llama)[1])


def test_a_nan_is_no_fault_of_the_file(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "nan")
    stored = load_file(llama / "model.safetensors")
    stored["model.norm.weight"][:2] = np.nan, -np.inf
    save_file(stored, copy / "model.safetensors")
    assert np.array_equal(load(copy, dtype=None)[1]["final_norm"][:2], [np.nan, -np.inf], True)


# --- what is refused -----------------------------------------------------------------------------


def edit_config(**fields: Any) -> Any:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def edit_tensors(change: Any) -> Any:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


def shard(weight_map: Any) -> Any:
    """Puts an index beside the one file."""

    def edit(folder: Path) -> None:
        names = load_file(folder / "model.safetensors")
        entries = {name: "model.safetensors" for name in names}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map(entries)})
        )

    return edit


def truncate(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(3000)


def scramble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 500)


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


UP = "model.layers.1.mlp.up_proj.weight"
QUANTIZED = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
BAD = {
    "missing tensor": (
        edit_tensors(lambda t: t.pop(UP)),
        rf"tensor '{UP}' \(48, 32\) is missing",
    ),
    "wrong shape": (
        edit_tensors(lambda t: t.update({UP: np.zeros((48, 31), np.float32)})),
        rf"'{UP}' has shape \(48, 31\).*\(48, 32\)",
    ),
    "unread tensor": (
        edit_tensors(lambda t: t.update({"model.extra": np.zeros(3, np.float32)})),
        r"'model\.extra' \(3,\) has no place",
    ),
    "unread bias": (
        edit_tensors(lambda t: t.update({UP.replace("weight", "bias"): np.zeros(48, np.float32)})),
        r"up_proj\.bias' \(48,\) has no place",
    ),
    "integer tensor": (
        edit_tensors(lambda t: t.update({UP: np.zeros((48, 32), np.int8)})),
        rf"'{UP}' is stored as I8",
    ),
    "truncated": (truncate, r"model\.safetensors: not a whole safetensors file"),
    "not safetensors": (scramble, r"model\.safetensors: not a whole safetensors file"),
    "pickle only": (pickle_only, r"pytorch_model\.bin.*never opened.*save_pretrained"),
    "no weights": (remove("model.safetensors"), r"no model\.safetensors"),
    "an adapter": (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        "a PEFT adapter, not a model",
    ),
    "no config": (remove("config.json"), r"config\.json: no such file"),
    "config not JSON": (write("config.json", "{oops"), r"config\.json: not readable as JSON"),
    "config a list": (write("config.json", "[]"), r"config\.json: expected a JSON object"),
    "no model_type": (
        write("config.json", "{}"),
        r"config\.json: model_type 'None' has no table.*llama",
    ),
    "unknown family": (edit_config(model_type="opt"), r"model_type 'opt' has no table.*qwen3"),
    "unread config field": (
        edit_config(embedding_multiplier=12.0),
        r"not understood: embedding_multiplier=12\.0",
    ),
    "quantized": (edit_config(**QUANTIZED), "no tensor is quantized"),
    "act": (edit_config(hidden_act="relu6"), "hidden_act 'relu6' is not supported"),
    "rope kind": (
        edit_config(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}),
        "longrope|rope",
    ),
    "heads": (edit_config(num_key_value_heads=3), "multiple of num_key_value_heads 3"),
    "type of field": (edit_config(hidden_size="wide"), r"config\.json: .*hidden_size"),
    "index escape": (
        shard(lambda names: names | {UP: "../other/model.safetensors"}),
        r"'\.\./other/model\.safetensors'.*refused",
    ),
    "index to a pickle": (
        shard(lambda names: names | {UP: "pytorch_model.bin"}),
        r"'pytorch_model\.bin'.*refused",
    ),
    "missing shard": (
        shard(lambda names: names | {UP: "model-2.safetensors"}),
        r"shard model-2\.safetensors is missing",
    ),
    "index of a tensor that is not there": (
        shard(lambda names: names | {"model.more": "model.safetensors"}),
        r"'model\.more' is not in model\.safetensors",
    ),
    "empty index": (shard(lambda names: {}), "has no 'weight_map'"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_folders_are_refused_in_one_line(bad: str, llama: Path, tmp_path: Path) -> None:
    spoil, message = BAD[bad]
    folder = shutil.copytree(llama, tmp_path / "model")
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    ["/no/such/folder", "./no-such", "~/no-such-model", "a/b/c", "org/model.gguf", "my model"],
)
def test_what_looks_local_never_reaches_the_hub(source: str) -> None:
    with pytest.raises(UserError, match="no such model folder or file"):
        load(source)


def test_a_hub_id_offline_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^some-org/some-Model-0\.5B: .*hub"):
        load("some-org/some-Model-0.5B")


def test_a_file_that_is_no_gguf(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a model is a folder"):
        load(llama / "model.safetensors")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03\x00\x00\x00nonsense")
    with pytest.raises(UserError, match="not a whole GGUF file"):
        load(broken)


def test_an_unknown_dtype(llama: Path) -> None:
    with pytest.raises(UserError, match=r"dtype 'bfloat17'.*Did you mean 'bfloat16'"):
        load(llama, dtype="bfloat17")


# --- memory --------------------------------------------------------------------------------------

MEASURE = """
import sys
from pathlib import Path
from mud_puppy.model import load
from mud_puppy.parallel import make_mesh

def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

small, big, *cases = sys.argv[1:]
for case in cases:
    dtype, spec = case.split(":")
    mesh = make_mesh(spec) if spec else None
    load(small, dtype=dtype, mesh=mesh)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = kib("VmRSS")
    _, params = load(big, dtype=dtype, mesh=mesh)
    print(1024 * (kib("VmHWM") - before), 1024 * kib("VmHWM"), flush=True)
    del params
"""


@pytest.fixture(scope="module")
def big(llama: Path, tmp_path_factory: Any) -> tuple[Path, int, int]:
    """(folder, bytes, bytes of its largest tensor) of a llama of about 300 MB in float32, in four
    shards."""
    from mud_puppy.model.names import flatten, hf_names
    from mud_puppy.model.save import write_weights

    folder = tmp_path_factory.mktemp("big")
    fields = json.loads((llama / "config.json").read_text()) | {
        "vocab_size": 8000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 4,
        "head_dim": 256,
    }
    model, shapes = abstract(fields)
    leaves, names = flatten(shapes), hf_names(model.arch, shapes)
    specs = {
        name: (leaves[p].shape[1:] if p.startswith("layers") else leaves[p].shape, np.dtype("f4"))
        for p in leaves
        for name in names[p]
    }
    write_weights(folder, specs, lambda name: np.ones(*specs[name]), 90 * 2**20)
    assert len(list(folder.glob("model-*-of-00004.safetensors"))) == 4
    (folder / "config.json").write_text(json.dumps(fields))
    sizes = [4 * int(np.prod(shape)) for shape, _ in specs.values()]
    return folder, sum(sizes), max(sizes)


def test_host_memory_is_the_model_and_one_tensor(llama: Path, big: tuple[Path, int, int]) -> None:
    """And of the whole process 700 MB more than the model, most of which are libraries; tools/
    bench_load.py says the same of 4 GB."""
    folder, size, largest = big
    assert size > 250e6
    cases = {"float32:": size, "bfloat16:": size // 2, "float32:fsdp=8": size}
    args = [sys.executable, "-c", MEASURE, str(llama), str(folder), *cases]
    done = subprocess.run(args, capture_output=True, text=True, env=os.environ, check=True)
    for line, held in zip(done.stdout.splitlines(), cases.values(), strict=True):
        used, peak = map(int, line.split())
        assert 0.9 * held < used <= 1.2 * held + largest
        assert peak <= held + 700e6
