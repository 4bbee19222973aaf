"""gpt-oss' MXFP4 files: the bits by hand, there and back, and transformers' decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.errors import UserError
from mud_puppy.kernels import dequantize, quantize
from mud_puppy.kernels.formats import swap_nibbles
from mud_puppy.model.mxfp4_format import pack, read

E, OUT, IN = 3, 8, 64
SHAPE = (E, OUT, IN)


def weight():
    return jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)


def value(tensors):
    return dequantize(jax.tree.map(jnp.asarray, read(tensors, SHAPE, "float32")))


def test_there_and_back():
    q = quantize(weight(), "mxfp4")
    tensors = pack(q)
    kinds = {name: (x.dtype.name, x.shape) for name, x in tensors.items()}
    assert kinds == {"blocks": ("uint8", (E, OUT, 2, 16)), "scales": ("uint8", (E, OUT, 2))}
    back = read(tensors, SHAPE, "bfloat16")
    assert (back.format, back.group, back.dtype) == ("mxfp4", 32, jnp.bfloat16)
    np.testing.assert_array_equal(back.codes, q.codes)
    np.testing.assert_array_equal(back.scales, q.scales)


def test_a_block_by_hand():
    # E2M1: 1 is code 2, -6 is 15, 0.5 is 1; a scale of 129 is 4.
    blocks, scales = np.zeros((1, 1, 1, 16), np.uint8), np.full((1, 1, 1), 129, np.uint8)
    blocks[..., 0], blocks[..., 1] = 0xF2, 0x01
    leaf = read({"blocks": blocks, "scales": scales}, (1, 1, 32), "float32")
    got = dequantize(jax.tree.map(jnp.asarray, leaf))
    assert got[0, 0, :4].tolist() == [4, -24, 2, 0]


def theirs(tensors):
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    given = (torch.tensor(tensors[name]) for name in ("blocks", "scales"))
    return convert_moe_packed_tensors(*given, dtype=torch.float32).numpy().swapaxes(1, 2)


def test_transformers_decodes_the_same_weights():
    random = np.random.default_rng(1)
    tensors = {
        "blocks": random.integers(0, 256, (E, OUT, 2, 16)).astype(np.uint8),
        "scales": random.integers(100, 140, (E, OUT, 2)).astype(np.uint8),
    }
    np.testing.assert_array_equal(value(tensors), theirs(tensors))
    for fault in (
        tensors | {"blocks": swap_nibbles(tensors["blocks"])},
        tensors | {"scales": tensors["scales"] + 1},
        tensors | {"blocks": tensors["blocks"][:, ::-1]},
    ):
        assert np.abs(value(fault) - theirs(tensors)).max() > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": np.full((E, OUT, 2), 255, np.uint8)}, "scales holds a scale that is NaN"),
        ({"scales": np.zeros((E, OUT, 3), np.uint8)}, r"scales is uint8\[3, 8, 3\], expected"),
        (
            {"blocks": np.zeros((E, OUT, 2, 8), np.uint8)},
            r"blocks is .*expected uint8\[3, 8, 2, 16",
        ),
        ({"blocks": np.zeros((E, OUT, 2, 16), np.int8)}, "blocks is int8"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    tensors = pack(quantize(weight(), "mxfp4"))
    with pytest.raises(UserError, match=message):
        read(tensors | change, SHAPE, "float32")


def test_other_codes_and_sizes():
    with pytest.raises(UserError, match="hold mxfp4 in groups of 32, not nf4 of 64"):
        pack(quantize(weight(), "nf4"))
    with pytest.raises(UserError, match="rows of 48 are not whole groups"):
        read({}, (E, OUT, 48), "float32")
