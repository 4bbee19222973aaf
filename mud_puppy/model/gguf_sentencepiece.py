"""SentencePiece's BPE as a `tokenizers` BPE (GGUF's "llama": Llama 2, Mistral, Gemma, Phi-3).

SentencePiece joins the two neighbours whose union has the highest score, the leftmost first, until
no union is a piece (bpe_model.cc; llama.cpp's `llm_tokenizer_spm_session` does the same).
`tokenizers` wants a rank of each pair instead: every split of a piece into two pieces, pieces by
falling score. Where scores differ the two agree; of equal ones the longer is joined first here,
wherever it stands. User-defined tokens are matched in the text, so that U+2581 written in a text
does not count as the space of one.
"""

from gguf import TokenType
from tokenizers import Tokenizer, decoders, models, normalizers

_SPACE = "\u2581"


def sentencepiece_bpe(
    tokens: list[str], scores: list[float], kinds: list[int], unknown: str, prefix: bool
) -> Tokenizer:
    """Characters that are no piece become their bytes' tokens, or `unknown` without those.

    prefix: whether a text gets a space in front, as does what follows an added token; a decoded
    text loses it again.
    """
    bpe = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges(tokens, scores, kinds),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    to_pieces = normalizers.Replace(" ", _SPACE)
    before = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, to_pieces])
    after = [decoders.Strip(" ", left=1, right=0)] if prefix else []
    to_text = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*to_text, *after])
    return tokenizer


def merges(tokens: list[str], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
    """Pairs of pieces whose union is a piece, first those that are joined first.

    Only ordinary pieces: a text that spells a control token or a byte's is not joined to it, and
    user-defined ones are cut out of the text before.

    >>> merges(["a", "b", "ab", "bb", "abb"], [0.0, 0.0, -1.0, -0.5, -2.0], [1] * 5)
    [('b', 'b'), ('a', 'b'), ('ab', 'b'), ('a', 'bb')]
    """
    normal = [index for index, kind in enumerate(kinds) if kind == TokenType.NORMAL]
    pieces = {tokens[index] for index in normal}
    # Of equal scores the longest first, so that a run of one character grows from its left end.
    ranked = sorted(normal, key=lambda index: (-scores[index], -len(tokens[index])))
    splits = (
        (tokens[index][:at], tokens[index][at:])
        for index in ranked
        for at in range(len(tokens[index]) - 1, 0, -1)
    )
    return [(left, right) for left, right in splits if left in pieces and right in pieces]
