"""Which candidate answers what was said, and not just anything? Maximum mutual information (Li et al. 2016, arXiv
1510.03055). The model itself says how likely a reply's beginning is after nothing, and half of that counts against it
(MMI-antiLM; what follows the beginning tells little more). Or a second model that was trained with the turns in reverse
(`palaver finetune --reverse`) says how likely the message is after the reply (DialoGPT's paper, arXiv 1911.00536,
section 3.2): what could be said to anything makes no message likely.
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
"""Ids of a message that are asked for, its last: the logits of more take too much memory."""
BEGINNING = 8
"""Ids of a reply that are asked for after nothing."""
AGAINST = 0.5
"""Share of their log-probability that counts against it."""


@dataclass(frozen=True, slots=True)
class Text:
    """How likely is `said` after `given`? Neither is empty."""

    given: tuple[int, ...]
    said: tuple[int, ...]

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
    known: dict[Text, float] = field(default_factory=dict)
    """Log-probabilities of those that have been read."""


class Judge:
    """A model, and who waits for it, first come, first served. It keeps nothing of what it has read."""

    def __init__(self, model: Model, *, reverse: bool = False) -> None:
        """`reverse`: it was trained with the turns in reverse. Else it is the one that made the candidates."""
        self.model = model
        self.reverse = reverse
        self.cases: deque[Case] = deque()

    def step(self) -> bool:
        """One step of the model for the first case; whose time is over is delivered at once. False: nobody waits."""
        self.cases = deque(case for case in self.cases if case.wanted())
        now = monotonic()
        if late := [case for case in self.cases if case.deadline is not None and now >= case.deadline]:
            for case in late:
                self.cases.remove(case)
                case.deliver(case.candidates)
            return True
        if not self.cases:
            return False
        case = self.cases[0]
        end: list[Completion] | None = case.candidates
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
        if not texts:
            return case.candidates
        left = [text for text in dict.fromkeys(texts) if text not in case.known]
        count = rows = kept = 0
        for text in left:
            rows, kept = rows + len(text), kept + round_up(len(text), ROUND)
            if count and (rows > ROWS or kept > self.model.config.n_positions):
                break
            count += 1
        case.known |= zip(left[:count], self.read(left[:count]), strict=True)
        if count < len(left):
            return None
        if not all(map(math.isfinite, case.known.values())):
            return case.candidates
        return [
            replace(c, score=self._score(c, text, case.known[text]))
            for c, text in zip(case.candidates, texts, strict=True)
        ]

    def _texts(self, case: Case) -> list[Text]:
        """Of each candidate; of none where there is nothing to ask for, or to choose among. A message's ids are as many
        for all of them, as many as the longest leaves positions for."""
        eos, longest = self.model.config.eos_id, max(len(c.token_ids) for c in case.candidates)
        room = max(0, min(MESSAGE, self.model.config.n_positions - longest))
        message = tuple(case.message[max(0, len(case.message) - room) :])
        if len({tuple(c.token_ids) for c in case.candidates}) == 1 or (self.reverse and not message):
            return []
        if self.reverse:
            return [Text((*c.token_ids, eos), message) for c in case.candidates]
        ends = [(eos,) if c.finish_reason == "stop" else () for c in case.candidates]
        return [Text((eos,), (*c.token_ids, *end)[:BEGINNING]) for c, end in zip(case.candidates, ends, strict=True)]

    def _score(self, completion: Completion, text: Text, known: float) -> float:
        return known / len(text.said) if self.reverse else completion.logprob - AGAINST * known

    def read(self, texts: Sequence[Text]) -> list[float]:
        """The log-probability of each, in nats. The same number beside any others."""
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
