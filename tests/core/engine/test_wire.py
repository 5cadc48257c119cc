"""What travels arrives as it was; what is malformed is one clear line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.engine import wire
from core.engine.base import BadCheckpoint, Completion, EngineError, Failed, SamplingParams

GOOD: dict[str, Any] = {"prompt": [1, 2], "params": {}, "session": "", "deadline": None}


@given(
    prompt=st.lists(st.integers(0, 299), min_size=1),
    session=st.text(max_size=100),
    deadline=st.none() | st.floats(-10, 1e6),
    seed=st.none() | st.integers(0, 2**63 - 1),
    temperature=st.floats(0, 10),
)
def test_a_request_survives_the_way(
    prompt: list[int], session: str, deadline: float | None, seed: int | None, temperature: float
) -> None:
    params = SamplingParams(temperature=temperature, seed=seed)
    body = json.dumps(wire.dump_request(prompt, params, session, deadline)).encode()
    assert wire.load_request(body, 300) == (prompt, params, session, deadline)


@pytest.mark.parametrize(
    ("name", "value"),
    [("n", 2.0), ("n", True), ("temperature", "1"), ("temperature", None), ("seed", 0.5), ("top_k", "")],
)
def test_what_is_of_another_type_is_no_parameter(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a (whole )?number"):
        SamplingParams(**{name: value})


def test_a_hint_is_a_request_without_params() -> None:
    body = json.dumps(wire.dump_hint("s", [1, 2])).encode()
    assert wire.load_request(body, 300) == ([1, 2], SamplingParams(), "s", None)


@given(logprob=st.floats(allow_nan=False), ids=st.lists(st.integers(0, 2**31)))
def test_a_completion_survives_the_way(logprob: float, ids: list[int]) -> None:
    there = [Completion(ids, logprob, "length", 3)]
    assert wire.load_completions(json.loads(json.dumps(wire.dump_completions(there)))) == there
    judged = [replace(there[0], score=logprob)]
    assert wire.load_completions(json.loads(json.dumps(wire.dump_completions(judged)))) == judged


def test_what_another_version_says_of_a_completion_does_no_harm() -> None:
    said = wire.dump_completions([Completion([1], -1.0, "stop", 0)])
    assert said == {"completions": [{"token_ids": [1], "logprob": -1.0, "finish_reason": "stop", "cached_tokens": 0}]}
    newer = {"completions": [{**of, "mood": "good"} for of in cast("Any", said)["completions"]]}
    assert wire.load_completions(newer) == [Completion([1], -1.0, "stop", 0)]


@pytest.mark.parametrize(
    "said", [{}, {"completions": 5}, {"completions": [5]}, {"completions": "no"}, {"completions": [{}]}]
)
def test_what_are_no_completions_is_said_to_be_none(said: dict[str, Any]) -> None:
    with pytest.raises((LookupError, TypeError)):  # http_engine makes a Failed of these
        wire.load_completions(said)


@pytest.mark.parametrize("kind", list(wire.STATUS))
def test_every_refusal_keeps_its_kind_and_line(kind: type[EngineError]) -> None:
    error = wire.load_error(wire.dump_error(kind("no, because of that")))
    assert type(error) is kind
    assert str(error) == "no, because of that"


def test_every_kind_of_refusal_has_its_place() -> None:
    assert set(wire.STATUS) == set(EngineError.__subclasses__())
    assert type(wire.load_error({"error": "Unheard", "message": "of"})) is Failed
    assert type(wire.load_error({"error": ["odd"]})) is Failed


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (b"", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"1" * 10_000, "JSON"),
        (b"[]", "object"),
        (json.dumps(GOOD | {"extra": 1}).encode(), "extra"),
        (json.dumps(GOOD | {"prompt": []}).encode(), "prompt"),
        (json.dumps(GOOD | {"prompt": "hi"}).encode(), "prompt"),
        (json.dumps(GOOD | {"prompt": [300]}).encode(), "prompt"),
        (json.dumps(GOOD | {"prompt": [-1]}).encode(), "prompt"),
        (json.dumps(GOOD | {"prompt": [True]}).encode(), "prompt"),
        (json.dumps(GOOD | {"prompt": [1.0]}).encode(), "prompt"),
        (json.dumps(GOOD | {"prompt": [10**40]}).encode(), "prompt"),
        (json.dumps(GOOD | {"session": 5}).encode(), "session"),
        (json.dumps(GOOD | {"session": "x" * 513}).encode(), "session"),
        (json.dumps(GOOD | {"deadline": "soon"}).encode(), "deadline"),
        (json.dumps(GOOD | {"deadline": math.nan}).encode(), "deadline"),
        (json.dumps(GOOD | {"deadline": math.inf}).encode(), "deadline"),
        (json.dumps(GOOD | {"deadline": 10**400}).encode(), "deadline"),
        (json.dumps(GOOD | {"deadline": -(10**400)}).encode(), "deadline"),
        (json.dumps(GOOD | {"params": []}).encode(), "params"),
        (json.dumps(GOOD | {"params": {"beams": 4}}).encode(), "beams"),
        (json.dumps(GOOD | {"params": {"top_k": 1.5}}).encode(), "top_k"),
        (json.dumps(GOOD | {"params": {"temperature": "hot"}}).encode(), "temperature"),
        (json.dumps(GOOD | {"params": {"temperature": None}}).encode(), "temperature must be a number"),
        (json.dumps(GOOD | {"params": {"seed": 0.5}}).encode(), "seed must be a whole number"),
        (json.dumps(GOOD | {"params": {"temperature": math.nan}}).encode(), "temperature"),
        (json.dumps(GOOD | {"params": {"seed": -1}}).encode(), "seed"),
        (json.dumps(GOOD | {"params": {"n": 65}}).encode(), "n must"),
    ],
)
def test_what_is_malformed_is_one_line_that_names_it(body: bytes, names: str) -> None:
    with pytest.raises(ValueError, match=names) as caught:
        wire.load_request(body, 300)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_tokenizers_file_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "merges.txt").write_bytes(b"\xe9 \xe8")
    with pytest.raises(BadCheckpoint, match=r"merges\.txt cannot be read \('utf-8' codec.*: fetch the file again"):
        wire.tokenizer_files(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        with pytest.raises(BadCheckpoint, match=r"\.json cannot be read .*: let the user that runs Palaver read it"):
            wire.tokenizer_files(tmp_path)
    (tmp_path / "merges.txt").unlink()
    (tmp_path / "config.json").symlink_to(tmp_path / "config.json")
    assert wire.tokenizer_files(tmp_path) == {"tokenizer.json": "{}"}
