"""generate and chat: ask a model."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from mud_puppy.commands.words import check_words
from mud_puppy.config.keys import DTYPES, MODEL, REMOTE_CODE, Precision
from mud_puppy.config.schema import AT_LEAST_1, NOT_NEGATIVE, REQUIRED, Limit, Parser, key, texts

_flag = partial(key, "flags")
_TOP_P = Limit("above 0 and at most 1", lambda v: 0 < v <= 1)
_PROMPTS = Parser("a non-empty text", texts)


@dataclass(frozen=True, kw_only=True)
class Talk:
    """What generate and chat share: the model and how it chooses words."""

    model: str = _flag(REQUIRED, MODEL)
    adapter: str | None = _flag(None, "PEFT adapter folder to add")
    precision: Precision = _flag("bf16", "type that the model computes in")
    max_new_tokens: int = _flag(256, "longest answer in tokens", AT_LEAST_1)
    temperature: float = _flag(0.0, "0 takes the likeliest token; higher is freer", NOT_NEGATIVE)
    top_k: int = _flag(0, "sample from this many likeliest tokens; 0: from all", NOT_NEGATIVE)
    top_p: float = _flag(1.0, "sample from the likeliest tokens of this total probability", _TOP_P)
    seed: int = _flag(0, "seed of the sampling", NOT_NEGATIVE)
    trust_remote_code: bool = _flag(False, REMOTE_CODE)


@dataclass(frozen=True, kw_only=True)
class Generate(Talk):
    """Answer each prompt, one after the other."""

    prompt: tuple[str, ...] = _flag(REQUIRED, "what to answer", _PROMPTS, repeat=True)
    chat_template: bool = _flag(True, "put each prompt into the model's chat template, if any")


def run_generate(args: Generate) -> None:
    """Prints the answers."""
    import mud_puppy as mp

    model, params, tokenizer = _open(args)
    answers = mp.generate(
        model,
        params,
        tokenizer,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        chat=None if args.chat_template else False,
    )
    print(*answers, sep="\n")


@dataclass(frozen=True, kw_only=True)
class Chat(Talk):
    """Talk to the model, a line at a time; /reset starts over, /exit ends."""

    system: str | None = _flag(None, "what the model is told first")
    max_new_tokens: int = _flag(512, "longest answer in tokens", AT_LEAST_1)
    temperature: float = _flag(0.7, "0 takes the likeliest token; higher is freer", NOT_NEGATIVE)


def run_chat(args: Chat) -> None:
    """Reads lines from the terminal and shows replies while they are generated."""
    from mud_puppy.sampling.chat import chat
    from mud_puppy.sampling.choose import Options

    options = Options(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    chat(*_open(args), options, system=args.system)


def _open(args: Talk) -> tuple[Any, Any, Any]:
    """(model, params, tokenizer), with the adapter if one is named."""
    import mud_puppy as mp

    trusted = args.trust_remote_code
    check_words(args.model, args.adapter, trusted)
    model, params = mp.load(args.model, DTYPES[args.precision], trust_remote_code=trusted)
    if args.adapter is not None:
        params = mp.load_adapter(params, args.adapter)
    return model, params, mp.load_tokenizer(args.model, trusted)
