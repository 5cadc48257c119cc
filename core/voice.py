"""Between words and ids: turns become a prompt, a completion becomes what people read.

async with open_voice() as voice:            # core.app
    print(await voice.ask("hi, how are you?"))
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from core.engine.base import Completion, Engine, EngineError, SamplingParams
from core.messages import Turn
from core.ranking import choose, stale
from core.text import normalise, restore
from core.tokenizer import Tokenizer
from core.window import Window


class Voice:
    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        params: SamplingParams,
        budget: int,
        keep: float = 0.5,
        spaced: bool = True,
    ) -> None:
        """`budget` ids of history at most, less where the model's positions leave less beside `params.max_tokens`, and
        `keep` as core.window has it; `spaced`: speak DialoGPT's spelling (core.text)."""
        room = engine.info.max_positions - min(params.max_tokens, engine.info.max_positions // 2)
        self.engine, self.tokenizer, self.params, self.spaced = engine, tokenizer, params, spaced
        self.window = Window(tokenizer.encode, tokenizer.eos_id, min(budget, room), keep, self._spelled)

    @property
    def at_once(self) -> int:
        """Answers for which the engine computes at a time; more would wait there, out of their order."""
        return max(1, self.engine.info.at_once // self.params.n)

    def hears(self, text: str) -> bool:
        """Does anything of `text` reach the model? If not, there is nothing to answer. Punctuation alone, as DialoGPT's
        spelling leaves it of other alphabets, is nothing."""
        ids = self.window.ids(Turn("user", "", text, 0))
        return any(map(str.isalnum, self.tokenizer.decode(ids))) if self.spaced else bool(ids)

    def spelled(self, text: str) -> str:
        """People's spelling in the model's."""
        return normalise(text) if self.spaced else " ".join(text.split())

    def restore(self, spoken: str) -> str:
        """The model's spelling in people's."""
        return restore(spoken) if self.spaced else spoken

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Ids for the engine; `turns` ends with the one to be answered. [] when there is nothing to answer."""
        return self.window.prompt(turns)

    def _spelled(self, turn: Turn) -> str:
        return turn.text if turn.role == "assistant" else self.spelled(turn.text)

    async def speak(
        self, turns: Sequence[Turn], *, seed: int | None = None, session: str = "", deadline: float | None = None
    ) -> tuple[str, Completion] | None:
        """(the reply in the model's spelling, its completion); None when there is nothing to answer.

        The same turns and seed give the same reply. What only repeats the bot is drawn again, twice at most and as
        long as there is time. Raises an EngineError.
        """
        prompt = self.prompt(turns)
        if not prompt:
            return None
        old_lines = stale(turns)
        params = self.params if seed is None else replace(self.params, seed=seed)
        clock = asyncio.get_running_loop().time
        end = None if deadline is None else clock() + deadline
        draws = 3 if params.temperature > 0 and params.seed is not None else 1
        found: tuple[str, Completion] | None = None
        for draw in range(draws):
            drawn = params if params.seed is None else replace(params, seed=(params.seed + draw * params.n) % 2**63)
            left = None if end is None else end - clock()
            try:
                completions = await self.engine.generate(prompt, drawn, session=session, deadline=left)
            except EngineError:
                if found is None:
                    raise
                break
            said = [self.tokenizer.decode(completion.token_ids).strip() for completion in completions]
            best, fresh = choose(completions, said, old_lines)
            found = said[best], completions[best]
            if fresh:
                break
        if session and found:  # the reply goes first
            answered = [*turns, Turn("assistant", "", found[0], turns[-1].index + 1)]
            asyncio.get_running_loop().call_soon(self._look_ahead, session, prompt, answered)
        return found

    def _look_ahead(self, session: str, prompt: Sequence[int], turns: Sequence[Turn]) -> None:
        """When the window is about to move, its new place is prepared while nobody waits."""
        ahead = self.window.ahead(turns)
        if ahead and ahead[: len(prompt)] != prompt:
            self.engine.prepare(session, ahead)

    async def forget(self, session: str) -> None:
        """Drop what is kept of `session`. Raises an EngineError."""
        self.window.forget()
        await self.engine.forget(session)

    async def ask(self, text: str, turns: Sequence[Turn] = ()) -> str:
        """One reply to `text` after `turns`, in people's spelling; "" when there is nothing to answer."""
        index = turns[-1].index + 1 if turns else 0
        spoken = await self.speak([*turns, Turn("user", "you", text, index)], seed=self.params.seed)
        return self.restore(spoken[0]) if spoken else ""
