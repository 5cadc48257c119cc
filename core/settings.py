"""Every knob of core, read once: credentials directory, NAME_FILE, environment, then .env in the working directory.

A wrong setting is one line that names the variable, what is wrong and an example; never the value.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from core.engine.base import SamplingParams

log = logging.getLogger(__name__)

ENV_FILE = ".env"
JOURNALS = ("sqlite", "sqlite+aiosqlite", "postgres", "postgresql", "postgresql+asyncpg")
SECRET = (SecretStr, SecretStr | None)
SOCKET_PATH = 107
"""Bytes; unix(7), sun_path."""
OTHERS = re.compile(r"HF_\w+|(HTTPS?|ALL|NO)_PROXY|SSL_CERT_(FILE|DIR)", re.IGNORECASE)
"""What libraries read from the environment alone."""
GroupT = TypeVar("GroupT", bound="Group")
_NESTED = ConfigDict(frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class WrongSettings(Exception):
    """`lines`: one per mistake, fit to print."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class _Files(PydanticBaseSettingsSource):
    """Secrets from $CREDENTIALS_DIRECTORY/NAME (systemd) or the file that NAME_FILE names (containers)."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        name = field_name.upper()
        if field.annotation not in SECRET:
            return None, name, False
        directory = os.environ.get("CREDENTIALS_DIRECTORY")
        if directory and (Path(directory) / name).is_file():
            return _read(name, Path(directory) / name), name, False
        file = os.environ.get(f"{name}_FILE") or _dotenv().get(f"{name}_FILE")
        return (_read(f"{name}_FILE", Path(file)) if file else None), name, False

    def __call__(self) -> dict[str, Any]:
        found = {name: self.get_field_value(f, name)[0] for name, f in self.settings_cls.model_fields.items()}
        return {name: value for name, value in found.items() if value}


def _read(name: str, path: Path) -> str:
    try:
        if text := path.read_text("utf-8-sig").strip():  # Windows' editors begin a file with a mark
            return text
        raise WrongSettings([f"{name}: the file is empty"])
    except (OSError, UnicodeDecodeError) as error:
        raise WrongSettings(
            [f"{name}: the file cannot be read ({type(error).__name__}); check path and rights"]
        ) from None


def _dotenv() -> dict[str, str | None]:
    try:
        text = Path(ENV_FILE).read_text("utf-8") if Path(ENV_FILE).is_file() else ""
    except UnicodeDecodeError:
        raise WrongSettings([f"{ENV_FILE}: is no UTF-8 text; save it as that"]) from None
    except OSError as error:
        raise WrongSettings([f"{ENV_FILE}: cannot be read ({error.strerror}); check its rights"]) from None
    parsed = parse_stream(StringIO(text))  # each line with blank ones before it; a name alone has None for a value
    wrong = [line.original for line in parsed if line.error or (line.key and line.value is None)]
    if lines := [bad.line + len(bad.string) - len(bad.string.lstrip("\n")) for bad in wrong]:
        raise WrongSettings([f"{ENV_FILE}: line {number} is not NAME=value" for number in lines])
    return dotenv_values(stream=StringIO(text), interpolate=False)


class _Dotenv(EnvSettingsSource):
    """The file as it stands: ${ in a password is no variable."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return {name.lower(): value for name, value in _dotenv().items() if value}


class Group(BaseSettings):
    """What a room or a bot wants set. Field names in capitals are the variables; nested fields join with __."""

    model_config = SettingsConfigDict(
        env_nested_delimiter="__",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _Files(settings_cls), env_settings, _Dotenv(settings_cls)


class QueueLimits(BaseModel):
    """How much may wait, and for how long."""

    model_config = _NESTED

    per_channel: int = Field(
        20,
        ge=1,
        description="messages waiting in one channel, and replies in its chat, all topics; more are shed",
        examples=[20],
    )
    per_user: int = Field(250, ge=1, description="messages waiting from one person, all channels", examples=[250])
    per_server: int = Field(2_000, ge=1, description="messages waiting in one server or group", examples=[2000])
    total: int = Field(20_000, ge=1, description="messages waiting in all", examples=[20000])
    deadline: float = Field(
        60.0, gt=0, le=86_400, description="seconds an answer may take, from receipt", examples=[60]
    )
    running: int = Field(
        0, ge=0, le=4096, description="answers under way at once, 0: as many as the engine runs", examples=[32]
    )


class DeliveryRules(BaseModel):
    """How replies go out when the platform makes trouble."""

    model_config = _NESTED

    patience: float = Field(900.0, gt=0, description="seconds after which an unsent reply is given up", examples=[900])
    in_doubt: Literal["resend", "abandon"] = Field(
        "resend",
        description="when nobody can tell whether a reply arrived: resend or abandon",
        examples=["resend"],
    )


class Settings(Group):
    database_url: SecretStr = Field(
        SecretStr("sqlite:///palaver.db"),
        description="where the journal is: SQLite or PostgreSQL",
        examples=["postgresql+asyncpg://palaver:PASSWORD@localhost/palaver"],
    )
    model: str = Field(
        "embedded",
        min_length=1,
        description="embedded, a hub name or a folder with a checkpoint",
        examples=["microsoft/DialoGPT-medium"],
    )
    model_revision: str = Field("", description="the hub revision to pin (branch, tag or commit)", examples=["main"])
    reverse_model: str = Field(
        "",
        description="judges candidates (SAMPLING__N above 1): a hub name or folder, from palaver finetune --reverse",
        examples=["./reverse"],
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N", examples=["cpu"])
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = Field(
        "auto", description="auto, float32 (exact), bfloat16, float16 or int8", examples=["float32"]
    )
    engine: str = Field(
        "process",
        description="process (a child), inprocess, echo (no model) or the address of a palaver engine",
        examples=["http://127.0.0.1:8100"],
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of the engine, 0 chooses", examples=[2])
    sampling: SamplingParams = Field(SamplingParams(), description="how replies are drawn")
    history_tokens: int = Field(128, ge=8, le=100_000, description="tokens of history in a prompt", examples=[128])
    history_keep: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of a full window kept when it moves on; less is faster",
        examples=[0.5],
    )
    normalise: bool = Field(True, description="speak the spaced spelling DialoGPT was trained on", examples=["true"])
    queue: QueueLimits = Field(QueueLimits(), description="overload")
    delivery: DeliveryRules = Field(DeliveryRules(), description="sending")
    grace: float = Field(
        10.0,
        ge=0,
        le=3600,
        description="seconds to finish answers under way at SIGTERM; a container's stop_grace_period must be 20 longer",
        examples=[10],
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="how much is logged: debug, info, warning or error", examples=["info"]
    )

    @field_validator("database_url")
    @classmethod
    def _a_journal(cls, url: SecretStr) -> SecretStr:
        scheme, slashes, rest = url.get_secret_value().strip().partition("://")
        if not slashes or scheme not in JOURNALS:
            raise ValueError("must be the address of a SQLite file (sqlite:///palaver.db) or a PostgreSQL database")
        if scheme.startswith("sqlite") and rest.lstrip("/").split("?")[0] in ("", ":memory:"):
            raise ValueError("must name a file: a journal in memory would lose everything")
        if scheme.startswith("sqlite") and not rest.startswith("/"):
            raise ValueError(
                "wants three slashes before a file's name, sqlite:///palaver.db, and four before a path's /"
            )
        if not scheme.startswith("sqlite"):
            if re.match(r"[^:/]*:[^@]*@[^/?]*@", rest):
                raise ValueError("has an @ in its password, where it must be %40")
            if not _has_port("//" + rest.rpartition("@")[2]):  # a password may have signs that end a host
                raise ValueError("has a port that is no number up to 65535")
        return SecretStr(url.get_secret_value().strip())

    @field_validator("device", "dtype", "engine", "log_level", mode="before")
    @classmethod
    def _in_any_case(cls, value: object) -> object:
        """Words; an address stays as it is."""
        return value.lower() if isinstance(value, str) and re.fullmatch(r"\w+(:\d+)?", value) else value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
            return value
        raise ValueError("must be auto, cpu, cuda or cuda:N")

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, value: str) -> str:
        if value.startswith("unix:") and len(os.fsencode(value[5:])) > SOCKET_PATH:
            raise ValueError(f"is longer than the {SOCKET_PATH} bytes that a socket's path may have")
        http = value.startswith(("http://", "https://")) and _is_host(urlsplit(value).hostname) and _has_port(value)
        if value in ("process", "inprocess", "echo") or http or (value.startswith("unix:") and value != "unix:"):
            return value.rstrip("/")
        raise ValueError("must be process, inprocess, echo or the address of a palaver engine")


def _is_host(name: str | None) -> bool:
    try:
        return bool(name and name.encode("idna"))
    except UnicodeError:  # no label, or one that is too long
        return False


def _has_port(url: str) -> bool:
    """One from 1 to 65535, or none."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def read(*groups: type[GroupT]) -> list[GroupT]:
    """One instance of each group; what .env says to libraries goes into the environment. Raises WrongSettings with the
    mistakes of all groups."""
    found, lines = [], _misspelt(groups)  # raises when .env cannot be read at all
    for name, value in _dotenv().items():
        if value and OTHERS.fullmatch(name) and os.environ.keys().isdisjoint({name, name.lower(), name.upper()}):
            os.environ[name] = value
    for group in groups:
        try:
            found.append(group())
        except ValidationError as error:
            lines += _explain(group, error)
        except SettingsError as error:
            name = _field_in(error)
            lines.append(f"{name}: is not valid JSON; {_nested(group, name)}")
        except WrongSettings as error:
            lines += error.lines
    if lines:
        raise WrongSettings(sorted(set(lines)))
    return found


def variables(group: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(variable, default, example, description) of every setting, nested ones too, in order."""
    for name, field in group.model_fields.items():
        default = field.get_default()
        variable, about = (prefix + name).upper(), field.description or ""
        if isinstance(default, SamplingParams):
            for f in fields(default):
                value = getattr(default, f.name)
                shown = "" if value is None else str(value)
                yield f"{variable}__{f.name.upper()}", shown, shown or "7", f.metadata["about"]
        elif isinstance(default, BaseModel):
            yield from variables(type(default), f"{prefix}{name}__")
        else:
            shown = default.get_secret_value() if isinstance(default, SecretStr) else default
            shown = "" if shown is None else str(shown).lower() if isinstance(shown, bool) else str(shown)
            yield variable, shown, str((field.examples or [shown])[0]), about


def _explain(group: type[BaseSettings], error: ValidationError) -> Iterator[str]:
    examples = {variable: example for variable, _, example, _ in variables(group)}
    for mistake in error.errors(include_input=False, include_url=False, include_context=False):
        path = [str(step).upper() for step in mistake["loc"]]
        what = mistake["msg"].removeprefix("Value error, ")
        if path == ["SAMPLING"] and what.split(" ", 1)[0] in SamplingParams.__dataclass_fields__:
            field, what = what.split(" ", 1)
            path.append(field.upper())
        name = "__".join(path)
        if mistake["type"] in ("model_type", "dataclass_type"):
            yield f"{name}: is no object in JSON; {_nested(group, name)}"
            continue
        example = examples.get(name, "")
        yield f"{name}: {what[:1].lower()}{what[1:]}" + (f"; for example {name}={example}" if example else "")


def _field_in(error: SettingsError) -> str:
    """The variable in pydantic's sentence 'error parsing value for field "x" from source "y"'."""
    parts = str(error).split('"')
    return parts[1].upper() if len(parts) > 1 else ENV_FILE


def _nested(group: type[BaseSettings], above: str) -> str:
    examples = (f"{name}={example}" for name, _, example, _ in variables(group) if name.startswith(f"{above}__"))
    return f"set its fields one by one, for example {next(examples, 'NAME=value')}"


def _misspelt(groups: tuple[type[GroupT], ...]) -> list[str]:
    """Names that nobody reads but that look like ours: a setting without effect is a mistake too."""
    known = [name for group in groups for name, *_ in variables(group)]
    nested = {name.split("__")[0] for name in known if "__" in name}
    secret = [n.upper() for g in groups for n, f in g.model_fields.items() if f.annotation in SECRET]
    ours = {*known, *(f"{name}_FILE" for name in secret), *nested}
    lines = []
    given = {
        **_dotenv(),
        **{name: value for name, value in os.environ.items() if name.split("__")[0].upper() in nested},
    }
    inner = [(name.upper(), key) for name, value in given.items() if name.upper() in nested for key in _keys(value)]
    lines += [f"{name}: its fields are in small letters, not {key}" for name, key in inner if key != key.lower()]
    for name in {*map(str.upper, given), *(f"{name}__{key.upper()}" for name, key in inner)}:
        near = _near(name, known, 0.85) or [
            short  # of which one wrong letter is a larger part
            for short in _near(name, known, 0.8)
            if (len(short), short[0]) == (len(name), name[0])
        ]
        if name not in ours and (near or name.split("__")[0] in nested):
            lines.append(f"{name}: is no setting" + (f"; did you mean {near[0]}?" if near else ""))
    for name in {name.upper() for name in os.environ} - ours:  # others set variables too: no mistake, but worth a word
        if near := _near(name, known, 0.9):
            log.warning("%s is no setting and does nothing here; %s is one", name, near[0])
    return lines


def _keys(value: str | None) -> list[str]:
    """Of an object in JSON."""
    try:
        found = json.loads(value or "")
    except ValueError:
        return []  # and so it says itself
    return list(found) if isinstance(found, dict) else []


def _near(name: str, known: list[str], cutoff: float) -> list[str]:
    """What was meant, if anything: also by who thinks that NAME_FILE is for all, and not for secrets alone."""
    plain = name.removesuffix("_FILE")
    return [plain] if plain in known else difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
