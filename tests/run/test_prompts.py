"""Which prompts a run answers: those named, or the data's that fit, as training words them."""

import json

import pytest

import mud_puppy as mp
from mud_puppy.config import Config
from mud_puppy.data import read_rows
from mud_puppy.errors import UserError
from mud_puppy.run.prompts import choose_prompts, uses_chat
from mud_puppy.sampling.prompts import tokenize


@pytest.fixture
def chosen(chat_model, chats):
    """Calls choose_prompts with keys of the config, and rows of the chats or of other messages."""

    def choose(*conversations, tokenizer=None, **keys):
        config = Config.load({"model": "m", "dataset": "d", "output": "o"} | keys)
        rows = list(read_rows(chats).rows)
        if conversations:
            path = chats.parent / "some.jsonl"
            path.write_text("".join(json.dumps({"messages": c}) + "\n" for c in conversations))
            rows = list(read_rows(path).rows)
        tokenizer = tokenizer or mp.load_tokenizer(chat_model)
        return choose_prompts(config, mp.abstract(chat_model)[0], tokenizer, rows)

    return choose


def talk(*contents: str):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def test_what_the_data_asks_first(chosen):
    asked = chosen(talk("a", "b", "c", "d"), talk("e", "f"), sample_prompts=5)
    assert asked == [talk("a"), talk("e")]
    assert chosen(sample_prompts=0) == []


def test_a_question_that_leaves_no_room_is_passed_over(chosen):
    long = talk("x" * 600, "y")
    assert chosen(long, talk("a", "b"), sample_prompts=1) == [talk("a")]
    # 20 tokens of template and text, of 512.
    assert chosen(talk("a", "b"), sample_max_new_tokens=492) == [talk("a")]
    assert chosen(talk("a", "b"), sample_max_new_tokens=493) == []


def test_without_a_template_a_question_is_worded_as_in_training(chosen, chat_model):
    opening = [{"role": "system", "content": "be"}, *talk("a", "b")]
    assert chosen(opening, chat_template=False) == ["be\na\n"]
    bare = mp.load_tokenizer(chat_model)
    bare.chat_template = None
    assert chosen(opening, tokenizer=bare) == ["be\na\n"]
    for tokenizer, config in ((bare, True), (mp.load_tokenizer(chat_model), False)):
        keys = {"model": "m", "dataset": "d", "output": "o", "chat_template": config}
        (tokens,) = tokenize(tokenizer, ["be\na\n"], uses_chat(Config.load(keys)))
        assert tokenizer.decode(tokens) == "be\na\n"


def test_named_prompts_are_judged_before_the_run(chosen):
    assert chosen(sample_prompts=["a", "b"]) == ["a", "b"]
    with pytest.raises(UserError, match="sample_prompts: prompt 1 has 6"):
        chosen(sample_prompts=["a", "x" * 600])
    with pytest.raises(UserError, match="sample_max_new_tokens 512: the model has 512 positions"):
        chosen(sample_prompts=["a"], sample_max_new_tokens=512)
