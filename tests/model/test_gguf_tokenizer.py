"""SentencePiece vocabularies of GGUF files: against ids that the sentencepiece library gave, its
algorithm written out slowly, and transformers' own reader where that is right."""

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mud_puppy.errors import UserError
from mud_puppy.model import load_tokenizer

CHAT = "{% for m in messages %}<|user|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
TYPES = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
NORMAL, CONTROL, USER = TokenType.NORMAL, TokenType.CONTROL, TokenType.USER_DEFINED
# What lies between the words of a text.
PARTS = [" ", "  ", "     ", "\n", "\n\n", "\t", "0", "12345", "a", "aaaa", "==", "s>", "\x00"]
PARTS += ["\u2581", "\u00e9", "\u0301", "\u4f60\u597d", "\U0001f600", "\U0001f469\u200d\U0001f467"]
SYLLABLES = "the re in de con al ing er st an a o s bab aba token (x) ' -- 19".split()
CHOOSE = random.Random(7)
WORDS = ["".join(CHOOSE.choices(SYLLABLES, k=CHOOSE.randrange(1, 5))) for _ in range(400)]


def write(path: Path, arch: str = "llama", **fields: Any) -> Path:
    """A file of `tokenizer.ggml.*` entries and no tensor; those that are None left out."""
    writer = gguf.GGUFWriter(path, arch)
    for name, value in ({"model": "llama"} | fields).items():
        key = "tokenizer.chat_template" if name == "chat_template" else f"tokenizer.ggml.{name}"
        if value is not None:
            getattr(writer, f"add_{TYPES[type(value)]}")(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """Entries of a vocabulary as Llama 2's: <unk>, <s>, </s>, the bytes, the unions that the
    tokenizers package learned by falling score, characters, and two added tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()  # a word has its space in front
    trainer = trainers.BpeTrainer(vocab_size=1000, show_progress=False)
    bpe.train_from_iterator([" ".join(WORDS), "=" * 9, " " * 40, "a" * 9], trainer)
    learned = sorted(bpe.get_vocab(), key=lambda token: bpe.get_vocab()[token])
    pieces = ["\u2581" * 4, "\u2581" * 2, *(p for p in learned if len(p) > 1)]
    pieces += [p for p in learned if len(p) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    kinds = [TokenType.UNKNOWN, CONTROL, CONTROL, *[TokenType.BYTE] * 256, *[NORMAL] * len(pieces)]
    scores = [*[0.0] * 259, *(-float(i) for i in range(len(pieces))), -1000.0, -1000.0]
    return {
        "tokens": [*tokens, "<|user|>", "<think>"],
        "scores": scores,
        "token_type": [int(kind) for kind in (*kinds, CONTROL, USER)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def texts(count: int, seed: int = 0) -> list[str]:
    choose = random.Random(seed)
    return [
        "".join(
            choose.choice(PARTS) if choose.random() < 0.5 else f"{choose.choice(WORDS)} "
            for _ in range(choose.randrange(14))
        )
        for _ in range(count)
    ]


def slowly(entries: dict[str, Any], text: str, prefix: bool = True) -> list[int]:
    """SentencePiece as its paper has it: join the two neighbours whose union has the highest score,
    the leftmost of equal ones, until no union is a piece; spell the rest in bytes."""
    columns = (entries["tokens"], entries["scores"], entries["token_type"])
    scores = {t: s for t, s, kind in zip(*columns, strict=True) if kind == NORMAL}
    ids = {token: index for index, token in enumerate(entries["tokens"])}
    parts = list(("\u2581" * (prefix and bool(text)) + text).replace(" ", "\u2581"))
    while True:
        unions = enumerate(a + b for a, b in pairwise(parts))
        joined = [(-scores[union], at) for at, union in unions if union in scores]
        if not joined:
            break
        at = min(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    spelled = [[p] if p in scores else [f"<0x{b:02X}>" for b in p.encode()] for p in parts]
    return [ids[token] for tokens in spelled for token in tokens]


def plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# Made by sentencepiece 0.2.3 (model_type BPE, identity normalization, add_dummy_prefix, no
# remove_extra_whitespaces) of these pieces; aa and aaa have one score.
PIECES = "\u2581a ab bc abc bcd \u2581\u2581 aa aaa \u2581ab cd a b c d \u2581".split()
SCORES = [0.0, -1, -2, -3, -4, -5, -6, -6, -8, -0.5, -20, -21, -22, -23, -24]
GOLDEN = {
    "": [],
    "abcd": [3, 7],
    "a abc": [3, 3, 5],
    "  ab  cd": [8, 11, 8, 12],
    "aaaaaaa": [3, 10, 10],
    "baaaab": [17, 14, 10, 4],
    "xyz a\u00e9b": [17, 0, 3, 0, 14],
    "bcdabcabcd": [17, 7, 6, 4, 12],
    "caaaa dabc  ": [17, 15, 10, 13, 17, 16, 6, 8],
}


def test_ids_that_sentencepiece_gave(tmp_path: Path) -> None:
    def tokenizer(scores: Sequence[float]) -> Any:
        entries = {
            "tokens": ["<unk>", "<s>", "</s>", *PIECES],
            "scores": [0.0, 0.0, 0.0, *map(float, scores)],
            "token_type": [2, 3, 3, *[1] * len(PIECES)],
        }
        return load_tokenizer(write(tmp_path / "a.gguf", **entries))

    right, reversed_ = tokenizer(SCORES), tokenizer(SCORES[::-1])
    assert {text: plain(right, text) for text in GOLDEN} == GOLDEN
    assert {text: plain(reversed_, text) for text in GOLDEN} != GOLDEN


@pytest.mark.parametrize(("kind", "ids"), [("BYTE", [4, 7]), ("UNUSED", [4, 7]), ("NORMAL", [3])])
def test_texts_join_to_ordinary_pieces_only(kind: str, ids: list[int], tmp_path: Path) -> None:
    # sentencepiece 0.2.3 gives [4, 7] for the byte and for the unused piece too.
    tokens = ["<unk>", "<s>", "</s>", "<0x61>", "<0x6", "<0x", "<0", "1>", *"<0x61>"]
    entries = {
        "tokens": tokens,
        "scores": [-float(i) for i in range(len(tokens))],
        "token_type": [2, 3, 3, int(TokenType[kind]), *[1] * 10],
        "add_space_prefix": False,
    }
    assert plain(load_tokenizer(write(tmp_path / "a.gguf", **entries)), "<0x61>") == ids


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_are_those_of_the_algorithm(
    prefix: bool, trained: dict[str, Any], tmp_path: Path
) -> None:
    ours = load_tokenizer(write(tmp_path / "a.gguf", **trained, add_space_prefix=prefix))
    some = texts(400)
    expected = [slowly(trained, text, prefix) for text in some]
    assert [plain(ours, text) for text in some] == expected
    for text, ids in zip(some, expected, strict=True):
        assert ours.decode(ids) == text.replace("\u2581", " ")  # they are one piece
    # Other orders of the merges, and the other prefix, are other tokens.
    other = trained | {"scores": [-score for score in trained["scores"]]}
    wrong = load_tokenizer(write(tmp_path / "b.gguf", **other, add_space_prefix=prefix))
    assert [plain(wrong, text) for text in some] != expected
    wrong = load_tokenizer(write(tmp_path / "c.gguf", **trained, add_space_prefix=not prefix))
    assert [plain(wrong, text) for text in some] != expected


def test_ids_equal_transformers(trained: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("torch")  # transformers reads a GGUF only with it
    from transformers import AutoTokenizer

    # Its phi3 has SentencePiece's space in front; its llama leaves it out before a text's own.
    path = write(tmp_path / "a.gguf", "phi3", **trained)
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = load_tokenizer(path)
    for text in texts(400, seed=1):
        assert ours(text)["input_ids"] == reference(text)["input_ids"], text
    assert ours.all_special_ids == reference.all_special_ids


def test_added_tokens_and_the_ends_of_a_text(trained: dict[str, Any], tmp_path: Path) -> None:
    ids = {token: index for index, token in enumerate(trained["tokens"])}
    user, think, line = ids["<|user|>"], ids["<think>"], ids["<0x0A>"]
    ours = load_tokenizer(write(tmp_path / "a.gguf", **trained, chat_template=CHAT))
    a, space = ids["\u2581a"], ids["\u2581"]
    # Behind an added token a text begins anew, as in llama.cpp.
    assert ours("<|user|>a<think>\n</s>")["input_ids"] == [1, user, a, think, space, line, 2]
    assert ours("")["input_ids"] == [1] and plain(ours, "") == []
    assert ours.decode([1, user, a, think, 2], skip_special_tokens=True) == "a<think>"
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")
    assert ours.pad_token is None and len(ours) == len(trained["tokens"])
    chat = [{"role": "user", "content": "a"}]
    assert ours.apply_chat_template(chat, return_dict=False) == [user, a, 2]
    for bos, eos in ((True, True), (False, True), (False, False)):
        flags = {"add_bos_token": bos, "add_eos_token": eos, "padding_token_id": 0}
        other = load_tokenizer(write(tmp_path / "b.gguf", **trained, **flags))
        assert other("a")["input_ids"] == [1] * bos + [a] + [2] * eos
        assert other.pad_token == "<unk>"
    # Phi-3's take the white space behind them along, all but three.
    phi = load_tokenizer(write(tmp_path / "c.gguf", "phi3", **trained))
    assert plain(phi, "<|user|> \n a<s>\n") == [user, a, 1, space, line]
    (saved := tmp_path / "saved").mkdir()
    for tokenizer in (ours, phi):
        tokenizer.save_pretrained(saved)
        again = load_tokenizer(saved)
        for text in ["<|user|> \n a<think> \n b</s>", *texts(50)]:
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
            assert again.decode(again(text)["input_ids"]) == tokenizer.decode(
                again(text)["input_ids"]
            )


def test_user_defined_spaces_as_gemma_has_them(trained: dict[str, Any], tmp_path: Path) -> None:
    # Of five spaces SentencePiece takes the longest user-defined token, whatever the scores; old
    # converters wrote them with U+2581.
    for mark in (" ", "\u2581"):
        added = {"tokens": [*trained["tokens"], mark * 3, "\n\n"]}
        added |= {"scores": [*trained["scores"], -1000.0, -1000.0]}
        added |= {"token_type": [*trained["token_type"], int(USER), int(USER)]}
        path = write(tmp_path / "a.gguf", "gemma2", **trained | added, add_space_prefix=False)
        ours, last = load_tokenizer(path), len(trained["tokens"])
        ids = {token: index for index, token in enumerate(trained["tokens"])}
        want = [ids["a"], last, ids["\u2581\u2581"], ids["a"], last + 1, ids["a"]]
        assert plain(ours, "a     a\n\na") == want
        assert ours.decode(want) == "a     a\n\na"


LONG = {"tokens": ["<unk>", "<s>", "</s>", "a" * 513], "token_type": [2, 3, 3, 1]}
BAD = {
    "no tokens": ({"tokens": None}, r"ggml\.tokens is missing"),
    "no scores": ({"scores": None}, r"ggml\.scores is missing, without .*own folder"),
    "no types": ({"token_type": None}, r"ggml\.token_type is missing"),
    "few scores": ({"scores": [0.0]}, r"ggml\.scores has 1 entries, expected \d+: one of each"),
    "few types": ({"token_type": [1] * 7}, r"ggml\.token_type has 7 entries, expected"),
    "scores are text": ({"scores": ["a"]}, r"ggml\.scores is of another type, .* list of float"),
    "scores are a number": ({"scores": 1.0}, r"ggml\.scores is of another type"),
    "a score is no number": ({"scores": float("nan")}, r"ggml\.scores holds a NaN"),
    "bos": ({"bos_token_id": 5000}, r"ggml\.bos_token_id is '5000', expected an id below \d+"),
    "eos": ({"eos_token_id": "x"}, r"ggml\.eos_token_id is 'x', expected an id"),
    "pad": ({"padding_token_id": 2**32 - 1}, r"ggml\.padding_token_id is '4294967295'"),
    "unknown": ({"unknown_token_id": 10**6}, r"ggml\.unknown_token_id is '1000000'"),
    "flag": ({"add_space_prefix": 3}, r"ggml\.add_space_prefix is '3', expected true or false"),
    "a token twice": ({"tokens": "twice"}, r"ggml\.tokens holds '<0x0A>' more than once"),
    "a long token": (LONG, r"ggml\.tokens: token 3 has 513 characters"),
    "unigrams": ({"model": "t5"}, r"its tokenizer \(t5, .* not read from GGUF.*own folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_entries_that_cannot_be_true(case: str, trained: dict[str, Any], tmp_path: Path) -> None:
    fields, message = BAD[case]
    if case == "a score is no number":
        fields = {"scores": [*trained["scores"][:-1], fields["scores"]]}
    if case == "a token twice":
        fields = {"tokens": [*trained["tokens"][:-1], "<0x0A>"]}
    path = write(tmp_path / "bad.gguf", **trained | fields)
    with pytest.raises(UserError, match=rf"bad\.gguf: .*{message}") as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)


def test_byte_level_entries_are_checked_too(tmp_path: Path) -> None:
    entries = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
    assert load_tokenizer(write(tmp_path / "a.gguf", **entries))("ab")["input_ids"] == [2]
    cases = {
        "merges is missing": {"merges": None},
        "eos_token_id is '3', expected": {"eos_token_id": 3},
        "add_bos_token is true, but bos_token_id is missing": {"add_bos_token": True},
    }
    for message, fields in cases.items():
        with pytest.raises(UserError, match=rf"tokenizer\.ggml\.{message}"):
            load_tokenizer(write(tmp_path / "a.gguf", **entries | fields))
