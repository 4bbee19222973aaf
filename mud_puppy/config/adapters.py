"""Keys of adapters; `keys.Config` has them beside its own."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from mud_puppy.config.schema import AT_LEAST_1, BELOW_1, POSITIVE, Need, Parser, key, names

Stored = Literal["bf16", "fp32", "fp16", "nf4", "int4", "int8", "mxfp4"]

_LORA = Need("method (or tune) lora or qlora, or qat with qat_lora", lambda c: c.adapts)
_NEW_ADAPTER = Need(
    "a new adapter: method (or tune) lora or qlora, or qat with qat_lora, and adapter_mode stack "
    "if adapter is set (continue keeps its own)",
    lambda c: c.adapts and (c.adapter is None or c.adapter_mode == "stack"),
)
_ADAPTER = Need("adapter", lambda c: c.adapter is not None)
_MERGE = Need("merge_lora", lambda c: c.merge_lora)


def _targets(value: Any) -> str | tuple[str, ...]:
    """Module names as a tuple; "all-linear" or a regular expression stays a text."""
    if value == "all-linear" or not isinstance(value, str):
        return value if isinstance(value, str) else names(value)
    if re.fullmatch(r"[\w.,\s-]+", value):
        return names(value)
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"as a regular expression: {error}") from None
    return value


_TARGETS = Parser("all-linear, module names or a regular expression", _targets)

_lora = partial(key, "LoRA")


@dataclass(frozen=True, kw_only=True)
class AdapterKeys:
    """Keys of LoRA and of adapters that are there already."""

    lora_r: int = _lora(16, "rank", AT_LEAST_1, needs=_NEW_ADAPTER)
    lora_alpha: float = _lora(32.0, "scale: alpha / rank", POSITIVE, needs=_NEW_ADAPTER)
    lora_dropout: float = _lora(0.0, "dropout on the adapter's input", BELOW_1, needs=_LORA)
    lora_targets: str | tuple[str, ...] = _lora(
        "all-linear", "modules that get an adapter", _TARGETS, needs=_NEW_ADAPTER
    )
    lora_rslora: bool = _lora(False, "scale: alpha / sqrt(rank)", needs=_NEW_ADAPTER)
    lora_dora: bool = _lora(False, "train magnitudes as well (DoRA)", needs=_NEW_ADAPTER)
    loraplus_lr_ratio: float = _lora(
        1.0, "learning rate of B over that of A (LoRA+)", POSITIVE, needs=_LORA
    )
    adapter: str | None = _lora(None, "PEFT adapter folder to start from", needs=_LORA)
    adapter_mode: Literal["continue", "stack"] = _lora(
        "continue", "train that adapter on, or a new one on top", needs=_ADAPTER
    )
    merge_lora: bool = _lora(False, "write the merged model to output/merged too", needs=_LORA)
    merge_precision: Stored | None = _lora(
        None,
        "type or format of the merged model; null: that of precision (bf16 for fp8)",
        needs=_MERGE,
    )
