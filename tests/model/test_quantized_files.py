"""`Codes`, over every layout: stacks of layers and experts, mixtures, and what is no scale."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mud_puppy.errors import UserError
from mud_puppy.export import save_hf
from mud_puppy.kernels import Quantized, dequantize, quantize
from mud_puppy.model import (
    abstract,
    bitsandbytes_format,
    compressed_config,
    compressed_tensors,
    gptq_format,
    init,
    load,
    mxfp4_format,
)
from mud_puppy.model.quantized_files import Codes
from mud_puppy.model.tensors import Stored
from mud_puppy.weights.gptq import round_to_nearest
from tests.model import test_awq_format
from tests.tiny import SIZES

OUT, IN, E = 32, 64, 3
WHERE = Path("folder")
GPTQ = gptq_format.quantization_config(4, 32, False, False, 0.01)
FP8 = compressed_tensors.Scheme(8, "row", type="float")
INT4 = compressed_tensors.Scheme(4, 32, symmetric=False, packed=True)
BNB = bitsandbytes_format.quantization_config(True, "float32", [])


def weight(seed: int, shape: tuple[int, ...] = (OUT, IN)) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def gptq(w: jax.Array) -> dict[str, np.ndarray]:
    found = round_to_nearest(w, bits=4, group=32, symmetric=False)
    codes, scales, zeros = (None if x is None else np.asarray(x) for x in found)
    assert codes is not None and scales is not None
    return gptq_format.pack(codes, scales, zeros, 4)


def awq(w: jax.Array) -> dict[str, np.ndarray]:
    codes, scales, zeros = (
        np.asarray(x).T for x in round_to_nearest(w, bits=4, group=32, symmetric=False)
    )
    words = test_awq_format.words
    return {"qweight": words(codes), "qzeros": words(zeros), "scales": scales.astype(np.float16)}


def compressed(scheme: compressed_tensors.Scheme, w: jax.Array) -> dict[str, np.ndarray]:
    q = quantize(w, "fp8") if scheme == FP8 else quantize(w, "int4", group=32, zero_points=True)
    return compressed_tensors.pack(q, scheme)


def int8(w: jax.Array) -> dict[str, np.ndarray]:
    absmax = np.abs(np.asarray(w)).max(1)
    codes = np.round(np.asarray(w) * 127 / absmax[:, None]).astype(np.int8)
    return {"weight": codes, "SCB": absmax, "weight_format": np.uint8(0)}


def nf4(w: jax.Array, **state: Any) -> dict[str, np.ndarray]:
    tensors = bitsandbytes_format.pack(quantize(w, "nf4", double=True))
    *_, name = tensors
    fields = json.loads(tensors[name].tobytes()) | state
    return tensors | {name: np.frombuffer(json.dumps(fields).encode(), np.uint8)}


def fp8_blocks(w: jax.Array) -> dict[str, np.ndarray]:
    blocks = np.asarray(w).reshape(2, OUT // 2, 2, IN // 2)
    scales = np.abs(blocks).max((1, 3), keepdims=True) / 448
    codes = (blocks / scales).reshape(OUT, IN).astype(ml_dtypes.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales.reshape(2, 2)}


def config_of(scheme: compressed_tensors.Scheme) -> dict[str, Any]:
    return compressed_config.quantization_config({"a": scheme})


# method: the config, a weight's tensors by suffix, the format of the leaf, what joins the suffix
LAYOUTS = {
    "gptq": (GPTQ, gptq, "int4"),
    "awq": (test_awq_format.CONFIG, awq, "int4"),
    "int4": (config_of(INT4), partial(compressed, INT4), "int4"),
    "fp8": (config_of(FP8), partial(compressed, FP8), "fp8_e4m3fn"),
    "fp8 blocks": (
        {"quant_method": "fp8", "weight_block_size": [OUT // 2, IN // 2]},
        fp8_blocks,
        "fp8_e4m3fn",
    ),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, int8, "int8"),
    "nf4": (BNB, nf4, "nf4"),
}
MXFP4 = mxfp4_format.quantization_config([])


def stored(tensors: dict[str, np.ndarray]) -> dict[str, Stored]:
    def read(x: np.ndarray, a: int, b: int, out: np.ndarray) -> None:
        out[...] = x[a:b] if x.ndim else x

    return {
        name: Stored(x.shape, x.dtype, partial(read, x), f"file: tensor '{name}'")
        for name, x in ((name, np.asarray(x)) for name, x in tensors.items())
    }


def expert_names(layers: int = 2) -> list[str]:
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(layers) for e in range(E)]
    return [f"{name}.weight" for name in names]


def files(pack: Any, names: list[str]) -> dict[str, np.ndarray]:
    """The tensors of the weights of these names, each of its own numbers."""
    return {
        f"{name.removesuffix('.weight')}.{suffix}": x
        for seed, name in enumerate(names)
        for suffix, x in pack(weight(seed)).items()
    }


LEAF = "layers/0/0/mlp/up_proj/weight"
NAMES = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]


def codes_of(config: Any, tensors: Any, names: list[str] = NAMES, leaf: str = LEAF) -> Codes:
    return Codes(WHERE, config, {leaf: names}, stored(tensors))


def test_every_layout_is_kept_in_codes(caplog: Any) -> None:
    for method, (config, pack, format) in LAYOUTS.items():
        codes = codes_of(config, files(pack, NAMES))
        assert len(caplog.records) == (method == "fp8 blocks")  # of its inputs
        caplog.clear()
        layers = [*codes.read(LEAF, (2, OUT, IN), "float32")]
        assert [w.format for w in layers] == [format] * 2
        for seed, w in enumerate(layers):
            error = np.abs(dequantize(w) - weight(seed)).max()
            assert error < 0.5 and np.abs(dequantize(w) - weight(seed + 1)).max() > 1


@pytest.mark.parametrize("method", LAYOUTS)
def test_experts_are_stacked_in_each_layer(method: str) -> None:
    config, pack, format = LAYOUTS[method]
    leaf, names = "layers/0/0/mlp/experts/up_proj/weight", expert_names()
    codes = codes_of(config, files(pack, names), names, leaf)
    layers = [*codes.read(leaf, (2, E, OUT, IN), "float32")]
    assert [(w.format, w.shape) for w in layers] == [(format, (E, OUT, IN))] * 2
    flat = [w for layer in layers for w in dequantize(layer)]
    errors = [[np.abs(w - weight(seed)).max() for seed in range(2 * E)] for w in flat]
    assert np.argmin(errors, axis=1).tolist() == [*range(2 * E)]


def test_experts_of_one_tensor() -> None:
    names = [f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(2)]
    leaf = "layers/0/0/mlp/experts/gate_up_proj/weight"
    packed = [mxfp4_format.pack(quantize(weight(i, (E, OUT, IN)), "mxfp4")) for i in range(2)]
    tensors = {
        f"{name}_{s}": x for name, p in zip(names, packed, strict=True) for s, x in p.items()
    }
    codes = codes_of(MXFP4, tensors, names, leaf)
    assert codes.parts == {name: [f"{name}_blocks", f"{name}_scales"] for name in names}
    for i, w in enumerate(codes.read(leaf, (2, E, OUT, IN), "float32")):
        want = quantize(weight(i, (E, OUT, IN)), "mxfp4")
        np.testing.assert_array_equal(w.codes, want.codes)
        np.testing.assert_array_equal(w.scales, want.scales)
    tensors[f"{names[1]}_scales"] = np.full((E, OUT, 2), 255, np.uint8)
    with pytest.raises(UserError, match=rf"{names[1]}: scales holds a scale that is NaN"):
        [*codes_of(MXFP4, tensors, names, leaf).read(leaf, (2, E, OUT, IN), "float32")]


# --- what becomes floats -------------------------------------------------------------------------


def test_a_layer_in_floats_beside_codes(caplog: Any) -> None:
    tensors = files(gptq, NAMES[:1]) | {NAMES[1]: np.asarray(weight(1), ml_dtypes.bfloat16)}
    codes = codes_of(GPTQ, tensors)
    assert [*codes.parts] == NAMES[:1]
    first, second = codes.read(LEAF, (2, OUT, IN), "float32")
    (kept,) = codes_of(GPTQ, tensors, NAMES[:1]).read(LEAF, (1, OUT, IN), "float32")
    np.testing.assert_array_equal(first, dequantize(kept))
    np.testing.assert_array_equal(second, weight(1).astype(jnp.bfloat16).astype(jnp.float32))
    (line,) = caplog.messages
    assert line == (
        "folder: 1 of 1 quantized weights are decoded to floats: the layers or experts of one "
        "weight are stored in different ways"
    )
    tensors[NAMES[1]] = tensors[NAMES[1]][:3]
    with pytest.raises(UserError, match=r"up_proj\.weight' has shape \(3, 64\), expected"):
        [*codes_of(GPTQ, tensors).read(LEAF, (2, OUT, IN), "float32")]


def test_groups_out_of_order_and_a_router(caplog: Any) -> None:
    router = "layers/0/0/mlp/router"
    gates = [f"model.layers.{i}.mlp.gate.weight" for i in range(2)]
    tensors = files(gptq, [*NAMES, *gates])
    shuffled = np.random.default_rng(0).permutation(tensors[NAMES[1][:-6] + "g_idx"])
    tensors[NAMES[1][:-6] + "g_idx"] = shuffled
    codes = Codes(WHERE, GPTQ, {LEAF: NAMES, router: gates}, stored(tensors))
    for leaf in (LEAF, router):
        assert codes.holds(leaf)
        layers = [*codes.read(leaf, (2, OUT, IN), "bfloat16")]
        assert {(x.dtype.name, x.shape) for x in layers} == {("bfloat16", (OUT, IN))}
    assert np.abs(layers[0] - weight(2)).max() < 0.5
    (line,) = caplog.messages
    assert "2 of 4 quantized weights are decoded to floats: their groups are not in the" in line
    assert "; 2 of 4 quantized weights are decoded to floats: here they are no linears" in line


def test_fp4_and_blocks_over_the_ends_of_rows(caplog: Any) -> None:
    def fp4(w: jax.Array) -> dict[str, np.ndarray]:
        tensors = nf4(w, quant_type="fp4")
        *_, name = tensors
        tensors["weight.quant_map"] = np.linspace(-1, 1, 16, dtype=np.float32)
        return {n.replace("__nf4", "__fp4"): x for n, x in tensors.items() if n != name} | {
            name.replace("__nf4", "__fp4"): tensors[name]
        }

    got, again = codes_of(BNB, files(fp4, NAMES)).read(LEAF, (2, OUT, IN), "float32")
    q = quantize(weight(0), "nf4", double=True)
    codes = np.stack([q.codes >> 4, q.codes & 15], -1).reshape(OUT, IN)
    assert again.shape == (OUT, IN)
    ones = Quantized(q.codes, q.scales, nested=q.nested, offset=q.offset, dtype=jnp.float32)
    scale = dequantize(ones) / bitsandbytes_format.NF4[codes]
    want = np.linspace(-1, 1, 16, dtype=np.float32)[codes] * scale
    known = codes != 7  # nf4's zero says nothing of the scale
    np.testing.assert_allclose(got[known], want[known], rtol=1e-5)
    assert "2 of 2 quantized weights are decoded to floats: no format here has" in caplog.text
    caplog.clear()
    # Rows of 96 and blocks of 64: one and a half.
    flat = quantize(weight(0, (1, 96 * OUT)), "nf4", double=True)
    long = bitsandbytes_format.pack(flat)
    *_, name = long
    fields = json.loads(long[name].tobytes()) | {"shape": [OUT, 96]}
    long[name] = np.frombuffer(json.dumps(fields).encode(), np.uint8)
    tensors = {f"{NAMES[0][:-7]}.{suffix}": x for suffix, x in long.items()}
    (got,) = codes_of(BNB, tensors, NAMES[:1]).read(LEAF, (1, OUT, 96), "float32")
    want = dequantize(flat, jnp.float32).reshape(OUT, 96)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert "their blocks of 64 run over the ends of rows" in caplog.text


# --- files that are no checkpoint ----------------------------------------------------------------


def scale_tensors() -> list[Any]:
    cases = []
    for method, (_, pack, _) in LAYOUTS.items():
        for suffix, x in pack(weight(0)).items():
            if x.dtype.kind == "f" and x.dtype != ml_dtypes.float8_e4m3fn:
                cases.append((method, suffix))
    return cases


@pytest.mark.parametrize(("method", "suffix"), scale_tensors())
@pytest.mark.parametrize("fault", ["nan", "inf", "shape"])
def test_a_scale_that_is_none(method: str, suffix: str, fault: str) -> None:
    config, pack, _ = LAYOUTS[method]
    tensors = files(pack, NAMES)
    name = f"{NAMES[1].removesuffix('.weight')}.{suffix}"
    bad = tensors[name].copy()
    bad.reshape(-1)[-1] = np.nan if fault == "nan" else np.inf
    tensors[name] = bad if fault != "shape" else np.ones((5, *bad.shape), bad.dtype)
    at = {"shape": rf"model\.layers\.1\.mlp\.up_proj\.weight: .*{suffix}"}
    message = at.get(fault, rf"tensor '{name}' holds a NaN or an infinity")
    with pytest.raises(UserError, match=message) as caught:
        [*codes_of(config, tensors).read(LEAF, (2, OUT, IN), "float32")]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", LAYOUTS)
def test_any_tensor_of_another_shape_is_one_line(method: str) -> None:
    config, pack, _ = LAYOUTS[method]
    tensors = files(pack, NAMES[:1])
    for name, x in tensors.items():
        for bad in (np.zeros((), x.dtype), np.zeros((0,), x.dtype), np.zeros((2, 3, 1), x.dtype)):
            if bad.shape == x.shape:
                continue
            with pytest.raises(UserError) as caught:
                found = codes_of(config, tensors | {name: bad}, NAMES[:1])
                [*found.read(LEAF, (1, OUT, IN), "float32")]
            assert "\n" not in str(caught.value)


def test_a_missing_part_and_a_bitsandbytes_order() -> None:
    tensors = files(int8, NAMES)
    config = LAYOUTS["int8"][0]
    bad = {name: x for name, x in tensors.items() if name != NAMES[1]}
    with pytest.raises(UserError, match=rf"tensor '{NAMES[1]}' is missing"):
        codes_of(config, bad)
    tensors[NAMES[0].replace("weight", "weight_format")] = np.asarray(np.uint8(2))
    with pytest.raises(UserError, match="weight_format is 2: only weights in rows"):
        [*codes_of(config, tensors).read(LEAF, (2, OUT, IN), "float32")]


# --- a whole model -------------------------------------------------------------------------------


def test_experts_of_a_model_in_gptq(tmp_path: Path) -> None:
    fields = SIZES | {
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }
    model, _ = abstract(fields)
    params = init(model.arch, jax.random.key(0))
    save_hf(model, params, tmp_path, dtype="float32")
    tensors = load_file(tmp_path / "model.safetensors")
    floats = dict(tensors)
    for name in [name for name in tensors if ".experts." in name]:
        parts = gptq(jnp.asarray(tensors.pop(name)))
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{suffix}": x for suffix, x in parts.items()}
        leaf = gptq_format.read(parts, floats[name].shape, GPTQ, "float32")
        floats[name] = np.array(dequantize(jax.tree.map(jnp.asarray, leaf)))
    save_file(floats, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, want = load(tmp_path, dtype="float32")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": GPTQ}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, params = load(tmp_path, dtype="float32")
    experts = params["layers"][0][0]["mlp"]["experts"]
    assert {w["weight"].format for w in experts.values()} == {"int4"}
    assert experts["up_proj"]["weight"].shape == (2, 4, 32, 64)
    floats = want["layers"][0][0]["mlp"]["experts"]
    for name, own in experts.items():
        values = dequantize(own["weight"])
        np.testing.assert_array_equal(values, floats[name]["weight"])
        assert np.abs(values[:, ::-1] - floats[name]["weight"]).max() > 0.1  # other experts
    logits = model(params, jnp.arange(24, dtype=jnp.int32)[None])
    assert np.isfinite(logits).all()
