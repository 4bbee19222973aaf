"""Adapters of every family in PEFT: ours gives our logits there and comes back as it was."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mud_puppy.errors import UserError
from mud_puppy.model import load
from mud_puppy.weights import Lora, add_lora, is_weight, load_adapter, save_adapter
from tests.model.family_cases import CASES
from tests.model.family_models import TOKENS, difference, logits_of, saved

# PEFT calls what transformers has renamed, and tells of what it does with Conv1D and experts.
pytestmark = pytest.mark.filterwarnings("ignore")

FAST = ("gpt2", "mixtral", "qwen2_moe", "gpt_oss")
EACH = [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


def trained(w: Any) -> Any:
    """An adapter as training leaves it: b is not zero."""
    if not isinstance(w, Lora):
        return w
    return replace(w, b=0.1 * jax.random.normal(jax.random.key(w.b.size), w.b.shape))


def adapted(params: Any, **options: Any) -> Any:
    params = add_lora(params, rank=3, alpha=5, key=jax.random.key(0), **options)
    return jax.tree.map(trained, params, is_leaf=is_weight)


def in_peft(model: Any, folder: Path) -> np.ndarray:
    peft = pytest.importorskip("peft")
    return logits_of(peft.PeftModel.from_pretrained(model, folder))


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("case", EACH)
def test_our_adapter_in_peft_and_back(case: str, tmp_path: Path) -> None:
    theirs = saved(case, tmp_path / "model")
    model, params = load(tmp_path / "model", dtype="float32")
    own = adapted(params)
    plain, ours = (model(p, jnp.asarray(TOKENS)) for p in (params, own))
    save_adapter(model, own, tmp_path / "adapter")
    assert difference(ours, in_peft(theirs, tmp_path / "adapter")) < 1e-5
    assert difference(ours, plain) > 1e-2
    assert_same(load_adapter(params, tmp_path / "adapter"), own)
