"""The spelling in and out: fixed examples, and what must hold for every string."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.text import MAX_CHARS, clean, normalise, restore

ANYTHING = st.text(st.characters(exclude_categories=()), max_size=300)
UNCLEAN = st.text(
    st.sampled_from("\ud800\udfff\u061c\u200b\u200e\u200f\u202a\u202e\u2066\u2069\ufeff\x00\x07\x7f\x85\n\tab 🙂")
)
SPACED = st.lists(
    st.sampled_from([*"()[]:,.!?'\"", "...", "i", "I", "i'm", "do", "n't", "'s", "hello", ":)", "3.5", "ok", "e.g."])
).map(" ".join)


@pytest.mark.parametrize(
    ("typed", "spaced"),
    [
        ("Hi, how are you?", "Hi , how are you ?"),
        ("don't  **shout**, please", "don't shout , please"),
        ("\u201cso\u201d it\u2019s . . . fine\u2026", '" so " it\'s ... fine ...'),
        ("see [this](https://a.example/x) or https://b.example/y?z", "see this or"),
        ("<@!4711> <:wave:12> hello @everyone #general me@example.org", "hello"),
        ("look ```rm -rf /``` and `this`", "look and this"),
        ("what is 2*3, or 12**2? a||b __snake__case", "what is 2 3 , or 12 2 ? a b snake case"),
        ("see <id:guide> and <id:customize>", "see and"),
        ("caf\u00e9, Zo\u00eb, Stra\u00dfe, \uff21", "cafe , Zoe , Strasse , A"),
        ("Z\u0351\u036b\u0343a\u0363\u0366l\u034fg\u0321o", "Zalgo"),
        ("\U0001f602 ok \U0001f60a", "haha ok :)"),
        ("a\x00b\u202ec\ud800d", "a bcd"),
        ("\u041f\u0440\u0438\u0432\u0435\u0442 \U0001f4a9", ""),
        ("", ""),
    ],
)
def test_typed_text_becomes_spaced(typed: str, spaced: str) -> None:
    assert normalise(typed) == spaced


def test_no_home_is_needed() -> None:
    """As for a user without an entry in /etc/passwd and without HOME."""
    code = (
        "import os, pwd\n"
        "pwd.getpwuid = {}.__getitem__\n"
        "from core.text import normalise\n"
        "print(normalise('hi!'), os.environ.get('HOME'))"
    )
    homeless = {name: value for name, value in os.environ.items() if name != "HOME"}
    ran = subprocess.run([sys.executable, "-c", code], env=homeless, capture_output=True, text=True, check=True)
    assert ran.stdout == "hi ! None\n"


@pytest.mark.parametrize(
    ("spaced", "shown"),
    [
        ("hi , how are you ?", "Hi, how are you?"),
        ("i do n't know . i 'm new", "I don't know. I'm new"),
        ('he said " hello there " , i think', 'He said "hello there", I think'),
        ("well ... maybe ( or not ) .", "Well... maybe (or not)."),
        ("fine :) . and you ?", "Fine :) . And you?"),
        ("what ? ! no , e.g. this", "What?! No, e.g. this"),
        ("", ""),
    ],
)
def test_spaced_text_is_restored(spaced: str, shown: str) -> None:
    assert restore(spaced) == shown


@pytest.mark.parametrize(
    "text", ["\u3316@" * 1000, "a@" * 1000, "\u33c2" * 2000, "\u2488" * 2000, "'a" * 1000, "a" + "*" * 1999]
)
def test_no_text_takes_long(text: str) -> None:
    """Whoever may write to the bot could stop it for all others: the first of these once took 35 seconds."""
    normalise("hello")  # with its import
    began = time.process_time()
    normalise(text)
    assert time.process_time() - began < 0.25


@given(ANYTHING)
def test_normalise_is_idempotent_and_keeps_to_its_alphabet(text: str) -> None:
    spaced = normalise(text)
    assert normalise(spaced) == spaced
    assert spaced == " ".join(spaced.split())
    assert all(c.isascii() and (c.isalnum() or c in " ()[]:,.!?'\"") for c in spaced)


@given(st.text("ab1.,!?:()[]'\"<>@#`*_|~/ \n-+;=dDpP\u2026", max_size=80))
def test_normalise_is_idempotent_on_punctuation(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize("unit", ["a", "hi. ", ".,", "\ufdfa", "(((", "1 ", "a.b", '" ', "http://"])
def test_long_input_is_cut(unit: str) -> None:
    spaced = normalise(unit * 5000)
    assert len(spaced) <= MAX_CHARS
    assert normalise(spaced) == spaced


def test_of_long_input_the_end_is_read() -> None:
    assert normalise("word " * 500 + "So, what is my name?").endswith("word word So , what is my name ?")
    code = "look ```" + "x = 1\n" * 500 + "``` what is this?"
    assert normalise(code) == "what is this ?"
    assert normalise("```no```" + code) == "what is this ?"
    assert normalise("no code " * 300 + "``` x ``` what is this?").endswith("no code what is this ?")


@given(ANYTHING | SPACED)
def test_restore_adds_and_loses_no_word(text: str) -> None:
    assert "".join(restore(text).split()).lower() == "".join(text.split()).lower()


@given(ANYTHING | UNCLEAN)
def test_what_is_sent_is_clean(text: str) -> None:
    sent = clean(text)
    assert all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") for c in sent)
    assert not set(sent) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c\u200b")
    assert clean(sent) == sent
    assert sent.encode() is not None


def test_clean_keeps_what_people_write() -> None:
    family, hello = "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u041f\u0440\u0438\u0432\u0435\u0442"
    kept = f"Zo\u00eb said:\n\t\u201cna\u00efve\u201d {family} {hello}"
    assert clean(kept) == kept
