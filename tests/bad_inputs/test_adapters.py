"""Adapters that are damaged, or made for another model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bad_inputs.damage import (
    ADAPTER,
    ADAPTER_CONFIG,
    Q,
    content,
    cut,
    edit,
    gone,
    renamed,
    tensors,
)

# name: (damage to the adapter's folder, what the line says)
ADAPTERS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "config is no JSON": (content(ADAPTER_CONFIG, b"{"), (f"{ADAPTER_CONFIG}: not readable",)),
    "no config": (gone(ADAPTER_CONFIG), (f"run: no {ADAPTER_CONFIG} here",)),
    "another kind": (
        lambda folder: edit(folder / ADAPTER_CONFIG, {"peft_type": "IA3"}),
        ("peft_type is not LORA; only LoRA adapters load",),
    ),
    "rank": (
        lambda folder: edit(folder / ADAPTER_CONFIG, {"r": 8}),
        ("lora_A.weight' is (4, 48)", "say (8, 48)"),
    ),
    "pattern": (
        lambda folder: edit(folder / ADAPTER_CONFIG, {"rank_pattern": {"*": 2}}),
        (f"{ADAPTER_CONFIG}: rank_pattern: '*' is no regular expression",),
    ),
    "dropout": (
        lambda folder: edit(folder / ADAPTER_CONFIG, {"lora_dropout": "x"}),
        ("lora_dropout must be a number, not 'x'",),
    ),
    "another model's shape": (
        tensors(lambda t: t | {f"{Q}.lora_A.weight": np.zeros((4, 64), np.float32)}, ADAPTER),
        (f"tensor '{Q}.lora_A.weight' is (4, 64)", "say (4, 32)"),
    ),
    "another model's layers": (
        tensors(lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}, ADAPTER),
        ("adapts module 'model.layers.7.", "which this model has not", "was made for"),
    ),
    "half a pair": (
        tensors(lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"}, ADAPTER),
        (f"tensor '{Q}.lora_B.weight' is missing",),
    ),
    "empty": (tensors(lambda t: {}, ADAPTER), (f"{ADAPTER}: holds no tensors",)),
    "truncated": (cut(ADAPTER, 9), (f"{ADAPTER}: not a whole safetensors file", "download")),
    "pickle": (renamed(ADAPTER, "adapter_model.bin"), ("pickles are never opened",)),
}


@pytest.mark.parametrize(("damage", "says"), ADAPTERS.values(), ids=list(ADAPTERS))
def test_adapters(damage, says, bench, refused):
    damage(bench.run)
    refused(bench.train("--adapter", str(bench.run)), *says)


def test_merge_with_an_adapter_of_another_model(bench, refused):
    ADAPTERS["another model's shape"][0](bench.run)
    argv = ["merge", bench.model, bench.run, "--output", bench.out]
    refused(argv, f"tensor '{Q}.lora_A.weight' is (4, 64)")
