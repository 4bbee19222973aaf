"""The GPTQ layout in another program: transformers with gptqmodel's pure torch kernels.

Needs gptqmodel and optimum beside torch (the extra `quant`).
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mud_puppy.export import save_hf
from mud_puppy.kernels import dequantize
from mud_puppy.model import abstract, init
from mud_puppy.model.gptq_format import pack, quantization_config
from mud_puppy.weights import is_weight
from mud_puppy.weights.gptq import round_to_nearest, to_quantized

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
GROUP = 32


def write(folder, bits, symmetric, fault=None):
    """Writes the model as GPTQ files; returns (model, params) with the same weights as leaves."""
    model, _ = abstract(CONFIG, dtype="float32")
    params = init(model.arch, jax.random.key(0))
    save_hf(model, params, folder, dtype="float32")
    tensors = load_file(folder / "model.safetensors")

    def change(path, stack):
        if stack.ndim < 3:
            return stack
        (*_, part, name, _), leaves = (getattr(key, "key", None) for key in path), []
        for layer, w in enumerate(stack):
            own = round_to_nearest(w, bits=bits, group=GROUP, symmetric=symmetric)
            codes, scales, zeros = (None if x is None else np.asarray(x) for x in own)
            if fault == "codes":
                codes = codes[:, ::-1]
            module = f"model.layers.{layer}.{part}.{name}"
            del tensors[f"{module}.weight"]
            parts = pack(codes, scales, zeros, bits)
            tensors.update({f"{module}.{suffix}": x for suffix, x in parts.items()})
            leaves.append(to_quantized(*own, bits, jnp.float32))
        return jax.tree.map(lambda *xs: jnp.stack(xs), *leaves)

    params = {**params, "layers": jax.tree.map_with_path(change, params["layers"])}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization_config(bits, GROUP, symmetric, False, 0.01)
    (folder / "config.json").write_text(json.dumps(config))
    return model, params


def both(folder, bits, symmetric, fault=None):
    """Logits of (ours, ours with weights rounded to float16, theirs)."""
    import torch
    from transformers import AutoModelForCausalLM, GPTQConfig

    torch._dynamo.config.disable = True  # gptqmodel would compile for minutes
    model, params = write(folder, bits, symmetric, fault)
    other = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        device_map="cpu",
        quantization_config=GPTQConfig(bits=bits, backend="gptq_torch"),
    ).eval()
    tokens = np.random.default_rng(0).integers(0, 64, (2, 24))
    with torch.no_grad():
        theirs = other(torch.tensor(tokens)).logits.float().numpy()

    def half(w):
        return dequantize(w, jnp.float16).astype(jnp.float32) if is_weight(w) else w

    variants = params, jax.tree.map(half, params, is_leaf=is_weight)
    ours = (np.asarray(model(p, jnp.asarray(tokens, jnp.int32))) for p in variants)
    return *ours, theirs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("bits", "symmetric"), [(4, True), (4, False), (8, True), (2, False), (3, True), (3, False)]
)
def test_logits_are_ours(tmp_path, bits, symmetric):
    ours, half, theirs = both(tmp_path, bits, symmetric)
    # gptqmodel decodes to float16, the dtype of the scales: with such weights we agree to float32.
    np.testing.assert_allclose(theirs, half, atol=1e-5 * np.abs(half).max())
    np.testing.assert_allclose(theirs, ours, atol=1e-3 * np.abs(ours).max())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_comparison_fails_for_other_codes(tmp_path):
    ours, _, theirs = both(tmp_path, 4, True, fault="codes")
    assert np.abs(ours - theirs).max() > 0.05 * np.abs(ours).max()
