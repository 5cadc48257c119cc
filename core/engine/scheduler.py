"""Who runs in the next step. Pure Python, no torch.

Rows join and leave at every step. Each step takes every sequence that needs one token (decode), then pieces of prompts
(prefill) within the token budget. First come, first served: nobody overtakes because of room. When there is nothing
to do, the step takes a small piece of a prompt that is still to come (prepare), which holds nothing between steps.

    waiting ──admit──▶ running ──finish──▶ delivered
       ▲                  │
       └─── restart ──────┘  (its numbers went bad once: again from a clean prefill)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import takewhile
from time import monotonic

from core.engine.base import Cancelled, EngineError, Failed, PromptTooLong, QueueFull, SamplingParams
from core.engine.guesses import Guesses
from core.engine.kv_cache import KVCache
from core.engine.sequence import Request, Sequence, Span

PIECE = 16
"""Rows of a step that prepares: who comes meanwhile waits about as long as for one token beside others."""

GUESS = 4
"""Rows that a lone sequence's step may have beside the one it needs; they share its reading of the weights."""

Drawn = list[tuple[int, float]]
"""A span's next tokens, one and those guessed right, with their log-probabilities under the unfiltered model."""


class Scheduler:
    """Waiting and running sequences, and the KV cache they stand in."""

    def __init__(
        self,
        cache: KVCache,
        *,
        max_positions: int,
        eos_id: int,
        max_running: int,
        token_budget: int,
        max_waiting: int,
        draw_seed: Callable[[], int],
        guess: int,
        guesses: Guesses,
    ) -> None:
        """At most `max_running` sequences run, `token_budget` rows are in a step and `max_waiting` requests wait.
        `draw_seed` is for requests without one; of `guesses` at most `guess` tokens are taken at once."""
        self.cache = cache
        self.max_positions = max_positions
        self.eos_id = eos_id
        self.max_running = max_running
        self.token_budget = max(token_budget, max_running)
        self.max_waiting = max_waiting
        self.draw_seed = draw_seed
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.requests: set[Request] = set()
        self.guess = guess
        self.guesses = guesses
        self.preparing: dict[str, Sequence] = {}
        """By session, oldest first: what its next prompt will begin with."""

    def add(self, request: Request) -> None:
        """Take it in; what is wrong with it is delivered like any other end."""
        room = self.max_positions - len(request.prompt)
        waiting = {s.request for s in self.waiting}
        if room < 1:
            most = self.max_positions - 1
            request.deliver(PromptTooLong(f"{len(request.prompt)} tokens; the model takes at most {most}"))
        elif len(waiting) >= self.max_waiting:
            request.deliver(QueueFull(f"{len(waiting)} requests wait already"))
        else:
            params = request.params
            seed = self.draw_seed() if params.seed is None else params.seed
            most = min(params.max_tokens, room)
            request.sequences = [Sequence(request, seed + k, most) for k in range(params.n)]
            self.requests.add(request)
            self.waiting.extend(request.sequences)
            self.preparing.pop(request.session, None)

    def prepare(self, session: str, ids: list[int]) -> None:
        """Compute `ids` when there is nothing else to do, so that the session's next prompt finds them in the cache."""
        self.preparing.pop(session, None)
        if 0 < len(ids) < self.max_positions and len(self.preparing) < self.max_waiting:
            request = Request(ids, SamplingParams(), session, None, lambda _: self._stop_preparing(session))
            self.preparing[session] = Sequence(request, 0, max_new=0)

    def _stop_preparing(self, session: str) -> None:
        self.preparing.pop(session, None)

    def forget(self, session: str) -> None:
        """Nothing of the session stays, nor of what it waits for now. (Whose the phrases are, nobody knows.)"""
        self.preparing.pop(session, None)
        self.guesses.clear()
        for request in self.requests:
            request.session = "" if request.session == session else request.session
        self.cache.forget(session)

    def schedule(self) -> list[Span]:
        """The next step: decode rows first, then prefill, within the token budget. Empty: nothing to do."""
        self.expire(monotonic())
        decoding = [s for s in self.running if len(s.tokens) - s.computed == 1]
        prefilling = [s for s in self.running if len(s.tokens) - s.computed > 1]
        spans = [Span(s, s.computed, 1) for s in decoding]
        if len(decoding) == len(self.running) == 1 and not self.waiting:
            spans = [self._with_guess(decoding[0])]
        budget = self.token_budget - sum(len(span.ids) for span in spans)
        for sequence in prefilling:
            budget -= self._take(sequence, budget, spans)
        while budget and len(self.running) < self.max_running and (admitted := self._admit()):
            budget -= self._take(admitted, budget, spans)
        return spans or self._piece()

    def update(self, spans: Iterable[Span], drawn: Iterable[Drawn | None]) -> None:
        """Book what a step computed; `drawn` has one entry for each span that is_last, None where numbers went bad."""
        results = iter(drawn)
        for span in spans:
            sequence, result = span.sequence, next(results) if span.is_last else []
            if sequence.slot is None:  # a candidate beside it failed a moment ago, and the request with it
                continue
            if result is None:
                self._restart(sequence)
                continue
            right = max(0, len(result) - 1)
            sequence.slot.tokens.extend(span.ids[: span.count + right])
            for token, logprob in result:
                sequence.append(token, logprob, self.eos_id)
            if span.guess:
                self.guesses.count(right, len(span.guess))
            if sequence.finish_reason:
                self._finish(sequence)
            elif sequence.max_new == 0:
                self.requests.remove(sequence.request)
                self._leave(sequence, keep=True)

    def give_up(self, request: Request, error: EngineError) -> None:
        """Take the request out, wherever it stands, and deliver the error. A request that is through is left alone."""
        if request not in self.requests:
            return
        self.requests.remove(request)
        self.waiting = deque(s for s in self.waiting if s.request is not request)
        for sequence in [s for s in self.running if s.request is request]:
            self._leave(sequence, keep=not isinstance(error, Failed))
        request.deliver(error)

    def expire(self, now: float) -> None:
        """Give up what is past its deadline."""
        for request in [r for r in self.requests if r.deadline is not None and now >= r.deadline]:
            self.give_up(request, Cancelled("the deadline passed"))

    def check_integrity(self) -> None:
        """Raises AssertionError when the books are wrong."""
        self.cache.check_integrity()
        slots = [s.slot for s in self.running]
        assert len(self.running) <= self.max_running
        assert set(slots) == self.cache.running and len(set(slots)) == len(slots), "a slot is lost or shared"
        for sequence in self.running:
            assert sequence.slot and sequence.slot.tokens == sequence.tokens[: sequence.computed]
            assert sequence.computed < len(sequence.tokens) and not sequence.finish_reason
        alive = {s.request for s in (*self.running, *self.waiting)}
        assert alive == self.requests, "a request is lost"
        assert all(s.slot is None and not s.finish_reason for s in self.waiting)
        assert all(s.slot is None for s in self.preparing.values()), "a preparation holds a slot between steps"

    def _piece(self) -> list[Span]:
        """The next piece of the oldest preparation, under way for this step alone; what cannot go on is dropped.

        It stands in `requests` and `running` until `update` takes it out again; its slot is idle between two pieces,
        so whoever needs room may take it, and the session's next prompt finds what is there so far.
        """
        while self.preparing and not self.waiting:
            session, sequence = next(iter(self.preparing.items()))
            sequence.slot = self.cache.prepare(session, sequence.tokens)
            if sequence.slot:
                self.requests.add(sequence.request)
                self.running.append(sequence)
                return [Span(sequence, sequence.computed, min(PIECE, len(sequence.tokens) - sequence.computed))]
            del self.preparing[session]
        return []

    def _take(self, sequence: Sequence, budget: int, spans: list[Span]) -> int:
        count = min(len(sequence.tokens) - sequence.computed, budget)
        if count:
            spans.append(Span(sequence, sequence.computed, count))
        return count

    def _admit(self) -> Sequence | None:
        """The first waiting sequence that can start, now running. Candidates wait while one computes the prompt."""
        for sequence in self.waiting:
            others = [] if sequence.retried else [s for s in sequence.request.sequences if s.slot]
            sibling = next((s.slot for s in others if s.computed >= s.prompt_len - 1), None)
            if others and sibling is None:
                continue
            need = min(sequence.prompt_len + sequence.max_new, self.max_positions)
            session = "" if sequence.retried else sequence.request.session
            slot = self.cache.acquire(session, sequence.tokens, need, sibling)
            if slot is None:
                return None
            slot.session = sequence.request.session
            sequence.slot, sequence.cached_tokens = slot, len(slot.tokens)
            self.waiting.remove(sequence)
            self.running.append(sequence)
            return sequence
        return None

    def _with_guess(self, sequence: Sequence) -> Span:
        """A step for one token, and for those that may follow it as far as they can still be drawn."""
        room = min(self.guess, self.token_budget - 1, sequence.prompt_len + sequence.max_new - len(sequence.tokens) - 1)
        guess = self.guesses.after(sequence, room)
        return Span(sequence, sequence.computed, 1, tuple(takewhile(lambda token: token != self.eos_id, guess)))

    def _finish(self, sequence: Sequence) -> None:
        self._leave(sequence, keep=True)
        closed = [self.eos_id] if sequence.finish_reason == "stop" else []
        request = sequence.request
        if self.guess and request.session:  # of one that was forgotten meanwhile, nothing stays
            self.guesses.learn([*sequence.tokens[sequence.prompt_len - 1 :], *closed])
        if all(s.finish_reason for s in request.sequences):
            self.requests.remove(request)
            request.deliver([s.completion() for s in request.sequences])

    def _leave(self, sequence: Sequence, *, keep: bool) -> None:
        self.running.remove(sequence)
        assert sequence.slot
        self.cache.release(sequence.slot, keep=keep)
        sequence.slot = None

    def _restart(self, sequence: Sequence) -> None:
        """Its logits were not finite. Once, all it built on is thrown away and computed again; then it fails alone."""
        if sequence.retried:
            self.give_up(sequence.request, Failed("the model's numbers are not finite for this prompt"))
            return
        sequence.retried = True
        self._leave(sequence, keep=False)
        self.cache.forget(sequence.request.session)
        self.waiting.appendleft(sequence)
