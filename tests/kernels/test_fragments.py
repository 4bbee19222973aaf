"""quantized_matmul of few rows by the tensor cores' fragments, in Pallas's interpreter."""

import contextlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mud_puppy.kernels import target
from mud_puppy.kernels.formats import Quantized
from mud_puppy.kernels.quantized_matmul import plans, quantized_matmul
from tests.kernels.contract import compiled, differences
from tests.kernels.quantized_products import BF16, CASES, F16, check, close, inputs, weight

FRAGMENTS = ("nf4", "nf4 double", "int4", "int4 zero points")


def hopper():
    """An H100's plans, for the interpreter where there is no card."""
    card = target.current().platform == "cuda"
    return contextlib.nullcontext() if card else target.use(target.Target("cpu", "sm90"))


def by_fragments(w, rows, dtype, seed=0):
    with hopper():
        plan = plans.plan(inputs(rows, w, dtype)[0], w)
        assert not isinstance(plan, str) and plan.kernel == "fragment"
        return check(w, rows, dtype, "pallas", seed)


@pytest.mark.parametrize(
    "case, rows, dtype",
    [
        ("nf4", 1, BF16),
        ("int4 zero points", 2, BF16),
        ("nf4 double", 4, BF16),
        ("int4", 8, F16),
        ("nf4", 16, BF16),
    ],
)
def test_few_rows_by_fragments(case, rows, dtype):
    by_fragments(weight(48, 512, **CASES[case]), rows, dtype)


@settings(derandomize=True, deadline=None, max_examples=5)
@given(st.data())
def test_drawn_shapes_by_fragments(data):
    draw = data.draw
    w = weight(
        16 * draw(st.integers(1, 4)), 64 * draw(st.integers(1, 9)),
        **CASES[draw(st.sampled_from(FRAGMENTS))], seed=draw(st.integers(0, 1000)),
    )  # fmt: skip
    by_fragments(w, draw(st.integers(1, 16)), BF16)


@pytest.mark.parametrize("case", ["nf4 double", "int4 zero points"])
def test_fragments_of_a_layer(case):
    """The codes of one of a stack are read where they lie."""
    layers = [weight(16, 128, seed=i, **CASES[case]) for i in range(2)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    x = inputs(3, layers[0], BF16)[0]
    with hopper():
        got, other = (
            quantized_matmul(x, replace(stack, layer=jnp.int32(i)), "pallas") for i in (1, 0)
        )
    close(got, quantized_matmul(x, layers[1], "reference"))
    assert float(jnp.abs(got - other).max()) > 1


def test_wrong_codes_are_seen_by_fragments():
    """The mutation partner: the bytes of a lane's two words in another order, the next scale."""
    w = weight(32, 512, "int4")
    _, want, bound = by_fragments(w, 3, BF16)
    x, g = inputs(3, w, BF16)
    rolled = jnp.roll(w.codes.reshape(32, -1, 8), 1, axis=2).reshape(w.codes.shape)
    for wrong in (
        Quantized(rolled, w.scales, format="int4"),
        Quantized(w.codes, jnp.roll(w.scales, 1, axis=1), format="int4"),
    ):
        with hopper():
            got = compiled(lambda x, w=wrong: quantized_matmul(x, w, "pallas"), (x,), g)
        assert max(differences(got, want)) > 3 * bound
