"""What starts Palaver in earnest, read by the tools that know the formats."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy/systemd/palaver.service"
BIN = Path(sys.executable).parent


def tool(name: str) -> str:
    """The tool's path; a tool that is missing is a failed test."""
    found = shutil.which(name, path=f"{BIN}:/usr/bin:/bin:/usr/local/bin")
    assert found, f"{name} is missing: install the test extra, and systemd from the distribution"
    return found


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr if done.returncode or done.stderr else ""


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that exists here."""
    file = tmp_path / UNIT.name
    file.write_text(UNIT.read_text().replace("/opt/palaver/.venv/bin/palaver", str(BIN / "palaver")))
    return file


def test_systemd_reads_the_unit_without_a_word(unit: Path) -> None:
    assert run(tool("systemd-analyze"), "verify", "--man=no", unit) == ""


def test_a_mistake_in_the_unit_would_be_seen(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("ProtectHome=", "ProtectHouse="))
    assert "ProtectHouse" in run(tool("systemd-analyze"), "verify", "--man=no", unit)


def test_the_unit_exposes_little(unit: Path) -> None:
    tool("systemd-analyze")
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-400:]


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    assert run(tool("hadolint"), ROOT / "deploy/docker/Dockerfile") == ""


def test_the_compose_file_fits_the_specification() -> None:
    check = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, str(ROOT / "deploy/docker/compose.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_python_without_venv_leaves_nothing_that_passes_for_one(tmp_path: Path) -> None:
    """Debian's makes the folder with its python, and fails then."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\nmkdir -p "$3/bin"; touch "$3/bin/python"; exit 1\n')
    python.chmod(0o755)
    for _ in range(2):
        done = subprocess.run(
            ["make", ".venv/bin/python", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode and "apt install python3-venv" in done.stdout and not (tmp_path / ".venv").exists()


def test_git_takes_no_secrets() -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    files = re.findall(r"file: \./(\w+/)\w+", (ROOT / "deploy/docker/compose.yaml").read_text())
    assert files and {".env", *(f"deploy/docker/{folder}" for folder in files)} <= {*ignored}


def test_the_image_is_healthy_also_where_a_proxy_is_set() -> None:
    """Its health check, asking a page of ours on a port of ours."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/livez" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    text = (ROOT / "deploy/docker/Dockerfile").read_text().replace("\\\n", "")
    [check] = [line.split(" CMD ", 1)[1] for line in text.splitlines() if line.startswith("HEALTHCHECK")]
    server = http.server.HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever).start()
    try:
        for port, healthy in ((server.server_port, True), (1, False)):
            environment = {"PATH": str(BIN), "WEB_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
            done = subprocess.run(json.loads(check), env=environment, capture_output=True, timeout=60)
            assert (done.returncode == 0) is healthy, done.stderr
    finally:
        server.shutdown()
        server.server_close()


def test_what_env_says_cuts_no_page_off() -> None:
    """env_file comes before environment."""
    lines = (ROOT / "deploy/docker/compose.yaml").read_text().splitlines()
    assert {"      WEB_HOST: 0.0.0.0", "      WEB_PORT: 8080", '      - "127.0.0.1:8080:8080"'} <= {*lines}


def test_what_the_image_copies_exists() -> None:
    lines = (ROOT / "deploy/docker/Dockerfile").read_text().splitlines()
    copied = [
        word for line in lines if line.startswith("COPY ") and "--from" not in line for word in line.split()[1:-1]
    ]
    assert copied and all((ROOT / name).exists() for name in copied)
