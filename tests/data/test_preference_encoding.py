"""Pairs, rated answers and steps as tokens: the mask, the prompt, what is cut, the processes."""

import numpy as np
import pytest

from mud_puppy.data.encoding import EncodeOptions, encode
from mud_puppy.data.formats import convert
from mud_puppy.data.preference_encoding import encode_pairs, encode_rated, encode_steps
from mud_puppy.data.preferences import (
    convert_pair,
    convert_scored,
    convert_steps,
    convert_unpaired,
)
from mud_puppy.data.preview import runs
from mud_puppy.errors import UserError

TEXTS = {"prompt": "Hello there!", "chosen": " How are you?", "rejected": " It is four."}
HISTORY = [
    {"role": "user", "content": "Hello there!"},
    {"role": "assistant", "content": "How are you?"},
    {"role": "user", "content": "What is two plus two?"},
]
GOOD = {"role": "assistant", "content": "It is four."}
BAD = {"role": "assistant", "content": "The answer is You."}
MESSAGES = {"prompt": HISTORY, "chosen": [GOOD], "rejected": [BAD]}


def pairs(tokenizer, *rows, **options):
    sound = [convert_pair(row, f"a:{i}")[0] for i, row in enumerate(rows, start=1)]
    return encode_pairs(sound, tokenizer, EncodeOptions(**options))


def rated(tokenizer, row, converter=convert_unpaired, **options):
    return encode_rated([converter(row, "a:1")[0]], tokenizer, EncodeOptions(**options))


def steps(tokenizer, row, separator="\n", **options):
    sound = [convert_steps(row, "a:1")[0]]
    return encode_steps(sound, tokenizer, EncodeOptions(**options), separator)


def trained(example, tokenizer):
    return [text for text, on in runs(example, tokenizer) if on]


@pytest.mark.parametrize("kind", ["byte", "spm"])
@pytest.mark.parametrize("template", [None, "chatml", "llama3", "gemma", "qwen3", "marks"])
@pytest.mark.parametrize("row", [TEXTS, MESSAGES])
def test_each_answer_is_encoded_as_in_supervised_training(make, template, kind, row):
    """The same tokens, and the weights of prompt + completion; none on an earlier answer."""
    tokenizer = make(template, kind)
    (pair,) = pairs(tokenizer, row).examples
    for name, got in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        alone, _ = convert({"prompt": row["prompt"], "completion": row[name]}, "a:1")
        (want,) = encode([alone], tokenizer, EncodeOptions()).examples
        assert got.tokens.tolist() == want.tokens.tolist()
        assert got.weights.tolist() == want.weights.tolist()
        assert len(trained(got, tokenizer)) == 1
    n = pair.shared
    assert pair.chosen.tokens[:n].tolist() == pair.rejected.tokens[:n].tolist()
    assert not pair.chosen.weights[:n].any() and not pair.rejected.weights[:n].any()
    # It goes up to the answers, which differ in their first token.
    assert pair.chosen.weights[n] == pair.rejected.weights[n] == 1
    assert pair.size == pair.chosen.size + pair.rejected.size


def test_a_token_over_the_boundary_belongs_to_the_answer(make):
    """As in prompt + completion; what both share then ends before it."""
    tokenizer = make()
    row = {"prompt": "The capital of Fra", "chosen": "nce is Paris.", "rejected": "z"}
    merged = tokenizer("The capital of France", add_special_tokens=False)["input_ids"]
    assert (
        merged[: len(merged) - 1] == tokenizer("The capital of", add_special_tokens=False).input_ids
    )
    (pair,) = pairs(tokenizer, row).examples
    assert trained(pair.chosen, tokenizer) == [" France is Paris.</s>"]
    assert trained(pair.rejected, tokenizer) == ["z</s>"]
    assert tokenizer.decode(pair.chosen.tokens[: pair.shared]) == "<s>The capital of"


def test_text_dialogues_keep_their_words_without_a_template(make):
    asked = "\n\nHuman: Hello there!\n\nAssistant: How are you?\n\nHuman: two\n\nAssistant:"
    row = {"chosen": asked + " It is four.", "rejected": asked + " It is."}
    (pair,) = pairs(make(), row).examples
    assert (
        make().decode(pair.chosen.tokens)
        == "<s>" + row["chosen"].replace("you?", "you?</s>") + "</s>"
    )
    assert trained(pair.chosen, make()) == [" It is four.</s>"]
    (pair,) = pairs(make("chatml"), row).examples
    text = "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\nIt is four.<|im_end|>\n"
    assert make("chatml").decode(pair.chosen.tokens).endswith(text)


def test_train_on_prompt_weighs_no_prompt_here(make):
    tokenizer = make("chatml")
    (plain,), (asked,) = (
        pairs(tokenizer, MESSAGES, train_on_prompt=on).examples for on in (False, True)
    )
    assert plain.chosen.weights.tolist() == asked.chosen.weights.tolist()


def test_answers_that_become_the_same_are_a_bad_row(make):
    row = {"prompt": "q", "chosen": "It is four.", "rejected": "It is four. "}
    tokenizer = make("llama3")  # trims the contents
    for encoder in (encode_pairs, encode_rated):
        with pytest.raises(UserError, match="a:1: chosen and rejected become the same tokens"):
            encoder([convert_pair(row, "a:1")[0]], tokenizer, EncodeOptions())
    done = pairs(tokenizer, row, TEXTS, on_bad_rows="skip")
    assert len(done) == 1 and done.report.bad.count == 1
    assert pairs(make("chatml"), row).examples


def test_answers_of_one_pair_are_no_neighbours(make):
    """KTO mixes the answers of neighbours."""
    tokenizer = make("chatml")
    rows = [convert_unpaired(TEXTS, f"a:{i}")[0] for i in range(1, 4)]
    found = encode_rated(rows, tokenizer, EncodeOptions()).examples
    assert [(one.where, one.label) for one in found] == [
        *((f"a:{i}", 1.0) for i in range(1, 4)),
        *((f"a:{i}", 0.0) for i in range(1, 4)),
    ]
    alone = [
        convert_unpaired({"prompt": "q", "completion": "a", "label": i % 2}, f"b:{i}")[0]
        for i in range(3)
    ]
    kept = encode_rated(alone, tokenizer, EncodeOptions()).examples
    assert [one.where for one in kept] == ["b:0", "b:1", "b:2"]


@pytest.mark.parametrize("template", [None, "chatml", "llama3"])
def test_only_the_prompt_is_cut(make, template):
    """One token less each time: the BOS and both answers stay whole, until a BOS and the longer
    answer are left."""
    tokenizer = make(template)
    (whole,) = pairs(tokenizer, MESSAGES).examples
    bos = [tokenizer.bos_token_id] if template != "chatml" else []
    assert whole.chosen.tokens[: len(bos)].tolist() == bos
    longest = max(whole.chosen.size, whole.rejected.size)
    fits = pairs(tokenizer, MESSAGES, max_seq_length=longest)
    assert fits.report.lines() == [] and fits.examples[0].shared == whole.shared
    for lost in range(1, whole.shared):
        done = pairs(tokenizer, MESSAGES, max_seq_length=longest - lost)
        (cut,) = done.examples
        assert done.report.lines() == ["1 prompts cut at their start, so that the answers fit"]
        assert cut.shared == whole.shared - lost
        for one, old in zip(cut.sequences, whole.sequences, strict=True):
            kept = bos + old.tokens[len(bos) + lost :].tolist()
            assert one.tokens.tolist() == kept and len(kept) <= longest - lost
            weights = [0.0] * len(bos) + old.weights[len(bos) + lost :].tolist()
            assert one.weights.tolist() == weights and one.trained == old.trained
    with pytest.raises(UserError, match="1 examples left out: an answer alone is longer than max"):
        pairs(tokenizer, MESSAGES, max_seq_length=longest - whole.shared)


def test_long_pairs_are_left_out_or_stop(make):
    tokenizer = make("chatml")
    short = {"prompt": "q", "chosen": "a", "rejected": "b"}
    (whole,) = pairs(tokenizer, MESSAGES).examples
    limit = max(one.size for one in whole.sequences) - 1
    done = pairs(tokenizer, MESSAGES, short, max_seq_length=limit, on_long="skip")
    assert len(done) == 1 and done.report.too_long == 1
    with pytest.raises(UserError, match=rf"a:1: {limit + 1} tokens are more than max_seq_length"):
        pairs(tokenizer, MESSAGES, max_seq_length=limit, on_long="stop", on_bad_rows="skip")


def test_processes_give_the_same(make, monkeypatch):
    monkeypatch.setattr("mud_puppy.data.encoding.CHUNK_ROWS", 2)
    rows = [TEXTS, MESSAGES, {**TEXTS, "margin": 2, "source": "s"}]
    one = pairs(make("chatml"), *rows)
    two = pairs(make("chatml"), *rows, preprocess_workers=2)
    for a, b in zip(one.examples, two.examples, strict=True):
        assert (a.shared, a.margin, a.source, a.where) == (b.shared, b.margin, b.source, b.where)
        assert a.chosen.tokens.tolist() == b.chosen.tokens.tolist()
        assert a.rejected.weights.tolist() == b.rejected.weights.tolist()
    assert one.examples[2].margin == 2.0 and one.examples[2].source == "s"


def test_rated_answers(make):
    tokenizer = make("chatml")
    row = {"prompt": HISTORY, "completion": [GOOD], "label": False, "source": "s"}
    (one,) = rated(tokenizer, row).examples
    assert trained(one.example, tokenizer) == ["It is four.<|im_end|>"]
    assert (one.label, one.source, one.where) == (0.0, "s", "a:1")
    asked = tokenizer.apply_chat_template(HISTORY, add_generation_prompt=True)["input_ids"]
    assert one.example.tokens[: one.shared].tolist() == asked
    (same,) = rated(tokenizer, {"messages": [*HISTORY, GOOD], "label": 0}).examples
    assert same.example.tokens.tolist() == one.example.tokens.tolist()
    assert same.example.weights.tolist() == one.example.weights.tolist()
    (text,) = rated(tokenizer, {"text": "Hello there!", "label": 0.5}, convert_scored).examples
    assert tokenizer.decode(text.example.tokens) == "<s>Hello there!</s>" and text.shared == 1


def test_a_pair_gives_two_rated_answers(make):
    tokenizer = make("chatml")
    (pair,) = pairs(tokenizer, MESSAGES).examples
    done = rated(tokenizer, MESSAGES)
    assert [one.label for one in done.examples] == [1.0, 0.0]
    for one, want in zip(done.examples, pair.sequences, strict=True):
        assert one.example.tokens.tolist() == want.tokens.tolist() and one.shared == pair.shared
    # Each is cut by itself.
    limit = min(one.size for one in pair.sequences)
    done = rated(tokenizer, MESSAGES, max_seq_length=limit)
    assert done.report.prompt_cut == 1
    assert [one.size for one in done.examples] == [limit, limit]


STEPS = {"prompt": "two plus two", "completions": ["It is", " four."], "labels": [True, False]}


def test_steps_without_a_template(make):
    """As TRL's PRMTrainer did it: prompt, steps and separators tokenized one by one, a label on the
    separator behind each step."""
    tokenizer = make()

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    (one,) = steps(tokenizer, STEPS).examples
    first, second = ids("It is") + ids("\n"), ids(" four.") + ids("\n")
    prompt = tokenizer("two plus two")["input_ids"]
    assert one.example.tokens.tolist() == prompt + first + second
    ends = [len(prompt + first) - 1, len(prompt + first + second) - 1]
    assert np.flatnonzero(one.example.weights).tolist() == ends
    assert one.labels[ends].tolist() == [1, 0] and one.labels.sum() == 1
    assert one.labels.dtype == np.int32
    (long,) = steps(tokenizer, STEPS, separator=" and so").examples
    text = tokenizer.decode(long.example.tokens)
    assert text == "<s>two plus twoIt is and so four. and so"
    assert len(ids(" and so")) > 1 and long.example.trained == 2
    (bare,) = steps(tokenizer, STEPS, separator="").examples
    assert bare.example.trained == 2 and bare.example.tokens.tolist() == prompt + ids("It is four.")


@pytest.mark.parametrize("template", ["chatml", "llama3", "gemma", "qwen3", "mistral"])
def test_steps_stand_where_the_template_puts_an_answer(make, template):
    tokenizer = make(template)
    (one,) = steps(tokenizer, STEPS).examples
    text = tokenizer.decode(one.example.tokens)
    before, found, after = text.partition("It is\n four.\n")
    assert found and after == ""
    answered = [{"role": "user", "content": STEPS["prompt"]}, {"role": "assistant", "content": "X"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False).startswith(before + "X")
    ends = np.flatnonzero(one.example.weights)
    assert tokenizer.decode(one.example.tokens[ends]) == "\n\n"
    assert one.labels[ends].tolist() == [1, 0]


def test_steps_keep_their_labels_when_the_prompt_is_cut(make):
    tokenizer = make("chatml")
    row = {**STEPS, "prompt": [*HISTORY]}
    (whole,) = steps(tokenizer, row).examples
    done = steps(tokenizer, row, max_seq_length=whole.size - 3)
    (cut,) = done.examples
    assert done.report.prompt_cut == 1
    assert cut.example.tokens.tolist() == whole.example.tokens[3:].tolist()
    assert cut.labels.tolist() == whole.labels[3:].tolist()
    assert cut.example.weights.tolist() == whole.example.weights[3:].tolist()
    with pytest.raises(UserError, match="an answer alone is longer than max_seq_length"):
        asked = tokenizer.apply_chat_template(HISTORY, add_generation_prompt=True)["input_ids"]
        steps(tokenizer, row, max_seq_length=whole.size - len(asked))


def test_a_template_that_hides_the_answer_is_refused(make):
    with pytest.raises(UserError, match="a:1: the chat template does not write the answer as it"):
        steps(make("hides_turns"), STEPS)
