"""Checkpoints that each format's own tool made: they load as it says, and our logits are those of
the model with the weights that the tool itself decodes, in float32.

The slow tests need what `test_gptq_transformers` (gptqmodel), `test_compressed_tensors` and
`test_bitsandbytes_format` (MUD_PUPPY_BNB) need. GGUF's are in `test_gguf_made`.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mud_puppy as mp
from mud_puppy.kernels import Quantized
from mud_puppy.kernels.formats import PACKED, swap_nibbles
from mud_puppy.weights import Int8Dynamic, is_weight

# Each gets: a folder of floats, one to write, options; and writes logits of the decoded model.
START = """
import json, os, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
source, folder, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
"""
END = """
tokens = load_file(source + "/tokens.safetensors")["tokens"].long()
with torch.no_grad():
    save_file({"logits": plain(tokens).logits}, folder + "/logits.safetensors")
"""
GPTQMODEL = """
torch._dynamo.config.disable = True  # it would compile for minutes
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
words = Tokenizer(models.BPE(vocab={chr(48 + i): i for i in range(64)}, merges=[]))
words = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="2", pad_token="2")
words.save_pretrained(source)
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
model = GPTQModel.load(source, QuantizeConfig(**options), device="cpu")
torch.manual_seed(0)
rows = [torch.randint(0, 64, (1, 48)) for _ in range(8)]
model.quantize([{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in rows], batch_size=1)
model.save(folder)
awq, group = options["method"] == "awq", options["group_size"]
backend = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
made, tensors = GPTQModel.load(folder, backend=backend, device="cpu"), {}
stored = load_file(folder + "/model.safetensors")
for name, m in made.model.named_modules():
    if not hasattr(m, "qweight"):
        continue
    m.scales.data = stored[f"{name}.scales"].float()  # it would decode in 16 bits
    w = dequantize_gemm(m.qweight, m.qzeros, m.scales, 4, group) if awq else m.dequantize_weight()
    tensors[f"{name}.weight"] = w.T.float().contiguous()
suffixes = (".qweight", ".qzeros", ".scales", ".g_idx")
tensors |= {name: x for name, x in stored.items() if not name.endswith(suffixes)}
# transformers puts experts together as it loads.
os.mkdir(folder + "/plain")
fields = json.load(open(folder + "/config.json"))
del fields["quantization_config"]
json.dump(fields, open(folder + "/plain/config.json", "w"))
save_file(tensors, folder + "/plain/model.safetensors", metadata={"format": "pt"})
plain = AutoModelForCausalLM.from_pretrained(folder + "/plain", dtype=torch.float32).eval()
"""
COMPRESSED = """
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
groups = {"group_0": {"targets": ["Linear"], **options}}
apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
for module in model.modules():
    if not hasattr(module, "weight_scale"):
        continue
    args, w = module.quantization_scheme.weights, module.weight.data
    rows = module.weight_scale.shape
    if args.strategy == "block":
        a, b = args.block_structure
        blocks = w.reshape(rows[0], a, rows[1], b).transpose(1, 2).reshape(*rows, -1)
    else:
        blocks = w.reshape(*rows, -1) if len(rows) == 2 else w.reshape(1, -1)
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
    module.weight_scale.data = scale.to(module.weight_scale.dtype).reshape(rows)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype).reshape(rows)
    if hasattr(module, "input_scale"):
        torch.nn.init.constant_(module.input_scale, 0.01)
compressor = ModelCompressor.from_pretrained_model(model)
compressor.compress_model(model)
model.save_pretrained(folder)
compressor.update_config(folder)
compressor.decompress_model(model)
own = plain.state_dict()
plain.load_state_dict({n: x.float() for n, x in model.state_dict().items() if n in own})
"""
BITSANDBYTES = """
import bitsandbytes.functional as F
from transformers import BitsAndBytesConfig
model = LlamaForCausalLM.from_pretrained(
    source, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32)
model.save_pretrained(folder)
for name, m in model.named_modules():
    if type(m).__name__ == "Linear4bit":
        w = F.dequantize_4bit(m.weight.data, m.weight.quant_state)
    elif type(m).__name__ == "Linear8bitLt":
        scales = m.state.SCB if m.weight.SCB is None else m.weight.SCB
        w = F.int8_vectorwise_dequant(m.weight.data, scales)
    else:
        continue
    plain.get_submodule(name).weight.data = w.float()
"""
FP8 = """
from types import SimpleNamespace
from safetensors.torch import save_file
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize
config = FineGrainedFP8Config(**options)  # its own conversion wants a GPU, its parts do not
plain.config.quantization_config = config
plain.config.save_pretrained(folder)
encode = Fp8Quantize(SimpleNamespace(quantization_config=config))
found = {}
for name, x in plain.state_dict().items():
    found |= encode.convert({name: x}) if "_proj" in name else {name: x}
save_file(found, folder + "/model.safetensors", metadata={"format": "pt"})
config = FineGrainedFP8Config(**options, dequantize=True)
plain = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
"""
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
INT4 = WEIGHTS | {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
INPUTS = WEIGHTS | {"dynamic": True, "strategy": "token"}
CHANNEL, TENSOR = WEIGHTS | {"strategy": "channel"}, WEIGHTS | {"strategy": "tensor"}
BLOCK = WEIGHTS | {"strategy": "block", "block_structure": [64, 32]}
MXFP4 = INT4 | {"type": "float", "scale_dtype": "torch.uint8"}
AWQ = {"method": "awq", "format": "gemm", "bits": 4, "group_size": 32}
GPTQ = {"method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

# tool, options, what the linears become ("": floats), what the log says
CASES = {
    "awq": (GPTQMODEL, AWQ | {"sym": False}, "int4 zeros", ""),
    "awq symmetric": (GPTQMODEL, AWQ | {"sym": True}, "int4 zeros", ""),
    "gptq": (GPTQMODEL, GPTQ, "int4", ""),
    "gptq zeros": (GPTQMODEL, GPTQ | {"sym": False}, "int4 zeros", ""),
    "gptq 8": (GPTQMODEL, GPTQ | {"bits": 8}, "int8", ""),
    "gptq in order of activations": (GPTQMODEL, GPTQ | {"desc_act": True}, "", "not in the order"),
    "fp8 tensor, static": (
        COMPRESSED,
        {"weights": TENSOR, "input_activations": INPUTS | {"strategy": "tensor", "dynamic": False}},
        "fp8_e4m3fn",
        "keep their codes, with inputs as they are (float8 a tensor, with scales of the file)",
    ),
    "fp8 dynamic": (
        COMPRESSED,
        {"weights": CHANNEL, "input_activations": INPUTS},
        "fp8_e4m3fn",
        "keep their codes, with inputs as they are (float8 a token)",
    ),
    "fp8 blocks": (COMPRESSED, {"weights": BLOCK}, "fp8_e4m3fn", ""),
    "fp8 naive": (COMPRESSED, {"weights": CHANNEL, "format": "naive-quantized"}, "fp8_e4m3fn", ""),
    "int8": (
        COMPRESSED,
        {"weights": CHANNEL | {"type": "int"}, "input_activations": INPUTS | {"type": "int"}},
        "int8",
        "",
    ),
    "int8 naive": (
        COMPRESSED,
        {"weights": CHANNEL | {"type": "int"}, "format": "naive-quantized"},
        "int8",
        "",
    ),
    "int8 zeros": (
        COMPRESSED,
        {"weights": INT4 | {"num_bits": 8, "symmetric": False}},
        "int8 zeros",
        "",
    ),
    "int4": (COMPRESSED, {"weights": INT4}, "int4", ""),
    "int4 zeros": (COMPRESSED, {"weights": INT4 | {"symmetric": False}}, "int4 zeros", ""),
    "mxfp4": (COMPRESSED, {"weights": MXFP4, "format": "mxfp4-pack-quantized"}, "mxfp4", ""),
    "fp8 of DeepSeek": (
        FP8,
        {"weight_block_size": [64, 32]},
        "fp8_e4m3fn",
        "keep their codes, with inputs as they are (float8, dynamic)",
    ),
    "nf4": (BITSANDBYTES, NF4, "nf4", ""),
    "nf4 double": (BITSANDBYTES, NF4 | {"bnb_4bit_use_double_quant": True}, "nf4", ""),
    "fp4": (BITSANDBYTES, NF4 | {"bnb_4bit_quant_type": "fp4"}, "", "bitsandbytes' fp4"),
    "LLM.int8": (BITSANDBYTES, {"load_in_8bit": True}, "int8", ""),
}
SIZES = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}


def make(
    tool: str, source: Path, folder: Path, options: dict[str, Any], tokens: np.ndarray
) -> np.ndarray:
    """Runs the tool; the logits of its decoded model."""
    save_file({"tokens": tokens}, source / "tokens.safetensors")
    path = os.environ.get("MUD_PUPPY_BNB", "") if tool == BITSANDBYTES else None
    if path is not None and not (Path(path) / "bitsandbytes").exists():
        pytest.fail("pip install --no-deps --target FOLDER bitsandbytes, then MUD_PUPPY_BNB=FOLDER")
    extra = {"GPTQMODEL_CPU_WORKERS": "2"} | ({} if path is None else {"PYTHONPATH": path})
    command = [sys.executable, "-c", START + tool + END, source, folder, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | extra)
    assert done.returncode == 0, done.stderr[-3000:]
    logits = load_file(folder / "logits.safetensors")["logits"]
    (folder / "logits.safetensors").unlink()
    return logits


def spoiled(w: Any) -> Any:
    """A linear with its codes in another order, or its rows where it is floats."""
    if isinstance(w, Quantized):
        wrong = swap_nibbles(w.codes) if w.format in PACKED else jnp.roll(w.codes, 1, -1)
        return replace(w, codes=wrong)
    return jnp.roll(w, 1, -1) if w.ndim == 3 else w


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_tool(
    case: str, tiny: Any, tokens: Any, tmp_path: Path, caplog: Any
) -> None:
    tool, options, kind, said = CASES[case]
    floats, _ = tiny("llama", **SIZES)
    source, folder = tmp_path / "floats", tmp_path / "made"
    shutil.copytree(floats, source)
    expected = make(tool, source, folder, options, tokens)
    caplog.clear()
    model, params = mp.load(folder, dtype="float32")
    assert len(caplog.messages) == bool(said) and said in "".join(caplog.messages)

    # Inputs that are rounded to int8 have a test of their own (test_compressed_tensors).
    linears = [w for w in jax.tree.leaves(params, is_leaf=is_weight) if is_weight(w)]
    assert all(isinstance(w, Int8Dynamic) == (case == "int8") for w in linears)
    params = jax.tree.map(
        lambda w: w.base if isinstance(w, Int8Dynamic) else w, params, is_leaf=is_weight
    )
    w = params["layers"][0][0]["mlp"]["down_proj"]["weight"]
    found = f"{w.format}{' zeros' if w.zeros is not None else ''}" if is_weight(w) else ""
    assert found == kind and len(linears) == (7 if kind else 0)
    allowed = 1e-4 * np.abs(expected).max()  # measured: 1e-5
    assert np.abs(np.asarray(model(params, jnp.asarray(tokens))) - expected).max() <= allowed
    wrong = jax.tree.map(spoiled, params, is_leaf=is_weight)
    assert np.abs(np.asarray(model(wrong, jnp.asarray(tokens))) - expected).max() > 300 * allowed


@pytest.mark.slow
@pytest.mark.parametrize("options", [AWQ | {"sym": False}, GPTQ], ids=["awq", "gptq"])
def test_experts_that_gptqmodel_stores_one_by_one(
    options: dict[str, Any], tokens: Any, tmp_path: Path, caplog: Any
) -> None:
    torch = pytest.importorskip("torch")
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = SIZES | {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    floats = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **sizes,
            vocab_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            norm_topk_prob=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
    )
    with torch.no_grad():
        for x in floats.parameters():
            x.add_(0.1 * torch.randn_like(x))
    source, folder = tmp_path / "floats", tmp_path / "made"
    floats.save_pretrained(source)
    expected = make(GPTQMODEL, source, folder, options, tokens)
    caplog.clear()
    model, params = mp.load(folder, dtype="float32")
    assert not caplog.messages
    experts = params["layers"][0][0]["mlp"]["experts"]
    assert {w["weight"].format for w in experts.values()} == {"int4"}
    assert experts["down_proj"]["weight"].shape == (2, 4, 128, 64)
    allowed, ids = 1e-4 * np.abs(expected).max(), jnp.asarray(tokens)
    assert np.abs(np.asarray(model(params, ids)) - expected).max() <= allowed
    # The experts of a layer the other way round.
    down = jax.tree.map(lambda x: x[:, ::-1], experts["down_proj"]["weight"])
    experts["down_proj"]["weight"] = down
    assert np.abs(np.asarray(model(params, ids)) - expected).max() > 300 * allowed
