# SPDX-License-Identifier: Apache-2.0
"""What is in the log, and what never is."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog

from cloister.identity import Role, SpiffeId
from cloister.runtime import logging as cloister_logging
from cloister.runtime.logging import REDACTED, get_logger
from cloister.secret import SecretBytes

SECRET = "correct-horse-battery-staple"


@pytest.fixture
def lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    out = io.StringIO()
    cloister_logging.configure("keybroker", "json", out)
    yield lambda: [json.loads(line) for line in out.getvalue().splitlines()]
    structlog.contextvars.clear_contextvars()
    logging.getLogger().handlers[:] = []


def test_a_line_is_json_with_service_level_time_and_facts(lines: Callable[[], list[dict[str, Any]]]) -> None:
    structlog.contextvars.bind_contextvars(request_id="r-1")
    get_logger(job="j1").info("job ended", seconds=1.5, caller=SpiffeId.service("t.test", Role.TRAINER))
    [line] = lines()
    assert (
        line.items()
        >= {
            "event": "job ended",
            "service": "keybroker",
            "level": "info",
            "job": "j1",
            "request_id": "r-1",
            "caller": "spiffe://t.test/service/trainer",
        }.items()
    )
    assert line["timestamp"].endswith("Z")


@pytest.mark.parametrize(
    "name",
    ["secret", "password", "token", "private_key", "private_key_pem", "root_key", "data_key", "dek", "plaintext",
     "user_password", "authorization", "ear_token", "Data_Key", "data_key_hex", "payload"],
)  # fmt: skip
def test_fields_with_a_secret_name_are_redacted(name: str, lines: Callable[[], list[dict[str, Any]]]) -> None:
    get_logger().info("event", **{name: SECRET})
    assert lines()[0][name] == REDACTED


@pytest.mark.parametrize("name", ["key_uri", "public_key", "request_id", "keys_open", "token_id", "key_version"])
def test_fields_that_only_sound_secret_are_kept(name: str, lines: Callable[[], list[dict[str, Any]]]) -> None:
    get_logger().info("event", **{name: "value"})
    assert lines()[0][name] == "value"


def test_secrets_are_redacted_by_type_and_shape_however_deep(lines: Callable[[], list[dict[str, Any]]]) -> None:
    get_logger().info(
        "event",
        direct=SecretBytes(SECRET.encode()),
        nested={"a": [{"password": SECRET}, SecretBytes(b"x" * 32)], "b": {"c": SECRET.encode()}},
        pem=f"before -----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY----- after",
        text=f"Bearer eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiIxIn0123.{SECRET}",
        strange=object(),
        error=ValueError(SECRET),
    )
    [line] = lines()
    assert SECRET not in json.dumps(line)
    assert line["direct"] == f"<secret, {len(SECRET)} bytes>"
    assert line["nested"]["a"] == [{"password": REDACTED}, "<secret, 32 bytes>"]
    assert line["nested"]["b"]["c"] == f"<{len(SECRET)} bytes>"
    assert line["pem"] == f"before {REDACTED} after"
    assert line["strange"] == "<object>"


def fail_with_a_secret_at_hand() -> None:
    data_key_here = SECRET + "-local"
    assert data_key_here
    raise RuntimeError("it failed")


def test_a_traceback_has_lines_and_no_local_variables(lines: Callable[[], list[dict[str, Any]]]) -> None:
    try:
        fail_with_a_secret_at_hand()
    except RuntimeError:
        get_logger().exception("event")
        logging.getLogger("some.library").exception("from a library")
    ours, library = lines()
    for line in (ours, library):
        assert "RuntimeError: it failed" in line["exception"]
        assert "fail_with_a_secret_at_hand" in line["exception"]
        assert f"{SECRET}-local" not in json.dumps(line)
    assert library["library"] == "some.library"
    assert library["service"] == "keybroker"


def test_libraries_are_redacted_too(lines: Callable[[], list[dict[str, Any]]]) -> None:
    logging.getLogger("lib").warning("key -----BEGIN EC PRIVATE KEY-----%s", SECRET)
    assert SECRET not in json.dumps(lines())


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_an_uncaught_exception_of_a_process_has_no_local_variables(log_format: str) -> None:
    program = f"""
from cloister.runtime.logging import configure
configure("test", {log_format!r})
def fail(data):
    secret_local = "correct-" + "horse"
    raise RuntimeError("it failed")
fail(b"0123" * 2)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "it failed" in done.stderr
    assert "correct-horse" not in done.stderr
    assert "01230123" not in done.stderr


def test_text_is_for_people() -> None:
    out = io.StringIO()
    cloister_logging.configure("test", "text", out)
    get_logger().info("job ended", job="j1", password=SECRET)
    logging.getLogger().handlers[:] = []
    assert "job ended" in out.getvalue()
    assert "job=j1" in out.getvalue()
    assert SECRET not in out.getvalue()
