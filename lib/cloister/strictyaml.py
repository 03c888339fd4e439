# SPDX-License-Identifier: Apache-2.0
"""YAML without surprises: every scalar is a string, and nothing means more than it shows.

PyYAML's loaders turn `no` into False, keep the last of two equal keys and expand aliases; a policy read that way is
not the policy its owner saw. Here scalars stay text (with one line number each for error messages) and duplicates,
anchors, aliases, tags, merge keys, directives, several documents and empty values are refused. Only PyYAML's event
parser is used: nothing is constructed from a tag. Any malformed input ends in StrictYamlError.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import yaml
from yaml import events

Value: TypeAlias = "str | list[Value] | dict[str, Value]"
Path: TypeAlias = tuple[str | int, ...]

MAX_SIZE: Final = 64 * 1024  # bytes; a policy of 64 KiB is already unreadable to people
MAX_DEPTH: Final = 16  # nesting; the deepest block of a policy is 6
MAX_NODES: Final = 8192  # scalars and collections together


class StrictYamlError(Exception):
    """Text that is not YAML of this subset; `line` counts from 1, 0 when there is none."""

    def __init__(self, reason: str, *, line: int = 0) -> None:
        super().__init__(f"line {line}: {reason}" if line else reason)
        self.reason = reason
        self.line = line


@dataclass(frozen=True, slots=True)
class Document:
    """What was read, and on which line each value starts."""

    root: Value
    lines: Mapping[Path, int]

    def line_of(self, path: Path) -> int:
        """Return the line of a value, or of the nearest value above it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def path_text(path: Path) -> str:
    """Write a path as people do: spec.when.tee.tcb.status[0]."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text.removeprefix(".") or "(document)"


def load(data: bytes) -> Document:
    """Parse UTF-8 YAML of this subset, at most 64 KiB; raise StrictYamlError for anything else."""
    if len(data) > MAX_SIZE:
        raise StrictYamlError(f"longer than {MAX_SIZE} bytes")
    try:
        text = data.decode("utf-8", errors="strict")
    except UnicodeDecodeError as error:
        raise StrictYamlError("not UTF-8", line=data[: error.start].count(b"\n") + 1) from None
    if text.startswith("\ufeff"):
        raise StrictYamlError("starts with a byte order mark", line=1)
    try:
        return _Reader(yaml.parse(text, Loader=yaml.SafeLoader)).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise StrictYamlError(error.problem or "not YAML", line=mark.line + 1 if mark else 0) from None
    except yaml.YAMLError as error:
        raise StrictYamlError(str(error).splitlines()[0][:200]) from None
    except (ValueError, OverflowError):
        # PyYAML passes escapes such as "\UFFFFFFFF" to chr() unchecked.
        raise StrictYamlError("an escape sequence is not a character") from None


@dataclass(slots=True)
class _Reader:
    """Turn the event stream into values; state is the stream and the counters."""

    stream: Iterator[events.Event]
    lines: dict[Path, int] = field(default_factory=dict)
    nodes: int = 0

    def document(self) -> Document:
        self._next()  # StreamStart
        start = self._next()
        if not isinstance(start, events.DocumentStartEvent):
            raise StrictYamlError("empty")
        if start.version or start.tags:
            raise StrictYamlError("directives are refused", line=_line(start))
        root = self._value(self._next(), ())
        self._next()  # DocumentEnd
        after = self._next()
        if not isinstance(after, events.StreamEndEvent):
            raise StrictYamlError("a second document is refused", line=_line(after))
        return Document(root, self.lines)

    def _next(self) -> events.Event:
        return next(self.stream)

    def _value(self, event: events.Event, path: Path) -> Value:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise StrictYamlError(f"more than {MAX_NODES} values", line=_line(event))
        if len(path) > MAX_DEPTH:
            raise StrictYamlError(f"nested deeper than {MAX_DEPTH}", line=_line(event))
        if isinstance(event, events.AliasEvent):
            raise StrictYamlError("aliases are refused: write the value out", line=_line(event))
        self._refuse_anchor_and_tag(event)
        self.lines[path] = _line(event)
        if isinstance(event, events.ScalarEvent):
            return _text(event)
        if isinstance(event, events.SequenceStartEvent):
            return self._sequence(path)
        return self._mapping(path)

    def _sequence(self, path: Path) -> list[Value]:
        values: list[Value] = []
        while not isinstance(event := self._next(), events.SequenceEndEvent):
            values.append(self._value(event, (*path, len(values))))
        return values

    def _mapping(self, path: Path) -> dict[str, Value]:
        values: dict[str, Value] = {}
        while not isinstance(event := self._next(), events.MappingEndEvent):
            if not isinstance(event, events.ScalarEvent):
                raise StrictYamlError("a key must be plain text", line=_line(event))
            self._refuse_anchor_and_tag(event)
            key = _text(event)
            if key == "<<":
                raise StrictYamlError("merge keys are refused: write the values out", line=_line(event))
            if key in values:
                raise StrictYamlError(f"{key[:80]!r} stands twice", line=_line(event))
            values[key] = self._value(self._next(), (*path, key))
        return values

    @staticmethod
    def _refuse_anchor_and_tag(event: events.Event) -> None:
        if getattr(event, "anchor", None) is not None:
            raise StrictYamlError("anchors are refused", line=_line(event))
        if getattr(event, "tag", None) is not None:
            raise StrictYamlError("tags are refused: every value is text", line=_line(event))


def _text(event: events.ScalarEvent) -> str:
    """Return a scalar's text; an unquoted nothing is a forgotten value, not the empty string."""
    value: str = event.value
    if value == "" and event.style is None:
        raise StrictYamlError('a value is missing (write "" for the empty text)', line=_line(event))
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise StrictYamlError("an escape sequence is not a character", line=_line(event))
    return value


def _line(event: events.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 0
