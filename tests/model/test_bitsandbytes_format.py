"""bitsandbytes' nf4: the bits by their definition, both ways; its config; the library's reading.

The slow tests need transformers, and the folder that MUD_PUPPY_BNB names:
`pip install --no-deps --target FOLDER bitsandbytes==0.50.2`.
"""

import json
import os
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
from mud_puppy.kernels import Quantized, dequantize, quantize
from mud_puppy.model import load
from mud_puppy.model.bitsandbytes_format import (
    check_config,
    pack,
    quantization_config,
    read,
    suffixes,
)
from mud_puppy.model.names import flatten

SHAPE = (40, 1024)  # 640 blocks: two whole blocks of absmax and a part of one
STATE = "weight.quant_state.bitsandbytes__nf4"
NAMES = ("codes", "scales", "nested", "offset")


def weight(out: int = SHAPE[0], size: int = SHAPE[1]) -> jax.Array:
    values = np.random.default_rng(0).normal(size=(out, size), scale=0.02)
    return jnp.asarray(values, jnp.float32)


def values(tensors: dict[str, np.ndarray], low_first: bool = False) -> np.ndarray:
    """The weight that the tensors stand for, element by element, from the layout's definition."""
    state = json.loads(tensors[STATE].tobytes().decode())
    absmax = tensors["weight.absmax"]
    if "nested_blocksize" in state:
        block = np.arange(absmax.size) // state["nested_blocksize"]
        absmax = tensors["weight.nested_quant_map"][absmax] * tensors["weight.nested_absmax"][block]
        absmax = absmax + np.float32(state["nested_offset"])
    flat = []
    for byte in tensors["weight"].reshape(-1).tolist():
        pair = [byte // 16, byte % 16]
        flat += pair[::-1] if low_first else pair
    codes = np.array(flat)
    scales = absmax[np.arange(codes.size) // state["blocksize"]]
    return (tensors["weight.quant_map"][codes] * scales).reshape(state["shape"])


@pytest.mark.parametrize("group", [32, 64, 1024])
@pytest.mark.parametrize("double", [False, True])
def test_the_bits_stand_for_the_weight_and_come_back(double: bool, group: int) -> None:
    q = quantize(weight(), "nf4", double=double, group=group)
    tensors = pack(q)
    assert tuple(tensors) == suffixes(double)
    assert tensors["weight"].shape == (40 * 512, 1) and tensors["weight"].dtype == np.uint8
    assert tensors["weight.absmax"].shape == (40 * 1024 // group,)
    np.testing.assert_array_equal(values(tensors), dequantize(q, jnp.float32))
    back = read(tensors, SHAPE, "bfloat16")
    assert (back.format, back.dtype, back.shape) == ("nf4", jnp.bfloat16, SHAPE)
    for name in NAMES:
        ours, theirs = getattr(q, name), getattr(back, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours is None or np.array_equal(ours, theirs), name


def test_the_other_order_of_nibbles_is_another_weight() -> None:
    q = quantize(weight(), "nf4")
    other = values(pack(q), low_first=True)
    assert np.abs(other - dequantize(q, jnp.float32)).max() > 0.02


def test_a_block_by_hand() -> None:
    # The largest is 2: 2 is code 15, -2 is code 0, 0 is code 7, and 0.66 / 2 is next to code 11's.
    w = jnp.zeros((1, 64)).at[0, :3].set(jnp.array([2, -2, 0.66]))
    tensors = pack(quantize(w, "nf4"))
    assert tensors["weight"].reshape(-1).tolist() == [0xF0, 0xB7, *[0x77] * 30]
    assert tensors["weight.absmax"].tolist() == [2]
    assert tensors["weight.quant_map"][[0, 7, 15]].tolist() == [-1, 0, 1]
    text = '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [1, 64]}'
    assert tensors[STATE].tobytes().decode() == text


def test_a_storage_dtype_only_labels_the_bytes() -> None:
    q = quantize(weight(), "nf4")
    tensors = pack(q)
    labelled = tensors | {"weight": tensors["weight"].reshape(-1).view(np.float32)[:, None]}
    assert np.array_equal(read(labelled, SHAPE, "float32").codes, q.codes)


def state(double: bool = False, **fields: Any) -> dict[str, np.ndarray]:
    entries = json.loads(pack(quantize(weight(), "nf4", double=double))[STATE].tobytes()) | fields
    return {STATE: np.frombuffer(json.dumps(entries).encode(), np.uint8)}


ONES = np.ones(16, np.float32)


@pytest.mark.parametrize(
    ("double", "change", "message"),
    [
        (False, {"SCB": ONES}, "expected the tensors of bitsandbytes' nf4 .*got SCB"),
        (False, {"weight": np.zeros((100, 1), np.uint8)}, "holds 100 bytes, expected 20480"),
        (False, {"weight.absmax": ONES}, r"weight.absmax is float32\[16\], expected float32\[640"),
        (False, {"weight.absmax": np.ones(640, np.uint8)}, r"absmax is uint8.*expected float32"),
        (True, {"weight.absmax": np.ones(640, np.float32)}, r"absmax is float32.*expected uint8"),
        (True, {"weight.nested_absmax": ONES}, r"nested_absmax is .*expected float32\[3\]"),
        (False, {"weight.quant_map": ONES}, "quant_map is not bitsandbytes' own"),
        (True, {"weight.nested_quant_map": np.ones(256, np.float32)}, "nested_quant_map is not"),
        (False, {STATE: np.zeros(3, np.uint8)}, "not the JSON of bitsandbytes"),
        (False, state(quant_type="fp4"), "bitsandbytes__nf4 says fp4"),
        (False, state(blocksize=48), "in blocks of 48"),
        (False, state(quant_type="int4"), "quant_state says int4 in blocks"),
        (True, state(double=True, nested_offset=float("nan")), "says nested_offset nan"),
        (False, state(shape=[1024, 40]), r"says shape \(1024, 40\), expected \(40, 1024\)"),
        (False, state(shape=None), "not the JSON of bitsandbytes"),
        (True, state(), "nested_blocksize is None, not 256"),
        (True, state(double=True, nested_offset=None), "not the JSON of bitsandbytes"),
        (True, state(double=True, nested_blocksize=64), "nested_blocksize is 64, not 256"),
    ],
)
def test_tensors_that_do_not_fit(double: bool, change: dict, message: str) -> None:
    tensors = pack(quantize(weight(), "nf4", double=double))
    read(tensors, SHAPE, "float32")
    with pytest.raises(UserError, match=message) as caught:
        read(tensors | change, SHAPE, "float32")
    assert "\n" not in str(caught.value)


def test_weights_without_a_layout() -> None:
    for q in (quantize(weight(), "int4"), quantize(weight(), "nf4", group=16)):
        with pytest.raises(UserError, match=f"not {q.format} with groups of {q.group}"):
            pack(q)


def test_the_config() -> None:
    config = quantization_config(True, "bfloat16", ["model.layers.0.mlp.up_proj"])
    check_config(json.loads(json.dumps(config)))
    assert config["llm_int8_skip_modules"] == ["model.layers.0.mlp.up_proj", "lm_head"]
    assert quantization_config(False, "float32", [], head=True)["llm_int8_skip_modules"] == []
    assert quantization_config(False, "float32", ["lm_head"])["llm_int8_skip_modules"] == [
        "lm_head"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bnb_4bit_quant_type": "af4"}, "bitsandbytes' af4; nf4 and fp4 load"),
        ({"load_in_4bit": False}, "neither load_in_4bit nor load_in_8bit"),
    ],
)
def test_what_is_not_read_is_refused(change: dict, message: str) -> None:
    config = quantization_config(False, "float32", [])
    with pytest.raises(UserError, match=message):
        check_config(config | change)


# --- the library ---------------------------------------------------------------------------------

QUANTIZE = """
import bitsandbytes.functional as F, sys, torch
from safetensors.torch import load_file, save_file
w = load_file(sys.argv[1] + "/in.safetensors")["w"]
for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
    for double in (False, True):
        codes, state = F.quantize_4bit(w.to(dtype), quant_type="nf4", compress_statistics=double)
        tensors = {"weight": codes}
        tensors |= {f"weight.{n}": x for n, x in state.as_dict(packed=True).items()}
        tensors["value"] = F.dequantize_4bit(codes, state).float()
        save_file(tensors, f"{sys.argv[1]}/{name}{double}.safetensors")
"""
LOGITS = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM
source, folder, double = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
tokens = load_file(folder + "/tokens.safetensors")["tokens"].long()
ours = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                            bnb_4bit_use_double_quant=double)
theirs = LlamaForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
theirs.save_pretrained(folder + "/theirs")
for module in [*ours.modules(), *theirs.modules()]:
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False  # its products are bfloat16's
with torch.no_grad():
    logits = {"ours": ours(tokens).logits, "theirs": theirs.eval()(tokens).logits}
kinds = {type(m).__name__ for n, m in ours.named_modules() if "proj" in n}
assert kinds == {"Linear4bit"}, kinds
save_file(logits, folder + "/logits.safetensors")
"""


def run(script: str, *args: Any) -> None:
    folder = os.environ.get("MUD_PUPPY_BNB", "")
    if not (Path(folder) / "bitsandbytes").exists():
        pytest.fail("pip install --no-deps --target FOLDER bitsandbytes, then MUD_PUPPY_BNB=FOLDER")
    command = [sys.executable, "-c", script, *map(str, args)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": folder}
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_library_writes_the_same_bits(tmp_path: Path) -> None:
    w = weight()
    save_file({"w": np.asarray(w)}, tmp_path / "in.safetensors")
    run(QUANTIZE, tmp_path)
    for dtype in ("float32", "bfloat16"):
        for double in (False, True):
            theirs = load_file(tmp_path / f"{dtype}{double}.safetensors")
            value = theirs.pop("value")
            # What they wrote is read as what they meant, and written again bit for bit.
            q = read(theirs, SHAPE, dtype)
            np.testing.assert_array_equal(dequantize(jax.tree.map(jnp.asarray, q)), value)
            again = pack(q)
            assert set(again) == set(theirs)
            assert all(again[n].tobytes() == x.tobytes() for n, x in theirs.items())
            ours = pack(quantize(w.astype(dtype), "nf4", double=double))
            # Their mean sums in another order, which can move a scale's code by one.
            loose = {STATE, "weight.nested_absmax", "weight.absmax"} if double else set()
            for name in set(theirs) - loose:
                assert ours[name].tobytes() == theirs[name].tobytes(), (dtype, double, name)
            if double:
                absmax = ours["weight.absmax"].astype(int) - theirs["weight.absmax"]
                assert np.abs(absmax).max() <= 1 and np.mean(absmax != 0) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_transformers_computes_our_logits(
    double: bool, tied: bool, tiny: Any, tokens: Any, write_quantized: Any, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    source, float_logits = tiny("llama", tie_word_embeddings=tied, **sizes)
    model, params = load(source, dtype="float32")

    def change(path: tuple, w: Any) -> Any:
        encode = jax.vmap(lambda x: quantize(x, "nf4", double=double))
        return encode(w) if "proj" in jax.tree_util.keystr(path) else w

    params = jax.tree.map_with_path(change, params)
    write_quantized(model, params, pack, lambda modules: quantization_config(double, "float32", []))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    run(LOGITS, source, tmp_path, double)
    logits = load_file(tmp_path / "logits.safetensors")
    ours = np.asarray(model(params, jnp.asarray(tokens)))
    largest = np.abs(ours).max()
    assert np.abs(ours - logits["ours"]).max() <= 1e-3 * largest
    assert np.abs(float_logits - logits["ours"]).max() > 1e-2 * largest
    # What transformers quantizes and saves itself is read as the same weights.
    assert np.abs(ours - logits["theirs"]).max() <= (1e-2 if double else 1e-3) * largest
    saved, own = load_file(tmp_path / "theirs/model.safetensors"), flatten(params)
    module = "model.layers.2.mlp.down_proj"
    entries = {n: saved[f"{module}.{n}"] for n in suffixes(double)}
    q: Quantized = own["layers/0/0/mlp/down_proj/weight"]
    got = read(entries, (64, 128), "float32")
    assert np.array_equal(got.codes, q.codes[2])
    steps = np.abs(np.asarray(got.scales, np.float32) - np.asarray(q.scales[2], np.float32))
    assert steps.max() <= (1 if double else 0)
    check_config(json.loads((tmp_path / "theirs/config.json").read_text())["quantization_config"])
