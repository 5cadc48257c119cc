"""Names to folders, against a hub of our own on loopback that the real client talks to."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.engine.base import BadCheckpoint, HubAway
from core.engine.hub import named, resolve
from tests.checkpoints import make_checkpoint
from tests.fakes.hub import Hub
from tests.fakes.hub import hub as serving

JUNK = {"tf_model.h5": b"tf", "README.md": b"readme", "onnx/model.onnx": b"onnx", "flax_model.msgpack": b"flax"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """`hub("some/model", revision, HF_HUB_OFFLINE="1")`: what `resolve` prints in a process of its own."""
    with serving({}) as address:

        def ask(name: str, revision: str | None = None, **environment: str) -> str:
            code = (
                "import sys; from core.engine.base import BadCheckpoint, HubAway; from core.engine.hub import resolve\n"
                "try: print(resolve(sys.argv[1], sys.argv[2] or None))\n"
                "except BadCheckpoint as error: print('bad:', error)\n"
                "except HubAway as error: print('away:', error)\n"
                "assert 'torch' not in sys.modules"
            )
            settings = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
            ran = subprocess.run(
                [sys.executable, "-c", code, name, revision or ""],
                env=os.environ | settings | environment,
                capture_output=True,
                text=True,
                timeout=120,
                check=True,
            )
            assert "Traceback" not in ran.stderr and "Retrying" not in ran.stderr
            return ran.stdout.strip()

        yield ask


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
    assert hub("no/model") == "bad: no/model is no folder here and no public repository on the hub: check its name"
    assert "HF_HUB_OFFLINE is set: fetch it once online" in hub("some/model", HF_HUB_OFFLINE="1")
    Hub.files = {"README.md": b"no model"}
    assert "has no config.json" in hub("some/model")


@pytest.mark.parametrize("trouble", ["429", "503", "silent", "break"])
def test_a_hub_in_trouble_is_away_and_a_model_in_the_cache_serves(hub: Callable[..., str], trouble: str) -> None:
    Hub.files, Hub.trouble = {"config.json": b"{}", "model.safetensors": b"s" * 99}, trouble
    said = hub("some/model", HF_HUB_ETAG_TIMEOUT="1")
    why = f"overloaded (HTTP {trouble})" if trouble.isdigit() else "out of reach ("
    assert said.startswith(f"away: some/model is not fetched yet, and the hub is {why}") and said.endswith("try later")
    Hub.trouble = ""
    folder = hub("some/model")
    Hub.trouble = trouble
    assert hub("some/model", HF_HUB_ETAG_TIMEOUT="1") == folder


def test_a_hub_that_is_not_there_is_away(hub: Callable[..., str]) -> None:
    assert "is out of reach" in hub("some/model", HF_ENDPOINT="http://127.0.0.1:9")


def test_without_a_home_one_must_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    with pytest.raises(BadCheckpoint, match="some/model has no place to be kept in: set HOME or HF_HOME"):
        resolve("some/model")


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


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG])
def test_a_folder_that_cannot_be_looked_into_is_one_line(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """As a home is for a service of systemd's."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(
        BadCheckpoint, match=rf"^/home/me/model cannot be opened \({os.strerror(number)}\): let the user"
    ):
        resolve("/home/me/model")


def test_what_is_wrong_names_the_setting_once() -> None:
    for kind in (BadCheckpoint, HubAway):
        with pytest.raises(kind, match=r"^REVERSE_MODEL: x is away$"), named("REVERSE_MODEL"):
            raise kind("x is away")
        with pytest.raises(kind, match=r"^DTYPE=int3 is not known$"), named("REVERSE_MODEL"):
            raise kind("DTYPE=int3 is not known")


def test_a_folder_is_known_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone, it is a folder that does not exist, not a name of the hub's."""
    monkeypatch.chdir(make_checkpoint(tmp_path / "mine").parent)
    assert resolve("mine") == resolve("./mine") == tmp_path / "mine"
