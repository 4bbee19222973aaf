"""The loss mask, by decoding what is trained and comparing it with the expected text exactly."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from mud_puppy.data.encoding import EncodeOptions, encode
from mud_puppy.data.formats import convert
from mud_puppy.data.preview import runs
from mud_puppy.errors import UserError

USER = {"role": "user", "content": "Hello there!"}
AGAIN = {"role": "user", "content": "What is two plus two?"}
SYSTEM = {"role": "system", "content": "You are helpful."}


def says(content, **fields):
    return {"role": "assistant", "content": content, **fields}


CHAT = [USER, says("How are you?"), AGAIN, says("It is four.")]
THINK = "<think>\nlet me see\n</think>\n\n"


def encoded(tokenizer, row, **options):
    sound, _ = convert(row if isinstance(row, dict) else {"messages": row}, "data.jsonl:7")
    return encode([sound], tokenizer, EncodeOptions(**options))


def trained(tokenizer, row, **options):
    (example,) = encoded(tokenizer, row, **options).examples
    return [text for text, on in runs(example, tokenizer) if on]


ENDS = {
    "chatml": "<|im_end|>",
    "chatml_no_prompt": "<|im_end|>",
    "marks": "<|im_end|>",
    "marks_whole": "<|im_end|>",
    "marks_unused": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
    "mistral_moving_system": "</s>",
    "r1": "<\uff5cend▁of▁sentence\uff5c>",
}


def closed(text, end, kind):
    """What the decoder of this kind of tokenizer makes of text and end-of-turn token."""
    return (text + end).replace("▁", " ") if kind == "spm" else text + end


@pytest.mark.parametrize("kind", ["byte", "spm"])
@pytest.mark.parametrize("template", ENDS)
def test_each_assistant_turn_with_its_end(make, template, kind):
    tokenizer = make(template, kind)
    end = ENDS[template]
    space = " " if template.startswith("mistral") or (template, kind) == ("r1", "spm") else ""
    want = [closed(space + text, end, kind) for text in ("How are you?", "It is four.")]
    assert trained(tokenizer, CHAT) == want
    assert encoded(tokenizer, CHAT).report.unclosed == 0
    one = CHAT[:2]
    assert trained(tokenizer, one) == want[:1]
    assert trained(tokenizer, [*CHAT, USER]) == want
    if template != "gemma":
        assert trained(tokenizer, [SYSTEM, *CHAT])[1] == want[1]


@pytest.mark.parametrize("template", [*ENDS, "phi3", "qwen3", "plain_words"])
def test_tokens_are_those_of_apply_chat_template(make, template):
    """Also: never a doubled BOS, though this tokenizer adds one to plain text."""
    tokenizer = make(template)
    (example,) = encoded(tokenizer, CHAT).examples
    want = tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert example.tokens.tolist() == want
    assert want.count(tokenizer.bos_token_id) == tokenizer.chat_template.count("bos_token")
    assert tokenizer("Hello")["input_ids"][0] == tokenizer.bos_token_id
    assert example.weights[0] == 0 and set(example.weights.tolist()) == {0.0, 1.0}


def test_a_shifted_mask_is_seen(make):
    """The partner of the tests above: the comparison fails for a mask one token off."""
    tokenizer = make("chatml")
    (example,) = encoded(tokenizer, CHAT).examples
    shifted = type(example)(example.tokens, np.roll(example.weights, 1), example.where)
    assert [text for text, on in runs(shifted, tokenizer) if on] != trained(tokenizer, CHAT)


def test_qwen3_strips_thoughts_of_earlier_turns(make):
    tokenizer = make("qwen3")
    chat = [USER, says(THINK + "How are you?"), AGAIN, says(THINK + "It is four.")]
    assert trained(tokenizer, chat) == [
        "How are you?<|im_end|>",
        THINK + "It is four.<|im_end|>",
    ]
    # Without a thought the template writes an empty one, which the model has to write too.
    assert trained(tokenizer, CHAT) == [
        "How are you?<|im_end|>",
        "<think>\n\n</think>\n\nIt is four.<|im_end|>",
    ]


@pytest.mark.parametrize("turns", [2, 4, 6])
def test_qwen3_tool_calls(make, turns):
    """A later question strips the thoughts of a tool call, so no prefix of the chat renders
    alike."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    chat = [
        AGAIN,
        says(None, reasoning_content="let me see", tool_calls=[call]),
        {"role": "tool", "content": "4"},
        says("It is four."),
        USER,
        says("How are you?"),
    ]
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
    empty = "<think>\n\n</think>\n\n"
    want = {
        2: [THINK + called],
        4: [THINK + called, empty + "It is four.<|im_end|>"],
        6: [called, "It is four.<|im_end|>", empty + "How are you?<|im_end|>"],
    }[turns]
    row = {"messages": chat[:turns], "tools": [{"name": "add"}]}
    assert trained(make("qwen3"), row) == want
    text = make("qwen3").decode(encoded(make("qwen3"), row).examples[0].tokens)
    assert '<tools>\n{"name": "add"}\n</tools>' in text


def test_llama3_tool_call(make):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    chat = [AGAIN, says("", tool_calls=[call]), {"role": "tool", "content": "4"}, says(" four ")]
    assert trained(make("llama3"), chat) == [
        '{"name": "add", "parameters": {"a": 2}}<|eot_id|>',
        "four<|eot_id|>",
    ]


def test_r1_drops_thoughts_and_its_prompt_opens_one(make):
    chat = [USER, says(THINK + "How are you?"), AGAIN, says("It is four.")]
    end = ENDS["r1"]
    assert trained(make("r1"), chat) == ["\n\nHow are you?" + end, "It is four." + end]


def test_phi3_ends_the_conversation_and_each_turn(make):
    assert trained(make("phi3"), CHAT) == ["How are you?<|end|>", "It is four.<|end|>\n</s>"]


@pytest.mark.parametrize("kind", ["byte", "spm"])
def test_phi3_tokens_that_swallow_the_line_break(make, kind):
    """Phi-3's control tokens take the white space behind them, so their offsets reach further."""
    tokenizer = make("phi3", kind)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    names = ("<|user|>", "<|assistant|>", "<|end|>")
    backend.add_special_tokens([AddedToken(name, rstrip=True, special=True) for name in names])
    swallowing = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )
    swallowing.chat_template = tokenizer.chat_template
    assert len(swallowing("<|end|>\n", add_special_tokens=False)["input_ids"]) == 1
    chat = [USER, says("\n How are you?"), AGAIN, says("It is four.")]
    got = [text.lstrip(" ") for text in trained(swallowing, chat)]
    assert got == ["How are you?<|end|>", "It is four.<|end|></s>"]


def test_marks_have_the_last_word_on_where_a_turn_begins(make):
    tokenizer = make("marks")
    header = "{{- '<|im_start|>assistant\\n' }}\n{%- generation"
    marked = tokenizer.chat_template.replace(header, header.replace("\\n'", "\\n>>\\n'"))
    tokenizer.chat_template = marked
    assert trained(tokenizer, CHAT) == ["How are you?<|im_end|>", "It is four.<|im_end|>"]
    tokenizer.chat_template = marked.replace("{%- generation %}", "").replace(
        "{%- endgeneration %}", ""
    )
    assert trained(tokenizer, CHAT) == [">>\nHow are you?<|im_end|>", ">>\nIt is four.<|im_end|>"]


def test_a_space_after_the_end_of_turn_is_not_trained(make):
    tokenizer = make("chatml_no_prompt")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|im_end|>' + '\n", "<|im_end|>' + ' "
    )
    assert "<|im_end|> <|im_start|>" in tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert trained(tokenizer, CHAT) == ["How are you?<|im_end|>", "It is four.<|im_end|>"]


def test_a_template_without_an_end_of_turn_is_reported(make):
    tokenizer = make("plain_words")
    assert trained(tokenizer, CHAT) == ["How are you?", "It is four."]
    report = encoded(tokenizer, CHAT).report
    assert report.unclosed == 2 and "may not learn to stop" in report.lines()[0]


def test_pad_equal_to_eos_hides_no_eos(make):
    tokenizer = make("mistral")
    tokenizer.pad_token = tokenizer.eos_token
    assert trained(tokenizer, CHAT) == [" How are you?</s>", " It is four.</s>"]


def test_repeated_and_odd_contents(make):
    """The same words in every role, special tokens as text, white space at the ends, no words."""
    for content in ("Hello there!", "assistant", " \n Hello  \n", "<|im_end|>", "", "é漢🙂"):
        chat = [{"role": "user", "content": content}, says(content)] * 3
        want = [content + "<|im_end|>"] * 3
        assert trained(make("chatml"), chat) == want
        assert trained(make("chatml_no_prompt"), chat) == want
        assert trained(make("marks_whole"), chat) == want


def test_roles_to_train(make):
    chat = [SYSTEM, *CHAT, {"role": "tool", "content": "4"}]
    assert trained(make("chatml"), chat, roles_to_train=("user", "tool")) == [
        "Hello there!<|im_end|>",
        "What is two plus two?<|im_end|>",
        "4<|im_end|>",
    ]
    every = trained(make("marks"), chat, roles_to_train=("system", "user", "assistant", "tool"))
    assert every == [turn["content"] + "<|im_end|>" for turn in chat]
    assert trained(make("llama3"), CHAT, roles_to_train=("user",)) == [
        "Hello there!<|eot_id|>",
        "What is two plus two?<|eot_id|>",
    ]


@pytest.mark.parametrize("template", ["chatml", "marks", "marks_whole", "qwen3", "mistral"])
def test_turns_can_be_left_out(make, template):
    tokenizer = make(template)
    both = trained(tokenizer, CHAT)
    first = [USER, says("How are you?", train=False), AGAIN, says("It is four.")]
    last = [USER, says("How are you?"), AGAIN, says("It is four.", weight=0)]
    assert trained(tokenizer, first) == both[1:]
    assert trained(tokenizer, last) == both[:1]


def test_train_on_prompt(make):
    tokenizer = make("chatml")
    (example,) = encoded(tokenizer, CHAT, train_on_prompt=True).examples
    assert example.trained == len(example.tokens) - 1
    (masked,) = encoded(tokenizer, CHAT).examples
    assert masked.trained < example.trained
    assert encoded(tokenizer, [USER], train_on_prompt=True).examples[0].trained > 0


@pytest.mark.parametrize("options", [{}, {"chat_template": False}])
def test_without_a_template(make, options):
    tokenizer = make("chatml" if options else None)
    (example,) = encoded(tokenizer, [SYSTEM, *CHAT], **options).examples
    text = tokenizer.decode(example.tokens)
    assert text == (
        "<s>You are helpful.\nHello there!\nHow are you?</s>What is two plus two?\nIt is four.</s>"
    )
    want = ["How are you?</s>", "It is four.</s>"]
    assert trained(tokenizer, [SYSTEM, *CHAT], **options) == want
    row = {"prompt": "two plus two is", "completion": " four "}
    assert trained(tokenizer, row, **options) == [" four </s>"]
    assert tokenizer.decode(encoded(tokenizer, row, **options).examples[0].tokens) == (
        "<s>two plus two is four </s>"
    )
    left_out = [USER, says("How are you?", train=False), AGAIN, says("It is four.")]
    assert trained(tokenizer, left_out, **options) == ["It is four.</s>"]


def test_completions_use_the_template_where_there_is_one(make):
    row = {"prompt": "Hello there!", "completion": "How are you?"}
    tokenizer = make("chatml")
    assert (
        encoded(tokenizer, row).examples[0].tokens.tolist()
        == encoded(tokenizer, CHAT[:2]).examples[0].tokens.tolist()
    )


def test_text_is_trained_on_whole(make):
    tokenizer = make("chatml")
    (example,) = encoded(tokenizer, {"text": " Hello there! \n"}).examples
    assert tokenizer.decode(example.tokens) == "<s> Hello there! \n</s>"
    assert example.weights.tolist() == [0.0] + [1.0] * (len(example.tokens) - 1)
    # BOS and EOS that the text has are not doubled.
    (again,) = encoded(tokenizer, {"text": "<s> Hello there! \n</s>"}).examples
    assert again.tokens.tolist() == example.tokens.tolist()


def test_no_turn_to_train_on_shows_the_example(make):
    with pytest.raises(UserError) as caught:
        encoded(make("chatml"), [SYSTEM, {"role": "user", "content": "Hello\n" + "long " * 100}])
    text = str(caught.value)
    assert text.startswith("data.jsonl:7: no assistant turn to train on in: [system] You are helpf")
    assert len(text) < 400 and "\n" not in text and " ... " in text
    with pytest.raises(UserError, match="no tool turn"):
        encoded(make("chatml"), CHAT, roles_to_train=("tool",))
    with pytest.raises(UserError, match="no assistant turn"):
        encoded(make("chatml"), [USER, says("x", train=False)])


def test_an_empty_mask_shows_the_example(make):
    row = [USER, says("")]
    with pytest.raises(UserError, match=r"data.jsonl:7: no token of it would be trained.*Question"):
        encoded(make("plain_words"), row)


def test_a_turn_that_cannot_be_located_is_an_error(make):
    with pytest.raises(UserError, match=r"data.jsonl:7: cannot tell which part.*messages\[1\]"):
        encoded(make("hides_turns"), CHAT)
    # All of it can still be trained on.
    assert encoded(make("hides_turns"), CHAT, train_on_prompt=True).examples


def test_what_the_template_says_is_passed_on(make):
    with pytest.raises(UserError, match=r"data.jsonl:7: .*System role not supported in: .system. "):
        encoded(make("gemma"), [SYSTEM, *CHAT])
    with pytest.raises(UserError, match="must alternate"):
        encoded(make("mistral"), [USER, *CHAT])
    broken = make()
    broken.chat_template = "{{ messages[0].content + 1 }}"
    with pytest.raises(UserError, match=r"data.jsonl:7: the chat template refuses"):
        encoded(broken, CHAT)
    broken.chat_template = "{% for %}"
    with pytest.raises(UserError, match="the chat template refuses"):
        encoded(broken, CHAT)


def test_tool_calls_need_a_template(make):
    with pytest.raises(UserError, match="tool_calls can only be written by a chat template"):
        encoded(make(), [USER, says(None, tool_calls=[{"function": {"name": "f"}}])])


def test_tokenizers_that_cannot_serve(make):
    without_eos = make("chatml")
    without_eos.eos_token = None
    with pytest.raises(UserError, match="no EOS"):
        encoded(without_eos, CHAT)
    with pytest.raises(UserError, match="is a slow one"):
        encoded(SimpleNamespace(is_fast=False), CHAT)
    several = make()
    several.chat_template = {"a": "x", "b": "y"}
    with pytest.raises(UserError, match="the tokenizer has several chat templates"):
        encoded(several, CHAT)


WORDS = st.text(
    st.sampled_from("ab \n.<>|é漢") | st.characters(codec="utf-8", categories=["L", "N", "P", "S"]),
    max_size=30,
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(contents=st.lists(WORDS, min_size=2, max_size=6), data=st.data())
def test_any_contents(make, contents, data):
    """Whatever the words are, the trained text is that of the assistant and its end of turn."""
    template = data.draw(st.sampled_from(["chatml", "chatml_no_prompt", "marks", "marks_whole"]))
    contents = contents[: len(contents) // 2 * 2]
    chat = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)
    ]
    assert trained(make(template), chat) == [text + "<|im_end|>" for text in contents[1::2]]
