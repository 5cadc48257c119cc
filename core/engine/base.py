"""The engine's contract: token ids in, token ids out. Torch-free; knows nothing of text, turns or platforms.

EngineError
 ├─ QueueFull       too many requests wait; try later
 ├─ PromptTooLong   prompt and reply do not fit the model's positions
 ├─ EngineClosed    closed, or died and could not be brought back
 ├─ Cancelled       the request was given up (deadline, client gone)
 ├─ OtherModel      the engine has another model than the one whose tokenizer is asked with
 ├─ BadCheckpoint   the model cannot be loaded; the text says which file and what to do
 ├─ HubAway         the hub that has the model cannot be reached or is overloaded; try later
 └─ Failed          this request raised; others did not suffer
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from operator import index
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length"]
"""The model said eos; or max_tokens were drawn, or no position is left."""


class EngineError(Exception):
    """Anything an engine refuses; str() is one line fit for an operator."""


class QueueFull(EngineError): ...


class PromptTooLong(EngineError): ...


class EngineClosed(EngineError): ...


class Cancelled(EngineError): ...


class OtherModel(EngineError): ...


class BadCheckpoint(EngineError): ...


class HubAway(EngineError): ...


class Failed(EngineError): ...


_KINDS: dict[str, tuple[Any, str]] = {
    "float": (int | float, "a number"),
    "int": (int, "a whole number"),
    "int | None": (int | None, "a whole number"),
}


def _knob(default: Any, about: str) -> Any:
    """A field that is an environment setting too, with its line for people."""
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Field names are those of vLLM's `SamplingParams`, `no_repeat_ngram` excepted.

    temperature 0 is greedy. top_k 0 and top_p 1 switch those filters off. `repetition_penalty` is CTRL's
    (arXiv 1909.05858, section 4.1), over prompt and reply. `no_repeat_ngram` forbids n-grams that stand in prompt or
    reply already; 0 is off. `seed` None draws one. `n` completions are drawn, the k-th from seed + k.
    """

    temperature: float = _knob(0.4, "how freely tokens are drawn; 0 always takes the likeliest")
    top_k: int = _knob(40, "draw among so many likeliest tokens, 0 is all")
    top_p: float = _knob(0.9, "draw among the likeliest that make up this probability, 1 is all")
    repetition_penalty: float = _knob(1.0, "above 1: what was said already is less likely")
    no_repeat_ngram: int = _knob(0, "no run of so many tokens twice, 0 allows it")
    max_tokens: int = _knob(64, "tokens a reply may have")
    seed: int | None = _knob(None, "the same seed and history give the same reply; drawn anew when empty")
    n: int = _knob(1, "candidates drawn per reply, of which the best is sent")

    def __post_init__(self) -> None:
        """ValueError that names the field and the bound."""
        for knob in fields(self):
            value = getattr(self, knob.name)
            kinds, what = _KINDS[str(knob.type)]
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ValueError(f"{knob.name} must be {what}")
        for name, good, bound in (
            ("temperature", 0 <= self.temperature <= 10, "between 0 and 10"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1 (off)"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 10, "between 0.01 and 10"),
            ("no_repeat_ngram", self.no_repeat_ngram >= 0, "0 (off) or more"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("n", 1 <= self.n <= 64, "between 1 and 64"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "from 0 below 2**63"),
        ):
            if not good:
                raise ValueError(f"{name} must be {bound}")


@dataclass(frozen=True, slots=True)
class Completion:
    """One reply: `token_ids` without the closing eos; `logprob` sums natural logs under the unfiltered model, of the
    closing eos too."""

    token_ids: list[int]
    logprob: float
    finish_reason: FinishReason
    cached_tokens: int
    """How many of the prompt's tokens were already in the KV cache."""
    score: float | None = None
    """How well it answers, beside the other candidates: see core.engine.judge. None where there is nothing to choose
    among, or nobody to judge."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a client must know of the model it talks to."""

    name: str
    max_positions: int
    """Tokens that prompt and reply have at most, together."""
    vocab_size: int
    eos_id: int
    path: str
    """The local folder with config.json and the tokenizer's files."""
    how: str
    """One line for people: device, precision, which path runs."""
    at_once: int = 32
    """Sequences under way at a time, each candidate of a reply one; more would wait."""

    def prompt(self, ids: Iterable[int]) -> tuple[int, ...]:
        """`ids`, looked through once: of an iterator nothing is left. ValueError where they are no prompt: none, or one
        outside the vocabulary."""
        try:
            whole = tuple(map(index, ids))
        except TypeError:
            whole = ()
        if not whole or min(whole) < 0 or max(whole) >= self.vocab_size:
            raise ValueError(f"a prompt is 1 or more ids from 0 below {self.vocab_size}")
        return whole

    def last_turn(self, prompt: Sequence[int]) -> list[int]:
        """Its ids, without ends of text; [] where there is none."""
        turn: list[int] = []
        for id in reversed(prompt):
            if id != self.eos_id:
                turn.append(id)
            elif turn:
                break
        return turn[::-1]


class Engine(Protocol):
    """`session` may change the cost, never the result. Cancelling the awaiting task gives the request up."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def ended(self) -> str:
        """The line that says why only a new process helps: it died in this one, or has another model than at the start.
        "" as long as it answers, or will again."""
        ...

    async def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        session: str = "",
        deadline: float | None = None,
    ) -> list[Completion]:
        """`params.n` completions of `prompt` (1 to max_positions - 1 ids). `deadline` in seconds from now, below 1e9;
        `session` has at most 512 characters.

        Raises an EngineError; ValueError for an empty prompt or an id outside the vocabulary.
        """
        ...

    def prepare(self, session: str, ids: Sequence[int]) -> None:
        """A hint, taken at once: the next prompt of `session` will probably begin with `ids`, 1 to max_positions - 1.

        Computed while nobody waits and there is free room, for a session of which something is cached. Never raises:
        what cannot be prepared is not.
        """
        ...

    async def ready(self) -> str:
        """ "" when requests are answered now; else why not, one line."""
        ...

    async def forget(self, session: str) -> None:
        """Drop what is cached for `session`, and phrases learnt of it: its room is free for others."""
        ...

    async def aclose(self) -> None: ...
