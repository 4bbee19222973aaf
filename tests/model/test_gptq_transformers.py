"""The GPTQ layout in another program: transformers with gptqmodel's pure torch kernels.

Needs the extra `quant`, and after it `pip install --no-deps gptqmodel==7.7.0`, which by itself asks
for another torch.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mud_puppy.export import save_hf
from mud_puppy.kernels import dequantize
from mud_puppy.model.gptq_format import pack, quantization_config
from mud_puppy.weights import is_weight
from mud_puppy.weights.gptq import gptq, round_to_nearest, to_quantized
from tests.tiny import tiny_model

FIELDS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
GROUP = 32


def write(folder, bits, symmetric, fault=None):
    """Writes the model as GPTQ files; returns (model, params) with the same weights as leaves."""
    model, params = tiny_model(**FIELDS)
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False)])
def test_codes_are_those_of_gptqmodel(bits, symmetric):
    """One group a block: gptqmodel takes the scales of later groups from before the block."""
    import torch
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 512, 128)) @ rng.normal(size=(128, 128))
    w = rng.normal(size=(48, 128)) * 0.05
    module = torch.nn.Linear(128, 48, bias=False)
    module.weight.data = torch.tensor(w, dtype=torch.float32)
    config = QuantizeConfig(
        bits=bits, group_size=128, sym=symmetric, desc_act=False, act_group_aware=False,
        damp_percent=0.01,
    )  # fmt: skip
    theirs = GPTQ(module, config)
    theirs.quantizer.configure(perchannel=True)
    with torch.no_grad():
        seen = torch.tensor(x, dtype=torch.float32)
        theirs.add_batch(seen, module(seen), 0)
        want = theirs.quantize()[0].float().numpy()
    hessian = jnp.asarray(x[0].T @ x[0], jnp.float32)
    own = jnp.asarray(w, jnp.float32)
    options = {"bits": bits, "group": 128, "symmetric": symmetric}
    for found, same in (
        (gptq(own, hessian, **options), True),
        (round_to_nearest(own, **options), False),
    ):
        got = np.asarray(dequantize(to_quantized(*found, bits, jnp.float32)))
        equal = np.isclose(got, want, atol=1e-3 * np.abs(w).max()).mean()
        assert (equal > 0.97) == same, equal
