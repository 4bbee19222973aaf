"""Codes to disk and back: the same codes, the same logits, and one line for what does not fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mud_puppy as mp
from mud_puppy.cli import main
from mud_puppy.export import save_quantized
from mud_puppy.model.gptq_format import quantization_config
from mud_puppy.model.quantized_files import gptq_writer
from mud_puppy.weights import fake_quant, finish_fake_quant
from tests.tiny import tiny_model

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 16)), jnp.int32)
CASES = {
    "int8": lambda p: mp.quantize(p, "int8", embed="int8", head="int8"),
    "int8 of the layers": lambda p: mp.quantize(p, "int8"),
    "mxfp4": lambda p: mp.quantize(p, "mxfp4"),
    "fp8": lambda p: mp.quantize(p, "fp8"),
    "nf4": lambda p: mp.quantize(p, "nf4", group=32, double=False),
    "nf4, doubly": lambda p: mp.quantize(p, "nf4", group=32),
    "int4": lambda p: mp.quantize(p, "int4", group=16),
    "int4 with zero points": lambda p: mp.quantize(p, "int4", group=16, zero_points=True),
    "int8 products": lambda p: finish_fake_quant(fake_quant(p, "int8", activations="int8")),
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def llama(request):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.1}
    return tiny_model(tie_word_embeddings=request.param, **sizes)


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_is_read(case, llama, tmp_path):
    model, params = llama
    q = CASES[case](params)
    save_quantized(model, q, tmp_path, "float32")
    again, read = mp.load(tmp_path, dtype="float32")
    assert jax.tree.structure(read) == jax.tree.structure(q)
    for a, b in zip(jax.tree.leaves(read), jax.tree.leaves(q), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    assert "quantization_config" not in again.arch.config
    np.testing.assert_array_equal(again(read, TOKENS), model(q, TOKENS))
    assert np.abs(model(q, TOKENS) - model(params, TOKENS)).max() > 1e-3
    # decoded, it is a plain model again
    mp.save_hf(again, read, tmp_path / "plain", dtype="float32")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


def test_bad_files_are_one_line(llama, tmp_path):
    model, params = llama
    with pytest.raises(mp.UserError, match="no weight is quantized"):
        save_quantized(model, params, tmp_path)
    save_quantized(model, mp.quantize(params, "int8"), tmp_path, "float32")
    config = json.loads((tmp_path / "config.json").read_text())

    def changed(**fields):
        (tmp_path / "config.json").write_text(json.dumps(config | fields))
        return tmp_path

    method = {"quantization_config": {"quant_method": "hqq", "bits": 4}}
    with pytest.raises(mp.UserError, match=r"config: the checkpoint is quantized \(hqq\); layouts"):
        mp.load(changed(**method))
    gptq = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(mp.UserError, match=r"quantization_config, but no tensor is quantized"):
        mp.load(changed(**gptq))
    ignore = config["quantization_config"] | {"ignore": ["lm_head", "model.layers.1.mlp.up_proj"]}
    with pytest.raises(mp.UserError, match=r"1.mlp.up_proj.weight' is stored as I8"):
        mp.load(changed(quantization_config=ignore))


def test_gptq_files(llama, tmp_path):
    model, params = llama
    q = mp.quantize(params, "int4", group=32)
    config = quantization_config(4, 32, True, False, 0.01)
    save_quantized(model, q, tmp_path, "float32", layout=gptq_writer(config))
    again, read = mp.load(tmp_path, dtype="float32")
    up, want = (p["layers"][0][0]["mlp"]["up_proj"]["weight"] for p in (read, q))
    assert np.array_equal(up.codes, want.codes)
    np.testing.assert_allclose(up.scales, want.scales, rtol=1e-3)  # float16 in the files
    assert np.abs(again(read, TOKENS) - model(q, TOKENS)).max() < 1e-2


def test_the_verb(chat_model, tmp_path, capsys):
    folder = str(chat_model)
    run = ["quantize", folder, "--to", "int4", "--group", "16", "--output", str(tmp_path / "q")]
    assert main([*run, "--precision", "fp32"]) == 0
    assert capsys.readouterr().out == f"quantized model: {tmp_path / 'q'}\n"
    model, params = mp.load(tmp_path / "q", dtype="float32")
    want = mp.quantize(mp.load(chat_model, dtype="float32")[1], "int4", group=16)
    np.testing.assert_array_equal(model(params, TOKENS), model(want, TOKENS))
    assert mp.load_tokenizer(tmp_path / "q").chat_template
    for flags, line in {
        ("--to", "int4"): "is not empty",
        ("--to", "nf5"): "--to: 'nf5' is not one of nf4",
        ("--to", "int8", "--double"): "--double: int8 has no scales in 8 bits",
        ("--to", "nf4", "--embeddings"): "--embeddings: bitsandbytes' layout holds nf4 alone",
    }.items():
        assert main(["quantize", folder, "--output", str(tmp_path / "q"), *flags]) == 2
        assert line in capsys.readouterr().err


def test_adapters_are_not_lost(llama, tmp_path):
    model, params = llama
    params = mp.add_lora(mp.quantize(params, "int8"), 4, key=jax.random.key(0))
    with pytest.raises(mp.UserError, match="these params have adapters"):
        save_quantized(model, params, tmp_path)
