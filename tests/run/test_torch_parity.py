"""30 steps of full and LoRA training against a plain torch / PEFT loop from the same start."""

from functools import partial

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

from mud_puppy.model import load, scan_layers
from mud_puppy.run.methods import SFT
from mud_puppy.run.optimizer import make_optimizer
from mud_puppy.run.schedule import schedule
from mud_puppy.run.step import init_state, make_step
from mud_puppy.weights import load_adapter, partition
from tests.tiny import SIZES

# peft asks transformers for a property that it has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

V, T, B, A, STEPS, WARMUP, RATE, CLIP, DECAY = SIZES["vocab_size"], 24, 4, 2, 30, 5, 5e-3, 0.5, 0.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    path = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(model, settings).save_pretrained(path)
    return path


def batches():
    """Right-padded rows whose first tokens, the prompt, are not trained on."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = rng.integers(0, V, (A, B, T)).astype(np.int32)
        # Half of each row repeats, so that there is something to learn.
        tokens[..., T // 2 :] = tokens[..., : T - T // 2]
        lengths = rng.integers(T // 2, T + 1, (A, B, 1))
        slot = np.broadcast_to(np.arange(T), tokens.shape)
        trained = (slot >= 5) & (slot < lengths)
        yield {
            "tokens": tokens,
            "positions": slot.astype(np.int32),
            "segment_ids": (slot < lengths).astype(np.int32),
            "targets": np.roll(tokens, -1, -1),
            "weights": np.roll(trained, -1, -1).astype(np.float32) * (slot < T - 1),
        }


def torch_losses(model, decayed) -> list[float]:
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if decayed(n) == flag], "weight_decay": DECAY * flag}
        for flag in (True, False)
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=RATE)
    rates = transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    losses = []
    for batch in batches():
        rows = {k: torch.tensor(x).long().reshape(A * B, T) for k, x in batch.items()}
        logits = model(input_ids=rows["tokens"], attention_mask=rows["segment_ids"]).logits
        nll = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), rows["targets"], reduction="none"
        )
        weights = torch.tensor(batch["weights"]).reshape(A * B, T)
        loss = (nll * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], CLIP)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def our_losses(model, params, **changes) -> list[float]:
    train, frozen = partition(params)
    rate = schedule("cosine", RATE, STEPS, WARMUP)
    tx = make_optimizer("adamw", rate, train, weight_decay=DECAY)
    settings = dict(max_grad_norm=CLIP, run_layers=partial(scan_layers, remat="full")) | changes
    step = jax.jit(make_step(model, SFT, tx, rate, **settings))
    state, losses = init_state(train, tx, jax.random.key(0), False), []
    for batch in batches():
        state, metrics = step(state, frozen, None, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return losses


def worst(ours, theirs) -> float:
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


def test_full_training(folder):
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs = torch_losses(reference, lambda name: "norm" not in name)
    assert theirs[-1] < theirs[0] - 0.3
    ours = our_losses(*load(folder, dtype="float32"))
    assert worst(ours, theirs) <= 1e-3
    assert worst(our_losses(*load(folder, dtype="float32"), max_grad_norm=None), theirs) > 1e-3


def test_lora_training(folder, adapter):
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    reference = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
    theirs = torch_losses(reference, lambda name: True)
    assert theirs[-1] < theirs[0] - 0.05
    model, params = load(folder, dtype="float32")
    assert worst(our_losses(model, load_adapter(params, adapter)), theirs) <= 1e-3
    other = load_adapter(params, adapter)
    other = jax.tree.map(lambda x: x * 1.1 if x.ndim == 1 else x, other)  # scales of the adapters
    assert worst(our_losses(model, other), theirs) > 1e-3
