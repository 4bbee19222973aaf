"""What the ops do with calls that make no sense.

A call that cannot mean anything is a ValueError that names the op's argument, not a traceback of
JAX; nothing is cast in silence.
"""

import inspect

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import mud_puppy as mp
from mud_puppy import kernels
from mud_puppy.kernels.encode import quantize
from tests.kernels.calls import (
    AT,
    CACHE,
    CODES,
    EXPERTS,
    HEAD,
    HIDDEN,
    ROWS,
    SIZES,
    WORDS,
    K,
    Q,
    V,
    attend,
    bare,
    decode,
    entropy,
    floats,
    grouped,
    logps,
)


def traced(f, **option):
    """`f(**option)` with the option's value traced."""
    [(name, value)] = option.items()
    return lambda: jax.jit(lambda value: f(**{name: value})())(value)


INTS = [x.astype(jnp.int32) for x in (Q, K, V)]
REFUSED = {
    "q without a batch": (attend(Q[0], K, V), r"attention: expected q \[B, T, H, D\]"),
    "a flat k": (attend(Q, K[0], V), r"attention: expected k \[B, S, K, D\]"),
    "lists": (attend([[1.0]], K, V), "got list"),
    "no key heads": (attend(Q, K[:, :, :0], V[:, :, :0]), "K dividing H"),
    "integers attend": (attend(*INTS), "expected q of a floating dtype; got int32"),
    "half a window": (attend(window=2.5), "at least 1 key; got 2.5"),
    "segments of floats": (attend(segment_ids=jnp.ones((2, 16))), "segment_ids of a integer"),
    "sinks of a list": (attend(sinks=[1.0] * 4), "expected sinks"),
    "a flat bias": (attend(bias=jnp.ones(16)), "expected bias"),
    "a mask for a bias": (attend(bias=jnp.ones((1, 1, 16, 16), bool)), "expected bias of a"),
    "a key for a seed": (attend(dropout=0.5, dropout_seed=jax.random.key(0)), "bits"),
    "an old key": (attend(dropout=0.5, dropout_seed=jax.random.PRNGKey(0)), "bits"),
    "half a seed": (attend(dropout=0.5, dropout_seed=1.5), "one integer"),
    "a traced scale": (traced(attend, scale=0.3), "attention: scale must be a Python number"),
    "a traced window": (traced(attend, window=3), "window must be a Python number"),
    "decode: integers": (decode(INTS[0][:, :4], K, V), "expected q of a floating"),
    "decode: flat k": (decode(CACHE[0], K[0], V[0]), r"expected k \[B, S, K, D\]"),
    "decode: an empty cache": (decode(CACHE[0], K[:, :0], V[:, :0]), "decode needs q"),
    "decode: sinks of key heads": (decode(sinks=jnp.ones(2)), r"expected sinks \(4,\)"),
    "decode: no window": (decode(window=0), "at least 1 key; got 0"),
    "decode: no cap": (decode(softcap=0.0), "softcap must be positive"),
    "decode: places between": (decode(at=AT * 1.0), "expected positions of a integer"),
    "decode: pages of one row": (decode(page_table=jnp.zeros((1, 1), int)), r"page_table \[2, n\]"),
    "decode: layers": (decode(*(CACHE[0], K[None], V[None]), layer=1), "one integer below 1"),
    "hidden without a batch": (entropy(HIDDEN[0]), r"expected hidden \[B, T, D\]"),
    "hidden integers": (entropy(WORDS[..., None]), "expected hidden of a floating"),
    "targets of floats": (entropy(words=WORDS * 1.0), "expected targets of a integer"),
    "a head of integers": (entropy(head=HEAD.astype(int)), "expected head of a floating"),
    "a head without words": (entropy(head=HEAD[:0]), r"expected a head \[V, 32\]"),
    "weights of a row": (entropy(weights=jnp.ones(8)), r"expected weights \(2, 8\)"),
    "smoothing of two": (entropy(label_smoothing=2.0), "label_smoothing from 0 to 1"),
    "no softcap": (entropy(softcap=0.0), "softcap must be positive"),
    "no temperature": (logps(temperature=0.0), "temperature must be positive"),
    "a traced temperature": (traced(logps, temperature=2.0), "temperature must be a Python"),
    "grouped: batches": (grouped(ROWS[None]), r"expected x \[M, in\]"),
    "grouped: one weight": (grouped(w=EXPERTS[0]), r"expected w \[E, out, in\]"),
    "grouped: no experts": (grouped(w=EXPERTS[:0], sizes=SIZES[:0]), "expected x"),
    "grouped: integers": (grouped(ROWS.astype(int)), "expected x of a floating"),
    "grouped: half rows": (grouped(sizes=SIZES * 1.0), "expected group_sizes of a integer"),
    "qgemm of floats": (lambda: bare.qgemm(ROWS, CODES), "expected a of a int8 dtype"),
    "qgemm of bytes": (lambda: bare.qgemm(CODES, CODES.astype(jnp.uint8)), "expected b of a int8"),
    "qgemm of a vector": (lambda: bare.qgemm(CODES, CODES[0]), r"expected b \[N, K\]"),
    "half a zero point": (lambda: bare.qgemm(CODES, CODES, b_zero=0.5), "expected b_zero of a"),
    "a norm's weight": (
        lambda: bare.quantized_layernorm(ROWS, jnp.ones(1)),
        r"quantized_layernorm: expected weight \[32\]",
    ),
    "a norm's bias": (
        lambda: bare.quantized_layernorm(ROWS, jnp.ones(32), jnp.ones((20, 32))),
        r"expected bias \[32\]",
    ),
    "no triple": (lambda: bare.dequantize(ROWS), "expected a Quantized or"),
    "no Quantized": (lambda: bare.quantized_matmul(ROWS, HEAD), "expected a Quantized weight"),
    "codes meet integers": (
        lambda: bare.quantized_matmul(WORDS @ jnp.ones((8, 64), int), quantize(floats(4, 64))),
        "expected x of a floating",
    ),
    "heads of nothing": (lambda: mp.FlashMHA(32, 0), "num_heads must be at least 1"),
    "no key heads in MHA": (lambda: mp.FlashMHA(32, 4, num_kv_heads=0), "num_kv_heads must"),
    "MHA's window": (lambda: mp.FlashMHA(32, 4, window=3, causal=False), "needs causal"),
    "MHA's dropout": (lambda: mp.FlashMHA(32, 4, dropout=1.5), "a probability below 1"),
    "MHA's stream": (
        lambda: mp.FlashMHA(32, 4, dropout=0.5, rngs=nnx.Rngs(params=0)),
        'dropout needs a stream "dropout"',
    ),
    "MHA's width": (
        lambda: inspect.unwrap(mp.FlashMHA.__call__)(mp.FlashMHA(32, 4), jnp.ones((2, 8, 16))),
        r"expected x \[B, T, 32\], got \[2, 8, 16\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_by_name(case):
    call, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        call()


def test_matmul_does_not_cast_the_weight_to_integers():
    with pytest.raises(TypeError, match="expected a float x, got int32"):
        inspect.unwrap(type(kernels.matmul).__call__)(kernels.matmul, jnp.ones((2, 32), int), HEAD)
