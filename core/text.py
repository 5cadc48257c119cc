"""Three pure functions on text: `normalise` for the model, `restore` for people, `clean` for platforms.

DialoGPT was trained on spaced text, `hi , how are you ?`. `normalise` brings what people type into that spelling and
`restore` brings what the model says back into theirs. None of the three ever raises, whatever the string.
"""

from __future__ import annotations

import os
import re
import unicodedata
from functools import cache
from typing import Protocol

MAX_CHARS = 2000
"""Of longer input the end is read, where the question is: some patterns take time that grows with its square."""
MAX_NFKD = 8192
"""A sign may stand for eighteen."""

_SMILES = (
    "\U0001f600\U0001f601\U0001f603\U0001f604\U0001f606\U0001f60a\U0001f60d\U0001f642\U0001f917\U0001f970\u263a\u2764"
)
_TEARS = "\U0001f61e\U0001f622\U0001f62d\U0001f641\U0001f625\U0001f614\u2639"
_SAID = {ord(sign): " :) " for sign in _SMILES} | {ord(sign): " :( " for sign in _TEARS}
_SAID |= {
    0x1F602: " haha ",
    0x1F923: " haha ",
    0x1F44B: " hello ",
    0x1F44D: " ok ",
    0x1F64F: " thank you ",
    0x2018: "'",
    0x2019: "'",
    0x00B4: "'",
    0x0060: "`",
    0x201C: '"',
    0x201D: '"',
    0x00DF: "ss",
    0x00E6: "ae",
    0x00C6: "AE",
    0x0153: "oe",
    0x00F8: "o",
    0x00D8: "O",
    0x0142: "l",
    0x0141: "L",
    0x0131: "i",
    0x0111: "d",
    0x2013: " ",
    0x2014: " ",
}

_CODE_BLOCK = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_LINKED = re.compile(r"\[([^\[\]]*)\]\([^()\s]*\)")
_TAG = re.compile(r"<(?:[@#!&:/]|a:|id:|t:|https?:)[^<>\s]*>")
_LINK = re.compile(r"\b(?:https?://|www\.)\S+", re.IGNORECASE)
_WORDS_OUT = re.compile(r"(?<!\S)(?:[#@]\S*|\S+@\S+\.\S+)")  # from a word's start: else each letter tries the rest
_BETWEEN = re.compile(r"(?<=[^\W_])[*_~|]+(?=[^\W_])")
_MARKS = re.compile(r"\*+|_{2,}|~{2,}|\|{2,}|`+")
_OUTSIDE = re.compile(r"[^A-Za-z0-9()\[\]:,.!?'\"]+")
_DOTS = re.compile(r"\.(?:\s*\.)+")

_BIDI = frozenset(
    "\u061c\u200b\u200e\u200f\ufeff" + "".join(map(chr, (*range(0x202A, 0x202F), *range(0x2060, 0x2070))))
)


class _Splits(Protocol):
    def tokenize(self, text: str) -> list[str]: ...


@cache
def _tweet_tokenizer() -> _Splits:
    # here and not above: it costs what nobody who only cleans should pay
    homeless = os.path.expanduser("~/") == "~/"
    if homeless:  # nltk wants a home, at its import alone
        os.environ["HOME"] = "/"
    try:
        from nltk.tokenize.casual import TweetTokenizer
    finally:
        if homeless:
            del os.environ["HOME"]
    tokenizer: _Splits = TweetTokenizer(preserve_case=True, reduce_len=False, strip_handles=False)
    return tokenizer


def normalise(text: str) -> str:
    """What someone typed, in DialoGPT's spelling: ASCII letters, digits and ()[]:,.!?'\", one space between tokens.

    Code blocks, links, mentions, hash tags and unknown signs are dropped, accents folded, the commonest emoji said in
    words. "" when nothing is left. `normalise(normalise(x)) == normalise(x)`.
    """
    text = _end(text).encode("utf-8", "ignore").decode("utf-8", "ignore")
    text = unicodedata.normalize("NFKD", text.translate(_SAID))[-MAX_NFKD:]
    text = "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Me", "Cf"))[-MAX_CHARS:]
    text = _LINKED.sub(r"\1", _CODE_BLOCK.sub(" ", text))
    for pattern in (_TAG, _LINK, _WORDS_OUT):
        text = pattern.sub(" ", text)
    text = _OUTSIDE.sub(" ", _MARKS.sub("", _BETWEEN.sub(" ", text)))
    return _split(_split(text))


def _end(text: str) -> str:
    """At most MAX_CHARS of it. A code block that the cut goes through is opened again: its end is no beginning."""
    if len(text) <= MAX_CHARS:
        return text
    start = len(text) - MAX_CHARS + 3
    return ("```" if text.count("```", 0, start) % 2 else "") + text[start:]


def _split(text: str) -> str:
    """Tokens with one space between, the last MAX_CHARS; cut at a space where there is one."""
    text = _DOTS.sub("...", " ".join(_tweet_tokenizer().tokenize(_DOTS.sub("...", text))))
    text = " ".join(text.split())
    if len(text) <= MAX_CHARS:
        return text
    _, space, end = text[-MAX_CHARS - 1 :].partition(" ")
    return end if space else text[-MAX_CHARS:]


_CLOSING = frozenset(".,!?:)]") | {"...", "?!", "!!", "??", "!!!", "???"}
_OPENING = frozenset("([")
_ENDINGS = frozenset(("n't", "'s", "'m", "'re", "'ve", "'ll", "'d"))
_SMILEY = re.compile(r"[:;=8xX]['-]?[()\[\]DPpdOo3]+")
_LONE_I = re.compile(r"\bi\b(?=$|[^\w.]|\.(?!\w))")
_SENTENCE = re.compile(r"(?:^|(?<!\.)(?<!\.\w)[.!?][\"')\]]*\s+)([\"'(\[]*)([a-z])")


def restore(text: str) -> str:
    """What the model said, in people's spelling: `hi , i do n't know .` becomes `Hi, I don't know.`

    Changes white space and the case of letters, nothing else: no word is added or lost.
    """
    out: list[str] = []
    quoted = glue = False
    for token in text.split():
        closes = token in _CLOSING or token.lower() in _ENDINGS or not token.strip(".,!?")
        if token == '"':
            closes, quoted = quoted, not quoted
        if out and not glue and not (closes and not _SMILEY.fullmatch(out[-1])):
            out.append(" ")
        out.append(token)
        glue = token in _OPENING or (token == '"' and quoted)
    whole = _LONE_I.sub("I", "".join(out))
    return _SENTENCE.sub(lambda m: m.group(0)[:-1] + m.group(2).upper(), whole)


def clean(text: str) -> str:
    """Text fit to be sent: no control characters but new line and tab, no bidi controls, no lone surrogates."""
    return "".join(c for c in text if c in "\n\t" or (c not in _BIDI and unicodedata.category(c) not in ("Cc", "Cs")))
