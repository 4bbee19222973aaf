"""A function of many parts, in several processes, with the results in the order of the parts."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from mud_puppy.errors import UserError


def in_processes(
    work: Callable[..., Any], parts: Sequence[Any], given: tuple[Any, ...], workers: int
) -> Iterator[Any]:
    """work(part, *given) of each part. `work` and `given` are sent to each process once, and an
    exception in one is raised here.

    Spawned, not forked: JAX in the parent has threads and perhaps a device, neither of which
    survives a fork.
    """
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (work, given))
    try:
        yield from pool.map(_work, parts)
    except BrokenProcessPool as error:
        raise UserError(
            "a preprocessing process ended early: put your script's calls under "
            "`if __name__ == '__main__':`, or set preprocess_workers to 1"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: dict = {}


def _start(work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    # One thread each: the processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.update(work=work, given=given)


def _work(part: Any) -> Any:
    return _worker["work"](part, *_worker["given"])
