"""Streaming and the conversation loop."""

import itertools
from dataclasses import replace

import pytest

from mud_puppy.errors import UserError
from mud_puppy.sampling import Options, chat, generate, generate_tokens, stream_text, stream_tokens

TEXT = "né — 日本語 😀 fin"


def test_pieces_never_break_a_character(tokenizer):
    tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(tokens) == len(TEXT.encode())
    pieces = list(stream_text(tokenizer, [[t] for t in tokens]))
    assert "".join(pieces) == TEXT and len(pieces) == len(TEXT)
    naive = [tokenizer.decode([t]) for t in tokens]
    assert any("\ufffd" in piece for piece in naive)  # mutation partner


def test_an_unfinished_character_is_shown_in_the_end(tokenizer):
    tokens = tokenizer("a😀", add_special_tokens=False)["input_ids"][:-1]
    pieces = list(stream_text(tokenizer, [[t] for t in tokens]))
    assert pieces == ["a", tokenizer.decode(tokens)[1:]]


def test_the_eos_is_not_shown(tokenizer):
    assert "".join(stream_text(tokenizer, [[104, 105], [258]], eos=(258,))) == tokenizer.decode(
        [104, 105]
    )


SHORT = Options(12, temperature=1.0, seed=3)


def test_a_stream_is_the_reply_of_one_call(tiny_model, prompts):
    tiny = tiny_model("llama")
    for prompt in (prompts[2], prompts[6]):
        (free,) = generate_tokens(tiny.model, tiny.params, [prompt], SHORT)
        for eos in ((), (free.tokens[3],), (free.tokens[9],)):
            (whole,) = generate_tokens(tiny.model, tiny.params, [prompt], SHORT, eos)
            chunks = list(stream_tokens(tiny.model, tiny.params, prompt, SHORT, eos))
            assert list(itertools.chain(*chunks)) == whole.tokens
            assert len(chunks) == -(-len(whole.tokens) // 8)


class Terminal:
    """Scripted input; what was written, as one text."""

    def __init__(self, *lines):
        self.lines = list(lines)
        self.text = ""

    def read(self, prompt):
        assert prompt == "> "
        if not self.lines:
            raise EOFError
        return self.lines.pop(0)

    def write(self, text, end="\n", flush=False):
        self.text += text + end


def talk(tiny_model, tokenizer, terminal, options=SHORT, system="be brief"):
    tiny = tiny_model("llama")
    return chat(tiny.model, tiny.params, tokenizer, options, system, terminal.read, terminal.write)


def test_a_conversation_keeps_its_history(tiny_model, tokenizer):
    tiny = tiny_model("llama")
    terminal = Terminal("hello", "", "and?", "/exit", "never read")
    messages = talk(tiny_model, tokenizer, terminal)
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[0]["content"] == "be brief" and terminal.lines == ["never read"]
    for n in (2, 4):
        options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3 + n}
        (want,) = generate(tiny.model, tiny.params, tokenizer, [messages[:n]], **options)
        assert messages[n]["content"] == want
    assert terminal.text == messages[2]["content"] + "\n" + messages[4]["content"] + "\n"


def test_reset_keeps_only_the_system_message(tiny_model, tokenizer):
    once = talk(tiny_model, tokenizer, Terminal("hello"))
    again = talk(tiny_model, tokenizer, Terminal("first", "/reset", "hello"))
    assert again == once and len(once) == 3
    assert talk(tiny_model, tokenizer, Terminal("/reset"), system=None) == []


def test_the_seed_decides_what_is_said(tiny_model, tokenizer):
    first = talk(tiny_model, tokenizer, Terminal("hello"))
    assert talk(tiny_model, tokenizer, Terminal("hello")) == first
    assert talk(tiny_model, tokenizer, Terminal("hello"), replace(SHORT, seed=4)) != first


def test_what_does_not_fit_is_refused_and_the_conversation_goes_on(tiny_model, tokenizer):
    terminal = Terminal("x" * 400, "hello")
    messages = talk(tiny_model, tokenizer, terminal)
    assert terminal.text.startswith("prompt 0 has") and "/reset" in terminal.text
    assert [m["content"] for m in messages if m["role"] == "user"] == ["hello"]


def test_a_reply_is_cut_to_the_room_that_is_left(tiny_model, tokenizer):
    terminal = Terminal("x" * 200)
    messages = talk(tiny_model, tokenizer, terminal, replace(SHORT, max_new_tokens=512))
    assert len(messages) == 3 and terminal.text.endswith("\n")


def test_ctrl_c_cuts_a_reply_short(tiny_model, tokenizer):
    terminal = Terminal("hello")
    shown = []

    def write(text, end="\n", flush=False):
        shown.append(text + end)
        if len(shown) == 1:
            raise KeyboardInterrupt

    terminal.write = write
    messages = talk(tiny_model, tokenizer, terminal)
    assert messages[2]["content"] == shown[0] and shown[1:] == ["\n"]


def test_chat_needs_a_template(tiny_model, plain_tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        talk(tiny_model, plain_tokenizer, Terminal("hello"))
