"""Prompts to tokens, and the ids that end a reply."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import processors

from mud_puppy.errors import UserError
from mud_puppy.sampling import context_length, eos_ids, generate_tokens, tokenize
from mud_puppy.sampling import prompts as prompts_module
from mud_puppy.sampling.batches import batches, bucket

RENDERED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_text_becomes_one_user_message(tokenizer):
    as_text, as_messages = tokenize(tokenizer, ["hi", [{"role": "user", "content": "hi"}]])
    assert as_text == as_messages
    assert tokenizer.decode(as_text) == RENDERED
    assert as_text[0] == 257, "<|im_start|> is one token"


def test_chat_off_and_a_tokenizer_without_template_continue_the_text(tokenizer, plain_tokenizer):
    assert tokenizer.decode(tokenize(tokenizer, ["hi"], chat=False)[0]) == "hi"
    assert tokenizer.decode(tokenize(plain_tokenizer, ["hi"])[0]) == "hi"


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("prompts", "chat", "message"),
    [
        ("hi", None, "put it in brackets"),
        (["ok", ""], None, "prompt 1 is empty"),
        ([[]], None, "prompt 0 is empty"),
        ([[{"role": "user"}]], None, "prompt 0, message 0: expected 'role' and 'content'"),
        ([MESSAGES], False, "prompt 0 is a list of messages, but chat is off"),
    ],
)
def test_bad_prompts(tokenizer, prompts, chat, message):
    with pytest.raises(UserError, match=message):
        tokenize(tokenizer, prompts, chat)


def test_chat_needs_a_template(plain_tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        tokenize(plain_tokenizer, ["hi"], chat=True)
    with pytest.raises(UserError, match="no chat template"):
        tokenize(plain_tokenizer, [MESSAGES])


def test_a_template_that_refuses_is_a_user_error(tokenizer, monkeypatch):
    strict = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(tokenizer, "chat_template", strict)
    with pytest.raises(UserError, match=r"prompt 0: the chat template refuses .* must alternate"):
        tokenize(tokenizer, ["hi"])


def test_eos_ids_of_every_source(tiny_model, tokenizer, plain_tokenizer, tmp_path):
    model = tiny_model("llama").model
    bare = replace(model, source=None)
    assert eos_ids(bare, plain_tokenizer) == (256,)
    assert eos_ids(bare, tokenizer) == (256, 258), "the template ends a turn with <|im_end|>"
    config = json.dumps({**json.loads(model.arch.config), "eos_token_id": 7})
    configured = replace(bare, arch=model.arch.replace(config=config))
    assert eos_ids(configured, plain_tokenizer) == (7, 256)
    path = Path(tmp_path) / "generation_config.json"
    path.write_text('{"eos_token_id": [8, 9]}')
    saved = replace(configured, source=str(tmp_path))
    assert eos_ids(saved, plain_tokenizer) == (8, 9, 256), "generation_config goes before config"
    path.write_text("{}")
    assert eos_ids(saved, plain_tokenizer) == (7, 256)
    path.write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json"):
        eos_ids(saved, plain_tokenizer)


def test_a_hub_id_is_resolved_for_its_generation_config(
    tiny_model, plain_tokenizer, tmp_path, monkeypatch
):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    monkeypatch.setattr(prompts_module, "find_model", lambda source, weights: tmp_path)
    model = tiny_model("llama").model
    assert eos_ids(replace(model, source="org/name"), plain_tokenizer) == (9, 256)
    gone = replace(model, source=str(tmp_path / "gone"))
    assert eos_ids(gone, plain_tokenizer) == (256,)


def test_a_text_to_continue_does_not_end(plain_tokenizer):
    """Some tokenizers put an EOS behind every text; the model would have nothing to add."""
    ending = copy.deepcopy(plain_tokenizer)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 256)]
    )
    assert ending("hi")["input_ids"][-1] == 256
    assert tokenize(ending, ["hi"]) == tokenize(plain_tokenizer, ["hi"])
    assert tokenize(plain_tokenizer, ["hi<|endoftext|>"])[0][-1] == 256


def test_prompts_that_do_not_fit_the_model(tiny_model):
    tiny = tiny_model("llama")
    full = [5] * (256 - 64)
    assert len(generate_tokens(tiny.model, tiny.params, [full])[0].tokens) == 64
    with pytest.raises(UserError, match=r"prompt 1 has 193 tokens; with 64 new ones .* 256 pos"):
        generate_tokens(tiny.model, tiny.params, [full, [*full, 5]])
    with pytest.raises(UserError, match="prompt 0 is empty"):
        generate_tokens(tiny.model, tiny.params, [[]])
    with pytest.raises(UserError, match=r"token id 300, .* vocabulary has 300"):
        generate_tokens(tiny.model, tiny.params, [[1, 300]])
    with pytest.raises(UserError, match="token id -1"):
        generate_tokens(tiny.model, tiny.params, [[-1, 3]])
    with pytest.raises(UserError, match="batch_size is 0"):
        generate_tokens(tiny.model, tiny.params, [[1]], batch_size=0)
    assert generate_tokens(tiny.model, tiny.params, []) == []


def test_scaled_rope_stretches_the_context(tiny_model):
    assert context_length(tiny_model("llama").model.arch) == 256
    assert context_length(tiny_model("dynamic").model.arch) == 4 * 48


def test_buckets():
    assert [bucket(n) for n in (1, 16, 17, 32, 33, 48, 49, 64, 65, 96, 97, 200)] == [
        16, 16, 32, 32, 48, 48, 64, 64, 96, 96, 128, 256,
    ]  # fmt: skip
    assert [bucket(n, smallest=1) for n in range(1, 10)] == [1, 2, 3, 4, 6, 6, 8, 8, 12]


def test_batches_hold_every_prompt_once_and_pad_on_the_right():
    prompts = [[1] * n for n in (5, 40, 3, 20, 7)]
    made = list(batches(prompts, batch_size=2, multiple=4))
    assert [batch.tokens.shape for batch in made] == [(4, 16), (4, 32), (4, 48)]
    rows = [int(i) for batch in made for i in batch.rows if i >= 0]
    assert sorted(rows) == [0, 1, 2, 3, 4]
    for batch in made:
        for tokens, length, i in zip(batch.tokens, batch.lengths, batch.rows, strict=True):
            want = [] if i < 0 else prompts[i]
            assert tokens[: len(want)].tolist() == want
            assert not tokens[len(want) :].any()
            assert length == max(len(want), 1)
