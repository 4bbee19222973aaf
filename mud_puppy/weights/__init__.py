"""Weights: leaf types, the linear dispatch, and the transforms `params -> params`."""

from mud_puppy.weights.adapter import check_savable, load_adapter, save_adapter
from mud_puppy.weights.fake_quant import fake_quant, finish_fake_quant, strip_fake_quant
from mud_puppy.weights.fp8 import fp8, fp8_types, strip_fp8, with_scales
from mud_puppy.weights.int8_dynamic import int8_dynamic
from mud_puppy.weights.leaf import FakeQuant, Fp8, Int8Dynamic, Lora, base_of, is_weight
from mud_puppy.weights.linear import dense, embed, linear, linears
from mud_puppy.weights.lora import (
    add_lora,
    freeze_lora,
    match_targets,
    merge_lora,
    strip_lora,
    with_dropout,
)
from mud_puppy.weights.merged import merge_quantized, merged_view
from mud_puppy.weights.peft import adapter_head
from mud_puppy.weights.quantize import Scheme, quantize, quantizer
from mud_puppy.weights.tree import combine, module_names, partition

__all__ = [
    "FakeQuant",
    "Fp8",
    "Int8Dynamic",
    "Lora",
    "Scheme",
    "adapter_head",
    "add_lora",
    "base_of",
    "check_savable",
    "combine",
    "dense",
    "embed",
    "fake_quant",
    "finish_fake_quant",
    "fp8",
    "fp8_types",
    "freeze_lora",
    "int8_dynamic",
    "is_weight",
    "linear",
    "linears",
    "load_adapter",
    "match_targets",
    "merge_lora",
    "merge_quantized",
    "merged_view",
    "module_names",
    "partition",
    "quantize",
    "quantizer",
    "save_adapter",
    "strip_fake_quant",
    "strip_fp8",
    "strip_lora",
    "with_dropout",
    "with_scales",
]
