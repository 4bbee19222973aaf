"""One row of docs/models.md: what a family's tiny random model does here and in transformers.

`make` builds and saves transformers' model with every number mattering (norms not one, biases not
zero, attention not flat) and notes what it computes; the checks compare. `tools/family_table.py`
writes the table, tests/model/test_families.py holds every row to the bounds.
"""

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from mud_puppy.export import save_hf
from mud_puppy.model import abstract, load, scan_layers
from mud_puppy.model.names import flatten
from mud_puppy.run.methods import SFT
from mud_puppy.sampling import Options, generate_tokens
from mud_puppy.weights import Lora, add_lora, is_weight, save_adapter
from tests.model.family_cases import CASES, FIELDS

TOKENS = np.random.default_rng(0).integers(3, 64, (2, 40), dtype=np.int32)
PROMPTS = [TOKENS[0, :7].tolist(), TOKENS[1, :12].tolist()]
NEW = 32
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2, "gradient": 1e-4}


@dataclass(frozen=True)
class Made:
    """A saved model of transformers' and what it computes of TOKENS, float32."""

    folder: Path
    gradients: Path  # a folder like the model's, of gradients
    logits: np.ndarray  # [B, T, V]
    torch: Any  # the model


def make(case: str, folder: Path) -> Made:
    import torch
    import transformers

    name, fields = CASES[case]
    config = getattr(transformers, f"{name}Config")(
        **(FIELDS | {"attn_implementation": "eager"} | fields)
    )
    torch.manual_seed(0)
    model = getattr(transformers, _CLASSES.get(name, f"{name}ForCausalLM"))(config).eval()
    norm = 0.0 if name.startswith("Gemma") else 1.0
    with torch.no_grad():
        for path, x in (*model.named_parameters(), *model.named_buffers()):
            noise = torch.randn_like(x) if x.dtype == torch.float32 else x
            if path.endswith(("inv_freq", "embed_scale")) or x.dtype != torch.float32:
                continue
            if "norm" in path or "ln_" in path:
                x.copy_(norm + 0.3 * noise if path.endswith("weight") else 0.5 * noise)
            else:
                x.copy_(noise * (0.5 if "bias" in path else 0.12))
            x.copy_(x.bfloat16().float())  # so that bfloat16 has the same weights
    model.save_pretrained(folder / "model")
    tokens = torch.tensor(TOKENS, dtype=torch.long)
    out = model(tokens, labels=tokens)
    out.loss.backward()
    return Made(
        folder / "model",
        _gradients(model, folder / "gradients"),
        out.logits.detach().numpy(),
        model,
    )


_CLASSES = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


def _gradients(model: Any, folder: Path) -> Path:
    """The gradients in the place of the weights, so that the files are named as those are."""
    import torch

    other = deepcopy(model)
    with torch.no_grad():
        for to, x in zip(other.parameters(), model.parameters(), strict=True):
            to.copy_(torch.zeros_like(x) if x.grad is None else x.grad)
    other.save_pretrained(folder)
    return folder


def _greedy(model: Any) -> list[list[int]]:
    import torch

    replies = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], dtype=torch.long)
        mask = torch.ones_like(ids)
        config = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None}
        out = model.generate(ids, attention_mask=mask, use_cache=True, **config)
        replies.append(out[0, len(prompt) :].tolist())
    return replies


@dataclass(frozen=True)
class Row:
    """The numbers of one family; see the functions that measure them."""

    float32: float
    bfloat16: float
    gradient: float
    round_trip: bool
    greedy: bool
    adapter: bool


def measure(made: Made, folder: Path) -> Row:
    return Row(
        logits_error(made),
        bfloat16_error(made),
        gradient_error(made),
        round_trip(made, folder / "saved"),
        same_greedy(made),
        adapter_loads(made, folder / "adapter"),
    )


Change = Callable[[Any, Any], tuple[Any, Any]]


def unchanged(model: Any, params: Any) -> tuple[Any, Any]:
    return model, params


def logits_error(made: Made, change: Change = unchanged) -> float:
    """Largest difference of logits in float32, relative to the largest."""
    model, params = change(*load(made.folder, dtype="float32"))
    ours = np.asarray(model(params, jnp.asarray(TOKENS)))
    return float(np.abs(ours - made.logits).max() / np.abs(made.logits).max())


def bfloat16_error(made: Made) -> float:
    """The median token's error of logits in bfloat16 against transformers' in float32, relative.

    The median, for a router that is near a tie sends a token to another expert after rounding,
    here as in transformers.
    """
    model, params = load(made.folder)
    ours = np.asarray(model(params, jnp.asarray(TOKENS)))
    norms = (np.linalg.norm(x, axis=-1) for x in (ours - made.logits, made.logits))
    return float(np.median(np.divide(*norms)))


def gradient_error(made: Made) -> float:
    """Largest difference in a leaf's gradient of the mean loss, relative to the leaf's largest (or
    to a thousandth of all leaves' largest, where a leaf's is zero)."""
    model, params = load(made.folder, dtype="float32")
    _, theirs = load(made.gradients, dtype="float32")
    batch = {
        "tokens": jnp.asarray(TOKENS),
        "targets": jnp.roll(jnp.asarray(TOKENS), -1, axis=1),
        "weights": jnp.ones(TOKENS.shape).at[:, -1].set(0.0),
        "positions": jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape),
        "segment_ids": jnp.ones(TOKENS.shape, jnp.int32),
    }

    def loss(params: Any) -> Any:
        scores = SFT.score(model, params, None, batch, scan_layers)
        return SFT.loss(scores, batch, batch["weights"].sum())[0]

    ours, theirs = flatten(jax.jit(jax.grad(loss))(params)), flatten(theirs)
    largest = {path: float(np.abs(x).max()) for path, x in theirs.items()}
    floor = 1e-3 * max(largest.values())
    return max(
        float(np.abs(ours[path] - theirs[path]).max()) / max(largest[path], floor)
        for path in ours
        if not path.endswith("choice_bias")  # a buffer, which has no gradient
    )


def tensors_of(folder: Path) -> dict[str, Any]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                found[name] = tensors.get_tensor(name)
    return found


def round_trip(made: Made, out: Path, change: Change = unchanged) -> bool:
    """Whether load and save give the same bytes of each tensor and a config that says the same."""
    model, params = change(*load(made.folder, dtype=None))
    save_hf(model, params, out, dtype=None)
    before, after = tensors_of(made.folder), tensors_of(out)
    same = before.keys() == after.keys() and all(
        x.dtype == after[name].dtype and x.tobytes() == after[name].tobytes()
        for name, x in before.items()
    )
    return same and abstract(out)[0].arch.replace(config="") == model.arch.replace(config="")


def same_greedy(made: Made) -> bool:
    """Whether 32 tokens, decoded with a cache, are those of transformers."""
    model, params = load(made.folder, dtype="float32")
    replies = generate_tokens(model, params, PROMPTS, Options(NEW))
    return [reply.tokens for reply in replies] == _greedy(made.torch)


def adapter_loads(made: Made, folder: Path) -> bool:
    """Whether peft loads our adapter on every linear and gives our logits."""
    import torch
    from peft import PeftModel

    model, params = load(made.folder, dtype="float32")
    params = add_lora(params, rank=3, alpha=6, key=jax.random.key(0))
    key = jax.random.key(1)

    def trained(w: Any) -> Any:
        if not isinstance(w, Lora):
            return w
        return replace(w, b=0.1 * jax.random.normal(key, w.b.shape))

    params = jax.tree.map(trained, params, is_leaf=is_weight)
    save_adapter(model, params, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft and transformers tell each other
        theirs = PeftModel.from_pretrained(deepcopy(made.torch), folder).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    ours = np.asarray(model(params, jnp.asarray(TOKENS)))
    scale = np.abs(expected).max()
    assert np.abs(expected - made.logits).max() > 1e-2 * scale, "the adapter does nothing"
    return bool(np.abs(ours - expected).max() <= BOUNDS["float32"] * scale)
