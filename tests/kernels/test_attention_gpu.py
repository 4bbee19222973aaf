"""Attention on an NVIDIA card (Hopper or newer for cuDNN's packed rows) against the definition.

The Pallas kernels run with their tuned tiles here, and on lengths that take several. Run there with
`JAX_PLATFORMS=cuda python -m pytest -m gpu tests/kernels`; deselected elsewhere.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.kernels import flash_attention
from mud_puppy.kernels.attention import cudnn

pytestmark = pytest.mark.gpu

TOLERANCE = {jnp.bfloat16: 2.5e-2, jnp.float16: 4e-3}  # 3 roundings of the dtype


@pytest.fixture(autouse=True)
def card():
    assert cudnn.on_cuda(), "no NVIDIA card: set JAX_PLATFORMS=cuda (tests/conftest.py pins cpu)"


def inputs(B=2, T=512, H=8, K=2, D=64, Dv=None, dtype=jnp.bfloat16):
    r = np.random.default_rng(0)
    shapes = [(B, T, H, D), (B, T, K, D), (B, T, K, Dv or D), (B, T, H, Dv or D)]
    return [jnp.asarray(r.normal(size=s), dtype) for s in shapes]


def packed(T, *rows):
    """Segment ids 1.. of the given lengths, 0 to the end."""
    ids = [np.repeat(np.arange(1, len(row) + 1), row) for row in rows]
    return jnp.asarray(np.stack([np.pad(x, (0, T - len(x))) for x in ids]), jnp.int32)


def results(args, implementation, dtype=None, **options):
    """out, dq, dk, dv"""
    *qkv, d_out = [x if dtype is None else x.astype(dtype) for x in args]

    @jax.jit
    def run(qkv, d_out):
        def f(q, k, v):
            return flash_attention(q, k, v, implementation=implementation, **options)

        out, pull = jax.vjp(f, *qkv)
        return out, *pull(d_out)

    return run(qkv, d_out)


def differences(got, want):
    for g, w in zip(got, want, strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.isfinite(g).all()
        yield np.abs(g - w).max() / np.abs(w).max()


def check(args, right, wrong, implementation="cudnn"):
    """It equals the float32 definition, and differs from it with one option wrong."""
    dtype = args[0].dtype.type
    got = results(args, implementation, **right)
    assert (
        max(differences(got, results(args, "reference", jnp.float32, **right))) < TOLERANCE[dtype]
    )
    mutant = results(args, "reference", jnp.float32, **wrong)
    assert max(differences(got, mutant)) > 2 * TOLERANCE[dtype]


LENGTHS = [200, 1, 150, 97], [64, 64, 128, 256]
IDS = packed(512, *LENGTHS)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("K", "D"), [(8, 64), (2, 64), (1, 128), (2, 256)])
def test_causal(dtype, K, D):
    check(inputs(K=K, D=D, dtype=dtype), {}, {"causal": False})


def test_full():
    check(inputs(), {"causal": False}, {})


@pytest.mark.parametrize("wrong", [15, 17])
def test_window(wrong):
    check(inputs(), {"window": 16}, {"window": wrong})


@pytest.mark.parametrize("K", [8, 2])
@pytest.mark.parametrize("ids", [IDS, packed(512, *LENGTHS[::-1]), packed(512, [512], [300])])
def test_packed(K, ids):
    check(inputs(K=K), {"segment_ids": ids}, {} if ids[0, -1] != 1 else {"causal": False})


def test_packed_full():
    check(inputs(), {"segment_ids": IDS, "causal": False}, {"causal": False})


@pytest.mark.parametrize("wrong", [15, 17])
def test_packed_window(wrong):
    options = {"segment_ids": IDS, "window": 16}
    check(inputs(), options, {**options, "window": wrong})


def test_one_segment_a_row_needs_no_mask():
    check(inputs(), {"segment_ids": packed(512, [512], [512])}, {"causal": False})


@pytest.mark.parametrize("name", ["cudnn", "pallas"])
def test_packed_under_scan_and_remat(name):
    """As the decoder calls it: layers in a scan, attention saved by name."""
    q, k, v, d_out = inputs()

    def loss(q, implementation):
        def layer(q, _):
            out = flash_attention(q, k, v, segment_ids=IDS, implementation=implementation)
            return q + out, None

        policy = jax.checkpoint_policies.save_only_these_names("attention")
        out, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy), q, None, length=3)
        return (out * d_out).astype(jnp.float32).sum()

    grads = [jax.jit(jax.grad(loss), static_argnums=1)(q, x) for x in (name, "xla")]
    assert max(differences(grads[:1], grads[1:])) < 2 * TOLERANCE[jnp.bfloat16]


def test_serves_without_being_asked_and_declines_by_name():
    q, k, v, _ = inputs()
    text = jax.jit(lambda *args: flash_attention(*args)).lower(q, k, v).as_text()
    assert "__cudnn$fmhaSoftmax" in text
    with pytest.raises(ValueError, match="float32"):
        flash_attention(*(x.astype(jnp.float32) for x in (q, k, v)), implementation="cudnn")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_xla_on_the_card(dtype):
    args = inputs(T=1100, dtype=dtype)
    ids = packed(1100, [600, 400], [1, 1000])
    got = results(args, "xla", segment_ids=ids, window=300)
    want = results(args, "reference", jnp.float32, segment_ids=ids, window=300)
    assert max(differences(got, want)) < TOLERANCE[dtype]
    wrong = results(args, "reference", jnp.float32, window=300)
    assert max(differences(got, wrong)) > 2 * TOLERANCE[dtype]


def test_packed_rows_are_served_by_our_kernels():
    q, k, v, _ = inputs()
    text = jax.jit(lambda *args: flash_attention(*args, segment_ids=IDS)).lower(q, k, v).as_text()
    assert "attention_forward" in text and "cudnn" not in text


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("K", "D"), [(8, 32), (2, 64), (1, 80), (2, 96), (2, 128), (2, 256)])
def test_pallas_causal(dtype, K, D):
    check(inputs(K=K, D=D, dtype=dtype), {}, {"causal": False}, "pallas")


def test_pallas_latent():
    check(inputs(D=192, Dv=128), {}, {"window": 100}, "pallas")


PALLAS = {
    "full": {"causal": False},
    "window": {"window": 200},
    "packed": {"segment_ids": IDS},
    "packed, unordered": {"segment_ids": (IDS * 7) % 3, "causal": False},
    "softcap": {"softcap": 2.0},
    "dropout": {"dropout": 0.3, "dropout_seed": 3},
}


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("case", PALLAS)
def test_pallas_options(case, D):
    check(inputs(D=D), PALLAS[case], {}, "pallas")
    if case == "packed":
        odd = inputs(T=511, D=D)
        check(odd, {"segment_ids": IDS[:, :511]}, {}, "pallas")


def test_pallas_gives_the_same_bits():
    args = inputs(T=1024)
    first, second = (results(args, "pallas", window=700) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
