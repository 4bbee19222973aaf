"""The check of a Pallas kernel against its reference on the device, before its first use.

Prebuilt 4-bit kernels have been silently wrong on gfx1100 (bitsandbytes#2087). A kernel that fails
declines by name, and the XLA implementation serves.
"""

import threading
from collections.abc import Callable

from mud_puppy.kernels import target

Case = Callable[[], tuple[float, float]]

_faults: dict[str, str | None] = {}
_lock = threading.Lock()


def fault(name: str, case: Case) -> str | None:
    """Why the kernel `name` must not be used on this device, or None.

    `case()` runs the kernel and its reference on concrete arrays and returns (error, bound). It
    runs once in a process, in a thread of its own, so that neither the trace nor the mesh of the
    caller reaches it. The CPU's interpreter and targets without a card are not checked here.
    """
    if target.current().platform not in ("cuda", "rocm") or not target.on_device():
        return None
    with _lock:
        if name not in _faults:
            thread = threading.Thread(target=_run, args=(name, case))
            thread.start()
            thread.join()
        return _faults[name]


def judge(name: str, case: Case) -> str | None:
    """What is wrong with a kernel by its case, run now; None where it agrees."""
    try:
        error, bound = case()
    except Exception as problem:  # whatever the compiler or the driver raises: it cannot be used
        return f"{name} failed its self-check: {type(problem).__name__}: {problem}"
    if error <= bound:
        return None
    # A NaN comes here too.
    return f"{name} failed its self-check: error {error:.2g}, allowed {bound:.2g}"


def _run(name: str, case: Case) -> None:
    _faults[name] = judge(name, case)
