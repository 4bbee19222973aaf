"""Every way of storing weights on every family: products of codes, adapters, grids and files."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.export import save_quantized
from mud_puppy.kernels import Quantized
from mud_puppy.model import load
from mud_puppy.model.names import flatten
from mud_puppy.weights import (
    add_lora,
    combine,
    dense,
    fake_quant,
    finish_fake_quant,
    fp8,
    is_weight,
    partition,
    quantize,
)
from mud_puppy.weights.quantize import is_rounded
from tests.model.family_cases import CASES
from tests.model.family_models import TOKENS, difference, ours

# What mxfp4's groups of 32 divide.
FIELDS = {
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "n_inner": 64,
    "head_dim": 16,
}
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"group": 32},
    "int4": {"group": 16, "zero_points": True},
    "int8": {},
    "mxfp4": {},
    "fp8": {},
}
FAST = {"qwen2_moe": ("nf4",), "gpt_oss": ("mxfp4",)}
EACH = [
    (case, format)
    if format in FAST.get(case, ())
    else pytest.param(case, format, marks=pytest.mark.slow)
    for case in CASES
    for format in FORMATS
]


def make(case: str) -> tuple[Any, Any]:
    own = CASES[case][1]
    fields = {name: value for name, value in FIELDS.items() if own.get(name, 0) is not None}
    # Only the fields that the case has, and those that every family has.
    fields = {n: v for n, v in fields.items() if n in own or n == "intermediate_size"}
    return ours(case, **fields)


def logits(model: Any, params: Any) -> np.ndarray:
    return np.asarray(model(params, jnp.asarray(TOKENS)))


def decoded(params: Any) -> Any:
    return jax.tree.map(lambda w: dense(w) if is_weight(w) else w, params, is_leaf=is_weight)


@pytest.mark.parametrize(("case", "format"), EACH)
def test_products_and_adapters(case: str, format: str) -> None:
    model, params = make(case)
    coded = quantize(params, format, **FORMATS[format])
    for path, leaf in flatten(coded).items():
        assert isinstance(leaf, Quantized) == is_rounded(path), path
    got, want, floats = (logits(model, p) for p in (coded, decoded(coded), params))
    assert difference(got, want) < 1e-5
    assert difference(want, floats) > 1e-4
    train, frozen = partition(add_lora(coded, rank=2, alpha=4, key=jax.random.key(0)))

    def loss(train: Any) -> Any:
        return jnp.square(model(combine(train, frozen), jnp.asarray(TOKENS))).mean()

    grads = jax.jit(jax.grad(loss))(train)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    moving = [bool(np.any(x)) for x in jax.tree.leaves(grads)]
    # b starts at 0, so that a has no gradient yet; of the others all have one.
    assert sum(moving) == len(moving) // 2


SAVED = {"nf4": 1e-5, "int8": 1e-5}
EACH_SAVED = [
    (case, format)
    if (case, format) in (("gpt_oss", "int8"), ("gpt2", "nf4"))
    else pytest.param(case, format, marks=pytest.mark.slow)
    for case in CASES
    for format in SAVED
]


@pytest.mark.parametrize(("case", "format"), EACH_SAVED)
def test_codes_on_disk(case: str, format: str, tmp_path: Path, caplog: Any) -> None:
    """float32 beside the codes: what comes back is what was written."""
    model, params = make(case)
    options = {"group": 64} if format == "nf4" else {}
    if format == "nf4":
        model, params = wide(case)
    coded = quantize(params, format, **options)
    save_quantized(model, coded, tmp_path, dtype="float32")
    again, read = load(tmp_path, dtype="float32")
    assert difference(logits(again, read), logits(model, coded)) < SAVED[format]
    stacked = case == "gpt_oss"
    assert ("are written as floats" in caplog.text) == stacked
    kept = {path for path, leaf in flatten(read).items() if isinstance(leaf, Quantized)}
    wanted = {path for path in flatten(coded) if is_rounded(path)}
    assert kept == {path for path in wanted if not (stacked and "experts" in path)}


def wide(case: str) -> tuple[Any, Any]:
    """bitsandbytes' groups are 64 and go over the rows, of which ours are whole ones."""
    own = CASES[case][1]
    fields = {name: 64 for name in FIELDS if name in own and name != "head_dim"}
    heads = 8 if case == "phi4" else 4  # the factors of its rope are those of heads of 8
    fields |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": heads}
    fields |= {"head_dim": 16} if "head_dim" in own else {}
    if own.get("q_lora_rank", 0) is None:
        fields["q_lora_rank"] = None
    if "v_head_dim" in own:
        fields |= {"v_head_dim": 16}
    if "layer_types" in own or "no_rope_layers" in own:
        del fields["num_hidden_layers"]
    return ours(case, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_grids_and_float8(case: str) -> None:
    model, params = make(case)
    floats = logits(model, params)
    rounded = fake_quant(params, "int8", activations="int8")
    shipped = finish_fake_quant(rounded)
    assert difference(logits(model, shipped), logits(model, rounded)) < 1e-4
    assert difference(logits(model, rounded), floats) > 1e-4
    assert np.isfinite(logits(model, fp8(params, emulated=True))).all()
