"""Checkpoints that are corrupt or made to harm: one line that names file and tensor, nothing
written, no hang, and less than 2 GB of memory.

All cases run in one process of their own, because a peak of memory is that of a process, and
because one that failed here would take the tests with it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_inputs import hostile
from tests.bad_inputs.bench import ERROR, SMALL
from tests.bad_inputs.damage import TENSORS
from tests.bad_inputs.hostile import DOWN, INDEX, UP, Damage, fields, gguf_array, gguf_tensor

BROKEN = f"{TENSORS}: not a whole safetensors file"
AGAIN = "copy or download it again"
MIB = 2**20

# name: (what is done to the folder m, what the line says)
CASES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    # The header's length, and what stands in it.
    "header longer than the file": (
        hostile.length(10**6),
        (BROKEN, "header is said to have 1000000 bytes", AGAIN),
    ),
    "header of 2^62 bytes": (hostile.length(2**62), (BROKEN, str(2**62), AGAIN)),
    "header of no bytes": (hostile.length(0), (BROKEN, "its header is no JSON", AGAIN)),
    "header cut by its length": (hostile.length(300), (BROKEN, "is no JSON")),
    "file of 7 bytes": (hostile.sparse(TENSORS, 7), (BROKEN, AGAIN)),
    "header of 300 MB": (hostile.garbage(300 * MIB), (BROKEN, "more than any model's", AGAIN)),
    "header of 32 MB of lists": (hostile.garbage(32 * MIB, b"[],", b"[0,"), (BROKEN, "no JSON")),
    "header of 32 MB of objects": (hostile.garbage(32 * MIB, b"{},", b"[0,"), (BROKEN, "no JSON")),
    "header of 30 MB of open lists": (hostile.garbage(30 * MIB, b"["), (BROKEN, "no JSON")),
    "header is no UTF-8": (hostile.garbage(100, b"\xff"), (BROKEN, "no JSON")),
    "header is a list": (hostile.text(lambda t: f"[{t}]"), (BROKEN, "is a list, not an object")),
    "entry is a number": (
        hostile.header(lambda h: h | {UP: 3}),
        (BROKEN, f"'{UP}' has not dtype, shape and"),
    ),
    "name with an escape": (
        hostile.header(lambda h: h | {"a\x1b[2J\n": h[UP]}),
        (BROKEN, r"'a\x1b[2J\n' has a name that cannot be printed"),
    ),
    "tensor twice": (
        hostile.text(lambda t: t[:-1] + f', "{UP}": ' + json.dumps({"dtype": "F32"}) + "}"),
        (BROKEN, f"the key '{UP}' stands twice", AGAIN),
    ),
    # Offsets.
    "overlap": (hostile.moved(-8), (BROKEN, f"'{UP}' overlap, from byte", AGAIN)),
    "hole at the end": (hostile.longer(64), (BROKEN, "64 bytes after the last tensor", AGAIN)),
    "hole in the middle": (
        hostile.header(lambda h: {name: value for name, value in h.items() if name != UP}),
        (BROKEN, "belong to no tensor", AGAIN),
    ),
    "offsets past the end": (hostile.moved(2**40), (BROKEN, f"'{UP}' ends at byte 10995", AGAIN)),
    "offsets backwards": (hostile.entry(data_offsets=[8, 0]), (BROKEN, f"'{UP}' has the offsets")),
    "offsets below zero": (hostile.entry(data_offsets=[-8, 0]), (f"'{UP}' has the offsets",)),
    "three offsets": (hostile.entry(data_offsets=[0, 1, 2]), (f"'{UP}' has the offsets",)),
    # Shapes.
    "shape of 2^40 by 2^40": (
        hostile.entry(shape=[2**40, 2**40]),
        (BROKEN, f"'{UP}' has the shape '[1099511627776, 1099511627776]'", AGAIN),
    ),
    "product that overflows to the truth": (
        hostile.entry(shape=[2**63 + 768, 2]),
        (BROKEN, f"'{UP}' has the shape"),
    ),
    "shape with a nought": (hostile.entry(shape=[0, 2**62]), (f"'{UP}' has the shape",)),
    "shape below zero": (hostile.entry(shape=[-48, -32]), (f"'{UP}' has the shape '[-48, -32]'",)),
    "shape of halves": (hostile.entry(shape=[48.0, 32]), (f"'{UP}' has the shape '[48.0, 32]'",)),
    "shape of truths": (hostile.entry(shape=[True, 1536]), (f"'{UP}' has the shape '[True,",)),
    "shape of 10^5 numbers": (hostile.entry(shape=[1] * 10**5), (f"'{UP}' has the shape '[1, 1",)),
    "shape is a text": (hostile.entry(shape="48"), (f"'{UP}' has the shape",)),
    "another shape, as many bytes": (
        hostile.entry(shape=[32, 48]),
        (f"tensor '{UP}' has shape (32, 48), but the config says (48, 32)",),
    ),
    "dtype that is half as wide": (
        hostile.entry(dtype="BF16"),
        (BROKEN, f"'{UP}' is said to be BF16 of shape '[48, 32]' in 6144 bytes"),
    ),
    "dtype of half a byte": (
        hostile.entry(dtype="F4"),
        (f"{TENSORS}: tensor '{UP}' is stored as 'F4', which is not read; dtypes that are: BF16",),
    ),
    "4 TB of nothing": (
        hostile.vast,
        (f"{TENSORS}: tensor 'model.embed_tokens.weight' and those stacked with it take 4398 GB",),
    ),
    # The index and what it names.
    "index names a path": (
        hostile.shards(lambda m: m | {UP: "/etc/b.safetensors"}),
        (f"{INDEX}: '/etc/b.safetensors' is no safetensors file beside the index; refused",),
    ),
    "index names a parent": (
        hostile.shards(lambda m: m | {UP: "x/../../b.safetensors"}),
        (f"{INDEX}: 'x/../../b.safetensors' is no safetensors file beside the index; refused",),
    ),
    "index names NUL": (
        hostile.shards(lambda m: m | {UP: "b\0.safetensors"}),
        (INDEX, r"'b\x00.safetensors' is no safetensors file beside the index; refused"),
    ),
    "tensor in two shards": (
        hostile.shards(lambda m: m, twice=True),
        (f"{INDEX}: tensor '{DOWN}' is in two shards, a.safetensors and b.safetensors",),
    ),
    "tensor in another shard": (
        hostile.shards(lambda m: m | {UP: "a.safetensors"}),
        (f"{INDEX}: tensor '{UP}' is not in a.safetensors (no shard has it)",),
    ),
    "two tensors in each other's shards": (
        hostile.shards(lambda m: m | {UP: "a.safetensors", DOWN: "b.safetensors"}),
        (f"{INDEX}: tensor", "is not in", "download the model again"),
    ),
    "tensor that the index forgot": (
        hostile.shards(lambda m: {k: v for k, v in (m | {"x": m[UP]}).items() if k != UP}),
        (f"{INDEX}: tensor 'x' is not in b.safetensors (no shard has it)",),
    ),
    "index names a tensor twice": (
        lambda f: (
            hostile.shards(lambda m: m)(f),
            hostile.insert(INDEX, '"weight_map": {', f'"{UP}": "a.safetensors", ')(f),
        ),
        (f"{INDEX}: not readable as JSON: the key '{UP}' stands twice, with different values",),
    ),
    "index of 40 MB": (
        lambda f: (hostile.shards(lambda m: m)(f), os.truncate(f / INDEX, 40 * MIB)),
        (f"{INDEX}: 41943040 bytes are more than any model's",),
    ),
    # Links and what is no file.
    "weights are a link out": (
        hostile.linked(TENSORS, "../elsewhere/x"),
        (f"m/{TENSORS}: is a link out of the model's folder, to ", "elsewhere/x; refused"),
    ),
    "tokenizer is a link out": (
        hostile.linked("tokenizer.json", "../secret"),
        ("m/tokenizer.json: is a link out of the model's folder",),
    ),
    "link to nowhere": (
        lambda f: (f / "vocab.json").symlink_to("/no/such/file"),
        ("m/vocab.json: is a link out of the model's folder, to /no/such/file; refused",),
    ),
    "snapshot that links into another repository": (
        hostile.snapshot("models--org--other"),
        (f"m/{TENSORS}: is a link out of the model's folder", "models--org--other/blobs/5678"),
    ),
    "config is a pipe": (hostile.pipe("config.json"), ("m/config.json: is a pipe, socket or dev",)),
    "config is a folder": (
        hostile.directory("config.json"),
        ("m/config.json: is a folder, expected a file",),
    ),
    "weights are a pipe": (hostile.pipe(TENSORS), (f"m/{TENSORS}: is a pipe, socket or device",)),
    "tokenizer is a pipe": (hostile.pipe("tokenizer.json"), ("m/tokenizer.json: is a pipe",)),
    "weights are a folder": (hostile.directory(TENSORS), (f"m: no {TENSORS}",)),
    # config.json.
    "config says it twice": (
        hostile.insert("config.json", "{", '"hidden_size": 64, '),
        ("m/config.json: not readable as JSON: the key 'hidden_size' stands twice",),
    ),
    "config of open lists": (
        lambda f: (f / "config.json").write_text("[" * 10**6),
        ("m/config.json: not readable as JSON",),
    ),
    "config of 40 MB": (
        hostile.sparse("config.json", 40 * MIB),
        ("m/config.json: 41943040 bytes are more than any model's",),
    ),
    "10^9 layers": (
        fields(num_hidden_layers=10**9),
        ("m/config.json: num_hidden_layers 1000000000 is beyond any model's (the limit is 10000)",),
    ),
    "10^9 layers of two kinds": (
        fields(model_type="qwen2", num_hidden_layers=10**9, use_sliding_window=True),
        ("num_hidden_layers 1000000000 is beyond",),
    ),
    "endless layers": (fields(num_hidden_layers=1e400), ("num_hidden_layers inf is beyond",)),
    "10^12 wide": (fields(hidden_size=10**12), ("hidden_size 1000000000000 is beyond",)),
    "heads of 10^9": (fields(head_dim=10**9), ("head_dim 1000000000 is beyond",)),
    "10^9 labels": (fields(num_labels=10**9), ("num_labels 1000000000 is beyond",)),
    "10^10 words": (fields(vocab_size=10**10), ("vocab_size 10000000000 is beyond",)),
    "more words than the embedding": (
        fields(vocab_size=300),
        ("tensor 'model.embed_tokens.weight' has shape (258, 32), but the config says (300, 32)",),
    ),
    # GGUF files.
    "gguf cut short": (
        hostile.gguf(count=3),
        ("m.gguf: not a whole GGUF file (it ends at byte 24, inside its header)", AGAIN),
    ),
    "gguf of 2^62 entries": (
        hostile.gguf(count=2**62),
        ("m.gguf: not a whole GGUF file", f"it is said to hold {2**62} items", AGAIN),
    ),
    "gguf of 2^62 tensors": (hostile.gguf(tensors=2**62), (f"it is said to hold {2**62} items",)),
    "gguf array of 2^40": (
        hostile.gguf(gguf_array(b"a.b", 0, 2**40, b"")),
        ("m.gguf: not a whole GGUF file", "entry 'a.b' is said to hold 1099511627776 items"),
    ),
    "gguf array behind the end": (
        hostile.gguf(gguf_array(b"a.b", 12, 10**6, b"")),
        ("m.gguf: not a whole GGUF file (entry 'a.b' ends at byte 8000051, the file at 51)",),
    ),
    "gguf text behind the end": (
        hostile.gguf(gguf_array(b"a.b", 8, 1, b"\xff" * 8)),
        ("m.gguf: not a whole GGUF file (entry 'a.b' ends at byte",),
    ),
    "gguf tensor behind the end": (
        hostile.gguf(tensors=1, end=gguf_tensor(b"a.weight", (64, 64), 0, 2**40)),
        ("m.gguf: not a whole GGUF file (tensor 'a.weight' ends at byte 10995116",),
    ),
    "gguf tensor of 2^40 by 2^40": (
        hostile.gguf(tensors=1, end=gguf_tensor(b"a.weight", (2**40, 2**40), 0, 0)),
        ("m.gguf: not a whole GGUF file (tensor 'a.weight' ends at byte 48357",),
    ),
    "gguf tensors overlap": (
        hostile.gguf(
            tensors=2,
            end=gguf_tensor(b"a.weight", (8,), 0, 0)
            + gguf_tensor(b"b.weight", (8,), 0, 0)
            + bytes(256),
        ),
        ("m.gguf: not a whole GGUF file (tensors 'a.weight' and 'b.weight' overlap)",),
    ),
    "gguf is a pipe": (lambda f: os.mkfifo(f.with_suffix(".gguf")), ("m.gguf: is a pipe",)),
}

# What looks like one of those, and is none: these train.
SOUND: dict[str, Damage] = {
    "as it was": lambda f: None,
    "two shards": hostile.shards(lambda m: m),
    "a link inside the folder": hostile.linked(TENSORS, "data/x"),
    "a hub snapshot": hostile.snapshot("models--org--name"),
    "a key twice, with one value": hostile.insert("config.json", "{", '"hidden_size": 32, '),
}

RUN = """
import io, json, resource, signal, sys
from contextlib import redirect_stderr
from mud_puppy.cli import main
resource.setrlimit(resource.RLIMIT_DATA, (12 * 2**30,) * 2)
def stop(*_): raise TimeoutError("hangs")
signal.signal(signal.SIGALRM, stop)
for line in sys.stdin:
    argv, error = json.loads(line), io.StringIO()
    signal.alarm(120)
    with redirect_stderr(error):
        code = main(argv)
    signal.alarm(0)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([code, error.getvalue(), peak]), flush=True)
"""


@pytest.fixture(scope="module")
def told(chat_model: Path, chats: Path, tmp_path_factory) -> dict[str, tuple[int, str, int, bool]]:
    """Of each case: (exit code, what stderr said, peak of memory until then, files as before)."""
    root = tmp_path_factory.mktemp("hostile")
    damages = {name: damage for name, (damage, _) in CASES.items()} | SOUND
    homes, lines = {}, []
    for i, (name, damage) in enumerate(damages.items()):
        homes[name] = home = root / str(i)
        shutil.copytree(chat_model, home / "m")
        damage(home / "m")
        gguf = home / "m.gguf"
        model = gguf if gguf.exists() else home / "m"
        keys = SMALL | {"max_steps": 1, "save_steps": "null"}
        keys |= {"model": model, "dataset": chats, "output": home / "out"}
        pairs = [(f"--{k.replace('_', '-')}", str(v)) for k, v in keys.items()]
        lines.append(json.dumps([word for pair in pairs for word in pair]) + "\n")
    before = {name: written(home) for name, home in homes.items()}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input="".join(lines),
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:1"},
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    same = [before[name] == written(home) for name, home in homes.items()]
    return {n: (*a, s) for n, a, s in zip(damages, answers, same, strict=True)}


def written(home: Path) -> dict[str, int]:
    """Size of every file; a pipe or link would not give its content."""
    return {str(p.relative_to(home)): p.lstat().st_size for p in home.rglob("*") if not p.is_dir()}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, told) -> None:
    code, error, peak, same = told[case]
    lines = error.splitlines()
    assert code == 2 and lines[-1].startswith(ERROR) and "Traceback" not in error, error
    assert all(part in lines[-1] for part in CASES[case][1]), lines[-1]
    assert same, "something was written or lost"
    assert peak < 2e9


@pytest.mark.parametrize("case", SOUND)
def test_the_same_without_the_fault_trains(case: str, told) -> None:
    code, error, _, same = told[case]
    assert code == 0 and not same, error
