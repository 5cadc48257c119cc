"""Text to ids and back: both forms of a checkpoint's files, hostile text, broken files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from core.engine.base import BadCheckpoint
from core.tokenizer import END_OF_TEXT, Tokenizer


def trained() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["hello there , how are you ?"] * 9, trainer)
    backend.add_special_tokens([END_OF_TEXT])
    return backend


@pytest.fixture(params=["tokenizer.json", "vocab.json"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    backend = trained()
    if request.param == "tokenizer.json":
        backend.enable_truncation(4)
        backend.save(str(tmp_path / "tokenizer.json"))
    else:
        backend.model.save(str(tmp_path))
        vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
        (tmp_path / "vocab.json").write_text(json.dumps(vocab | {END_OF_TEXT: len(vocab)}), encoding="utf-8")
    return tmp_path


def test_both_forms_give_the_same_ids(folder: Path) -> None:
    tokenizer, backend = Tokenizer.load(folder), trained()
    text = "hello there , how is Zo\u00eb ? \U0001f600"
    assert tokenizer.encode(text) == backend.encode(text).ids
    assert len(tokenizer) == backend.get_vocab_size()
    assert tokenizer.eos_id == len(tokenizer) - 1


def test_a_typed_end_of_text_stays_text(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    for text in (END_OF_TEXT, f"a {END_OF_TEXT}{END_OF_TEXT} b"):
        assert tokenizer.eos_id not in tokenizer.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_nobody_types_what_ends_a_reply_or_what_the_model_does_not_know(tmp_path: Path) -> None:
    """Also where the file does not call it special. What is special is not said; any other added word is both."""
    backend = trained()
    backend.add_tokens(["PADWORD", "farewell"])
    backend.add_special_tokens(["<sep>"])
    vocab = backend.get_vocab()
    end, farewell, sep = vocab[END_OF_TEXT], vocab["farewell"], vocab["<sep>"]
    whole = json.loads(backend.to_str())
    for token in whole["added_tokens"]:
        token["special"] = token["content"] == "<sep>"
    whole["added_tokens"][1]["id"], beyond = 900, 900
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole), "utf-8")
    tokenizer = Tokenizer.load(tmp_path, 400, end)
    ids = tokenizer.encode(f"a {END_OF_TEXT} PADWORD farewell <sep>")
    assert not {end, beyond, sep} & set(ids) and farewell in ids
    assert tokenizer.decode(ids) == f"a {END_OF_TEXT} PADWORD farewell <sep>"
    assert tokenizer.decode([*tokenizer.encode("a"), sep, end]) == "a"


def test_a_space_before_the_first_word_where_the_model_learnt_it_so(tmp_path: Path) -> None:
    trained().model.save(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text("utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {END_OF_TEXT: len(vocab)}), "utf-8")
    plain = Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    assert Tokenizer.load(tmp_path).encode("there") == plain.encode(" there") != plain.encode("there")


def test_what_it_does_not_know_is_no_end_of_text(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE({END_OF_TEXT: 0, "h": 1, "i": 2}, [], unk_token=END_OF_TEXT))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert backend.encode("hi zzz").ids == [1, 2, 0, 0, 0, 0]
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.encode("hi zzz"), tokenizer.encode("zzz")) == ([1, 2], [])


@pytest.mark.parametrize("special", [False, True])
def test_words_that_were_added_beside_the_two_files(tmp_path: Path, special: bool) -> None:
    """As Transformers 4 saved them. What is special is neither typed nor said."""
    backend = trained()
    backend.model.save(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {END_OF_TEXT: len(vocab)}), encoding="utf-8")
    end = len(vocab)
    decoder = {str(end + 1): {"content": "xyzzy", "special": special}, str(end + 2): {"content": "plugh"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}), "utf-8-sig")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"plugh": end + 2, "xyzzy": end + 1}), "utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("hello xyzzy plugh")
    assert (end + 1 in ids, end + 2 in ids) == (not special, True)
    assert tokenizer.decode([*tokenizer.encode("hello "), end + 1, end + 2]) == (
        "hello plugh" if special else "hello xyzzyplugh"
    )
    (tmp_path / "added_tokens.json").write_text(json.dumps({"plugh": end + 7}), "utf-8")
    with pytest.raises(BadCheckpoint, match=rf"added_tokens\.json has 'plugh' as {end + 7}, which is not the next id"):
        Tokenizer.load(tmp_path)


def test_cut_characters_and_strange_ids_are_left_out(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("ok \u20ac")
    assert tokenizer.decode(ids[:-1]) == "ok "
    assert tokenizer.decode([-1, *ids, tokenizer.eos_id, 10**6]) == "ok \u20ac"
    assert tokenizer.decode([]) == ""
    assert tokenizer.encode("") == []


TOKENIZER = Tokenizer(trained())


@given(st.text(st.characters(exclude_categories=()), max_size=100))
def test_every_string_survives(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.eos_id not in ids
    assert TOKENIZER.decode(ids) == text.encode("utf-8", "replace").decode().rstrip("\ufffd")


def test_more_ids_than_the_model_has_are_one_line(folder: Path) -> None:
    size = len(Tokenizer.load(folder))
    plain = size - (folder / "tokenizer.json").is_file()  # there the end of text is an added one
    Tokenizer.load(folder, plain)
    with pytest.raises(BadCheckpoint, match=f"has {plain} ids, the model {plain - 1}: put"):
        Tokenizer.load(folder, plain - 1)


def test_another_end_of_text_than_the_models_is_one_line(folder: Path) -> None:
    eos_id = Tokenizer.load(folder).eos_id
    Tokenizer.load(folder, eos_id=eos_id)
    words = rf"has <\|endoftext\|> as {eos_id}, config.json says eos_token_id 0: a reply would not end"
    with pytest.raises(BadCheckpoint, match=words):
        Tokenizer.load(folder, eos_id=0)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, "has no tokenizer"),
        ({"vocab.json": "{}"}, "has no tokenizer"),
        ({"tokenizer.json": '{"version": "1.0", "trunc'}, "tokenizer.json"),
        ({"tokenizer.json": ""}, "tokenizer.json"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\n"}, "vocab.json"),
        ({"vocab.json": "no json", "merges.txt": ""}, "vocab.json"),
    ],
)
def test_broken_files_give_one_line(tmp_path: Path, files: dict[str, str], named: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(BadCheckpoint, match=named) as raised:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(raised.value)
