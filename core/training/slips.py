"""How people really type: slang, missing marks, swapped letters, a word before or after. Slots stay untouched."""

from __future__ import annotations

import random
import re

SLANG = {
    "you": "u", "are": "r", "your": "ur", "what's": "whats", "don't": "dont", "i'm": "im", "because": "cuz",
    "really": "rly", "favorite": "favourite", "color": "colour", "can't": "cant", "that's": "thats", "it's": "its",
    "please": "pls", "thanks": "thx", "people": "ppl", "tomorrow": "tmrw", "love": "luv", "i've": "ive", "okay": "k",
    "doesn't": "doesnt", "didn't": "didnt", "isn't": "isnt", "know": "kno", "though": "tho", "where's": "wheres",
    "who's": "whos", "how's": "hows", "going to": "gonna", "want to": "wanna", "do you": "d you", "and": "n",
    "i'd": "id", "won't": "wont", "something": "smth", "right": "rite", "to": "2", "for": "4",
}  # fmt: skip
BEFORE = [
    *("hey", "so", "well", "hmm", "ok", "oh", "ok so", "btw", "by the way", "um", "hey palaver", "and", "but"),
    *("also", "now", "hi", "haha", "lol", "yo"),
]
AFTER = [
    *("lol", "haha", ":)", "please", "bro", "man", "then", "buddy", "my friend", "though", "palaver"),
    *("?", "??", "!", "!!", "...", ":D", "x"),
]
DROPPABLE = {
    *("do", "does", "is", "are", "the", "a", "an", "to", "of", "really", "so", "just", "very", "that", "it", "i"),
}


def mistype(rng: random.Random, text: str) -> str:
    """`text` as somebody in a hurry writes it; mostly unchanged."""
    if rng.random() < 0.6:
        return text
    for change, chance in (
        (_drop_marks, 0.35), (_slang, 0.3), (_letters, 0.25), (_capital, 0.3), (_around, 0.25), (_drop_word, 0.15)
    ):  # fmt: skip
        if rng.random() < chance:
            text = change(rng, text)
    return text


def _drop_marks(rng: random.Random, text: str) -> str:
    return re.sub(r"[.,!?]", "", text) if rng.random() < 0.5 else text.rstrip(".!?")


def _slang(rng: random.Random, text: str) -> str:
    found = [plain for plain in SLANG if re.search(rf"(?<![\w{{]){plain}(?![\w}}'])", text)]
    if not found:
        return text
    plain = rng.choice(found)
    return re.sub(rf"(?<![\w{{]){plain}(?![\w}}'])", SLANG[plain], text)


def _letters(rng: random.Random, text: str) -> str:
    """Two letters swapped, one doubled, or one lost, in one longer word."""
    words = text.split(" ")
    long = [index for index, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    if not long:
        return text
    index = rng.choice(long)
    word, at = words[index], rng.randrange(1, len(words[index]) - 1)
    words[index] = rng.choice(
        (
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            word[:at] + word[at:][0] + word[at:],
            word[:at] + word[at + 1 :],
        )
    )
    return " ".join(words)


def _capital(rng: random.Random, text: str) -> str:
    if rng.random() < 0.1 and "{" not in text:
        return text.upper()
    return text[:1].upper() + re.sub(r"\bi\b", "I", text[1:])


def _around(rng: random.Random, text: str) -> str:
    if rng.random() < 0.5:
        return f"{rng.choice(BEFORE)}{rng.choice(('', ','))} {text}"
    return f"{text} {rng.choice(AFTER)}"


def _drop_word(rng: random.Random, text: str) -> str:
    words = text.split(" ")
    small = [index for index, word in enumerate(words) if word in DROPPABLE]
    if not small or len(words) < 4:
        return text
    del words[rng.choice(small)]
    return " ".join(words)
