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


# --- experts, as PEFT has them -------------------------------------------------------------------

EXPERTS = ["gate_proj", "up_proj", "down_proj"]
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "one parameter": ("qwen3_moe", {"target_modules": ["k_proj", "down_proj"]}),
    "shared": ("qwen2_moe", {"target_modules": ["o_proj"], "target_parameters": EXPERTS[2:]}),
    "rsLoRA": ("deepseek_v3", {"target_modules": ["o_proj", *EXPERTS], "use_rslora": True}),
    "gpt_oss": (
        "gpt_oss",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {"experts.down_proj": 2},
        },
    ),
    "gpt_oss down": ("gpt_oss", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
}


def made_by_peft(folder: Path, case: str, **options: Any) -> tuple[np.ndarray, Any]:
    """Logits of an adapter that PEFT made of the model in folder / "model", saved in folder /
    "peft", and the plain model again."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    model = saved(case, folder / "model")
    config = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(folder / "peft")
    logits = logits_of(adapted)
    return logits, adapted.unload()


SLOW_MADE = ("rsLoRA", "one parameter", "shared", "gpt_oss down")
EACH_MADE = [pytest.param(k, marks=pytest.mark.slow) if k in SLOW_MADE else k for k in MADE]


@pytest.mark.parametrize("name", EACH_MADE)
def test_pefts_adapter_of_experts_here_and_back(name: str, tmp_path: Path) -> None:
    case, options = MADE[name]
    theirs, _ = made_by_peft(tmp_path, case, **options)
    model, params = load(tmp_path / "model", dtype="float32")
    own = load_adapter(params, tmp_path / "peft")
    assert difference(model(own, jnp.asarray(TOKENS)), theirs) < 1e-5
    assert difference(model(params, jnp.asarray(TOKENS)), theirs) > 1e-2
    save_adapter(model, own, tmp_path / "again")
    plain = saved(case, tmp_path / "model")
    assert difference(in_peft(plain, tmp_path / "again"), theirs) < 1e-5


@pytest.mark.parametrize("fault", ["order", "alpha"])
def test_the_comparison_fails_for_another_adapter(fault: str, tmp_path: Path) -> None:
    theirs, _ = made_by_peft(tmp_path, "gpt_oss", **MADE["gpt_oss"][1])
    model, params = load(tmp_path / "model", dtype="float32")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    if fault == "order":  # experts before ranks
        tensors = load_file(path)
        for name, x in tensors.items():
            if "experts" in name and "lora_B" in name:
                swapped = x.reshape(len(x), 4, -1).swapaxes(1, 2).reshape(x.shape)
                tensors[name] = np.ascontiguousarray(swapped)
        save_file(tensors, path)
    else:
        config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
        config["alpha_pattern"] = {"mlp.experts.gate_up_proj": 15}
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    own = load_adapter(params, tmp_path / "peft")
    assert difference(model(own, jnp.asarray(TOKENS)), theirs) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe"])
def test_a_gate_alone_and_other_ranks(case: str, tmp_path: Path) -> None:
    """PEFT has gate and up as one, and one rank for all experts."""
    theirs = saved(case, tmp_path / "model")
    model, params = load(tmp_path / "model", dtype="float32")
    gate, down = ("w1", "w2") if case == "mixtral" else ("gate_proj", "down_proj")
    own = add_lora(params, 2, 4, [rf".*\.experts\.\d+\.{gate}"], key=jax.random.key(0))
    own = add_lora(own, 5, 3, [rf".*\.[01]\..*experts\.\d+\.{down}"], key=jax.random.key(1))
    own = add_lora(own, 4, 4, ["q_proj"], key=jax.random.key(1), dropout=0.1)
    own = jax.tree.map(trained, own, is_leaf=is_weight)
    save_adapter(model, own, tmp_path / "adapter")
    ours = model(own, jnp.asarray(TOKENS))
    assert difference(ours, in_peft(theirs, tmp_path / "adapter")) < 1e-5
    again = load_adapter(params, tmp_path / "adapter")
    assert difference(model(again, jnp.asarray(TOKENS)), ours) < 1e-5
    adapted = {
        w.a.shape[-2:] for w in jax.tree.leaves(again, is_leaf=is_weight) if isinstance(w, Lora)
    }
    assert (
        len(adapted) == 3
        and json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_dropout"]
        == 0.0
    )


def test_what_does_not_load_is_refused(tmp_path: Path) -> None:
    model, params = load_tiny(tmp_path)
    save_adapter(model, adapted(params), tmp_path / "good")
    tensors = load_file(tmp_path / "good" / "adapter_model.safetensors")

    def changed(change: Any) -> Path:
        folder = tmp_path / "bad"
        folder.mkdir(exist_ok=True)
        text = (tmp_path / "good" / "adapter_config.json").read_text()
        (folder / "adapter_config.json").write_text(text)
        save_file(
            {change(n): x for n, x in tensors.items() if change(n)},
            folder / "adapter_model.safetensors",
        )
        return folder

    with pytest.raises(UserError, match="adapts only some experts of a layer, not"):
        load_adapter(params, changed(lambda n: "" if "experts.2.up_proj" in n else n))
    with pytest.raises(UserError, match="adapters of routers do not load"):
        load_adapter(params, changed(lambda n: n.replace("self_attn.q_proj", "mlp.gate")))
    with pytest.raises(UserError, match="target_parameters do not say which"):
        one = "mlp.experts.0.up_proj"
        load_adapter(params, changed(lambda n: n.replace(one, "mlp.experts") if one in n else ""))
    with pytest.raises(UserError, match=r"experts.lora_A.weight' is \(3, 32\); .* say \(18, 32\)"):
        folder = changed(lambda n: n.replace(one, "mlp.experts") if one in n else "")
        config = json.loads((folder / "adapter_config.json").read_text())
        config["target_parameters"] = ["experts.gate_up_proj"]
        (folder / "adapter_config.json").write_text(json.dumps(config))
        load_adapter(params, folder)


def load_tiny(folder: Path) -> tuple[Any, Any]:
    saved("qwen3_moe", folder / "model", num_hidden_layers=1)
    return load(folder / "model", dtype="float32")
