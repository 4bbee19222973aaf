"""What `mud-puppy preview` prints."""

from mud_puppy.data.encoding import EncodeOptions, encode
from mud_puppy.data.formats import convert
from mud_puppy.data.preview import preview_text

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
