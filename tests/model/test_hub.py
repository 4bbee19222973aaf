"""Hub ids, against a small server that answers as the hub does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "1" * 40
SCRIPT = """
import sys
from mud_puppy.errors import UserError
from mud_puppy.model import abstract, load
for source in sys.argv[1:]:
    try:
        model, params = load(source, dtype=None)
        print("loaded", model.source, params["embed"].shape, abstract(source)[0] == model)
    except UserError as error:
        print("refused", error)
"""


class Hub(BaseHTTPRequestHandler):
    """Serves one repository, org/tiny-1.5B, from `folder`; notes what was asked for."""

    folder: Path
    asked: list[str]

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        self.asked.append(self.path)
        repo, _, file = self.path.partition("/resolve/")
        if self.path.startswith("/api/models/org/tiny-1.5B"):
            files = sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*.*"))
            tree = [{"type": "file", "path": f, "size": 1, "oid": "0"} for f in files]
            siblings = [{"rfilename": f} for f in files]
            info = {"id": "org/tiny-1.5B", "sha": COMMIT, "siblings": siblings}
            listing = tree if "/tree/" in self.path else info
            return self.send(200, json.dumps(listing).encode(), body)
        path = self.folder / file.partition("/")[2]
        if repo == "/org/tiny-1.5B" and path.is_file():
            return self.send(200, path.read_bytes(), body)
        status = 401 if "/org/secret" in self.path else 404
        code = "GatedRepo" if status == 401 else "RepoNotFound"
        return self.send(status, b"{}", body, {"X-Error-Code": code})

    def send(self, status: int, data: bytes, body: bool, headers: Any = None) -> None:
        self.send_response(status)
        etag = hashlib.sha1(data).hexdigest()
        standard = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(data))}
        for name, value in (standard | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(llama: Path, tmp_path: Path) -> Iterator[Any]:
    """(url, what was asked): the llama beside a pickle and a folder that must not be fetched."""
    folder = tmp_path / "repo"
    (folder / "original").mkdir(parents=True)
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name in ("pytorch_model.bin", "original/model.safetensors", "modeling.py"):
        (folder / name).write_bytes(b"no")
    handler = type("Handler", (Hub,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_hub_ids(hub: Any, tmp_path: Path) -> None:
    url, asked = hub
    env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    sources = ["org/tiny-1.5B", "org/absent", "org/secret"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *sources], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    loaded, absent, secret = done.stdout.splitlines()
    assert loaded == "loaded org/tiny-1.5B (64, 32) True"
    assert absent.startswith("refused org/absent: neither a folder here nor a model on the hub")
    assert secret.startswith("refused org/secret: its licence must be accepted")
    # No pickle, no code, nothing below the top folder.
    files = {path.partition("/resolve/")[2].partition("/")[2] for path in asked} - {""}
    assert files == {"model.safetensors", "config.json", "generation_config.json"}
