"""A hub on loopback that the real client talks to."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Just enough of the hub: one repository's list of files, and the files."""

    files: ClassVar[dict[str, bytes]] = {}
    fetched: ClassVar[list[str]] = []
    drip: ClassVar[float] = 0.0
    """Seconds between two pieces of a file."""
    trouble: ClassVar[str] = ""
    """What it does instead: answer with this status, fall "silent", or "break" off in a file."""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0].strip("/")
        if self.trouble.isdigit():
            return self._fail(int(self.trouble), "")
        if self.trouble == "silent":
            self.rfile.read(1)  # until who asked has gone
            return None
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
            return self._send(self.files[name], with_body, self.trouble == "break")
        return self._fail(404, "EntryNotFound" if path.startswith("some/model") else "RepoNotFound")

    def _send(self, body: bytes, with_body: bool, breaks: bool = False) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if breaks and with_body:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        step = 1000 if self.drip else len(body) or 1
        with contextlib.suppress(OSError):  # who asked has gone
            for at in range(0, len(body) if with_body else 0, step):
                self.wfile.write(body[at : at + step])
                time.sleep(self.drip)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def hub(files: dict[str, bytes], drip: float = 0.0) -> Iterator[str]:
    """Its address. What it was asked for stands in Hub.fetched."""
    Hub.files, Hub.fetched, Hub.drip, Hub.trouble = files, [], drip, ""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
