from __future__ import annotations

import pytest

from core.messages import Channel


def test_a_channel_reads_what_it_writes() -> None:
    assert Channel.parse(str(Channel("telegram", "-100:5"))) == Channel("telegram", "-100:5")


@pytest.mark.parametrize("text", ["", "discord", "discord:", ":5"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="discord:123"):
        Channel.parse(text)
