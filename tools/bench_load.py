"""Speed and memory of `load` beside plain reads of the same files.

    python tools/bench_load.py                  # 4 GB in 4 shards, written to a temporary folder
    python tools/bench_load.py --gigabytes 1 --rounds 3

Speeds: one process calls `mud_puppy.load` and only reads, in turns, the order of two changing each
time. Only reading is every tensor's bytes by pread into a fresh buffer of its size, so that
both pay for the first touch of their memory. Before each turn, off the clock, the files are read
into the page cache and as much memory is touched and freed: no disk is measured, nor a virtual
machine's host that has yet to find memory, which is slower than all else.

Peaks: a process each, of the whole of it from its start, imports too: VmHWM of /proc/self/status.
ru_maxrss is the same counter, but a child's begins at what its parent held when it forked. Resident
memory counts pages of mapped files as well; nothing here maps the checkpoint (files are read into
anonymous memory), so what is counted is the arrays, the interpreter and its libraries.
"""

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

GB = 10**9
WIDTHS = {  # Llama-3.2-1B's
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
TINY = WIDTHS | {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 64}
LAYER_BYTES, EMBED_BYTES = 2 * 60_821_504, 2 * 128256 * 2048
WHAT = {
    "pread": "pread alone",
    "load": "load",
    "fsdp": "load, mesh fsdp=8 of CPU devices",
    "nf4": "load, on_leaf nf4",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--cases", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cases is not None and args.rounds:
        print(json.dumps(speeds(args.cases.split(","), args.folder, args.rounds)))
    elif args.cases is not None:
        print(json.dumps(peak(args.cases, args.folder)))
    else:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            bench(Path(name), args.gigabytes, args.rounds)


def bench(folder: Path, gigabytes: float, rounds: int) -> None:
    size = write(folder, gigabytes)
    print(f"{size / GB:.2f} GB in {len(list((folder / 'big').glob('*.safetensors')))} shards")
    found = child("pread,load", folder, rounds)
    ratios = [a / b for a, b in zip(found["pread"], found["load"], strict=True)]
    for case in ("fsdp", "nf4"):
        found |= child(case, folder, min(rounds, 3))
    for case, seconds in found.items():
        rates = sorted(size / GB / s for s in seconds)
        held = child(case, folder, 0)
        hwm, maxrss = ((held[name] - size) / 1e6 for name in ("hwm", "maxrss"))
        print(
            f"{WHAT[case]:34} median {median(rates):.2f} GB/s ({rates[0]:.2f} to {rates[-1]:.2f}, "
            f"{len(rates)} turns); peak: model {hwm:+.0f} MB, {held['before'] / 1e6:.0f} of them "
            f"before it (ru_maxrss {maxrss:+.0f})"
        )
    print(f"load at {100 * median(ratios):.0f} % of the speed of pread, median of the turns'")


def child(cases: str, folder: Path, rounds: int) -> dict[str, Any]:
    args = [sys.executable, __file__, "--cases", cases, "--folder", str(folder)]
    flags = "--xla_force_host_platform_device_count=8" if cases == "fsdp" else ""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    args += ["--rounds", str(rounds)]
    return json.loads(subprocess.run(args, env=env, check=True, stdout=subprocess.PIPE).stdout)


def speeds(cases: list[str], folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each turn; the first, which finds the memory, is not counted."""
    found: dict[str, list[float]] = {case: [] for case in cases}
    for turn in range(rounds + 1):
        for case in cases[:: -1 if turn % 2 else 1]:
            make_ready(folder / "big")
            found[case].append(timed(case, folder))
    return {case: seconds[1:] for case, seconds in found.items()}


def make_ready(folder: Path) -> None:
    """The files in the page cache, and as much memory that the machine has at hand."""
    import numpy as np

    block = bytearray(2**24)
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    np.empty(size, np.uint8).fill(1)


def peak(case: str, folder: Path) -> dict[str, float]:
    """Bytes of one case, in this process."""
    timed(case, folder, "tiny")
    before = status("VmRSS")
    timed(case, folder)
    maxrss = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"before": before, "hwm": status("VmHWM"), "maxrss": maxrss}


def timed(case: str, folder: Path, name: str = "big") -> float:
    """Seconds until everything is in memory."""
    import jax

    from mud_puppy.model import load
    from mud_puppy.parallel import make_mesh
    from mud_puppy.weights import Scheme, quantizer

    options: dict[str, Any] = {}
    if case == "fsdp":
        options["mesh"] = make_mesh("fsdp=8")
    if case == "nf4":
        options["on_leaf"] = quantizer(Scheme("nf4"))
    # JAX lets go of a host buffer in its next call, not when its array ends; what is still held
    # would make the next turn find new memory.
    jax.block_until_ready(jax.numpy.zeros(1) + 1)
    gc.collect()
    assert status("VmRSS") < 1.2 * GB, "the last turn's memory is not free"
    start = time.perf_counter()
    held = pread(folder / name) if case == "pread" else load(folder / name, **options)
    jax.block_until_ready([x for x in jax.tree.leaves(held) if isinstance(x, jax.Array)])
    return time.perf_counter() - start


def pread(folder: Path) -> list[Any]:
    """Every tensor's bytes in a fresh buffer."""
    import numpy as np

    buffers = []
    for path in sorted(folder.glob("*.safetensors")):
        file = os.open(path, os.O_RDONLY)
        length = int.from_bytes(os.pread(file, 8, 0), "little")
        header = json.loads(os.pread(file, length, 8))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            a, b = (8 + length + offset for offset in entry["data_offsets"])
            buffers.append(np.empty(b - a, np.uint8))
            view = memoryview(buffers[-1])
            while len(view):
                count = os.preadv(file, [view], b - len(view))
                view = view[count:]
        os.close(file)
    return buffers


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def write(folder: Path, gigabytes: float) -> int:
    """Two models of random bits, `tiny` and `big`; the bytes of the big one's tensors."""
    layers = max(1, round((gigabytes * GB - EMBED_BYTES) / LAYER_BYTES))
    write_model(folder / "tiny", TINY | {"num_hidden_layers": 1}, 1)
    return write_model(folder / "big", WIDTHS | {"num_hidden_layers": layers}, 4)


def write_model(folder: Path, fields: dict[str, Any], shards: int) -> int:
    import ml_dtypes
    import numpy as np

    from mud_puppy.model import abstract
    from mud_puppy.model.names import flatten, hf_names
    from mud_puppy.model.save import write_weights

    folder.mkdir()
    model, shapes = abstract(fields)
    leaves, dtype = flatten(shapes), np.dtype(ml_dtypes.bfloat16)
    specs = {
        name: (leaves[path].shape[path.startswith("layers/") :], dtype)
        for path, names in hf_names(model.arch, shapes).items()
        for name in names
    }
    random = np.random.default_rng(0)

    def tensor(name: str) -> Any:
        shape = specs[name][0]
        # Small floats: sign and mantissa are random, the exponent is that of 2^-6.
        return ((random.integers(0, 2**16, shape, np.uint16) & 0x807F) | 0x3C80).view(dtype)

    sizes = [2 * int(np.prod(shape)) for shape, _ in specs.values()]
    write_weights(folder, specs, tensor, sum(sizes) // shards + 2**26)
    (folder / "config.json").write_text(json.dumps(fields))
    return sum(sizes)


if __name__ == "__main__":
    main()
