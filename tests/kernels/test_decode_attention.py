"""decode_attention against its definition: caches, masks, options; the kernel's two programs."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from mud_puppy.kernels import decode_attention, tuned
from mud_puppy.kernels.attention import decode_pallas
from tests.kernels import contract

pytestmark = pytest.mark.usefixtures("exact_products")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
call = inspect.unwrap(decode_attention)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. kind: "plain", "pages", "layers" or "int8"."""

    B: int = 2
    T: int = 1
    K: int = 2
    G: int = 2
    D: int = 32
    S: int = 100
    kind: str = "plain"
    dtype: str = "float32"
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    gradients: bool = True

    def arrays(self, seed=0):
        """(q, k, v, sinks or None), positions, the other keyword arguments."""
        r = np.random.default_rng(seed)
        dtype, page, rest = DTYPES[self.dtype], 16, {}
        shape = (self.B, self.S, self.K, self.D)
        if self.kind == "pages":
            n = -(-self.S // page)
            shape = (self.B * n + 2, page, self.K, self.D)
            pages = r.permutation(shape[0])[: self.B * n].reshape(self.B, n)
            rest["page_table"] = jnp.asarray(pages, jnp.int32)
        if self.kind == "layers":
            shape, rest["layer"] = (3, *shape), jnp.int32(1)
        k, v = r.normal(size=(2, *shape)) * (40 if self.kind == "int8" else 1)
        if self.kind == "int8":
            for name in ("k_scales", "v_scales"):
                rest[name] = jnp.asarray(r.uniform(0.02, 0.03, shape[:-1]), jnp.float32)
        stored = jnp.int8 if self.kind == "int8" else dtype
        q = jnp.asarray(r.normal(size=(self.B, self.T, self.K * self.G, self.D)), dtype)
        sinks = jnp.asarray(r.normal(size=self.K * self.G), jnp.float32) if self.sinks else None
        last = r.integers(self.T - 1, self.S, size=self.B)
        positions = jnp.asarray(last[:, None] - np.arange(self.T)[::-1], jnp.int32)
        rest |= {"window": self.window, "softcap": self.softcap, "return_lse": True}
        return (q, jnp.asarray(k, stored), jnp.asarray(v, stored), sinks), positions, rest


def results(case, name, mutate=lambda rest, positions: (rest, positions)):
    """(ours, the definition's in float64): out, lse, and the gradients of what is not codes."""
    (q, k, v, sinks), positions, rest = case.arrays()
    codes = case.kind == "int8"
    args = (q,) if codes else (q, k, v)
    args = args if sinks is None else (*args, sinks)

    def f(implementation, rest, positions):
        def run(*args):
            args = list(args if case.gradients else jax.lax.stop_gradient(args))
            q = args.pop(0)
            keys = (k, v) if codes else (args.pop(0), args.pop(0))
            sinks = args.pop() if args else None
            return call(q, *keys, positions, sinks=sinks, implementation=implementation, **rest)

        return run

    r = np.random.default_rng(1)
    lead = (case.B, case.T, case.K * case.G)
    g = (jnp.asarray(r.normal(size=(*lead, case.D)), q.dtype),
         jnp.asarray(r.normal(size=lead), jnp.float32))  # fmt: skip
    got = contract.compiled(f(name, *mutate(rest, positions)), args, g)
    return got, contract.in_float64(f("reference", rest, positions), args, g)


def worst(case, name, *mutate):
    got, want = results(case, name, *mutate)
    bound = contract.tolerance(DTYPES[case.dtype], case.S + case.D)
    # The implementations for codes decode them to q's dtype.
    bound = max(bound, 3e-3 if case.kind == "int8" else 0)
    return max(contract.differences(got, want)) / bound


@pytest.mark.parametrize("part", contract.PARTS)
def test_drawn(part):
    @seed(part)
    @settings(max_examples=6, deadline=None, database=None)
    @given(
        name=st.sampled_from(["xla", "pallas", "pallas"]),
        rows=st.sampled_from([0, 2]),
        case=st.builds(
            Case,
            B=st.integers(1, 3),
            T=st.integers(1, 8),
            K=st.integers(1, 2),
            G=st.sampled_from([1, 2, 3, 4]),
            D=st.sampled_from([16, 32, 48]),
            S=st.integers(33, 150),
            kind=st.sampled_from(["plain", "pages", "layers", "int8"]),
            dtype=st.sampled_from(sorted(DTYPES)),
            window=st.sampled_from([None, 7, 40]),
            softcap=st.sampled_from([None, 2.0]),
            sinks=st.booleans(),
            # Those of the kernel are the XLA implementation's: a third of the draws is enough.
            gradients=st.sampled_from([False, False, True]),
        ),
    )
    def check(name, rows, case):
        with pytest.MonkeyPatch.context() as patch:
            tile = {"block": 32, "programs": 12, "num_warps": 4, "num_stages": 1, "rows": rows}
            patch.setattr(tuned, "tiles", lambda op, key: tile)
            assert worst(case, name) < 1

    check()


@pytest.mark.parametrize("name", ["xla", "pallas"])
@pytest.mark.parametrize("what", ["window", "softcap", "positions"])
def test_a_lost_option_is_seen(name, what):
    def mutate(rest, positions):
        if what == "positions":
            return rest, positions - 1
        return rest | {what: None}, positions

    assert worst(Case(window=7, softcap=2.0, dtype="bfloat16"), name, mutate) > 2


def test_splits_share_what_a_row_sees():
    """Each of three splits gets a third of a row's blocks, however long the row is."""
    plan = decode_pallas.Plan(16, 3, 4, 1, 320, None, None, 1.0, None, False, 0)
    at = jnp.array([[319] * 16, [47] * 16, [-1] * 16])
    assert decode_pallas._blocks(plan, at).tolist() == [[0, 20], [0, 3], [0, 0]]
    plan = dataclasses.replace(plan, window=20)
    assert decode_pallas._blocks(plan, at).tolist() == [[18, 20], [1, 3], [0, 0]]


def test_a_row_that_is_off_gives_zero_and_no_nan():
    (q, k, v, _), positions, _ = Case().arrays()
    out, lse = call(q, k, v, positions.at[1].set(-1), implementation="pallas", return_lse=True)
    assert not np.asarray(out[1]).any() and np.isneginf(lse[1]).all() and np.isfinite(out[0]).all()


def test_two_runs_are_bitwise_equal():
    (q, k, v, _), positions, _ = Case(S=140).arrays()
    run = jax.jit(lambda: call(q, k, v, positions, implementation="pallas"))
    np.testing.assert_array_equal(run(), run())


def test_refuses_what_it_cannot_do():
    (q, k, v, _), positions, _ = Case().arrays()
    with pytest.raises(ValueError, match="decode needs q"):
        call(q, k[:1], v[:1], positions)
    with pytest.raises(ValueError, match="int8 codes, no others, have k_scales"):
        call(q, k.astype(jnp.int8), v, positions)
    with pytest.raises(ValueError, match="none of"):
        call(q, k, v, positions, implementation="cudnn")
    with pytest.raises(ValueError, match="a head of 24 is no multiple of 16"):
        call(*(x[..., :24] for x in (q, k, v)), positions, implementation="pallas")
