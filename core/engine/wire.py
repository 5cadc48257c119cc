"""The engine's nouns as JSON, for both ends of the wire. Torch-free; never pickle.

A request is {"prompt": [ids], "params": {…}, "session": "", "deadline": seconds or null}, its answer {"completions":
[{…}]}; a hint of what to prepare is {"prompt": [ids], "session": ""}, what is to be forgotten {"session": ""}, the
answer to both {}; a refusal is {"error": the exception's name, "message": one line}. The header MODEL says whose ids
they are, as /info names it; an engine with another model refuses. What comes with the same REQUEST is one request,
computed once. What comes with the same SESSION is best sent to the same engine, where there are several.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from core.engine.base import (
    BadCheckpoint,
    Cancelled,
    Completion,
    EngineClosed,
    EngineError,
    Failed,
    HubAway,
    ModelInfo,
    OtherModel,
    PromptTooLong,
    QueueFull,
    SamplingParams,
)
from core.engine.config import mend

STATUS: dict[type[EngineError], int] = {
    QueueFull: 429,
    PromptTooLong: 422,
    EngineClosed: 503,
    Cancelled: 504,
    OtherModel: 409,
    BadCheckpoint: 500,
    HubAway: 503,
    Failed: 500,
}
"""Every refusal and its HTTP status. The name in the body decides; the status is for those who only see that."""
ERRORS = {error.__name__: error for error in STATUS}
BAD_REQUEST = "BadRequest"
TOKENIZER_FILES = (
    "config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
)
"""What a client elsewhere needs of the checkpoint's folder."""
MODEL, REQUEST, SESSION = "Palaver-Model", "Palaver-Request", "X-Session-Id"
_KNOBS = [field.name for field in fields(SamplingParams)]
_FARTHEST = 1e9
"""Seconds to a deadline, from now."""
_LONGEST_SESSION = 512


def dump_request(
    prompt: Sequence[int], params: SamplingParams, session: str, deadline: float | None
) -> dict[str, object]:
    return {"prompt": list(prompt), "params": asdict(params), "session": session, "deadline": deadline}


def dump_hint(session: str, ids: Sequence[int]) -> dict[str, object]:
    return {"prompt": list(ids), "session": session}


def load_request(body: bytes, vocab_size: int) -> tuple[list[int], SamplingParams, str, float | None]:
    """(prompt, params, session, deadline). ValueError, one line that names the field, for anything else."""
    asked = load_object(body, "prompt", "params", "session", "deadline")
    prompt, params = asked.get("prompt"), asked.get("params", {})
    if not isinstance(prompt, list) or not prompt:
        raise ValueError("prompt must be a list of at least one token id")
    if not all(type(i) is int and 0 <= i < vocab_size for i in prompt):
        raise ValueError(f"prompt must be token ids from 0 below {vocab_size}")
    deadline = asked.get("deadline")
    if deadline is not None and not (type(deadline) in (int, float) and abs(deadline) < _FARTHEST):
        raise ValueError(f"deadline must be seconds from now, less than {_FARTHEST:.0f}, or null")
    if not isinstance(params, dict):
        raise ValueError("params must be an object")
    if unknown := sorted(params.keys() - _KNOBS):
        raise ValueError(f"params has no field {unknown[0][:40]!a}; it has {', '.join(_KNOBS)}")
    return prompt, SamplingParams(**params), load_session(asked), deadline


def load_session(asked: dict[str, Any]) -> str:
    session = asked.get("session", "")
    if not isinstance(session, str) or len(session) > _LONGEST_SESSION:
        raise ValueError(f"session must be text of at most {_LONGEST_SESSION} characters")
    return session


def affinity(session: str) -> str:
    """What SESSION says: alike for all who ask for `session`, and not its name."""
    return hashlib.sha256(session.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def load_object(body: bytes, *known: str) -> dict[str, Any]:
    """A JSON object with no other keys than `known`. ValueError, one line."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise ValueError("the body must be a JSON object")
    if unknown := sorted(found.keys() - known):
        raise ValueError(f"there is no field {unknown[0][:40]!a}; there are {', '.join(known)}")
    return found


def dump_completions(completions: Sequence[Completion]) -> dict[str, object]:
    """What is None is left out."""
    found = [asdict(completion) for completion in completions]
    return {"completions": [{name: value for name, value in of.items() if value is not None} for of in found]}


def load_completions(answer: dict[str, Any]) -> list[Completion]:
    """What a newer engine says besides is left aside. LookupError or TypeError for what are no completions."""
    known = [field.name for field in fields(Completion)]
    return [Completion(**{name: of[name] for name in known if name in of}) for of in answer["completions"]]


def tokenizer_files(folder: Path) -> dict[str, str]:
    """Name -> text of those in TOKENIZER_FILES that are there. Raises BadCheckpoint."""
    files = dict[str, str]()
    for path in (folder / name for name in TOKENIZER_FILES):
        try:
            if path.is_file():
                files[path.name] = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadCheckpoint(f"{path} cannot be read ({error}): {mend(path)}") from error
    return files


def fingerprint(files: dict[str, str]) -> str:
    """Of the files in TOKENIZER_FILES: who has the same means the same by an id."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def load_info(answer: dict[str, Any]) -> ModelInfo:
    """What a newer engine says besides is left aside."""
    known = {field.name for field in fields(ModelInfo)}
    return ModelInfo(**{name: value for name, value in answer.items() if name in known})


def dump_error(error: EngineError) -> dict[str, str]:
    return {"error": type(error).__name__, "message": str(error)}


def is_refusal(answer: dict[str, Any]) -> bool:
    """An engine's own. Gateways on the way say in JSON, too, that they reach nobody."""
    return answer.keys() == {"error", "message"} and str(answer["error"]).isidentifier()


def load_error(answer: dict[str, Any]) -> EngineError | ValueError:
    """The exception that the other end raised: a ValueError for what it could not read, a Failed for a name unknown."""
    name, message = answer.get("error"), str(answer.get("message", "the engine gave no reason"))
    return ValueError(message) if name == BAD_REQUEST else ERRORS.get(str(name), Failed)(message)


def one_line(error: BaseException) -> str:
    """The kind of a surprise and what it says, for an operator."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
