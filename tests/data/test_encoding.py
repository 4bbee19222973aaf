"""Long examples, bad rows, processes, splits."""

import os

import numpy as np
import pytest

from mud_puppy.data.encoding import EncodeOptions, encode
from mud_puppy.data.example import Example, split
from mud_puppy.data.formats import Text, convert
from mud_puppy.errors import UserError


def chats(count, words=3):
    rows = []
    for i in range(count):
        messages = [
            {"role": "user", "content": f"Hello {i} " * words},
            {"role": "assistant", "content": f"four {i}"},
        ]
        rows.append(convert({"messages": messages}, f"a.jsonl:{i + 1}")[0])
    return rows


def same(a, b):
    return all(
        np.array_equal(x.tokens, y.tokens)
        and np.array_equal(x.weights, y.weights)
        and x.where == y.where
        for x, y in zip(a.examples, b.examples, strict=True)
    )


def test_dtypes_order_and_place(make):
    done = encode(chats(5), make("chatml"), EncodeOptions())
    assert [example.where for example in done.examples] == [f"a.jsonl:{i}" for i in range(1, 6)]
    assert {(e.tokens.dtype, e.weights.dtype) for e in done.examples} == {
        (np.dtype(np.int32), np.dtype(np.float32))
    }
    assert len(done) == 5 and done.report.lines() == []


def test_processes_give_the_same(make, monkeypatch):
    import jax

    jax.numpy.zeros(1).block_until_ready()  # a parent with JAX's threads running
    monkeypatch.setattr("mud_puppy.data.encoding.CHUNK_ROWS", 7)
    rows, tokenizer = chats(30), make("chatml")
    one = encode(rows, tokenizer, EncodeOptions())
    two = encode(rows, tokenizer, EncodeOptions(preprocess_workers=2))
    assert same(one, two) and one.report == two.report
    assert not same(one, encode(rows[::-1], tokenizer, EncodeOptions()))
    rows[20] = convert({"messages": [{"role": "user", "content": "x"}]}, "a.jsonl:21")[0]
    with pytest.raises(UserError, match=r"a.jsonl:21: no assistant turn"):
        encode(rows, tokenizer, EncodeOptions(preprocess_workers=2))


class Fatal(Text):
    """A row that ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_process_that_dies_is_an_error(make, monkeypatch):
    monkeypatch.setattr("mud_puppy.data.encoding.CHUNK_ROWS", 1)
    with pytest.raises(UserError, match="a preprocessing process ended early"):
        encode([Fatal("x", "a:1")] * 2, make("chatml"), EncodeOptions(preprocess_workers=2))


def test_on_long(make):
    tokenizer = make("chatml")
    rows = [*chats(2), *chats(1, words=60)]
    whole = encode(rows, tokenizer, EncodeOptions())
    short, long = len(whole.examples[0].tokens), len(whole.examples[2].tokens)
    just_fits = encode(rows, tokenizer, EncodeOptions(max_seq_length=long))
    assert same(whole, just_fits) and just_fits.report.truncated == 0
    cut = encode(rows, tokenizer, EncodeOptions(max_seq_length=long - 3))
    assert cut.report.truncated == 1
    assert cut.examples[2].tokens.tolist() == whole.examples[2].tokens[:-3].tolist()
    assert cut.examples[2].weights.tolist() == whole.examples[2].weights[:-3].tolist()
    away = encode(rows, tokenizer, EncodeOptions(max_seq_length=short))
    assert len(away) == 2 and away.report.cut_away == 1 and away.report.truncated == 0
    skipped = encode(rows, tokenizer, EncodeOptions(max_seq_length=long - 3, on_long="skip"))
    assert len(skipped) == 2 and skipped.report.too_long == 1
    with pytest.raises(UserError, match=rf"a.jsonl:1: {long} tokens are more than max_seq_length"):
        encode(rows, tokenizer, EncodeOptions(max_seq_length=long - 3, on_long="stop"))
    with pytest.raises(UserError, match="none of 3 rows can be trained on: 3 examples left out"):
        encode(rows, tokenizer, EncodeOptions(max_seq_length=2))


def test_bad_rows_are_skipped_on_request(make):
    bad = convert({"messages": [{"role": "user", "content": "x"}]}, "a.jsonl:9")[0]
    rows, tokenizer = [*chats(2), bad], make("chatml")
    done = encode(rows, tokenizer, EncodeOptions(on_bad_rows="skip"))
    assert len(done) == 2 and done.report.bad.count == 1
    assert done.report.lines()[0] == "1 bad rows left out"
    assert done.report.lines()[1].startswith("a.jsonl:9: no assistant turn")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"max_seq_length": 1}, "max_seq_length must be at least 2, not 1"),
        ({"preprocess_workers": -1}, "preprocess_workers"),
        ({"roles_to_train": ()}, "names no role"),
        ({"roles_to_train": ("asistant",)}, r"unknown role 'asistant'.*Did you mean 'assistant'"),
        ({"on_long": "cut"}, "on_long must be truncate, skip or stop"),
        ({"on_bad_rows": "ignore"}, "on_bad_rows must be stop or skip, not 'ignore'"),
    ],
)
def test_options_are_checked(options, what):
    with pytest.raises(UserError, match=what):
        EncodeOptions(**options)


def test_split():
    items = list(range(10))
    kept, held = split(items, 0.25, seed=3)
    assert sorted(kept + held) == items and len(held) == 3
    assert kept == sorted(kept) and held == sorted(held)
    assert split(items, 0.25, seed=3) == (kept, held) != split(items, 3, seed=4)
    assert split(items, 3, seed=3) == (kept, held)
    assert len(split(items, 0.001, seed=0)[1]) == 1
    for held_out in (0, 10, 0.99, 1.0, 0.0, -1):
        with pytest.raises(UserError, match=r"both sides need|must lie between"):
            split(items, held_out, seed=0)


def test_trained_counts_weights():
    tokens, weights = np.arange(3, dtype=np.int32), np.array([0, 1, 1], np.float32)
    assert Example(tokens, weights, "x:1").trained == 2
