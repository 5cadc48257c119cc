"""What is being generated: a Request of n Sequences, each a row of ids that grows. Pure Python, no torch."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from core.engine.base import Completion, EngineError, FinishReason, SamplingParams
from core.engine.kv_cache import Slot


class Sequence:
    """One completion under way. `tokens` is the prompt and what was drawn; the first `computed` are in the KV cache.

    With `max_new` 0 nothing is drawn: the prompt is computed ahead of its time, piece by piece.
    """

    def __init__(self, request: Request, seed: int, max_new: int) -> None:
        self.request = request
        self.tokens = list(request.prompt)
        self.prompt_len = len(request.prompt)
        self.max_new = max_new
        self.slot: Slot | None = None
        self.cached_tokens = 0
        self.logprob = 0.0
        self.retried = False
        self.finish_reason: FinishReason | None = None
        self.seed = seed

    @property
    def computed(self) -> int:
        return len(self.slot.tokens) if self.slot else 0

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    def append(self, token: int, logprob: float, eos_id: int) -> None:
        """Take the next token; sets `finish_reason` when it was the last."""
        self.logprob += logprob
        if token == eos_id:
            self.finish_reason = "stop"
            return
        self.tokens.append(token)
        if len(self.tokens) - self.prompt_len >= self.max_new:
            self.finish_reason = "length"

    def completion(self) -> Completion:
        assert self.finish_reason
        return Completion(self.new_tokens, self.logprob, self.finish_reason, self.cached_tokens)


@dataclass(eq=False)
class Request:
    """`deliver` is called once, in the engine's thread, with the completions or with why there are none; of a
    preparation only with the latter."""

    prompt: Ids[int]
    params: SamplingParams
    session: str
    deadline: float | None
    """On time.monotonic's clock."""
    deliver: Callable[[list[Completion] | EngineError], None]
    sequences: list[Sequence] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Span:
    """A sequence's part of one step: tokens start .. start + count - 1 run through the model, then those of `guess`."""

    sequence: Sequence
    start: int
    count: int
    guess: tuple[int, ...] = ()
    """What may come next. Row by row a token is drawn while the guess before it was right."""

    @property
    def is_last(self) -> bool:
        """Its last row's logits draw the next token. Asked before that is booked: then the sequence is longer."""
        return self.start + self.count == len(self.sequence.tokens) and self.sequence.max_new > 0

    @property
    def ids(self) -> list[int]:
        return [*self.sequence.tokens[self.start : self.start + self.count], *self.guess]
