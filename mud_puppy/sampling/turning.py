"""Replies that grow past LongRoPE's turning point, where all positions take other frequencies.

What the cache holds was computed with the frequencies of short rows and is of no use from there on:
such a reply is generated up to the turn, and its row read again as a prompt, as transformers does.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mud_puppy.model.arch import Arch
from mud_puppy.sampling.choose import Options


@dataclass(frozen=True)
class Reply:
    """tokens: with the EOS that ended it, if one did. logps: float32, of each token (`choose`)."""

    tokens: list[int]
    logps: np.ndarray


Tokens = Sequence[int]
Stop = Callable[[list[int]], bool] | None
Run = Callable[[Sequence[Tokens], Options, Stop], list[Reply]]


def in_two_parts(
    arch: Arch, prompts: Sequence[Tokens], options: Options, eos: Tokens, stopped: Stop, run: Run
) -> list[Reply]:
    """`run(prompts, options, stopped)`, but rows that turn are run up to there and then again."""
    turn = min((rope.long[1] for rope in arch.ropes if rope.long is not None), default=None)
    most = options.max_new_tokens
    # By length, for the rows of a call have one limit; the last part has them as they are.
    parts: dict[int | None, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        turns = turn is not None and len(prompt) <= turn < len(prompt) + most - 1
        parts[len(prompt) if turns else None].append(i)
    replies: dict[int, Reply] = {}
    for length, rows in parts.items():
        own = [prompts[i] for i in rows]
        if length is None or turn is None:
            found = run(own, options, stopped)
        else:
            # Rows draw by their number in a call: another seed, or those of two calls were alike.
            drawn = replace(options, seed=options.seed + length)
            found = _turned(own, drawn, eos, stopped, run, turn + 1 - length)
        replies |= dict(zip(rows, found, strict=True))
    return [replies[i] for i in range(len(prompts))]


def _turned(
    prompts: Sequence[Tokens], options: Options, eos: Tokens, stopped: Stop, run: Run, first: int
) -> list[Reply]:
    """`first` tokens, and then the rest of the rows that go on, one by one."""
    replies = run(prompts, replace(options, max_new_tokens=first), stopped)
    rest = replace(options, max_new_tokens=options.max_new_tokens - first, seed=~options.seed)
    for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        before = reply.tokens
        if len(before) < first or before[-1] in eos or (stopped and stopped(before)):
            continue
        after = None if stopped is None else _later(stopped, before)
        (more,) = run([[*prompt, *before]], rest, after)
        logps = np.concatenate([reply.logps, more.logps])
        replies[i] = Reply(before + more.tokens, logps)
    return replies


def _later(stopped: Callable[[list[int]], bool], before: list[int]) -> Callable[[list[int]], bool]:
    return lambda reply: stopped(before + reply)
