"""GPTQ of a model with experts in gptqmodel's own loader (transformers 5 reads no such file: its
experts are one parameter, and the codes of each are left over).

Needs what tests/model/test_gptq_transformers.py needs.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mud_puppy.export import save_quantized
from mud_puppy.kernels import dequantize
from mud_puppy.model import load
from mud_puppy.model.gptq_format import quantization_config
from mud_puppy.model.quantized_files import gptq_writer
from mud_puppy.run.calibrate import GptqOptions, quantize_gptq
from mud_puppy.weights import is_weight
from tests.model.family_models import TOKENS, difference, logits_of, ours

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
CASES = {
    "qwen3_moe": SIZES | {"moe_intermediate_size": 64, "head_dim": 16},
    "mixtral": SIZES | {"sliding_window": None},
}


def written(case: str, folder: Path, fault: bool = False) -> tuple[Any, Any]:
    """(model, params in codes), also in a folder."""
    model, params = ours(case, **CASES[case])
    tokens = np.random.default_rng(0).integers(0, 64, (4, 32), dtype=np.int32)
    coded = quantize_gptq(model, params, [{"tokens": tokens}], GptqOptions(group=32))
    layout = gptq_writer(quantization_config(4, 32, True, True, 0.01))
    kept = jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), coded["layers"]) if fault else None
    save_quantized(
        model, coded if kept is None else {**coded, "layers": kept}, folder,
        dtype="float32", layout=layout,
    )  # fmt: skip
    return model, coded


def logits(model: Any, params: Any) -> Any:
    return model(params, jnp.asarray(TOKENS))


@pytest.mark.parametrize("case", [pytest.param("mixtral", marks=pytest.mark.slow), "qwen3_moe"])
def test_files_come_back_as_codes(case: str, tmp_path: Path) -> None:
    model, coded = written(case, tmp_path)
    again, read = load(tmp_path, dtype="float32")
    assert difference(logits(again, read), logits(model, coded)) < 1e-6
    assert jax.tree.structure(read) == jax.tree.structure(coded)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", [False, True])
def test_logits_in_gptqmodel_are_ours(fault: bool, tmp_path: Path) -> None:
    import torch
    from gptqmodel import BACKEND, GPTQModel

    torch._dynamo.config.disable = True
    model, coded = written("qwen3_moe", tmp_path, fault)
    backend = BACKEND.GPTQ_TORCH
    loaded = GPTQModel.load(str(tmp_path), backend=backend, device="cpu", dtype=torch.float16)
    theirs = logits_of(loaded.model.float())

    def half(w: Any) -> Any:  # gptqmodel takes no wider dtype
        w = dequantize(w, jnp.float16) if is_weight(w) else w
        return w.astype(jnp.float16).astype(jnp.float32)

    mine = logits(model, jax.tree.map(half, coded, is_leaf=is_weight))
    assert (difference(mine, theirs) < 2e-3) == (not fault)
