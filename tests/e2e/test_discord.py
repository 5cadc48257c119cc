"""`palaver run` as a process against a Discord of our own; the ledger is the oracle."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.discord_server import DiscordServer

CHANNELS, MESSAGES = 20, 10


@pytest.fixture
async def server() -> AsyncIterator[DiscordServer]:
    async with DiscordServer() as opened:
        yield opened


class Palaver:
    """The process; `say back` as its model, so that a reply shows what it answers."""

    def __init__(self, server: DiscordServer, folder: Path, **settings: str) -> None:
        self._folder = folder
        self._env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("DISCORD", "TELEGRAM"))},
            "DISCORD_TOKEN": server.token,
            "DISCORD_API_BASE": server.base,
            "DISCORD_GATEWAY_URL": server.gateway,
            "WEB_ENABLED": "false",
            "ENGINE": "echo",
            **settings,
        }

    async def start(self) -> None:
        self.log = (self._folder / "log").open("ab")
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bots", "run", cwd=self._folder, env=self._env, stderr=self.log, stdout=self.log
        )

    async def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        if self.process.returncode is None:
            self.process.send_signal(how)
        code = await asyncio.wait_for(self.process.wait(), 60)
        self.log.close()
        return code


@pytest.fixture
async def palaver(server: DiscordServer, tmp_path: Path) -> AsyncIterator[Palaver]:
    process = Palaver(server, tmp_path, PYTHONPATH=str(Path(__file__).parents[2]))
    await process.start()
    await server.until(connected=True)
    yield process
    await process.end(signal.SIGKILL)


def judge(server: DiscordServer, said: dict[str, list[str]]) -> None:
    """Each message answered once, in its channel's order, with nothing of another channel in it."""
    for channel, ids in said.items():
        here = [sent for sent in server.ledger if sent.channel == channel]
        assert [sent.reply_to for sent in here] == ids
        name = server.channels[channel]["name"]
        assert [sent.text for sent in here] == [f"Canary {name} number {number}" for number in range(len(ids))]


def speak(server: DiscordServer, numbers: range, places: list[str]) -> dict[str, list[str]]:
    said: dict[str, list[str]] = {place: [] for place in places}
    for number in numbers:
        for place in places:
            text = f"canary {server.channels[place]['name']} number {number}"
            said[place].append(server.say(place, "ann", text, mention=True))
    return said


async def test_many_channels_at_once(server: DiscordServer, palaver: Palaver) -> None:
    places = [server.channel(f"room{chr(97 + number)}") for number in range(CHANNELS)]
    said = speak(server, range(MESSAGES), places)
    await server.until(CHANNELS * MESSAGES, timeout=180)
    assert await palaver.end() == 0
    judge(server, said)


async def test_while_a_model_thinks_it_types(server: DiscordServer, tmp_path: Path) -> None:
    where = str(Path(__file__).parents[2])
    process = Palaver(server, tmp_path, PYTHONPATH=where, ENGINE="inprocess", SAMPLING__N="64")
    await process.start()
    try:
        await server.until(connected=True)
        places = [server.channel(f"room {number}") for number in range(10)]
        for place in places:
            server.say(place, "ann", "do you like the sea?", mention=True)
        await server.until(len(places), timeout=60)
        assert {channel for _, channel in server.typing} == set(places)
    finally:
        await process.end(signal.SIGKILL)


async def test_what_was_said_while_it_was_down_is_answered(server: DiscordServer, palaver: Palaver) -> None:
    general = server.channel("general")
    server.say(general, "ann", "canary general number 0", mention=True)
    await server.until(1)
    assert await palaver.end() == 0
    server.say(general, "ann", "canary general number 1", mention=True)
    server.say(general, "bob", "between ourselves")
    server.say(general, "ann", "canary general number 2", mention=True)
    await palaver.start()
    await server.until(3)
    assert [sent.text for sent in server.ledger] == [f"Canary general number {number}" for number in range(3)]
