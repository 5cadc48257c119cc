"""From a model's name to a local folder with its files. Torch-free: who only needs the tokenizer uses it too.

A name is `embedded` (the model in this repository), a folder, or a repository on the Hugging Face hub.
`HF_HUB_OFFLINE=1` and the other variables of huggingface_hub are honoured.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from core.engine.base import BadCheckpoint, HubAway

log = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parent.parent / "models" / "tiny"
SMALL_FILES = ["*.json", "vocab.*", "merges.txt"]
WEIGHT_FILES = ["model*.safetensors", "pytorch_model*.bin"]
"""Tried in this order. Subfolders and other frameworks' weights are never fetched."""


def of_setting(error: Exception, setting: str = "MODEL") -> str:
    """What is wrong with a checkpoint, by the setting that names it, where the error names no other."""
    return str(error) if re.match(r"[A-Z_]+[=:]", str(error)) else f"{setting}: {error}"


@contextmanager
def named(setting: str) -> Iterator[None]:
    """A BadCheckpoint or HubAway raised inside is of this setting."""
    try:
        yield
    except (BadCheckpoint, HubAway) as error:
        raise type(error)(of_setting(error, setting)) from error


def resolve_reverse(model: str) -> Path | None:
    """As `resolve`, of REVERSE_MODEL; None where there is none."""
    with named("REVERSE_MODEL"):
        return resolve(model) if model else None


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The folder of `model`, fetched from the hub (with a progress bar) where it must be.

    Raises BadCheckpoint, one line that says what to do, or HubAway.
    """
    name = str(model)
    folder = EMBEDDED if name == "embedded" else Path(os.path.expanduser(name))  # Path's own raises at ~nobody
    try:
        if folder is EMBEDDED or folder.is_dir():
            if revision:
                log.warning("MODEL_REVISION=%s pins nothing: %s is on this machine, not on the hub", revision, name)
            return _checked(folder.absolute())  # whoever asks again, when it is gone, shall not take it for the hub's
        is_file = folder.is_file()
    except OSError as error:  # what is not there raises nothing
        reason = f"{name} cannot be opened ({error.strerror})"
        raise BadCheckpoint(f"{reason}: let the user that runs Palaver read it, or name another folder") from error
    if is_file:
        raise BadCheckpoint(f"{name} is a file: name the folder that holds config.json and the weights")
    if name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise BadCheckpoint(
            f"{name} does not exist: name a folder, a hub repository such as microsoft/DialoGPT-small, or embedded"
        )
    return _checked(_fetch(name, revision))


def _fetch(name: str, revision: str | None) -> Path:
    """Download what is missing into the hub's cache. Weights in safetensors if the repository has them."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else two lines for each of its tries
    from httpx2 import HTTPError
    from huggingface_hub import get_session, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if HF_HUB_CACHE.startswith("~"):
        raise BadCheckpoint(f"{name} has no place to be kept in: set HOME or HF_HOME")
    hooks = get_session().event_hooks["request"]
    if _in_time not in hooks:
        hooks.append(_in_time)
    try:
        for weights in WEIGHT_FILES:
            wanted = [*SMALL_FILES, weights]
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]))
            if any(folder.glob(weights)):
                break
    except RevisionNotFoundError as error:
        raise BadCheckpoint(f"{name} has no revision {revision}: check MODEL_REVISION") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BadCheckpoint(f"{name} is no folder here and no public repository on the hub: check its name") from error
    except (HTTPError, OSError, RuntimeError) as error:  # the last is hf_xet's, whatever its wire or server does
        cause = (error.__cause__ or error) if isinstance(error, LocalEntryNotFoundError) else error
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        if isinstance(cause, OfflineModeIsEnabled):
            raise BadCheckpoint(
                f"{name} is no folder here, not in the hub's cache, and HF_HUB_OFFLINE is set: fetch it once online"
            ) from error
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            if status >= 500 or status in (408, 429):
                raise HubAway(
                    f"{name} is not fetched yet, and the hub is overloaded (HTTP {status}): try later"
                ) from error
        elif isinstance(cause, HTTPError | RuntimeError):
            raise HubAway(f"{name} is not fetched yet, and the hub is out of reach ({reason}): try later") from error
        raise BadCheckpoint(
            f"{name} could not be fetched from the hub ({reason}): see to that and try again"
        ) from error
    return folder


def _in_time(request: Any) -> None:
    """What the client would ask without a limit of time: a hub that accepts and stays silent is away."""
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

    given = request.extensions["timeout"]
    request.extensions["timeout"] = {of: HF_HUB_ETAG_TIMEOUT if s is None else s for of, s in given.items()}


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise BadCheckpoint(f"{folder} has no config.json: it is not a model's folder")
    return folder
