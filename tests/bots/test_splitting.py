from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bots.splitting import Units, size, split

UNITS = st.sampled_from(["characters", "utf-16"])


def test_what_fits_is_left_alone() -> None:
    assert split("  one\n\ntwo ", 40) == ["one\n\ntwo"]
    assert split(" \n ", 40) == []


def test_cuts_stand_at_paragraphs_then_lines_then_sentences_then_words() -> None:
    assert split("a" * 30 + "\n\n" + "b" * 8 + ". cc", 40) == ["a" * 30, "b" * 8 + ". cc"]
    assert split("a" * 30 + ". " + "b" * 30, 40) == ["a" * 30 + ".", "b" * 30]
    assert split("word " * 20, 40) == ["word word word word word word word"] * 2 + ["word word word word word word"]
    assert split("x" * 100, 40) == ["x" * 36, "x" * 36, "x" * 28]
    assert split("a\n" + "word " * 10, 40)[0] == "a\nword word word word word word", "no piece is nearly empty"


def test_an_emoji_counts_two_where_the_platform_says_so() -> None:
    assert [len(piece) for piece in split("🙂" * 60, 40, "utf-16")] == [18, 18, 18, 6]
    assert [len(piece) for piece in split("🙂" * 60, 40)] == [36, 24]


def test_a_fence_is_closed_and_opened_again() -> None:
    code = "```python\n" + "\n".join(f"line {i}" for i in range(12)) + "\n```\nand text"
    pieces = split(code, 60)
    assert len(pieces) > 2 and all(size(piece, "characters") <= 60 for piece in pieces)
    assert all(piece.count("```") % 2 == 0 for piece in pieces)
    assert all(piece.startswith("```python\n") for piece in pieces[:2])
    assert [line for piece in pieces for line in piece.splitlines() if line.startswith("line")] == [
        f"line {i}" for i in range(12)
    ]


def test_a_fence_too_long_to_be_opened_again_is_measured_in_the_platforms_units() -> None:
    code = "```" + "🙂" * 16 + "\n" + "a" * 100
    assert all(size(piece, "utf-16") <= 40 for piece in split(code, 40, "utf-16"))
    assert split(code, 40, "characters")[1].startswith("```🙂")


def test_what_is_in_a_fence_keeps_its_indentation() -> None:
    pieces = split("```\n" + "    a line\n" * 20 + "```", 60)
    assert len(pieces) > 3
    assert all(line in ("    a line", "```") for piece in pieces for line in piece.splitlines())


def test_a_fence_whose_first_line_is_long_is_not_opened_again() -> None:
    pieces = split("```" + "p" * 30 + "\n" + "code " * 30 + "\n```", 40)
    assert len(pieces) < 10 and all(size(piece, "characters") <= 40 for piece in pieces)
    pieces = split("```🙂🙂🙂🙂\n" + "x" * 200 + "\n```", 40, "utf-16")
    assert pieces[1].startswith("```🙂🙂🙂🙂\n") and all(size(piece, "utf-16") <= 40 for piece in pieces)


@given(st.text(alphabet=st.sampled_from("ab .!\n`🙂é\t"), max_size=400), st.integers(40, 90), UNITS)
def test_nothing_is_lost_nothing_is_too_long_nothing_is_blank(text: str, limit: int, units: Units) -> None:
    pieces = split(text, limit, units)
    assert all(0 < size(piece, units) <= limit and piece.strip() for piece in pieces)
    letters = [char for piece in pieces for char in piece if char in "ab.!🙂é"]
    assert letters == [char for char in text if char in "ab.!🙂é"]
