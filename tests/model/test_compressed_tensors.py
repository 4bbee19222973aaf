"""compressed-tensors: the bits by their definition, both ways, and the library's reading.

The slow tests need the extra `quant` (compressed-tensors).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized, dequantize, quantize
from mud_puppy.model import load
from mud_puppy.model.compressed_config import quantization_config
from mud_puppy.model.compressed_tensors import Scheme, pack, read, scheme_of, suffixes
from mud_puppy.weights import Int8Dynamic, int8_dynamic
from mud_puppy.weights.gptq import round_to_nearest, to_quantized

RNG = np.random.default_rng(0)
LEAVES = {
    "int8 row": lambda w: quantize(w, "int8"),
    "int8 group": lambda w: quantize(w, "int8", group=16),
    "int8 tensor": lambda w: quantize(w, "int8", group="tensor"),
    "int8 zeros": lambda w: to_quantized(
        *round_to_nearest(w + 0.5, bits=8, group=16, symmetric=False), 8, jnp.float32
    ),
    "int8 dynamic": lambda w: int8_dynamic(quantize(w, "int8")),
    "int4 group": lambda w: quantize(w, "int4", group=16),
    "int4 row": lambda w: quantize(w, "int4", group=w.shape[-1]),
    "int4 zeros": lambda w: quantize(w + 0.5, "int4", group=16, zero_points=True),
    "int4 dynamic": lambda w: int8_dynamic(quantize(w, "int4", group=16)),
    "int4 dynamic zeros": lambda w: int8_dynamic(
        quantize(w + 0.5, "int4", group=16, zero_points=True)
    ),
    "fp8 row": lambda w: quantize(w, "fp8"),
    "fp8 tensor": lambda w: quantize(w, "fp8", group="tensor"),
    "mxfp4": lambda w: quantize(w, "mxfp4"),
}
FLOATS = ("fp8 row", "fp8 tensor", "mxfp4")
# None: as `scheme_of` decides, which for floats is all there is.
CASES = [(k, p) for k in LEAVES for p in (None, True, False) if p is None or k not in FLOATS]
OUT, SIZE = 12, 96


def weight(out: int = OUT, size: int = SIZE) -> jax.Array:
    return jnp.asarray(RNG.normal(size=(out, size)), jnp.float32)


def quantized(leaf: Any) -> Quantized:
    return leaf.base if isinstance(leaf, Int8Dynamic) else leaf


def bits_of(words: np.ndarray, bits: int, n: int, lowest_first: bool = True) -> np.ndarray:
    """Codes from int32 words by the definition: each row is one long number in base 2."""
    rows = []
    for row in words.astype(np.uint32):
        number = sum(int(word) << (32 * i) for i, word in enumerate(row))
        codes = [(number >> (bits * i)) & (2**bits - 1) for i in range(n)]
        rows.append(codes if lowest_first else codes[::-1])
    return np.array(rows) - 2 ** (bits - 1)


def float_of(code: int, exponent_bits: int, fraction_bits: int) -> float:
    """The value of a sign, an exponent and a fraction by IEEE 754's definition, without NaN."""
    sign, rest = divmod(code, 2 ** (exponent_bits + fraction_bits))
    exponent, fraction = divmod(rest, 2**fraction_bits)
    bias, unit = 2 ** (exponent_bits - 1) - 1, 2.0**-fraction_bits
    value = fraction * unit * 2.0 ** (1 - bias)
    if exponent:
        value = (1 + fraction * unit) * 2.0 ** (exponent - bias)
    return -value if sign else value


def float_values(tensors: dict[str, np.ndarray], lowest_first: bool) -> np.ndarray:
    """As `values`, of fp8 (E4M3) and mxfp4 (E2M1 with scales of E8M0)."""
    scales = tensors["weight_scale"].reshape(-1, tensors["weight_scale"].shape[-1])
    if "weight" in tensors:
        rows = tensors["weight"].view(np.uint8).tolist()
        decoded = np.array([[float_of(code, 4, 3) for code in row] for row in rows])
        return (decoded.astype(np.float32) * scales).astype(np.float32)
    pairs = [[[byte % 16, byte // 16] for byte in row] for row in tensors["weight_packed"].tolist()]
    if not lowest_first:
        pairs = [[pair[::-1] for pair in row] for row in pairs]
    decoded = np.array([[float_of(code, 2, 1) for pair in row for code in pair] for row in pairs])
    scales = np.repeat(2.0 ** (scales.astype(np.float64) - 127), 32, axis=1)
    return (decoded * scales).astype(np.float32)


def values(tensors: dict[str, np.ndarray], scheme: Scheme, **order: bool) -> np.ndarray:
    """The weight that the tensors stand for, computed apart from the code under test."""
    if scheme.type == "float":
        return float_values(tensors, order.get("lowest_first", True))
    scales = tensors["weight_scale"].reshape(-1, tensors["weight_scale"].shape[-1])
    zeros = 0
    if scheme.packed:
        out, size = tensors["weight_shape"]
        codes = bits_of(tensors["weight_packed"], scheme.bits, size, **order)
        if not scheme.symmetric:
            zeros = bits_of(tensors["weight_zero_point"].T, scheme.bits, out, **order).T
    else:
        codes = tensors["weight"].astype(np.int64)
        zeros = 0 if scheme.symmetric else tensors["weight_zero_point"].astype(np.int64)
    span = codes.shape[1] // scales.shape[1]
    zeros = np.repeat(zeros, span, axis=1) if not scheme.symmetric else 0
    return ((codes - zeros) * np.repeat(scales, span, axis=1)).astype(np.float32)


@pytest.mark.parametrize(("kind", "packed"), CASES)
def test_the_bits_stand_for_the_weight_and_come_back(kind: str, packed: bool | None) -> None:
    leaf = LEAVES[kind](weight())
    q, scheme = quantized(leaf), scheme_of(leaf, packed)
    tensors = pack(q, scheme)
    assert tuple(tensors) == suffixes(scheme)
    np.testing.assert_array_equal(values(tensors, scheme), dequantize(q, jnp.float32))
    back = read(tensors, (OUT, SIZE), scheme, "float32")
    assert (back.format, back.dtype) == (q.format, q.dtype)
    for name in ("codes", "scales", "zeros"):
        ours, theirs = getattr(q, name), getattr(back, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or np.array_equal(ours, theirs), name


@pytest.mark.parametrize("kind", ["int4 group", "mxfp4"])
def test_the_other_order_of_bits_is_another_weight(kind: str) -> None:
    q = LEAVES[kind](weight())
    tensors = pack(q, scheme_of(q))
    other = values(tensors, scheme_of(q), lowest_first=False)
    assert np.abs(other - dequantize(q, jnp.float32)).max() > 0.1


def test_a_word_by_hand() -> None:
    codes = jnp.array([[0, 1, 2, 3, 4, 5, 6, 15]], jnp.uint8)
    pairs = (codes[:, ::2] << 4) | codes[:, 1::2]
    q = Quantized(pairs, jnp.ones((1, 1)), format="int4", dtype=jnp.dtype("float32"))
    tensors = pack(q, scheme_of(q))
    assert tensors["weight_packed"].view(np.uint32).tolist() == [[0xF6543210]]
    assert tensors["weight_shape"].tolist() == [1, 8] and tensors["weight_shape"].dtype == np.int64


def test_floats_by_hand() -> None:
    # 1 is 0x38 in E4M3 (7 is the bias), and 448 its largest; E2M1: 1 is 2, -6 is 15, 0.5 is 1.
    scheme = Scheme(8, "tensor", type="float")
    codes = jnp.array([[0x38, 0x7E, 0xB8]], jnp.uint8)
    q = Quantized(codes, jnp.ones((1, 1)), format="fp8_e4m3fn", dtype=jnp.dtype("float32"))
    tensors = pack(q, scheme)
    assert tensors["weight"].dtype.name == "float8_e4m3fn"
    assert tensors["weight"].astype(np.float32).tolist() == [[1, 448, -1]]
    assert tensors["weight_scale"].tolist() == [1]
    w = jnp.zeros((1, 32)).at[0, :3].set(jnp.array([2, -12, 1]))
    tensors = pack(quantize(w, "mxfp4"), Scheme(4, 32, packed=True, type="float"))
    assert tensors["weight_packed"].tolist() == [[0xF2, 0x01, *[0] * 14]]
    assert tensors["weight_scale"].tolist() == [[128]]


def test_sizes_that_fill_no_word() -> None:
    w = weight(5, 18)
    for leaf in (quantize(w, "int4", group=6, zero_points=True), quantize(w, "int8")):
        scheme = scheme_of(leaf, True)
        tensors = pack(leaf, scheme)
        words = tensors["weight_packed"].shape[1]
        assert words == -(-18 * scheme.bits // 32)
        back = jax.tree.map(jnp.asarray, read(tensors, (5, 18), scheme, "float32"))
        np.testing.assert_array_equal(dequantize(back), dequantize(leaf))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": np.ones((12, 2), np.float32)}, r"weight_scale is float32\[12, 2\]"),
        ({"weight_packed": np.zeros((12, 5), np.int32)}, r"weight_packed is .*\[12, 5\], expected"),
        ({"weight_packed": np.zeros((12, 12), np.int64)}, "weight_packed is int64"),
        ({"weight_shape": np.array([96, 12])}, "weight_shape says"),
        ({"weight_g_idx": np.zeros(96, np.int32)}, "expected weight_packed.*weight_g_idx"),
    ],
)
def test_tensors_that_do_not_fit(change: dict, message: str) -> None:
    q = quantize(weight(), "int4", group=16)
    with pytest.raises(UserError, match=message):
        read(pack(q, scheme_of(q)) | change, (OUT, SIZE), scheme_of(q), "float32")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("fp8 row", {"weight": np.zeros((OUT, SIZE), np.int8)}, "weight is int8.*float8_e4m3fn"),
        ("fp8 row", {"weight_scale": np.ones(1, np.float32)}, r"float32\[1\], expected \[12, 1\]"),
        ("fp8 tensor", {"weight_scale": np.ones((12, 1), np.float32)}, r"expected \[1\]"),
        ("fp8 row", {"weight_packed": np.zeros(3)}, "expected weight, weight_scale; got"),
        ("mxfp4", {"weight_packed": np.zeros((12, 12), np.int32)}, "weight_packed is int32"),
        ("mxfp4", {"weight_scale": np.ones((12, 3), np.float32)}, "weight_scale is float32"),
        ("mxfp4", {"weight_scale": np.full((12, 3), 255, np.uint8)}, "weight_scale holds .* NaN"),
        ("mxfp4", {"weight_shape": np.array([12, 96])}, "expected weight_packed, weight_scale; "),
    ],
)
def test_floats_that_do_not_fit(kind: str, change: dict, message: str) -> None:
    q = LEAVES[kind](weight())
    with pytest.raises(UserError, match=message):
        read(pack(q, scheme_of(q)) | change, (OUT, SIZE), scheme_of(q), "float32")


def test_formats_without_a_layout() -> None:
    minimum = dataclasses.replace(quantize(weight(), "int4", group=16), minimum=jnp.zeros((12, 6)))
    for leaf in (quantize(weight(), "nf4", group=16), quantize(weight(), "fp8_e5m2"), minimum):
        with pytest.raises(UserError, match="compressed-tensors holds int8, int4, fp8_e4m3fn and"):
            scheme_of(leaf)
    with pytest.raises(UserError, match="holds no fp8_e4m3fn in groups of 16"):
        scheme_of(quantize(weight(), "fp8", group=16))


# --- the library ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "packed"), [case for case in CASES if case[1] is not False])
def test_transformers_computes_our_logits(
    kind: str,
    packed: bool | None,
    llama: Any,
    tiny: Any,
    tokens: Any,
    write_quantized: Any,
    tmp_path: Any,
) -> None:
    import torch
    from transformers import LlamaForCausalLM

    if "zeros" in kind:
        # transformers 5.23 with compressed-tensors 0.20 reports packed zero points as a mismatch.
        packed = False
    # Rows of 48 are no multiple of mxfp4's groups.
    folder = tiny("llama", intermediate_size=64)[0] if kind == "mxfp4" else llama
    model, params = load(folder, dtype="float32")
    encode, tokens = LEAVES[kind], jnp.asarray(tokens)

    def change(path: tuple, w: Any) -> Any:
        named = jax.tree_util.keystr(path)
        return jax.vmap(encode)(w) if "layers" in named and "proj" in named else w

    params = jax.tree.map_with_path(change, params)
    write_quantized(
        model,
        params,
        lambda leaf: pack(quantized(leaf), scheme_of(leaf, packed)),
        lambda modules: quantization_config(
            {name: scheme_of(leaf, packed) for name, leaf in modules.items()}
        ),
    )
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    if kind == "mxfp4":
        # The library decompresses it to bfloat16, which holds it exactly.
        theirs.hf_quantizer.compressor.decompress_model(theirs)
        torch.nn.Module.float(theirs)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.array(tokens), dtype=torch.long)).logits.numpy()
    ours = np.asarray(model(params, tokens))
    # The library divides a token's largest by 127.5, vLLM and this project by 127.
    allowed = 2e-2 if "dynamic" in kind else 1e-3
    assert np.abs(ours - expected).max() <= allowed * np.abs(expected).max()
    float_logits = np.asarray(model(load(folder, dtype="float32")[1], tokens))
    assert np.abs(float_logits - expected).max() > 3e-3 * np.abs(expected).max()


def without_minus_zero(pairs: np.ndarray) -> np.ndarray:
    low, high = pairs & 15, pairs >> 4
    return np.where(low == 8, 0, low) | (np.where(high == 8, 0, high) << 4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "packed"), [case for case in CASES if case[1] is not False])
def test_the_library_decompresses_and_compresses_alike(kind: str, packed: bool | None) -> None:
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    leaf = LEAVES[kind](weight())
    q, scheme = quantized(leaf), scheme_of(leaf, packed)
    config = QuantizationConfig(**quantization_config({"a": scheme}))
    (theirs,) = config.config_groups.values()
    assert set(config.to_dict()["config_groups"]["group_0"]) >= {"weights", "format"}
    compressor = BaseCompressor.get_value_from_registry(theirs.format)
    float8 = "float8_e4m3fn"
    tensors = {
        name: torch.tensor(x.view(np.uint8)).view(torch.float8_e4m3fn)
        if x.dtype.name == float8
        else torch.tensor(x)
        for name, x in pack(q, scheme).items()
    }
    plain = compressor.decompress(tensors, theirs)
    np.testing.assert_array_equal(plain["weight"].float().numpy(), dequantize(q, jnp.float32))
    again = compressor.compress(plain, theirs)
    for name in suffixes(scheme):
        assert again[name].dtype == tensors[name].dtype
        own, other = (x.view(torch.uint8).numpy() for x in (tensors[name], again[name]))
        if kind == "mxfp4" and name == "weight_packed":
            own = without_minus_zero(own)  # the library writes 0 for it
        np.testing.assert_array_equal(other, own, err_msg=name)
