"""A small server that answers as the hub does, and fails as networks do.

Every repository of `org` holds the files of one folder; what is special about it is in its name.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMITS = {"main": "1" * 40, "v1": "2" * 40, "refs/pr/3": "3" * 40}
TOKEN = "hf_of_the_tests"
WEIGHTS = "model.safetensors"


@dataclass
class Hub:
    """Served: `folder` at every revision, but `old` at v1, and `large` where connections break (the
    client keeps what it has in pieces of 10 MB). `asked` notes (method, path, headers).

    org/private    401 without the token         org/drops  its weights break off halfway, once
    org/secret     gated                         org/dead   ... and again, as long as it is `sick`
    org/tiny-1.5B  answers at once               org/busy   503 to every file's first request
    any other      404                           org/down   503 to everything
    """

    folder: Path
    old: Path
    large: Path
    url: str = ""
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    sick: bool = True

    def paths(self, word: str = "") -> list[str]:
        return [path for _, path, _ in self.asked if word in path]

    def ranges(self, repo: str) -> list[str | None]:
        """The Range header of each request for the weights of a repository."""
        start = f"/{repo}/resolve/"
        return [
            headers.get("range")
            for method, path, headers in self.asked
            if method == "GET" and path.startswith(start) and path.endswith(WEIGHTS)
        ]


@contextmanager
def serve(folder: Path, old: Path, large: Path) -> Iterator[Hub]:
    hub = Hub(folder, old, large)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        first = self.path not in self.hub.paths()
        self.hub.asked.append((self.command, self.path, headers))
        api = re.fullmatch(r"/api/models/(org/[\w.-]+)(/(revision|tree)/([^?]+))?.*", self.path)
        file = re.fullmatch(r"/(org/[\w.-]+)/resolve/(\w+)/(.+)", self.path)
        repo = api[1] if api else file[1] if file else ""
        if repo == "org/down" or (repo == "org/busy" and file and first):
            return self._send(503, b"", body)
        if repo == "org/private" and headers.get("authorization") != f"Bearer {TOKEN}":
            return self._send(401, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        if repo == "org/secret":
            return self._send(401, b"{}", body, {"X-Error-Code": "GatedRepo"})
        if repo.removeprefix("org/") not in ("tiny-1.5B", "private", "drops", "dead", "busy"):
            return self._send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        asked = (api[4] or "main").replace("%2F", "/") if api else file[2] if file else ""
        commit = COMMITS.get(asked, asked)
        if commit not in COMMITS.values():
            return self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        folder = self.hub.old if commit == COMMITS["v1"] else self.hub.folder
        folder = self.hub.large if repo in ("org/drops", "org/dead") else folder
        if api:
            return self._list(folder, repo, commit, body, tree="/tree/" in self.path)
        path = folder / (file[3] if file else "")
        if not path.is_file():
            return self._send(404, b"{}", body, {"X-Error-Code": "EntryNotFound"})
        self._file(repo, path, commit, headers.get("range"), body)

    def _list(self, folder: Path, repo: str, commit: str, body: bool, tree: bool) -> None:
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*"))
        rows = [
            {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": str(i)}
            for i, f in enumerate(files)
        ]
        info = {"id": repo, "sha": commit, "siblings": [{"rfilename": f} for f in files]}
        self._send(200, json.dumps(rows if tree else info).encode(), body)

    def _file(self, repo: str, path: Path, commit: str, asked: str | None, body: bool) -> None:
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        breaks = body and path.name == WEIGHTS
        breaks &= (repo == "org/drops" and not asked) or (repo == "org/dead" and self.hub.sick)
        rest = data[start:]
        half = 0 if asked else len(rest) // 2  # of the rest, nothing more comes
        self._send(206 if asked else 200, rest, body, headers, half if breaks else None)

    def _send(
        self, status: int, data: bytes, body: bool, headers: Any = None, stop: int | None = None
    ) -> None:
        """stop: after so many bytes the connection breaks."""
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:stop])
        if stop is not None:
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass
