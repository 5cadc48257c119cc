"""`palaver bench` as a person starts it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.bots.process import palaver, start


async def test_it_prints_what_the_machine_serves(tmp_path: Path) -> None:
    code, output, errors = await palaver(tmp_path, "bench", "--seconds", "1")
    assert code == 0, errors
    assert output.startswith("echo: says it back, no model;")
    assert "active channels (each writes 2 messages a minute" in output
    assert "16 in flight ..." in errors and "loading embedded ..." in errors
    assert not list(tmp_path.iterdir()), "it touches no journal"


async def test_an_engine_elsewhere_is_named_and_its_memory_is_not_ours(tmp_path: Path) -> None:
    server = await start(tmp_path, "engine", f"unix:{tmp_path}/engine")
    try:
        code, output, errors = await palaver(tmp_path, "bench", "--seconds", "1", ENGINE=f"unix:{tmp_path}/engine")
    finally:
        server.kill()
        await server.communicate()
    assert code == 0, errors
    assert f", at unix:{tmp_path}/engine\n" in output and "memory not seen from here" in output
    assert f"asking unix:{tmp_path}/engine ..." in errors and "loading" not in errors


async def test_json_is_all_that_is_printed(tmp_path: Path) -> None:
    code, output, errors = await palaver(tmp_path, "bench", "--seconds", "1", "--json", SAMPLING__MAX_TOKENS="5")
    assert code == 0, errors
    found = json.loads(output)
    assert found["model"] == "echo"
    assert set(found["in_flight"]) == {"1", "4", "16"}
    assert found["active_channels"] == int(found["most_per_second"] * 30) > 0
    assert found["p95_goal"] == 2.0 and found["memory"] > 10**7
