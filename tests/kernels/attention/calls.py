"""Arrays for a call of attention, and what its implementations and its definition make of them."""

import jax
import jax.numpy as jnp
import numpy as np

from mud_puppy.kernels import flash_attention
from tests.kernels import contract
from tests.kernels.contract import differences, tolerance


def inputs(B=2, T=40, S=None, H=4, K=2, D=8, Dv=None, dtype=jnp.float32, sinks=False, bias=None):
    """({q, k, v, sinks, bias}, cotangents of (out, lse))"""
    r = np.random.default_rng(0)
    S, Dv = T if S is None else S, Dv or D
    shapes = {"q": (B, T, H, D), "k": (B, S, K, D), "v": (B, S, K, Dv)}
    shapes |= {"sinks": (H,)} if sinks else {}
    shapes |= {"bias": (*bias, T, S)} if bias else {}
    arrays = {name: jnp.asarray(r.normal(size=s), dtype) for name, s in shapes.items()}
    d_out, d_lse = r.normal(size=(B, T, H, Dv)), r.normal(size=(B, T, H))
    return arrays, (jnp.asarray(d_out, dtype), jnp.asarray(d_lse, jnp.float32))


def segments(B, T, seed=0):
    """Rows of 1..n ascending with 0 at the end, as packing makes them."""
    cuts = np.sort(np.random.default_rng(seed).integers(0, T, (B, 4)), axis=1)
    ids = 1 + (np.arange(T)[None, :, None] >= cuts[:, None, :]).sum(-1)
    return jnp.asarray(np.where(ids == 5, 0, ids), jnp.int32)


def shuffled(B, T, seed=0):
    """Ids in no order, in runs of a few tokens."""
    r = np.random.default_rng(seed)
    return jnp.asarray(np.repeat(r.integers(0, 3, (B, -(-T // 6))), 6, axis=1)[:, :T], jnp.int32)


def qkv(**shape):
    return tuple(inputs(**shape)[0][name] for name in "qkv")


def attend(implementation, options):
    def f(arrays):
        rest = {name: x for name, x in arrays.items() if name not in "qkv"}
        return flash_attention(
            *(arrays[name] for name in "qkv"),
            **rest,
            **options,
            implementation=implementation,
            return_lse=True,
        )

    return f


def results(implementation, args, cotangents, **options):
    """out, lse, then the gradients of the arrays in the order of their names"""
    return contract.compiled(attend(implementation, options), (args,), cotangents)


def wanted(args, cotangents, **options):
    return contract.in_float64(attend("reference", options), (args,), cotangents)


def check(shape, options, implementations=("xla", "pallas")):
    args, cotangents = inputs(**shape)
    want = wanted(args, cotangents, **options)
    # A gradient sums over keys what was summed over columns.
    dtype, length = args["q"].dtype, args["k"].shape[1] * args["v"].shape[3]
    for name in implementations:
        got = results(name, args, cotangents, **options)
        assert max(differences(got, want)) < tolerance(dtype, length), name
        assert got[0].dtype == dtype and got[1].dtype == jnp.float32
        for g, x in zip(got[2:], jax.tree.leaves(args), strict=True):
            assert g.dtype == x.dtype and g.shape == x.shape
