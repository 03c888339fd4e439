# SPDX-License-Identifier: Apache-2.0
"""Logs: JSON lines (or text for people) without secrets, and without local variables in tracebacks."""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

from cloister.secret import SecretBytes

_marks: dict[str, Any] = {}  # facts about this process
REDACTED: Final = "<redacted>"
_MAX_DEPTH: Final = 6
# Whole words of a field's name. "key_uri", "public_key" and "request_id" are facts; "private_key" is not.
_SECRET_NAME: Final = re.compile(
    r"(?:^|_)(?:secret|password|passwd|passphrase|token|authorization|cookie|credential|credentials"
    r"|private_key(?:_pem)?|root_key|data_key|dek|kek|plaintext|payload)(?:$|_(?:bytes|hex|pem|value)$)"
)
# Text that carries a key or a bearer token, wherever it comes from (a library's message, say).
_SECRET_TEXT: Final = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+",
    re.DOTALL,
)


def configure(
    service: str,
    log_format: Literal["json", "text"] = "json",
    stream: TextIO | None = None,
    *,
    level: int = logging.INFO,
) -> None:
    """Set up logging of this process. Call it before anything that could fail: the defaults print locals.

    The standard library's loggers (grpc, asyncio, torch) go the same way.
    """
    out = stream or sys.stderr
    _marks.clear()
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _name_service(service),
        _format_exception,
        redact,
    ]
    renderer: structlog.typing.Processor
    if log_format == "json":
        renderer = _render_json
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared[:-2], _name_library],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _format_exception,
                redact,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught


def mark_every_line(**facts: Any) -> None:
    """Put these facts on every line of this process from now on, whoever logs it."""
    _marks.update(facts)


def get_logger(**facts: Any) -> FilteringBoundLogger:
    """Return a logger with these facts bound. The event is a constant phrase; facts are fields."""
    return cast(FilteringBoundLogger, structlog.get_logger(**facts))


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace secrets by name, by type and by shape, however deep they lie."""
    return {name: _redacted(name, value, 0) for name, value in event.items()}


@lru_cache(maxsize=1024)
def _is_secret_name(name: str) -> bool:
    return _SECRET_NAME.search(name.lower()) is not None


def _redacted(name: str, value: Any, depth: int) -> Any:
    if isinstance(value, SecretBytes):
        return repr(value)
    if _is_secret_name(name) and not isinstance(value, bool | None):
        return REDACTED
    if isinstance(value, str):
        # What the expression can begin with is looked for first: that is ten times as fast, and nearly always enough.
        return _SECRET_TEXT.sub(REDACTED, value) if "-----BEGIN " in value or "eyJ" in value else value
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if depth >= _MAX_DEPTH:
        return "..."
    if isinstance(value, Mapping):
        return {str(key): _redacted(str(key), inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redacted(name, inner, depth + 1) for inner in value]
    return value


def _format_exception(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Turn exc_info into text without local variables: they hold keys where it matters most."""
    found = event.pop("exc_info", None)
    if found is True:
        found = sys.exc_info()
    if isinstance(found, tuple):
        found = found[1]
    if isinstance(found, BaseException):
        formatted = traceback.TracebackException.from_exception(found, capture_locals=False, limit=40)
        event["exception"] = "".join(formatted.format()).rstrip()
    return event


def _describe(value: Any) -> str:
    # A repr of an unknown object could hold anything; its type is enough to find it.
    if isinstance(value, SecretBytes | BaseException):
        return repr(value) if isinstance(value, SecretBytes) else type(value).__name__
    return (
        str(value)
        if hasattr(value, "__fspath__") or type(value).__module__ == "cloister.identity"
        else (f"<{type(value).__name__}>")
    )


_ENCODER: Final = json.JSONEncoder(default=_describe, ensure_ascii=False)


def _render_json(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    return _ENCODER.encode(event)


def _name_service(service: str) -> structlog.typing.Processor:
    def add(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event["service"] = service
        event.update(_marks)
        return event

    return add


def _name_library(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    record = event.get("_record")
    if record is not None:
        event["library"] = record.name
    return event


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    get_logger().critical("uncaught exception", exc_info=(kind, error, trace))
