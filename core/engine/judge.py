"""Which candidate answers what was said? A second model that was trained with the turns in reverse (`palaver finetune
--reverse`) says how likely the message is after each: maximum mutual information, DialoGPT's paper (arXiv 1911.00536,
section 3.2), after Li et al. 2016 (arXiv 1510.03055). What could be said to anything makes no message likely.
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
MESSAGE = 128
"""Ids of a message that are looked at, its last: of a longer one the logits would take too much memory."""
Reply = tuple[int, ...]


@dataclass(eq=False)
class Case:
    """Candidates to be judged. `deliver` is called once, unless nobody wants them any more."""

    message: Sequence[int]
    candidates: list[Completion]
    deliver: Callable[[list[Completion]], None]
    wanted: Callable[[], bool]
    deadline: float | None = None
    """On time.monotonic's clock; from then on they are good as they are."""
    scores: dict[Reply, float] = field(default_factory=dict)


class Judge:
    """A reverse model, and who waits for it, first come, first served. It keeps nothing of what it has read."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.cases: deque[Case] = deque()

    def step(self) -> bool:
        """One step of the model for the first case. False: nobody waits."""
        while self.cases and not self.cases[0].wanted():
            self.cases.popleft()
        if not self.cases:
            return False
        case = self.cases[0]
        if case.deadline is not None and monotonic() >= case.deadline:
            self._close(case.candidates)
            return True
        try:
            done = self._go_on(case)
        except Exception as error:  # it can do without
            if lost(error):
                raise
            log.warning("the reverse model raised %r", error)
            self._close(case.candidates)
            return True
        if done and all(map(math.isfinite, case.scores.values())):
            self._close([replace(c, reverse_logprob=case.scores[tuple(c.token_ids)]) for c in case.candidates])
        elif done:
            self._close(case.candidates)
        return True

    def _close(self, candidates: list[Completion]) -> None:
        self.cases.popleft().deliver(candidates)

    def _go_on(self, case: Case) -> bool:
        """As many replies as fit in ROWS and in the keys and values of one window, which every model has room for. Is
        that all? Each reply once, and all are asked for the same ids, as many as the longest leaves positions for."""
        replies = dict.fromkeys(tuple(c.token_ids) for c in case.candidates)
        most = self.model.config.n_positions
        room = max(0, min(MESSAGE, most - max(map(len, replies))))
        message = case.message[len(case.message) - min(room, len(case.message)) :]
        left = [reply for reply in replies if reply not in case.scores]
        if not message or len(replies) == 1:
            case.scores = dict.fromkeys(replies, math.nan)
            return True
        count = rows = kept = 0
        for reply in left:
            length = len(reply) + len(message)  # an end of text between them, and the last id is not run
            rows, kept = rows + length, kept + round_up(length, ROUND)
            if count and (rows > ROWS or kept > most):
                break
            count += 1
        case.scores |= zip(left[:count], self.scores(message, left[:count]), strict=True)
        return count == len(left)

    def scores(self, message: Sequence[int], replies: Sequence[Reply]) -> list[float]:
        """For each reply the mean log-probability, in nats, of the message's ids after it and its end of text. The same
        number beside any others."""
        ids, rows, wanted = list[int](), list[Rows](), list[int]()
        for reply in replies:
            whole = [*reply, self.model.config.eos_id, *message[:-1]]
            rows.append(Rows(self.model.new_kv(len(whole)), 0, len(whole)))
            ids += whole
            wanted += range(len(ids) - len(message), len(ids))
        logits, summary = self.model.forward(Batch(ids, rows, wanted))
        expected = enumerate(zip([*message] * len(replies), summary.totals, strict=True))
        known = [float(logits[row, id]) - total for row, (id, total) in expected]
        return [math.fsum(known[i : i + len(message)]) / len(message) for i in range(0, len(known), len(message))]
