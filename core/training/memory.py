"""What a person tells about themselves, and how it is acknowledged, asked for and recalled: phrases, many of each.

`{v}` is the value, `{noun}` what it is called. Every phrase of one list may stand for every other of the same list.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from core.training.slots import names, values


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing to remember, for example the name or the favorite food."""

    noun: str
    slot: str
    tell: list[str]
    bare: list[str]
    """How it is told in answer to a question."""
    change: list[str]
    acknowledge: list[str]
    ask: list[str]
    answer: list[str]
    unknown: list[str]

    def value(self, rng: random.Random, *, held_out: bool) -> str:
        """A value that training may use, or one kept for the evaluation."""
        known = values(self.slot, held_out=held_out)
        if self.slot == "name" and rng.random() < 0.6:
            known = names(held_out=held_out)
        elif not held_out and self.slot in INVENTED and rng.random() < 0.25:
            return rng.choice(names(held_out=False)).lower()
        value = rng.choice(known)
        return plural(value) if self.slot in ("animal", "fruit") else value


INVENTED = frozenset(("food", "hobby", "game", "drink", "sport", "music", "color", "animal", "instrument", "country"))
"""Kinds that now and then get a made-up word, so that the model learns to repeat what it hears."""


def plural(word: str) -> str:
    """`foxes`, `cherries`; good enough for the animals and fruits of the slots."""
    if word in ("sheep", "deer", "moose", "salmon", "jellyfish", "goldfish"):
        return word
    if word in ("wolf", "goose"):
        return {"wolf": "wolves", "goose": "geese"}[word]
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("x", "s", "ch", "sh")) else "s")


def _lines(text: str) -> list[str]:
    return [part.strip() for part in text.replace("\n", " ").split("|") if part.strip()]


def _favorite(noun: str, slot: str = "") -> Fact:
    lines = {
        "tell": """my favorite {noun} is {v} | i love {v} | i really like {v} | {v} is my favorite {noun}
            | i'm a big fan of {v} | i like {v} a lot | i adore {v} | nothing beats {v} | i'm crazy about {v}
            | the {noun} i like best is {v} | you know, i love {v} | my favorite {noun} has always been {v}
            | just so you know, my favorite {noun} is {v} | guess what, i love {v} | i can't get enough of {v}
            | remember this: my favorite {noun} is {v} | i'm really into {v} | i like {v}""",
        "bare": """{v} | it's {v} | {v}, for sure | i love {v} | my favorite is {v} | {v} of course
        | definitely {v}
            | it is {v} | i like {v} | probably {v} | i'd say {v} | mine is {v}""",
        "change": """actually my favorite {noun} is {v} now | i changed my mind, my favorite {noun} is {v}
            | no wait, i like {v} more | now i like {v} better | these days my favorite {noun} is {v}
            | sorry, i meant {v}. that's my favorite {noun}""",
        "acknowledge": """{v}, a fine choice! I will remember that.
        | Good taste! I will keep {v} in mind for you.
            | Ooh, {v}! Tell me what you like about it. | Noted: you love {v}.
            | So {v} it is! How did that start?
            | Lovely, {v} is now on my list of things about you. | {v}! I could have guessed that you like that.
            | I see, a fan of {v}! Since when? | {v} is a great pick. I will not forget it.""",
        "ask": """what's my favorite {noun}? | what is my favorite {noun}? | do you remember my favorite {noun}?
            | which {noun} do i like best? | what {noun} do i like? | can you tell me my favorite {noun}?
            | do you know my favorite {noun}? | so what was my favorite {noun} again?
            | what did i say my favorite {noun} was?
            | which {noun} do i love? | remind me, what's my favorite {noun}? | what's the {noun} i like most?
            | do you still know what {noun} i like? | have you forgotten my favorite {noun}?""",
        "answer": """You told me that your favorite {noun} is {v}. | It is {v}, you said so yourself.
            | That would be {v}! | Easy one: {v}. | You like {v}, I did not forget. | {v}! Did I get it right?
            | I remember it well: {v}. | Your favorite {noun} is {v}.""",
        "unknown": """You have not told me your favorite {noun} yet. What is it?
        | I do not know that yet. Which {noun} do you like?
            | Hmm, you never said. What is your favorite {noun}?
            | That is still a secret to me. What is your favorite {noun}?""",
    }
    return Fact(
        noun, slot or noun, **{key: [s.replace("{noun}", noun) for s in _lines(text)] for key, text in lines.items()}
    )


def _fact(noun: str, slot: str, *texts: str) -> Fact:
    tell, bare, change, acknowledge, ask, answer, unknown = map(_lines, texts)
    return Fact(noun, slot, tell, bare, change, acknowledge, ask, answer, unknown)


NAME = _fact(
    "name",
    "name",
    """my name is {v} | i'm {v} | i am {v} | hi, i'm {v} | hello, my name is {v} | call me {v}
    | you can call me {v}
    | my name's {v} | hey, {v} here | this is {v} | people call me {v} | everyone calls me {v}
    | i'm {v}, nice to meet you
    | hi there, i am {v} | my friends call me {v} | the name is {v} | i go by {v} | hi palaver, i'm {v}
    | hello, i'm {v}
    | let me introduce myself, i'm {v} | please call me {v} | it's {v} by the way | btw my name is {v}
    | hi! my name is {v}. what's yours? | hi my name is {v} how are you?""",
    """{v} | it's {v} | i'm {v} | my name is {v} | {v}, and you? | call me {v} | just {v} | it is {v}
    | {v} is my name
    | you can call me {v} | oh, it's {v} | i am {v} | i'm called {v}""",
    """actually, call me {v} | sorry, my name is {v} | no, my real name is {v} | you can call me {v} instead
    | i changed my name to {v} | wait, i mean {v}. my name is {v} | from now on i am {v} | no it's {v}""",
    """Nice to meet you, {v}! How are you today? | Hello {v}! What a lovely name.
    | Hi {v}, I am Palaver. What is on your mind?
    | Pleased to meet you, {v}! What brings you here? | {v}, that is a name I will remember.
    | Welcome, {v}! I am Palaver.
    | A pleasure, {v}! What shall we talk about? | Great to meet you, {v}. I am Palaver, a small chat bot.
    | Got it, {v}!""",
    """what's my name? | what is my name? | do you remember my name? | who am i? | do you know my name?
    | say my name
    | can you tell me my name? | what am i called? | what was my name again? | did you forget my name?
    | remember my name?
    | do you still know my name? | do you know who i am? | what did i say my name was? | what do people call me?
    | remind me, what's my name? | tell me my name | whats my name | you remember what i'm called?""",
    """Your name is {v}. | You are {v}! | {v}, of course! | You told me that you are {v}.
    | How could I forget? You are {v}.
    | It is {v}, if I listened well. | You are {v}, and I am glad you are here. | That is easy: {v}!
    | I remember: {v}.""",
    """You have not told me yet. What is it? | I do not know it yet. What is your name?
    | You never said. What should I call you?
    | We have not done names yet! I am Palaver, and you? | I wish I knew! What is your name?""",
)
CITY = _fact(
    "place",
    "city",
    """i live in {v} | i'm from {v} | i come from {v} | my home is {v}
    | i was born in {v} and i still live there | i'm living in {v}
    | i am from {v} | my hometown is {v} | i'm based in {v} | greetings from {v} | i'm writing from {v}
    | hello from {v}
    | i've lived in {v} all my life | we live in {v} | i'm in {v} | home for me is {v}""",
    """{v} | in {v} | i'm from {v} | i live in {v} | from {v} | {v}, and you? | it's {v} | it's called {v}""",
    """i just moved to {v} | actually i live in {v} now | we moved to {v}
    | i meant {v}, that's where i live | now i live in {v}""",
    """{v}! I have never been anywhere, so tell me about it. | Ah, {v}! Do you like living there?
    | {v} sounds lovely. What is it like? | How nice, someone from {v}! What should I see there first?
    | I will picture {v} while we talk. Is it noisy there? | Hello to {v} then! Is it a good place to live?""",
    """where do i live? | where am i from? | do you remember where i live? | what city do i live in?
    | which city am i from?
    | do you know where i'm from? | where did i say i live? | what's my hometown? | which place do i call home?
    | what city am i from? | where is my home? | remind me where i live | do you remember where i'm from?""",
    """You live in {v}. | In {v}, you told me! | You are from {v}. | {v}, right?
    | It is {v}, if I remember well.
    | You said {v}, and I kept that. | That would be {v}!""",
    """You have not told me where you live. Where is it? | I do not know yet. Where are you from?
    | You never said. Which city is home to you? | I can not guess that. Where do you live?""",
)
PET = _fact(
    "pet",
    "name",
    """my {pet} is called {v} | i have a {pet} named {v} | i have a {pet} called {v}
    | my {pet}'s name is {v} | i got a {pet}, his name is {v}
    | we have a {pet}, she is called {v} | my {pet} {v} says hi | this is my {pet} {v}
    | i've got a {pet} named {v}""",
    """{v} | it's {v} | his name is {v} | her name is {v} | we call it {v} | {v}, my {pet}
    | she's called {v}""",
    """i renamed my {pet}, it's {v} now | actually my {pet} is called {v} | sorry, my {pet} is {v}""",
    """{v} is a wonderful name for a {pet}! | Give {v} a gentle pat from me!
    | Aw, {v}! What is {v} doing right now?
    | I would love to meet {v}. Is your {pet} lazy or lively? | {v} the {pet}, I will remember that name!""",
    """what's my {pet}'s name? | what is my {pet} called? | do you remember my {pet}'s name?
    | what's the name of my {pet}?
    | how is my {pet} called? | do you know the name of my {pet}? | what did i name my {pet}? | who is my {pet}?
    | what is the name of my {pet}? | do you still know my {pet}'s name?""",
    """Your {pet} is called {v}. | {v}, your {pet}! | That is {v}, of course. | The name of your {pet} is {v}.
    | {v}! I hope your {pet} is well. | It is {v}, I remembered.""",
    """You have not told me the name of your {pet}. What is it?
    | I do not know your {pet} yet. What is it called?
    | You never told me. How do you call your {pet}?""",
)
FRIEND = _fact(
    "friend",
    "name",
    """my {kin} is called {v} | my {kin}'s name is {v} | i have a {kin} named {v} | {v} is my {kin}
    | my {kin} {v} is visiting
    | i was out with my {kin} {v} | my {kin} {v} makes me laugh""",
    """{v} | it's {v} | {v} is the name | my {kin} is {v} | my {kin}'s name is {v}""",
    """no wait, my {kin} is called {v} | sorry, i meant {v}. that's my {kin}'s name
    | actually my {kin} is {v}""",
    """{v} sounds like good company! | Say hello to {v} from me! | Ah, {v}! Do the two of you meet often?
    | How nice. What is {v} like? | I will remember {v}. Are you close?""",
    """what's my {kin}'s name? | what is the name of my {kin}? | do you remember my {kin}'s name?
    | who is my {kin}?
    | what is my {kin} called? | do you know what my {kin} is called? | remember my {kin}'s name?""",
    """Your {kin} is called {v}. | That is {v}! | {v}, your {kin}. | You told me about {v}.
    | The name of your {kin} is {v}.""",
    """You have not told me about your {kin} yet. What is the name?
    | I do not know that name yet. How is your {kin} called?
    | You never said. What is your {kin}'s name?""",
)
MOOD = _fact(
    "mood",
    "mood",
    """i feel {v} today | i'm feeling {v} | i am {v} | i'm so {v} today | i'm a bit {v} | i feel really {v}
    | i'm {v} right now
    | today i am {v} | feeling {v} | to be honest, i feel {v} | i woke up {v} | i'm kind of {v}
    | honestly i'm pretty {v}""",
    """{v} | i'm {v} | pretty {v} | i feel {v} | a bit {v} | kind of {v} | quite {v} today | {v}, and you?""",
    """now i feel {v} | actually i'm more {v} now | i'm {v} now | that changed, now i'm {v}
    | i was, but now i feel {v}""",
    """Thank you for telling me that you feel {v}. What happened? | So you are {v}. Do you know why?
    | {v}, I see. Do you want to talk about it? | I hear you. What made you {v}?
    | Feeling {v} is part of life. Tell me more!""",
    """how was i feeling? | how do i feel? | how did i say i feel? | do you remember how i feel?
    | what's my mood?
    | what mood am i in? | how am i feeling today? | do you know how i feel? | how did i feel?
    | do you remember my mood?
    | what did i say about my mood?""",
    """You said that you feel {v}. | You told me you were {v}. Is that still so?
    | You felt {v}. How is it now? | {v}, you said.
    | As far as I know, {v}. | You were feeling {v} when you told me.""",
    """You have not told me. How do you feel? | I can not see that from here. How are you feeling?
    | You did not say. What is your mood?
    | I would like to know! How are you?""",
)
JOB = _fact(
    "job",
    "job",
    """i work as a {v} | i'm a {v} | i am a {v} | my job is {v} | i'm working as a {v}
    | i earn my money as a {v}
    | i've been a {v} for years | i'm a {v} by trade | i just started working as a {v}
    | my profession is {v}""",
    """{v} | i'm a {v} | a {v} | i work as a {v} | i am a {v} | {v}, and you?""",
    """i have a new job, i'm a {v} now | actually i work as a {v} now | i changed jobs and became a {v}
    | now i'm a {v}""",
    """A {v}! What is the best part of it? | How interesting, a {v}! Do you like the work?
    | {v} is a job with stories, I bet. Tell me one! | So you are a {v}. Was that always your plan?
    | I respect that. Is being a {v} hard?""",
    """what's my job? | what do i do for a living? | what is my job? | do you remember my job?
    | what do i work as?
    | do you know what i do for work? | where do i earn my money? | what was my job again?
    | what's my profession?
    | do you remember what i do?""",
    """You work as a {v}. | You are a {v}! | You told me your job: {v}. | {v}, that is your job.
    | As far as I remember, {v}.
    | Your job is {v}, you said.""",
    """You have not told me. What do you do? | I do not know your job yet. What is it?
    | You never said. What do you do for a living?""",
)
AGE = _fact(
    "age",
    "age",
    """i'm {v} years old | i am {v} years old | i'm {v} | i just turned {v} | my age is {v}
    | i turned {v} this year | im {v} years old""",
    """{v} | i'm {v} | i am {v} | {v} years old | i just turned {v}""",
    """no, i'm {v} years old | actually i am {v} | it's my birthday, now i'm {v}""",
    """{v} is a fine age! What do you like about it? | {v}! I am much younger, I am only a bot.
    | At {v} you surely have stories to tell. | {v} years of adventures! Which was the best one?""",
    """how old am i? | what's my age? | do you remember my age? | what is my age?
    | do you know how old i am? | how old did i say i am?
    | can you tell me how old i am?""",
    """You are {v} years old. | {v}, you told me. | You said {v}. | You are {v}!
    | If I remember well, you are {v}.""",
    """You have not told me your age. How old are you? | I do not know. How old are you?
    | You never said. What is your age?""",
)
FAVORITES = [
    _favorite(noun, slot)
    for noun, slot in [
        ("food", ""), ("color", ""), ("animal", ""), ("hobby", ""), ("music", ""), ("sport", ""), ("drink", ""),
        ("game", ""), ("fruit", ""), ("season", ""), ("instrument", ""), ("city", ""), ("country", ""),
        ("movie genre", "movie_genre"), ("book genre", "book_genre"),
    ]
]  # fmt: skip
WHAT_I_LIKE = _lines(
    """what do i like? | do you remember what i like? | do you know what i like? | what did i say i like?
    | what do i love?
    | tell me something i like | do you remember what i love? | what was it that i like?
    | what am i a fan of?"""
)
LIKE_ANSWERS = _lines(
    """You like {v}. | You told me that you like {v}. | {v}! You said you love it. | I remember: {v}.
    | You are a fan of {v}."""
)
ABOUT_ME = _lines(
    """what do you know about me? | what do you remember about me? | tell me what you know about me
    | do you remember me?
    | what have i told you about myself?"""
)
ABOUT_YOU = _lines(
    """You are {name}, and you like {like}. | Your name is {name} and you like {like}.
    | I know that you are {name} and that you love {like}."""
)
ABOUT_NOBODY = _lines(
    """Not much yet! What is your name? | You are still a mystery to me. What should I call you?
    | Only that you are good company. What is your name?"""
)
TWO_AT_ONCE = _lines(
    """i'm {name} and i love {like} | my name is {name} and i like {like} | hi, i'm {name}, i really like {like}
    | call me {name}. i'm a fan of {like} | {name} here, i love {like}"""
)
TWO_NOTED = _lines(
    """Nice to meet you, {name}! {like} is a fine choice. | Hello {name}! I will remember that you love {like}.
    | Hi {name}, a fan of {like}! Tell me more. | Welcome, {name}! What do you like about {like}?"""
)
YOUR_NAME = _lines(
    """what's your name? | what is your name? | who are you? | and what's your name? | do you have a name?
    | what are you called?
    | what should i call you? | tell me your name | your name? | and you? who are you? | how do i call you?
    | whats ur name"""
)
MY_NAME = _lines(
    """I am Palaver, a small chat bot. | My name is Palaver. It means a long and lively talk!
    | Palaver, at your service!
    | They call me Palaver. | I am Palaver! I like long talks. | You can call me Palaver."""
)
REPEAT = _lines(
    """repeat after me: {w} | say {w} | can you say {w}?
    | please say: {w} | repeat: {w} | say this: {w}
    | repeat this: {w} | echo {w}
    | just say {w} | now say {w} | could you repeat {w}? | copy me: {w} | type {w} | write {w}"""
)
REPEATED = _lines("{w} | {w}! | Sure: {w}. | Here you go: {w}. | {w}. Happy now? | {w}. What else? | As you wish: {w}.")
RIGHT = _lines(
    """correct | that's right | yes | right! | good memory | wow you remembered | exactly | yep
    | nice, you remember | well done
    | you remembered! | yes, that's right"""
)
PLEASED = _lines(
    """I listen, you see! | Hooray! My little memory works. | I try my best. What else should I know?
    | It was worth remembering!
    | Phew, lucky me! | Of course! I do pay attention. | That makes me a bit proud."""
)
KIN = _lines(
    """sister | brother | best friend | friend | mother | father | son | daughter | boss | neighbor
    | roommate | wife | husband | cousin"""
)
