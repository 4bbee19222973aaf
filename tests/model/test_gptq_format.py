"""The GPTQ layout against a reader of single bits, and there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.errors import UserError
from mud_puppy.kernels import Quantized, dequantize
from mud_puppy.model.gptq_format import (
    SUFFIXES,
    check_config,
    pack,
    quantization_config,
    read,
    unpack,
    why_floats,
)
from mud_puppy.weights.gptq import round_to_nearest, to_quantized

OUT, IN, GROUP = 32, 96, 32
CASES = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]


def found(bits, symmetric, out=OUT, n=IN, seed=0):
    w = np.random.default_rng(seed).normal(size=(out, n)) + 0.3
    return round_to_nearest(
        jnp.asarray(w, jnp.float32), bits=bits, group=GROUP, symmetric=symmetric
    )


def packed(bits, symmetric):
    codes, scales, zeros = (None if x is None else np.asarray(x) for x in found(bits, symmetric))
    return pack(codes, scales, zeros, bits)


def config(bits, symmetric=True, **other):
    return quantization_config(bits, GROUP, symmetric, False, 0.01) | other


def leaf_of(tensors, config, dtype=jnp.float32):
    return jax.tree.map(jnp.asarray, read(tensors, (OUT, IN), config, dtype))


def bits_of(words):
    """The bits of int32 [n] as one Python string, the lowest of the first word first."""
    return "".join(format(int(word) & 0xFFFFFFFF, "032b")[::-1] for word in words)


def number(stream, i, bits):
    return int(stream[i * bits : (i + 1) * bits][::-1], 2)


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_every_code_and_zero_point_is_where_it_belongs(bits, symmetric):
    codes, scales, zeros = found(bits, symmetric)
    tensors = packed(bits, symmetric)
    assert tuple(tensors) == SUFFIXES
    kinds = {name: (x.dtype.name, x.shape) for name, x in tensors.items()}
    assert kinds == {
        "qweight": ("int32", (IN * bits // 32, OUT)),
        "qzeros": ("int32", (IN // GROUP, OUT * bits // 32)),
        "scales": ("float16", (IN // GROUP, OUT)),
        "g_idx": ("int32", (IN,)),
    }
    for o in range(OUT):
        stream = bits_of(tensors["qweight"][:, o])
        assert [number(stream, i, bits) for i in range(IN)] == codes[o].tolist()
    for g in range(IN // GROUP):
        stream = bits_of(tensors["qzeros"][g])
        want = [1 << (bits - 1)] * OUT if symmetric else zeros[:, g].tolist()
        assert [number(stream, o, bits) + 1 for o in range(OUT)] == want
    np.testing.assert_array_equal(tensors["scales"].T, scales)
    assert tensors["g_idx"].tolist() == [i // GROUP for i in range(IN)]


def test_three_bits_run_over_the_ends_of_words():
    """Code 10 has two bits in the first word and one in the second, code 21 one and two."""
    codes = np.zeros((32, 32), np.uint8)
    codes[0, 10], codes[1, 21] = 7, 7
    words = pack(codes, np.ones((32, 1)), None, 3)["qweight"].view(np.uint32)
    assert words[:, 0].tolist() == [3 << 30, 1, 0]
    assert words[:, 1].tolist() == [0, 1 << 31, 3]


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_there_and_back(bits, symmetric):
    codes, scales, zeros = found(bits, symmetric)
    leaf = leaf_of(packed(bits, symmetric), config(bits, symmetric))
    want = to_quantized(codes, scales, zeros, bits, jnp.float32)
    assert isinstance(leaf, Quantized) and leaf.format == want.format
    np.testing.assert_array_equal(dequantize(leaf), dequantize(want))
    for got, given in zip(unpack(leaf, bits), (codes, scales, zeros), strict=True):
        if given is None and got is not None:  # int4 of fewer bits says its middle
            assert (got == 1 << (bits - 1)).all()
        else:
            np.testing.assert_array_equal(got, given)


def test_version_two_holds_zero_points_as_they_are():
    _, _, zeros = found(4, False)
    tensors = packed(4, False)
    leaf = read(tensors, (OUT, IN), config(4, checkpoint_format="gptq_v2"), jnp.float32)
    np.testing.assert_array_equal(leaf.zeros, zeros - 1)
    leaf = read(tensors, (OUT, IN), config(4), jnp.float32)
    np.testing.assert_array_equal(leaf.zeros, zeros)


def test_inputs_in_another_order_are_decoded():
    tensors = packed(4, False)
    ordered = leaf_of(tensors, config(4))
    del tensors["g_idx"]
    np.testing.assert_array_equal(dequantize(leaf_of(tensors, config(4))), dequantize(ordered))
    index = np.random.default_rng(1).permutation(IN) // GROUP
    tensors["g_idx"] = index.astype(np.int32)
    assert "order of the inputs" in why_floats(tensors["g_idx"], IN // GROUP)
    assert not why_floats(np.sort(tensors["g_idx"]), IN // GROUP)
    got = read(tensors, (OUT, IN), config(4, desc_act=True), jnp.bfloat16)
    assert not isinstance(got, Quantized) and got.dtype == np.float32
    codes, scales, zeros = (np.asarray(x, np.float32) for x in found(4, False))
    want = (codes - zeros[:, index]) * scales[:, index]
    np.testing.assert_array_equal(got, want)


def test_what_does_not_fit_is_named():
    tensors = packed(4, True)
    with pytest.raises(UserError, match=r"'qweight' has shape \(12, 32\).* says \(16, 32\)"):
        read(tensors, (OUT, 128), config(4), jnp.float32)
    bad = tensors | {"g_idx": np.full(IN, 9, np.int32)}
    with pytest.raises(UserError, match="names group 9 of 3"):
        read(bad, (OUT, IN), config(4), jnp.float32)
    for name in ("qweight", "qzeros"):
        bad = tensors | {name: tensors[name].astype(np.int64)}
        with pytest.raises(UserError, match=f"'{name}' is int64, not int32"):
            read(bad, (OUT, IN), config(4), jnp.float32)
    with pytest.raises(UserError, match=r"'scales' has shape \(32,\)"):
        read(tensors | {"scales": tensors["scales"][0]}, (OUT, IN), config(4), jnp.float32)
    codes, scales, zeros = (np.asarray(x) for x in found(4, False))
    with pytest.raises(UserError, match="no zero point of 0"):
        pack(codes, scales, zeros * 0, 4)
    with pytest.raises(UserError, match="too large for float16"):
        pack(codes, scales * 1e9, zeros, 4)
    with pytest.raises(UserError, match=r"30 outputs do not fill .* multiple of 32"):
        pack(codes[:30], scales[:30], zeros[:30], 3)
    with pytest.raises(UserError, match="not nf4"):
        unpack(Quantized(codes, scales, format="nf4"), 4)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"quant_method": "awq"}, "awq is not gptq"),
        ({"bits": 5}, "5 bits"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"pack_dtype": "int64"}, "pack_dtype int64"),
        ({"dynamic": {"-:lm_head": {}, "+:.*up": {"bits": 8}}}, "dynamic"),
    ],
)
def test_configs_that_are_not_understood(change, match):
    check_config(config(4) | {"dynamic": {"-:lm_head": {}}})
    with pytest.raises(UserError, match=match):
        check_config(config(4) | change)
