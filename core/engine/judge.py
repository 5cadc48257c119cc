"""Which candidate answers what was said, and not just anything? Maximum mutual information (Li et al. 2016, arXiv
1510.03055). The model itself says how likely a reply is after nothing, and half of that counts against it (section
4.4.1, MMI-antiLM). Or a second model that was trained with the turns in reverse (`palaver finetune --reverse`) says how
likely the message is after the reply (DialoGPT's paper, arXiv 1911.00536, section 3.2): what could be said to anything
makes no message likely.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic

from core.engine.base import Completion
from core.engine.graphs import lost
from core.engine.kv_cache import ROUND, round_up
from core.engine.model import Batch, Model, Rows

log = logging.getLogger(__name__)

ROWS = 256
"""Of a step, between two of the engine's."""
MOST = 128
"""Ids of a reply, its first, or of a message, its last, that are asked for: the logits of more take too much memory."""
AGAINST = 0.5
"""Share of a reply's log-probability after nothing that counts against it."""
Reply = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """How likely is `said` after `given`? Neither is empty."""

    given: Sequence[int]
    said: Sequence[int]

    def __len__(self) -> int:
        """Rows that it takes: nothing is asked of its last id."""
        return len(self.given) + len(self.said) - 1


@dataclass(eq=False)
class Case:
    """Candidates to be judged. `deliver` is called once, unless nobody wants them any more."""

    message: Sequence[int]
    candidates: list[Completion]
    deliver: Callable[[list[Completion]], None]
    wanted: Callable[[], bool]
    deadline: float | None = None
    """On time.monotonic's clock; from then on they are good as they are."""
    known: dict[Reply, float] = field(default_factory=dict)
    """Log-probabilities of the texts of those that have been read."""


class Judge:
    """A model, and who waits for it, first come, first served. It keeps nothing of what it has read."""

    def __init__(self, model: Model, *, reverse: bool = False) -> None:
        """`reverse`: it was trained with the turns in reverse. Else it is the one that made the candidates."""
        self.model = model
        self.reverse = reverse
        self.cases: deque[Case] = deque()

    def step(self) -> bool:
        """One step of the model for the first case. False: nobody waits."""
        while self.cases and not self.cases[0].wanted():
            self.cases.popleft()
        if not self.cases:
            return False
        case = self.cases[0]
        end: list[Completion] | None = case.candidates
        if case.deadline is None or monotonic() < case.deadline:
            try:
                end = self._go_on(case)
            except Exception as error:  # it can do without
                if lost(error):
                    raise
                log.warning("judging candidates raised %r", error)
        if end is not None:
            self.cases.popleft().deliver(end)
        return True

    def _go_on(self, case: Case) -> list[Completion] | None:
        """Read as many texts as fit in ROWS and in the keys and values of one window, which every model has room for.
        The candidates, when there is nothing left to read."""
        texts = self._texts(case)
        left = [reply for reply in texts if reply not in case.known]
        count = rows = kept = 0
        for reply in left:
            length = len(texts[reply])
            rows, kept = rows + length, kept + round_up(length, ROUND)
            if count and (rows > ROWS or kept > self.model.config.n_positions):
                break
            count += 1
        case.known |= zip(left[:count], self.read([texts[reply] for reply in left[:count]]), strict=True)
        if count < len(left):
            return None
        if len(texts) < 2 or not all(map(math.isfinite, case.known.values())):
            return case.candidates
        return [replace(c, score=self._score(c, texts, case.known)) for c in case.candidates]

    def _texts(self, case: Case) -> dict[Reply, Text]:
        """Of each reply once. Where a message is asked for, all are asked for the same ids of it, as many as the
        longest leaves positions for."""
        eos = self.model.config.eos_id
        ends = {tuple(c.token_ids): [eos] if c.finish_reason == "stop" else [] for c in case.candidates}
        if not self.reverse:
            return {reply: Text([eos], [*reply, *end][:MOST]) for reply, end in ends.items()}
        room = max(0, min(MOST, self.model.config.n_positions - max(map(len, ends))))
        message = case.message[max(0, len(case.message) - room) :]
        return {reply: Text([*reply, eos], message) for reply in ends} if message else {}

    def _score(self, completion: Completion, texts: dict[Reply, Text], known: dict[Reply, float]) -> float:
        reply = tuple(completion.token_ids)
        if self.reverse:
            return known[reply] / len(texts[reply].said)
        return completion.logprob - AGAINST * known[reply]

    def read(self, texts: Sequence[Text]) -> list[float]:
        """The log-probability of each, in nats. The same number beside any others."""
        if not texts:
            return []
        ids, rows, wanted = list[int](), list[Rows](), list[int]()
        for text in texts:
            rows.append(Rows(self.model.new_kv(len(text)), 0, len(text)))
            ids += [*text.given, *text.said[:-1]]
            wanted += range(len(ids) - len(text.said), len(ids))
        logits, summary = self.model.forward(Batch(ids, rows, wanted))
        row, found = 0, list[float]()
        for text in texts:
            behind = row + len(text.said)
            found.append(
                math.fsum(
                    float(logits[i, id]) - total
                    for i, id, total in zip(range(row, behind), text.said, summary.totals[row:behind], strict=True)
                )
            )
            row = behind
        return found
