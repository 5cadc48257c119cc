"""Names to folders, against a hub of our own on loopback that the real client talks to."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from core.engine.base import BadCheckpoint
from core.engine.hub import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
JUNK = {"tf_model.h5": b"tf", "README.md": b"readme", "onnx/model.onnx": b"onnx", "flax_model.msgpack": b"flax"}


class Hub(http.server.BaseHTTPRequestHandler):
    """Just enough of the hub: one repository's list of files, and the files."""

    files: ClassVar[dict[str, bytes]] = {}
    fetched: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0].strip("/")
        if path in (f"api/models/some/model/revision/{r}" for r in ("main", "v2", COMMIT)):
            siblings = [{"rfilename": name} for name in self.files]
            return self._send(json.dumps({"id": "some/model", "sha": COMMIT, "siblings": siblings}).encode(), with_body)
        if path == f"api/models/some/model/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            return self._send(json.dumps(tree).encode(), with_body)
        if path.startswith("api/models/some/model/revision/"):
            return self._fail(404, "RevisionNotFound")
        name = path.removeprefix(f"some/model/resolve/{COMMIT}/")
        if name in self.files:
            if with_body:
                self.fetched.append(name)
            return self._send(self.files[name], with_body)
        return self._fail(404, "EntryNotFound" if path.startswith("some/model") else "RepoNotFound")

    def _send(self, body: bytes, with_body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """`hub("some/model", revision, HF_HUB_OFFLINE="1")`: what `resolve` prints in a process of its own."""
    Hub.files, Hub.fetched = {}, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def ask(name: str, revision: str | None = None, **environment: str) -> str:
        code = (
            "import sys; from core.engine.base import BadCheckpoint; from core.engine.hub import resolve\n"
            "try: print(resolve(sys.argv[1], sys.argv[2] or None))\n"
            "except BadCheckpoint as error: print('bad:', error)\n"
            "assert 'torch' not in sys.modules"
        )
        settings = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        ran = subprocess.run(
            [sys.executable, "-c", code, name, revision or ""],
            env=os.environ | settings | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return ran.stdout.strip()

    yield ask
    server.shutdown()
    thread.join()
    server.server_close()


def test_only_what_is_needed_is_fetched_once(hub: Callable[..., str]) -> None:
    small = {name: f'{{"of": "{name}"}}'.encode() for name in ("config.json", "vocab.json", "merges.txt")}
    Hub.files = small | JUNK | {"model.safetensors": b"s" * 99, "pytorch_model.bin": b"b" * 99}
    folder = Path(hub("some/model"))
    assert sorted(Hub.fetched) == sorted([*small, "model.safetensors"])
    assert (folder / "config.json").read_bytes() == small["config.json"]
    assert Path(hub("some/model", HF_HUB_OFFLINE="1")) == folder
    assert len(Hub.fetched) == 4


def test_a_repository_with_bin_files_only(hub: Callable[..., str]) -> None:
    Hub.files = JUNK | {"config.json": b"{}", "pytorch_model.bin": b"b" * 99}
    folder = Path(hub("some/model", "v2"))
    assert sorted(Hub.fetched) == ["config.json", "pytorch_model.bin"]
    assert Path(hub("some/model", "v2", HF_HUB_OFFLINE="1")) == folder


def test_what_is_not_there_is_one_line(hub: Callable[..., str]) -> None:
    assert hub("some/model", "v9") == "bad: some/model has no revision v9: check MODEL_REVISION"
    assert hub("no/model") == "bad: no/model is no folder here and no public repository on the hub: check MODEL"
    assert "fetch it once while online" in hub("some/model", HF_HUB_OFFLINE="1")
    assert "is out of reach" in hub("some/model", HF_ENDPOINT="http://127.0.0.1:9")
    Hub.files = {"README.md": b"no model"}
    assert "has no config.json" in hub("some/model")


def test_local_names(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path
    for name, words in (
        ("~nobody-of-this-name/model", "does not exist: name a folder"),
        (str(tmp_path / "nothing"), "does not exist"),
        (str(tmp_path / "config.json"), "is a file"),
        ("a/b/c", "does not exist"),
        ("~/nothing-here-at-all", "does not exist"),
    ):
        with pytest.raises(BadCheckpoint, match=words):
            resolve(name)
