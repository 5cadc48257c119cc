"""Every mistake is one line that names the variable, what is wrong and an example; never the value."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field, SecretStr

from core.settings import Group, Settings, WrongSettings, read, variables


class Tokens(Group):
    some_token: SecretStr | None = Field(None, description="a secret", examples=["abc123"])


@pytest.fixture(autouse=True)
def empty_house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("CREDENTIALS_DIRECTORY", *(name for name, *_ in variables(Settings))):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def mistakes(*groups: type[Group]) -> list[str]:
    with pytest.raises(WrongSettings) as caught:
        read(*groups)
    return caught.value.lines


def test_without_any_setting_all_is_well() -> None:
    (settings,) = read(Settings)
    assert settings.model == "embedded" and settings.engine == "process"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SAMPLING__TEMPERATURE", "99"),
        ("SAMPLING__TEMPERATURE", "hot"),
        ("SAMPLING__TOP_K", "-7"),
        ("SAMPLING__TOP_P", "nan"),
        ("DATABASE_URL", "mysql://root:hunter2@db/x"),
        ("DATABASE_URL", "palaver.db"),
        ("DATABASE_URL", "sqlite:///:memory:"),
        ("DATABASE_URL", "sqlite://palaver.db"),
        ("DATABASE_URL", "postgresql://u@h:99999/x"),
        ("DATABASE_URL", "postgresql://u:p@ss@h/x"),
        ("ENGINE", "http://"),
        ("ENGINE", "http://h:99999"),
        ("ENGINE", "http://[::1"),
        ("ENGINE", "unix:"),
        ("ENGINE", "steam"),
        ("ENGINE", "http://a..b"),
        ("ENGINE", "unix:/" + "x" * 107),
        ("DEVICE", "tpu"),
        ("DTYPE", "int3"),
        ("HISTORY_TOKENS", "3"),
        ("QUEUE__DEADLINE", "inf"),
        ("QUEUE__TOTAL", "-1"),
        ("DELIVERY__IN_DOUBT", "pray"),
        ("NORMALISE", "perhaps"),
        ("GRACE", "forever"),
        ("LOG_LEVEL", "loud"),
    ],
)
def test_a_wrong_value_is_one_line_with_an_example(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    (line,) = mistakes(Settings)
    assert (
        line.startswith(f"{name}: ") and f"for example {name}=" in line and value not in line.split("; for")[0].split()
    )


@pytest.mark.parametrize(
    ("name", "value", "example"),
    [
        ("SAMPLING", "[1]", "SAMPLING__TEMPERATURE=0.4"),
        ("QUEUE", "5", "QUEUE__PER_CHANNEL=20"),
        ("QUEUE", "{", "QUEUE__"),
    ],
)
def test_an_object_that_is_none_is_named_by_its_fields(
    name: str, value: str, example: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    (line,) = mistakes(Settings)
    assert f"set its fields one by one, for example {example}" in line and line.startswith(f"{name}: is no")


def test_all_mistakes_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE", "steam")
    monkeypatch.setenv("GRACE", "-1")
    monkeypatch.setenv("QUEUE__TOTAL", "x")
    assert [line.split(":")[0] for line in mistakes(Settings)] == ["ENGINE", "GRACE", "QUEUE__TOTAL"]


def test_a_misspelt_name_is_a_mistake(empty_house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_house / ".env").write_text("DATABSE_URL=x\nPOSTGRES_PASSWORD=y\n")
    monkeypatch.setenv("SAMPLING__TEMPRATURE", "1")
    assert mistakes(Settings) == [
        "DATABSE_URL: is no setting; did you mean DATABASE_URL?",
        "SAMPLING__TEMPRATURE: is no setting; did you mean SAMPLING__TEMPERATURE?",
    ]


@pytest.mark.parametrize(
    ("name", "meant"),
    [("MODLE", "MODEL"), ("MIDEL", "MODEL"), ("GRAEC", "GRACE"), ("DEIVCE", "DEVICE"), ("DTYEP", "DTYPE")],
)
def test_a_slip_in_a_short_name_is_a_mistake(empty_house: Path, name: str, meant: str) -> None:
    (empty_house / ".env").write_text(f"{name}=x\n")
    assert mistakes(Settings) == [f"{name}: is no setting; did you mean {meant}?"]


def test_names_of_others_are_no_slips(empty_house: Path) -> None:
    others = (
        "HOME PATH NODE_ENV MODEL_NAME PORT DATABASE DATABASE_HOST DATABASE_PORT DEVICE_ID TRACE WEBHOOK_PORT QUEUE_URL"
    )
    (empty_house / ".env").write_text("".join(f"{name}=x\n" for name in others.split()))
    read(Settings)


def test_only_a_secret_has_a_file(
    empty_house: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (empty_house / "url").write_text("sqlite:///mine.db")
    monkeypatch.setenv("DATABASE_URL_FILE", str(empty_house / "url"))
    monkeypatch.setenv("LOG_LEVEL_FILE", "/somewhere")
    read(Settings)
    assert caplog.messages == ["LOG_LEVEL_FILE is no setting and does nothing here; LOG_LEVEL is one"]
    (empty_house / ".env").write_text("MODEL_FILE=/somewhere\nQUEUE__TOTAL_FILE=/somewhere\n")
    assert mistakes(Settings) == [
        "MODEL_FILE: is no setting; did you mean MODEL?",
        "QUEUE__TOTAL_FILE: is no setting; did you mean QUEUE__TOTAL?",
    ]


def test_a_misspelt_name_in_the_environment_is_worth_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOGLEVEL", "debug")
    monkeypatch.setenv("HOMEWORK", "1")
    read(Settings)
    assert caplog.messages == ["LOGLEVEL is no setting and does nothing here; LOG_LEVEL is one"]


def test_a_name_like_no_other_in_a_group_of_ours_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPLING__XYZZY", "1")
    assert mistakes(Settings) == ["SAMPLING__XYZZY: is no setting"]


def test_a_strange_field_of_an_object_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPLING", '{"top_k": 5, "temprature": 1, "TOP_P": 0.5}')
    assert mistakes(Settings) == [
        "SAMPLING: its fields are in small letters, not TOP_P",
        "SAMPLING__TEMPRATURE: is no setting; did you mean SAMPLING__TEMPERATURE?",
    ]


def test_words_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DEVICE", "CUDA:0"), ("DTYPE", "Float32"), ("ENGINE", "InProcess"), ("LOG_LEVEL", "WARNING")):
        monkeypatch.setenv(name, value)
    (settings,) = read(Settings)
    assert (settings.device, settings.dtype, settings.engine) == ("cuda:0", "float32", "inprocess")
    assert settings.log_level == "warning"
    monkeypatch.setenv("ENGINE", "unix:/tmp/Engine")
    assert read(Settings)[0].engine == "unix:/tmp/Engine"


def test_addresses_as_people_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", " sqlite:////data/palaver.db\n")
    monkeypatch.setenv("ENGINE", "http://engine:8000/")
    (settings,) = read(Settings)
    for address in ("postgresql://u:pa#s/s@h/x", "postgresql://u@there:p@h:5432/x", "postgresql://u:p@/x?host=/tmp/@"):
        monkeypatch.setenv("DATABASE_URL", address)
        assert read(Settings)[0].database_url.get_secret_value() == address
    assert settings.database_url.get_secret_value() == "sqlite:////data/palaver.db"
    assert settings.engine == "http://engine:8000"


def test_the_environment_goes_before_the_file(empty_house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_house / ".env").write_text("HISTORY_TOKENS=64\nQUEUE__TOTAL=7\nMODEL=\n")
    monkeypatch.setenv("HISTORY_TOKENS", "32")
    (settings,) = read(Settings)
    assert (settings.history_tokens, settings.queue.total, settings.model) == (32, 7, "embedded")


def test_the_file_is_taken_as_it_stands(empty_house: Path) -> None:
    (empty_house / ".env").write_text("SOME_TOKEN=pa${HOME}ss\n")
    (tokens,) = read(Tokens)
    assert tokens.some_token is not None and tokens.some_token.get_secret_value() == "pa${HOME}ss"


def test_secrets_come_from_credentials_then_files_then_the_environment(
    empty_house: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def token() -> str:
        (tokens,) = read(Tokens)
        assert tokens.some_token is not None and "from" not in repr(tokens)
        return tokens.some_token.get_secret_value()

    monkeypatch.setenv("SOME_TOKEN", "from environment")
    assert token() == "from environment"
    (empty_house / "file").write_text("from file\n")
    (empty_house / ".env").write_text("SOME_TOKEN_FILE=file\n")
    assert token() == "from file"
    (empty_house / ".env").unlink()
    monkeypatch.setenv("SOME_TOKEN_FILE", str(empty_house / "file"))
    assert token() == "from file"
    (empty_house / "file").write_text("from an editor on Windows\r\n", "utf-8-sig")
    assert token() == "from an editor on Windows"
    (empty_house / "SOME_TOKEN").write_text("from credentials\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(empty_house))
    assert token() == "from credentials"


def test_files_that_cannot_be_read_are_said(empty_house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN_FILE", "/nowhere")
    assert mistakes(Tokens)[0].startswith("SOME_TOKEN_FILE: the file cannot be read")
    (empty_house / "nothing").write_text(" \n")
    monkeypatch.setenv("SOME_TOKEN_FILE", str(empty_house / "nothing"))
    assert mistakes(Tokens) == ["SOME_TOKEN_FILE: the file is empty"]
    (empty_house / ".env").write_bytes(b"\xff\xfe")
    assert mistakes(Settings) == [".env: is no UTF-8 text; save it as that"]
    (empty_house / ".env").write_text('# mine\nGRACE=3\nSOME_TOKEN "secret"\n\nLOG_LEVEL="info\n')
    assert mistakes(Tokens) == [".env: line 3 is not NAME=value", ".env: line 5 is not NAME=value"]
    (empty_house / ".env").write_text("SOME_TOKEN=\n\nMTIz.secret\nSOME_TOKEN # comment\n")
    assert mistakes(Tokens) == [".env: line 3 is not NAME=value", ".env: line 4 is not NAME=value"]
    (empty_house / ".env").unlink()
    monkeypatch.delenv("SOME_TOKEN_FILE")
    monkeypatch.setenv("QUEUE", "{broken")
    assert mistakes(Settings)[0].startswith("QUEUE: is not valid JSON")
