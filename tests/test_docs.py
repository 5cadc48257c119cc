"""What the documents say is what the code does. `python -m tests.test_docs` writes .env.example and README's table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bots.discord import DiscordSettings
from bots.telegram import TelegramSettings
from bots.web import WebSettings
from core.settings import Group, Settings, WrongSettings, read, variables

ROOT = Path(__file__).parents[1]
GROUPS: dict[str, type[Group]] = {
    "Discord": DiscordSettings,
    "Telegram": TelegramSettings,
    "The web page": WebSettings,
    "The house": Settings,
}
BEGIN = "<!-- settings: written by python -m tests.test_docs -->"


def env_example() -> str:
    lines = [
        "# Copy to .env and take the # off what you set. Wrong settings stop the start with one line each.",
        "# Secrets may stand in files instead: NAME_FILE=/path, or systemd credentials called NAME.",
    ]
    for title, group in GROUPS.items():
        lines += ["", f"# {title}"]
        for name, default, example, about in variables(group):
            first = about[:1] if default and about.startswith(default) else about[:1].upper()
            lines += [
                f"# {first}{about[1:]}" + (f" (default {default})" if default else ""),
                f"#{name}={example}",
            ]
    return "\n".join(lines) + "\n"


def table() -> str:
    rows = ["| variable | default | what it is |", "|---|---|---|"]
    for group in GROUPS.values():
        rows += [
            f"| `{name}` | {f'`{default}`' if default else ''} | {about} |"
            for name, default, _, about in variables(group)
        ]
    return "\n".join(rows) + "\n"


def readme() -> str:
    text = (ROOT / "README.md").read_text()
    return text[: text.index(BEGIN) + len(BEGIN)] + "\n\n" + table()


def test_the_example_settings_are_all_there_are() -> None:
    assert (ROOT / ".env.example").read_text() == env_example()


def test_the_readme_lists_every_setting() -> None:
    assert (ROOT / "README.md").read_text() == readme()


def test_the_example_settings_are_right_but_for_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for group in GROUPS.values():
        for name, *_ in variables(group):
            monkeypatch.delenv(name, raising=False)
    lines = [line.removeprefix("#") for line in env_example().splitlines() if re.match(r"#[A-Z_]+=", line)]
    (tmp_path / ".env").write_text("\n".join(lines))
    with pytest.raises(WrongSettings) as caught:
        read(*GROUPS.values())
    assert [line.split(":")[0] for line in caught.value.lines] == ["DISCORD_TOKEN", "TELEGRAM_TOKEN"]
    (tmp_path / ".env").write_text("\n".join(line for line in lines if "_TOKEN=" not in line))
    assert len(read(*GROUPS.values())) == 4


def test_what_the_documents_point_at_exists() -> None:
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} points at {target}"


def test_the_house_on_the_map_is_the_house() -> None:
    for path in re.findall(r"`((?:core|bots|tests|deploy|docs)/[\w/.]*)`", (ROOT / "README.md").read_text()):
        assert (ROOT / path).exists() or "<" in path, path


if __name__ == "__main__":
    (ROOT / ".env.example").write_text(env_example())
    (ROOT / "README.md").write_text(readme())
