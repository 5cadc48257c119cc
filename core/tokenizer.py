"""Text to token ids and back, without torch. What a person types can never become the end-of-text id."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from core.engine.base import BadCheckpoint
from core.engine.config import mend

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """GPT-2's byte-level BPE. Knows every string; adds nothing at either end."""

    def __init__(self, backend: tokenizers.Tokenizer, vocab_size: int = 0) -> None:
        """For a model of `vocab_size` (0: of all ids). ValueError when the vocabulary has no `<|endoftext|>`."""
        eos_id = backend.token_to_id(END_OF_TEXT)
        if eos_id is None:
            raise ValueError(f"the vocabulary has no {END_OF_TEXT}")
        added = backend.get_added_tokens_decoder()
        reserved = [t for id, t in added.items() if id == eos_id or 0 < vocab_size <= id]
        backend.add_special_tokens([tokenizers.AddedToken(t.content, special=True, normalized=False) for t in reserved])
        backend.encode_special_tokens = True  # a typed "<|endoftext|>" is split like any other text
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_id: int = eos_id
        self._unsaid = {eos_id} | {id for id, t in added.items() if t.special}

    @classmethod
    def load(cls, folder: str | Path, vocab_size: int = 0, eos_id: int | None = None) -> Tokenizer:
        """From a checkpoint's folder: `tokenizer.json`, else DialoGPT's `vocab.json` and `merges.txt`.

        Raises BadCheckpoint, one line that names the file, also where text has ids that a model of `vocab_size` (0: not
        asked) does not know, or where a model that ends with `eos_id` (None: not asked) would not be heard to end.
        """
        folder = Path(folder)
        whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
        in_one_file = whole.is_file()
        if not in_one_file and not (vocab.is_file() and merges.is_file()):
            raise BadCheckpoint(f"{folder} has no tokenizer: put tokenizer.json, or vocab.json and merges.txt, there")
        file = whole if in_one_file else vocab
        try:
            backend = tokenizers.Tokenizer.from_file(str(whole)) if in_one_file else _from_vocab(vocab, merges)
            tokenizer = cls(backend, vocab_size)
        except Exception as error:  # the library raises plain Exception
            reason = " ".join(str(error).split())
            raise BadCheckpoint(f"{file} is not a GPT-2 tokenizer ({reason}): {mend(file)}") from error
        ids = max(backend.get_vocab(with_added_tokens=False).values(), default=-1) + 1  # added ones nobody types
        if vocab_size and ids > vocab_size:
            raise BadCheckpoint(
                f"{file} has {ids} ids, the model {vocab_size}: put the tokenizer it was trained with there"
            )
        if eos_id not in (None, tokenizer.eos_id):
            raise BadCheckpoint(
                f"{file} has {END_OF_TEXT} as {tokenizer.eos_id}, config.json says eos_token_id {eos_id}: "
                "a reply would not end; write the right one there"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; never `eos_id`, though some vocabularies have it for what they do not know. Lone
        surrogates count as question marks."""
        ids = self._backend.encode(text.encode("utf-8", "replace").decode("utf-8"), add_special_tokens=False).ids
        return [id for id in ids if id != self.eos_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`. Special tokens, unknown ids and a character cut off at the end are left out."""
        known = [i for i in ids if 0 <= i < len(self) and i not in self._unsaid]
        text: str = self._backend.decode(known, skip_special_tokens=False)
        return text.rstrip("\ufffd")

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of each token."""
        found: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return found

    def __len__(self) -> int:
        """Size of the vocabulary, `<|endoftext|>` included."""
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        return size


def _from_vocab(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    config, added = (_read(vocab.with_name(name)) for name in ("tokenizer_config.json", "added_tokens.json"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space") is True)
    backend.decoder = decoders.ByteLevel()
    known = config.get("added_tokens_decoder", {})
    for content, id in sorted(added.items(), key=lambda item: int(item[1])):
        special = known.get(str(id), {}).get("special") is True
        backend.add_tokens([tokenizers.AddedToken(content, special=special, normalized=False)])
        if backend.token_to_id(content) != id:
            raise ValueError(f"added_tokens.json has {content!r:.40} as {id}, which is not the next id")
    return backend


def _read(path: Path) -> dict[str, Any]:
    """{} where there is none."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8-sig")) if path.is_file() else {}
    return found
