"""gpt-oss' MXFP4 files: the bits by hand, there and back, and transformers' decoding."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mud_puppy.errors import UserError
from mud_puppy.export import save_quantized
from mud_puppy.kernels import dequantize, quantize
from mud_puppy.kernels.formats import swap_nibbles
from mud_puppy.model import load
from mud_puppy.model.mxfp4_format import pack, quantization_config, read

E, OUT, IN = 3, 8, 64
SHAPE = (E, OUT, IN)


def weight():
    return jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)


def value(tensors):
    return dequantize(jax.tree.map(jnp.asarray, read(tensors, SHAPE, "float32")))


def test_there_and_back():
    q = quantize(weight(), "mxfp4")
    tensors = pack(q)
    kinds = {name: (x.dtype.name, x.shape) for name, x in tensors.items()}
    assert kinds == {"blocks": ("uint8", (E, OUT, 2, 16)), "scales": ("uint8", (E, OUT, 2))}
    back = read(tensors, SHAPE, "bfloat16")
    assert (back.format, back.group, back.dtype) == ("mxfp4", 32, jnp.bfloat16)
    np.testing.assert_array_equal(back.codes, q.codes)
    np.testing.assert_array_equal(back.scales, q.scales)


def test_a_block_by_hand():
    # E2M1: 1 is code 2, -6 is 15, 0.5 is 1; a scale of 129 is 4.
    blocks, scales = np.zeros((1, 1, 1, 16), np.uint8), np.full((1, 1, 1), 129, np.uint8)
    blocks[..., 0], blocks[..., 1] = 0xF2, 0x01
    leaf = read({"blocks": blocks, "scales": scales}, (1, 1, 32), "float32")
    got = dequantize(jax.tree.map(jnp.asarray, leaf))
    assert got[0, 0, :4].tolist() == [4, -24, 2, 0]


def theirs(tensors):
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    given = (torch.tensor(tensors[name]) for name in ("blocks", "scales"))
    return convert_moe_packed_tensors(*given, dtype=torch.float32).numpy().swapaxes(1, 2)


def test_transformers_decodes_the_same_weights():
    random = np.random.default_rng(1)
    tensors = {
        "blocks": random.integers(0, 256, (E, OUT, 2, 16)).astype(np.uint8),
        "scales": random.integers(100, 140, (E, OUT, 2)).astype(np.uint8),
    }
    np.testing.assert_array_equal(value(tensors), theirs(tensors))
    for fault in (
        tensors | {"blocks": swap_nibbles(tensors["blocks"])},
        tensors | {"scales": tensors["scales"] + 1},
        tensors | {"blocks": tensors["blocks"][:, ::-1]},
    ):
        assert np.abs(value(fault) - theirs(tensors)).max() > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": np.full((E, OUT, 2), 255, np.uint8)}, "scales holds a scale that is NaN"),
        ({"scales": np.zeros((E, OUT, 3), np.uint8)}, r"scales is uint8\[3, 8, 3\], expected"),
        (
            {"blocks": np.zeros((E, OUT, 2, 8), np.uint8)},
            r"blocks is .*expected uint8\[3, 8, 2, 16",
        ),
        ({"blocks": np.zeros((E, OUT, 2, 16), np.int8)}, "blocks is int8"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    tensors = pack(quantize(weight(), "mxfp4"))
    with pytest.raises(UserError, match=message):
        read(tensors | change, SHAPE, "float32")


def test_other_codes_and_sizes():
    with pytest.raises(UserError, match="hold mxfp4 in groups of 32, not nf4 of 64"):
        pack(quantize(weight(), "nf4"))
    with pytest.raises(UserError, match="rows of 48 are not whole groups"):
        read({}, (E, OUT, 48), "float32")


# --- a whole model -------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "pad_token_id": 0,
}


def test_logits_of_gpt_oss_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config

    torch.manual_seed(0)
    floats = GptOssForCausalLM(GptOssConfig(**SIZES))
    with torch.no_grad():
        for name, x in floats.named_parameters():
            x.copy_(0.2 * torch.randn_like(x) + ("norm" in name))
    floats.save_pretrained(tmp_path)
    # transformers' own encoder wants a GPU's kernels; decoding is its own.
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        w = jnp.asarray(tensors.pop(name)).swapaxes(1, 2)
        tensors |= {f"{name}_{s}": x for s, x in pack(quantize(w, "mxfp4")).items()}
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"] = quantization_config(["model.layers.*.self_attn", "lm_head"])
    (tmp_path / "config.json").write_text(json.dumps(fields))
    theirs = GptOssForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    tokens = np.random.default_rng(0).integers(0, 64, (2, 24))
    with torch.no_grad():
        want = theirs.eval()(torch.tensor(tokens)).logits.numpy()

    model, params = load(tmp_path, dtype="float32")
    experts = params["layers"][0][0]["mlp"]["experts"]
    assert experts["gate_up_proj"]["weight"].format == "mxfp4"
    assert experts["down_proj"]["weight"].shape == (1, 4, 64, 96)
    save_quantized(model, params, tmp_path / "again", dtype="float32")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(again[name].tobytes() == x.tobytes() for name, x in tensors.items())
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["quantization_config"]["quant_method"] == "mxfp4"
    run, ids = jax.jit(model.__call__), jnp.asarray(tokens, jnp.int32)
    assert np.abs(run(params, ids) - want).max() <= 1e-4 * np.abs(want).max()
    experts["down_proj"]["weight"] = replace(
        experts["down_proj"]["weight"], codes=swap_nibbles(experts["down_proj"]["weight"].codes)
    )
    assert np.abs(run(params, ids) - want).max() > 1e-2 * np.abs(want).max()
