"""What `mud-puppy preview` prints."""

import numpy as np
import pytest

from mud_puppy.cli import main
from mud_puppy.data.encoding import EncodeOptions, encode
from mud_puppy.data.formats import convert
from mud_puppy.data.preference_encoding import encode_pairs, encode_rated, encode_steps
from mud_puppy.data.preferences import convert_pair, convert_steps, convert_unpaired
from mud_puppy.data.preview import preview_text, rewarded, runs, with_prompt

CHAT = [
    {"role": "user", "content": "Hello\x1b[31m there!"},
    {"role": "assistant", "content": "How are\nyou?"},
]


def previewed(make, kind="byte", **options):
    rows = [convert({"messages": CHAT}, f"a.jsonl:{i}")[0] for i in (1, 2)]
    tokenizer = make("chatml_no_prompt", kind)
    examples = encode(rows, tokenizer, EncodeOptions()).examples
    return examples, preview_text(examples, tokenizer, **options)


def test_marks_without_colour(make):
    examples, text = previewed(make, count=1, color=False)
    tokens, trained = len(examples[0].tokens), examples[0].trained
    assert text == (
        f"a.jsonl:1  {tokens} tokens, {trained} trained ({100 * trained / tokens:.0f} %)\n"
        "<|im_start|>user\nHello␛[31m there!<|im_end|>\n"
        "<|im_start|>assistant\n⟦How are\nyou?<|im_end|>⟧\n\n"
    )


def test_colour_is_set_line_by_line_and_data_cannot_set_it(make):
    _, text = previewed(make, count=5)
    assert text.count("a.jsonl:") == 2
    assert "assistant\n\x1b[30;42mHow are\x1b[0m\n\x1b[30;42myou?<|im_end|>\x1b[0m\n" in text
    assert text.count("\x1b") == 2 * 4


def test_sentencepiece_words_keep_their_spaces(make):
    _, text = previewed(make, kind="spm", count=1, color=False)
    assert "⟦How are\nyou?<|im_end|>⟧" in text


ASKED = [{"role": "user", "content": "Hello there!"}]
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("How are\nyou?", "It is four."))
PAIR = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD, "margin": 0.5, "source": "s\x1b0"}
QUESTION = "<|im_start|>user\nHello there!<|im_end|>\n<|im_start|>assistant\n"


def paired(make, row=PAIR, template: str | None = "chatml_no_prompt", **options):
    tokenizer = make(template)
    [pair] = encode_pairs(
        [convert_pair(row, "a:1", whole_texts=True)[0]], tokenizer, EncodeOptions(), **options
    ).examples
    return pair, tokenizer


def shown(example, tokenizer, word="trained"):
    return preview_text([example], tokenizer, 1, color=False, word=word)


@pytest.mark.parametrize("once", [False, True])
def test_a_pair_shows_its_prompt_once_and_both_answers(make, once):
    pair, tokenizer = paired(make, prompt_once=once)
    p, c, r = pair.shared, pair.chosen, pair.rejected
    size, trained = c.size + r.size - once * (p - 1), c.trained + r.trained
    assert shown(pair, tokenizer) == (
        f"a:1  {size} tokens, {trained} trained ({100 * trained / size:.0f} %), margin 0.5, "
        "source s␛0\n"
        f"--- prompt: {p} tokens, 0 trained\n{QUESTION}"
        f"--- chosen: {c.size - p} tokens, {c.trained} trained\n⟦How are\nyou?<|im_end|>⟧\n"
        f"--- rejected: {r.size - p} tokens, {r.trained} trained\n⟦It is four.<|im_end|>⟧\n"
    )


def test_an_answer_of_several_turns_marks_the_assistants_alone(make):
    turns = [*BAD, {"role": "user", "content": "Hello"}, *GOOD]
    pair, tokenizer = paired(make, PAIR | {"rejected": turns})
    text = shown(pair, tokenizer).split("--- rejected")[1]
    assert "⟦It is four.<|im_end|>⟧\n<|im_start|>user\nHello<|im_end|>\n" in text
    assert text.endswith("<|im_start|>assistant\n⟦How are\nyou?<|im_end|>⟧\n")


def test_a_prompt_that_is_learned_is_marked(make):
    pair, tokenizer = paired(make)
    text = shown(with_prompt(pair), tokenizer)
    assert f"--- prompt: {pair.shared} tokens, {pair.shared - 1} trained\n<|im_start|>⟦user" in text
    assert text.split("--- rejected")[1] == shown(pair, tokenizer).split("--- rejected")[1]


def test_a_reward_is_read_at_the_last_token_that_is_no_pad(make):
    """As `collate_pairs` reads it: with a template behind the answer's end, unless that is what
    is padded with."""
    pair, tokenizer = paired(make)
    text = shown(rewarded(pair, None), tokenizer, "read")
    assert ", 2 read (" in text
    assert text.endswith("--- rejected: 6 tokens, 1 read\nIt is four.<|im_end|>⟦⏎⟧\n")
    line_break = int(pair.chosen.tokens[-1])
    assert text.count("⟦") == 2
    assert shown(rewarded(pair, line_break), tokenizer).count("⟦<|im_end|>⟧") == 2
    texts, tokenizer = paired(make, {"chosen": "Hello there!", "rejected": "Hello you!"}, None)
    text = shown(rewarded(texts, tokenizer.eos_token_id), tokenizer, "read")
    assert "<s>Hello there⟦!⟧</s>" in text and "--- prompt" not in text


def test_rated_answers_show_their_label(make):
    tokenizer = make("chatml_no_prompt")
    rows = [
        convert_unpaired(row, "a:1")[0] for row in (PAIR, {"messages": ASKED + BAD, "label": 0})
    ]
    data = encode_rated(rows, tokenizer, EncodeOptions())
    good, bad, other = (shown(example, tokenizer) for example in data.examples)
    assert " %), label 1, source s␛0\n" in good and good.endswith(
        QUESTION + "⟦How are\nyou?<|im_end|>⟧\n\n"
    )
    assert " %), label 0, source s␛0\n" in bad and " %), label 0\n" in other
    assert bad.split("\n")[1:] == other.split("\n")[1:]
    text = shown(rewarded(data.examples[1], None), tokenizer, "read")
    assert text.endswith("It is four.<|im_end|>⟦⏎⟧\n")


STEPS = {"prompt": ASKED, "steps": ["It is\nfour.", "How"], "labels": [1, 0], "source": "s"}


@pytest.mark.parametrize("separator", ["\n", "!"])
def test_each_step_ends_with_its_label(make, separator):
    tokenizer = make("chatml_no_prompt")
    rows = [convert_steps(STEPS, "a:1")[0]]
    [steps] = encode_steps(rows, tokenizer, EncodeOptions(), separator).examples
    end = separator.replace("\n", "⏎")
    assert shown(steps, tokenizer) == (
        f"a:1  {steps.size} tokens, 2 steps (1 right), source s\n{QUESTION}"
        f"It is\nfour.⟦{end}⟧ step 1: right\nHow⟦{end}⟧ step 2: wrong\n"
    )


def test_steps_of_one_token_each_are_not_run_together(make):
    tokenizer = make(None)
    [steps] = encode_steps(
        [convert_steps(STEPS, "a:1")[0]], tokenizer, EncodeOptions(), "!"
    ).examples
    weights = np.zeros_like(steps.example.weights)
    weights[-2:] = 1
    steps.example.weights[:] = weights
    assert len([text for text, on in runs(steps.example, tokenizer) if on]) == 1
    assert shown(steps, tokenizer).count("⟦") == 2  # a run each


RUNS = {
    "preference": ([], ["--- prompt: 3", "⟦How are\nyou?<|im_end|>⟧", "not used: margin"]),
    "kto": (["--preference", "kto"], ["label 1, source s␛0", "label 0, source s␛0"]),
    "rm": ([], ["margin 0.5, source s", ", 2 read (", "How are\nyou?<|im_end|>⟦⏎⟧"]),
    "orpo": (["--preference", "orpo", "--train-on-prompt"], ["<|im_start|>⟦user\nHello there!"]),
    "once": (["--shared-prefix"], ["--- prompt: 3"]),
    "cut": (["--max-seq-length", "30"], ["⟦How are", "1 prompts cut at their start"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_command_shows_what_a_run_reads(name, write, chat_model, capsys):
    flags, parts = RUNS[name]
    method = "rm" if name == "rm" else "preference"
    argv = ["preview", write("d.jsonl", [PAIR]), "--model", str(chat_model), "--method", method]
    assert main([*argv, *flags]) == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in [*parts, "1 rows in "]), printed


def test_a_config_is_previewed_as_its_run_reads_it(write, chat_model, tmp_path, capsys):
    data, path = write("d.jsonl", [STEPS, STEPS]), tmp_path / "c.yaml"
    path.write_text(f"{{model: {chat_model}, dataset: {data}, output: none, method: prm}}")
    assert main(["preview", "--config", str(path), "-n", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("How⟦⏎⟧ step 2: wrong") == 1 and f"2 rows in {data}" in printed
    assert main(["preview", data, "--model", str(chat_model), "--train-on-prompt"]) == 2
    assert "steps with labels are for method prm" in capsys.readouterr().err
    assert main(["preview", "--config", str(path), "--train-on-prompt"]) == 2
    assert "--train-on-prompt: true has no effect" in capsys.readouterr().err
