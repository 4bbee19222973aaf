"""Hub ids, against a small server that answers as the hub does (hub_server.py)."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE

from mud_puppy.errors import UserError
from mud_puppy.export import save_hf
from mud_puppy.model import load, load_tokenizer
from mud_puppy.model.files import looks_local, split_revision
from tests.model.hub_server import COMMITS, TOKEN, WEIGHTS, Hub, serve
from tests.tiny import tiny_model

# time.sleep: the client waits seconds between its attempts.
SCRIPT = """
import json, sys, time
time.sleep = lambda seconds: None
from mud_puppy.errors import UserError
from mud_puppy.model import abstract, load, load_tokenizer
for source in sys.argv[1:]:
    try:
        model, params = load(source, dtype=None)
        same = abstract(source)[0] == model and len(load_tokenizer(source)) == 258
        print(json.dumps([model.source, float(params["final_norm"][0]), same]))
    except UserError as error:
        print(json.dumps(str(error)))
"""
REPO = "org/tiny-1.5B"


@pytest.fixture(scope="module")
def hub(chat_model: Path, tmp_path_factory: Any) -> Iterator[Hub]:
    """The chat model beside a pickle and a folder that must not be fetched; at v1 with another
    final norm."""
    root = tmp_path_factory.mktemp("hub")
    folder = shutil.copytree(chat_model, root / "repo")
    (folder / "original").mkdir()
    for name in ("pytorch_model.bin", f"original/{WEIGHTS}", "modeling.py"):
        (folder / name).write_bytes(b"no")
    model, params = load(chat_model, dtype=None)
    old = root / "old"
    save_hf(model, params | {"final_norm": 7 * params["final_norm"]}, old, dtype=None)
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 258}
    large = root / "large"
    save_hf(*tiny_model(**sizes), large, "float32", load_tokenizer(chat_model))
    with serve(folder, old, large) as hub:
        yield hub


Ask = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def ask(hub: Hub, tmp_path_factory: Any) -> Ask:
    """ask(*sources, **environment): what `load` made of each: [source, number, tokenizer is its
    own], or the error. All with one cache."""
    home = str(tmp_path_factory.mktemp("home"))

    def run(*sources: str, **environment: str) -> list[Any]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        args = [sys.executable, "-c", SCRIPT, *sources]
        done = subprocess.run(args, capture_output=True, text=True, env=env | environment)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.fixture(scope="module")
def first(ask: Ask) -> dict[str, Any]:
    """What is answered to somebody without a token and with an empty cache."""
    names = "tiny-1.5B absent secret private drops dead busy down".split()
    sources = [f"org/{name}" for name in names]
    sources += [f"{REPO}@{revision}" for revision in ("v1", "refs/pr/3", COMMITS["v1"], "v2")]
    return dict(zip(sources, ask(*sources), strict=True))


@pytest.fixture(scope="module")
def offline(first: dict[str, Any], hub: Hub, ask: Ask) -> dict[str, Any]:
    """... and then with HF_HUB_OFFLINE, which asks the hub for nothing."""
    before = len(hub.asked)
    at = [f"{REPO}@{revision}" for revision in ("v1", COMMITS["v1"], "v3")]
    sources = [REPO, *at, "org/dead", "org/never"]
    answers = ask(*sources, HF_HUB_OFFLINE="1")
    assert len(hub.asked) == before
    return dict(zip(sources, answers, strict=True))


@pytest.fixture(scope="module")
def later(offline: dict[str, Any], hub: Hub, ask: Ask) -> dict[str, Any]:
    """... and then with a token, when connections break no more."""
    assert not any("authorization" in headers for _, _, headers in hub.asked)
    hub.sick = False
    sources = ["org/private", "org/secret", "org/dead"]
    return dict(zip(sources, ask(*sources, HF_TOKEN=TOKEN), strict=True))


def test_ids(first: dict[str, Any], hub: Hub) -> None:
    assert first[REPO] == [REPO, 1.0, True]
    # No pickle, no code, nothing below the top folder.
    files = {path.partition("/resolve/")[2].partition("/")[2] for path in hub.paths(REPO)} - {""}
    texts = "config generation_config tokenizer tokenizer_config".split()
    assert files == {WEIGHTS, "chat_template.jinja", *(f"{name}.json" for name in texts)}


def test_what_the_hub_does_not_give(first: dict[str, Any]) -> None:
    nowhere = "neither a folder here nor a model on the hub (a private one needs HF_TOKEN)"
    assert first["org/absent"] == f"org/absent: {nowhere}"
    assert first["org/private"] == f"org/private: {nowhere}"
    licence = "its licence must be accepted on the hub first, and HF_TOKEN set"
    assert first["org/secret"] == f"org/secret: {licence}"


def test_revisions(first: dict[str, Any], hub: Hub) -> None:
    for revision, number in (("v1", 7.0), ("refs/pr/3", 1.0), (COMMITS["v1"], 7.0)):
        source = f"{REPO}@{revision}"
        assert first[source] == [source, number, True]
    unknown = f"{REPO}@v2: the model has no branch, tag or commit 'v2' on the hub"
    assert first[f"{REPO}@v2"] == unknown


def test_a_connection_that_breaks_is_taken_up_again(first: dict[str, Any], hub: Hub) -> None:
    assert first["org/drops"] == ["org/drops", 1.0, True]
    whole, rest = hub.ranges("org/drops")
    assert whole is None and rest == resumed(hub)


def resumed(hub: Hub) -> str:
    """The Range of a request for what is missing after half of the large weights came."""
    half = (hub.large / WEIGHTS).stat().st_size // 2
    assert half > DOWNLOAD_CHUNK_SIZE
    return f"bytes={half // DOWNLOAD_CHUNK_SIZE * DOWNLOAD_CHUNK_SIZE}-"


def test_servers_that_are_busy_or_down(first: dict[str, Any], hub: Hub) -> None:
    assert first["org/busy"] == ["org/busy", 1.0, True]
    assert len(hub.ranges("org/busy")) >= 1
    down = first["org/down"]
    assert down.startswith("org/down: neither a folder here nor in the cache, and the hub cannot")
    assert "503" in down and "\n" not in down


def test_half_a_download_is_no_model(
    first: dict[str, Any], offline: dict[str, Any], later: dict[str, Any], hub: Hub
) -> None:
    dead = first["org/dead"]
    assert dead.startswith("org/dead: the download failed: ") and "\n" not in dead
    assert set(hub.ranges("org/dead")) == {None, resumed(hub)}
    partly = "org/dead: only some of its files are in the cache, and HF_HUB_OFFLINE is set"
    assert offline["org/dead"].startswith(partly)
    assert hub.ranges("org/dead")[-1] is None  # all of it again
    assert later["org/dead"] == ["org/dead", 1.0, True]


def test_tokens_of_the_environment(later: dict[str, Any], hub: Hub) -> None:
    assert later["org/private"] == ["org/private", 1.0, True]
    sent = [headers.get("authorization") for _, path, headers in hub.asked if "private" in path]
    assert sent[0] is None and sent[-1] == f"Bearer {TOKEN}"
    assert later["org/secret"].endswith(
        "its licence must be accepted on the hub first, and HF_TOKEN set"
    )


def test_offline(first: dict[str, Any], offline: dict[str, Any]) -> None:
    for source in (REPO, f"{REPO}@v1", f"{REPO}@{COMMITS['v1']}"):
        assert offline[source] == first[source]
    for source in ("org/never", f"{REPO}@v3"):
        why = "neither a folder here nor in the cache, and HF_HUB_OFFLINE is set; unset it to"
        assert offline[source] == f"{source}: {why} download the model from the hub"


# --- names, which need no server -----------------------------------------------------------------

REMOTE = [
    "gpt2",
    "org/name",
    "org/name-1.5B@main",
    "org/name@refs/pr/3",
    "gpt2@607a30d",
    "a/b@v1.0",
]
LOCAL = [
    "./a@v1",
    "/a/b@main",
    "a/b/c@main",
    "a/b.gguf@main",
    "a/b@",
    "a/b@../c",
    "a/b@c//d",
    "@v1",
]


def test_which_names_are_of_the_hub() -> None:
    assert [looks_local(source) for source in REMOTE] == [False] * len(REMOTE)
    assert [looks_local(source) for source in LOCAL] == [True] * len(LOCAL)
    assert split_revision("org/name@refs/pr/3") == ("org/name", "refs/pr/3")
    assert split_revision("org/name") == ("org/name", None)


@pytest.mark.parametrize("source", LOCAL)
def test_what_looks_local_is_not_asked_for(source: str) -> None:
    for open_it in (load, load_tokenizer):
        with pytest.raises(UserError, match="no such model folder or file"):
            open_it(source)


def test_a_folder_with_an_at_sign_is_a_folder(
    chat_model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = shutil.copytree(chat_model, tmp_path / "org" / "name@v1")
    monkeypatch.chdir(tmp_path)
    model, params = load("org/name@v1", dtype=None)
    assert model.source == str(folder)
    assert jax.tree.leaves(params)[0].shape and len(load_tokenizer("org/name@v1")) == 258
