"""A checkpoint on disk -> Config and tensors under the model's own names, every one of them checked, each read when
it is taken: a model that packs as it goes needs memory for what it keeps and little more.

Reads what the GPT-2 family comes in: model.safetensors or pytorch_model.bin, in one file or in shards, with or without
the `transformer.` prefix, with legacy attention buffers, with lm_head tied, explicit or (the reverse model of the
DialoGPT paper) as `lm_head.decoder.weight`, in any floating type.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.engine.base import BadCheckpoint
from core.engine.config import Config, mend, read_config

BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|.*\.rotary_emb\..*")
"""Constants that old versions stored beside the weights."""

REMAP = 16 << 20
"""Bytes read of a mapped file count as this process's memory; after so many it is mapped anew and they are not."""


class Tensors(MutableMapping[str, Tensor]):
    """Tensors by name. One that nobody has set is read from its file whenever it is looked at, so `pop` it and copy
    what is kept: a view keeps the file mapped. Raises BadCheckpoint where it holds NaN or infinity.
    """

    def __init__(self, names: Iterable[str], remap: Callable[[], dict[str, Tensor]], source: Path) -> None:
        self._set: dict[str, Tensor | None] = dict.fromkeys(names)
        self._remap, self._source = remap, source
        self._mapped: dict[str, Tensor] = {}
        self._bytes_read = math.inf

    def __getitem__(self, name: str) -> Tensor:
        if (tensor := self._set[name]) is not None:
            return tensor
        if self._bytes_read > REMAP:
            self._mapped, self._bytes_read = self._remap(), 0
            trim()
        tensor = self._mapped[name]
        self._bytes_read += tensor.nbytes
        _check_finite(name, tensor, self._source)
        return tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._set[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._set[name]

    def __contains__(self, name: object) -> bool:
        return name in self._set  # the one inherited would read it

    def __iter__(self) -> Iterator[str]:
        return iter(self._set)

    def __len__(self) -> int:
        return len(self._set)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's numbers on the CPU, as stored; `tensors` has exactly the names of `config.shapes()`."""

    folder: Path
    config: Config
    tensors: Tensors

    def take(self, name: str, to: torch.dtype, device: torch.device | None = None) -> Tensor:
        """A tensor in another type, out of `tensors`. Raises BadCheckpoint where that has no such numbers."""
        tensor = self.tensors.pop(name).to(device, to, copy=True)  # a view would keep the whole file mapped
        if to is torch.float16 and not tensor.isfinite().all():
            what = f"{self.folder}: {name} holds numbers beyond float16's 65504"
            raise BadCheckpoint(f"{what}: DTYPE=bfloat16 or float32 takes them")
        return tensor


def load(folder: Path) -> Checkpoint:
    """Check the checkpoint, its numbers excepted: they are when they are read. Raises BadCheckpoint, one line that
    names the file and the mend.
    """
    config = read_config(folder / "config.json")
    source, files = _weight_files(folder)
    as_found = _stamps(files)

    def mapped() -> dict[str, Tensor]:
        tensors = _named(files, config)
        if _stamps(files) != as_found:
            raise BadCheckpoint(f"{source} was changed while it was read: start again")
        return tensors

    tensors = mapped()
    _check_tie(tensors, config, source)
    _check(tensors, config, source)
    found = Tensors(tensors, mapped, source)
    if not all(_can_be_mapped(file) for file in files):
        for name, tensor in tensors.items():
            _check_finite(name, tensor, source)
            found[name] = tensor
    return Checkpoint(folder, config, found)


def _weight_files(folder: Path) -> tuple[Path, list[Path]]:
    """What to call them, and the first kind that is there: safetensors before .bin, shards after the single file."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        path, index = folder / name, folder / f"{name}.index.json"
        if path.is_file():
            return path, [path]
        if index.is_file():
            return index, [folder / shard for shard in _shards(index)]
    raise BadCheckpoint(f"{folder} has neither model.safetensors nor pytorch_model.bin: fetch the weights")


def _stamps(files: list[Path]) -> list[tuple[int, int, int]]:
    return [(found.st_ino, found.st_size, found.st_mtime_ns) for found in (file.stat() for file in files)]


def _shards(index: Path) -> list[str]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise BadCheckpoint(f"{index} is not an index of shards ({error!r}): {mend(index)}") from error
    for name in names:
        if Path(name).name != name or not os.path.isfile(index.parent / name):
            raise BadCheckpoint(f"{index} names {name!r:.80}, which is not there: fetch the missing shard")
    return names


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise BadCheckpoint(f"{path} is damaged or cut short ({_one_line(error)}): {mend(path)}") from error


def _can_be_mapped(path: Path) -> bool:
    """Not the .bin of a torch before 1.6, which is no zip."""
    return path.suffix == ".safetensors" or zipfile.is_zipfile(path)


def _read_bin(path: Path) -> dict[str, Tensor]:
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except Exception as error:  # torch raises whatever the broken pickle or zip made it raise
        raise BadCheckpoint(
            f"{path} is damaged, cut short, or holds more than weights ({_one_line(error)}): {mend(path)}"
        ) from error
    raw = raw.get("state_dict", raw) if isinstance(raw, dict) else None
    if not isinstance(raw, dict):
        raise BadCheckpoint(f"{path} holds no weights by name: save model.state_dict() there")
    tensors = {str(name): value for name, value in raw.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise BadCheckpoint(f"{path}: {name} holds no numbers side by side: save the dense tensor")
    return tensors


def _named(files: list[Path], config: Config) -> dict[str, Tensor]:
    """All tensors, mapped, under the model's own names: prefixes off, buffers out, the embedding's from the head where
    the file has only that.
    """
    tensors = {}
    for file in files:
        for name, tensor in (_read_safetensors if file.suffix == ".safetensors" else _read_bin)(file).items():
            name = name.removeprefix("module.").removeprefix("transformer.")
            name = "lm_head.weight" if name == "lm_head.decoder.weight" else name
            if name in tensors:
                raise BadCheckpoint(f"{file} holds {name} a second time, under another prefix: leave one of them out")
            if not BUFFERS.fullmatch(name):
                tensors[name] = tensor
    if config.tied and "lm_head.weight" in tensors:
        tensors.setdefault("wte.weight", tensors["lm_head.weight"])
    return tensors


def _check_tie(tensors: dict[str, Tensor], config: Config, source: Path) -> None:
    """Take a tied head out, which must be the embedding again."""
    head = tensors.pop("lm_head.weight", None) if config.tied else None
    if head is None:
        return
    embedding = tensors["wte.weight"]
    if head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
        raise BadCheckpoint(
            f"{source}: lm_head.weight differs from wte.weight, but config.json ties them: "
            'write "tie_word_embeddings": false there if that is meant'
        )


def _check(tensors: dict[str, Tensor], config: Config, source: Path) -> None:
    """Names, shapes and types, which need no number read."""
    shapes = config.shapes()
    for problem, names in (("lacks", shapes.keys() - tensors.keys()), ("has unknown", tensors.keys() - shapes.keys())):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise BadCheckpoint(f"{source} {problem} {listed}: it does not belong to config.json, or is no GPT-2 model")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise BadCheckpoint(f"{source}: {name} has shape {tuple(tensor.shape)}, config.json says {shape}")
        if not tensor.is_floating_point():
            raise BadCheckpoint(f"{source}: {name} is {tensor.dtype}; quantised files are not read, use the original")


def _check_finite(name: str, tensor: Tensor, source: Path) -> None:
    ends = torch.aminmax(tensor if tensor.itemsize == 2 else tensor.float())  # NaN where one is
    if not all(map(math.isfinite, ends)):
        raise BadCheckpoint(f"{source}: {name} holds NaN or infinity (in float32): the file is damaged, fetch it again")


def trim() -> None:
    """Give back to the system what was freed: glibc would keep it, other C libraries have no such function."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _one_line(error: Exception) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch writes for terminals
    return " ".join(plain.split())[:160] or type(error).__name__
