# SPDX-License-Identifier: Apache-2.0
"""Configuration errors name the file, the line and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from cloister.errors import CloisterError, Code
from cloister.runtime.config import ConfigModel, GuestSection, ServiceSection, load_config


class Root(ConfigModel):
    path: Path
    simulated: bool = False


class Broker(ConfigModel):
    root_key_file: Path
    mode: Literal["embedded", "ehsm"] = "embedded"
    clock_skew_s: int = 30
    extra_paths: tuple[Path, ...] = ()


class Config(ConfigModel):
    service: ServiceSection
    guest: GuestSection | None = None
    keybroker: Broker
    trust_roots: tuple[Root, ...] = ()


GOOD = """\
# a comment
[service]
trust_domain = "cloister.test"
state_dir = "state"
endpoints_file = "/run/endpoints.json"

[keybroker]
root_key_file = "../root.key"
mode = "embedded"
extra_paths = ["a", "/b"]

[[trust_roots]]
path = "one.pem"

[[trust_roots]]
path = "two.pem"
simulated = true
"""


def load(tmp_path: Path, text: str | bytes) -> Config:
    path = tmp_path / "config.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(path, Config)


def refused(tmp_path: Path, text: str | bytes) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        load(tmp_path, text)
    assert caught.value.code is Code.CONFIG_INVALID
    assert str(tmp_path / "config.toml") in caught.value.what
    return caught.value


def test_paths_are_relative_to_the_file_and_defaults_fill_the_rest(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert config.service.state_dir == tmp_path / "state"
    assert config.service.endpoints_file == Path("/run/endpoints.json")
    assert config.keybroker.root_key_file == tmp_path.parent / "root.key"
    assert config.keybroker.extra_paths == (tmp_path / "a", Path("/b"))
    assert [root.path.name for root in config.trust_roots] == ["one.pem", "two.pem"]
    assert config.trust_roots[0].path.parent == tmp_path
    assert config.service.listen == "127.0.0.1:0"


@pytest.mark.parametrize(
    ("old", "new", "line", "why", "todo"),
    [
        ('mode = "embedded"', 'mode = "hsm"', 9, "keybroker.mode", "allowed values: 'embedded' or 'ehsm'"),
        ('mode = "embedded"', 'mood = "embedded"', 9, "no such key", "clock_skew_s, extra_paths, mode, root_key_file"),
        ('mode = "embedded"', 'clock_skew_s = "soon"', 9, "integer", "correct"),
        ('root_key_file = "../root.key"\n', "", 7, "keybroker.root_key_file: missing", "add root_key_file"),
        ("[service]", "[sevice]", 2, "sevice: no such key", "allowed keys: guest, keybroker"),
        ("simulated = true", 'simulated = "perhaps"', 17, "trust_roots[1].simulated", "true, false"),
        ('path = "one.pem"', "path = 5", 13, "trust_roots[0].path", "correct"),
        ('mode = "embedded"', 'mode = "embedded', 9, "not TOML", "correct"),
        ('mode = "embedded"', 'mode = "embedded"\nmode = "ehsm"', 10, "not TOML", "correct"),
    ],
)
def test_an_error_names_the_line_and_what_is_allowed(
    tmp_path: Path, old: str, new: str, line: int, why: str, todo: str
) -> None:
    error = refused(tmp_path, GOOD.replace(old, new))
    if "sevice" not in new:
        assert f"line {line} " in error.what
    assert why in error.why
    assert todo in error.todo


def test_an_error_does_not_repeat_the_value(tmp_path: Path) -> None:
    error = refused(tmp_path, GOOD.replace('mode = "embedded"', 'mode = "hunter2-secret"'))
    assert "hunter2" not in str(error)


@pytest.mark.parametrize("text", [b"\xff\xfe", b"a = " + b"[" * 20_000, b"#" * 2_000_000, b""])
def test_whatever_is_not_a_configuration_is_one_error(tmp_path: Path, text: bytes) -> None:
    refused(tmp_path, text)


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(CloisterError) as caught:
        load_config(tmp_path / "none.toml", Config)
    assert caught.value.code is Code.FILE_NOT_FOUND


def test_a_configuration_cannot_be_changed_afterwards(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    with pytest.raises(ValueError, match="frozen"):
        config.keybroker.mode = "ehsm"  # type: ignore[misc]
