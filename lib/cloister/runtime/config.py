# SPDX-License-Identifier: Apache-2.0
"""Configuration files: TOML into frozen models, with errors that name path, line and allowed values."""

from __future__ import annotations

import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cloister.errors import CloisterError, Code

# What validators of a model find in ValidationInfo.context: the directory of the file, for paths inside other text.
DIRECTORY: Final = "directory"
_MAX_BYTES: Final = 1024 * 1024
_SECTION: Final = re.compile(r"^\s*\[\[?\s*([A-Za-z0-9_.\"' -]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY: Final = re.compile(r"^\s*([A-Za-z0-9_.\"'-]+)\s*=")


class ConfigModel(BaseModel):
    """A section of a configuration file: frozen, unknown keys refused, no silent conversion of defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True)


class ServiceSection(ConfigModel):
    """[service]: what every service needs to run. Port 0 lets the system choose; see `endpoints_file`."""

    trust_domain: str
    listen: str = "127.0.0.1:0"
    health_listen: str = "127.0.0.1:0"
    metrics_listen: str = "127.0.0.1:0"
    state_dir: Path
    endpoints_file: Path
    reflection: bool = True
    log_format: Literal["json", "text"] = "json"


class GuestSection(ConfigModel):
    """[guest]: where quotes come from and who appraises them."""

    provider: str
    attest_endpoint: str
    trust_bundle: Path
    # A Unix socket for the SPIFFE Workload API: whoever of this user connects gets the TLS key. None: not served.
    workload_api: Path | None = None


_Model = TypeVar("_Model", bound=BaseModel)


def load_config(path: Path, model: type[_Model]) -> _Model:
    """Read a TOML file into `model`; `Path` fields are relative to the file.

    Raises CloisterError(FILE_NOT_FOUND) or CloisterError(CONFIG_INVALID).
    """
    return load_measured_config(path, model)[0]


def load_measured_config(path: Path, model: type[_Model]) -> tuple[_Model, bytes]:
    """Read a TOML file once, into `model` and the bytes it came from: what a TD measures is what it obeys."""
    data = _read(path)
    return _parse(path, data, model), data


def _parse(path: Path, data: bytes, model: type[_Model]) -> _Model:
    text = _decode(path, data)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _invalid(path, _line_of_syntax_error(error, text), f"not TOML: {_first_clause(error)}") from None
    except RecursionError:
        raise _invalid(path, None, "not TOML: nested too deeply") from None
    _anchor(document, model, path.parent)
    try:
        return model.model_validate(document, context={DIRECTORY: path.parent})
    except ValidationError as error:
        raise _from_validation(path, text, model, error) from None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise CloisterError(
            Code.FILE_NOT_FOUND,
            what=f"{path} is not there",
            why="a service is started with a configuration file",
            todo="give the path of a TOML file with --config",
        ) from None
    except OSError as error:
        raise CloisterError(Code.IO_FAILED, what=f"{path} cannot be read", why=error.strerror or "") from None
    if len(data) > _MAX_BYTES:
        raise _invalid(path, None, f"longer than {_MAX_BYTES} bytes")
    return data


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid(path, data[: error.start].count(b"\n") + 1, "not UTF-8") from None


def _anchor(document: dict[str, Any], model: type[BaseModel], base: Path) -> None:
    """Make the relative values of `Path` fields absolute, in place."""
    for name, field in model.model_fields.items():
        if name not in document:
            continue
        value, annotation = document[name], field.annotation
        if isinstance(value, str) and _mentions_path(annotation):
            document[name] = str((base / value).resolve()) if value else value
        elif isinstance(value, list) and _mentions_path(annotation):
            document[name] = [str((base / item).resolve()) if isinstance(item, str) else item for item in value]
        else:
            for inner in _models_in(annotation):
                for table in value if isinstance(value, list) else [value]:
                    if isinstance(table, dict):
                        _anchor(table, inner, base)


def _parts(annotation: Any) -> list[Any]:
    return [annotation, *(part for inner in typing.get_args(annotation) for part in _parts(inner))]


def _mentions_path(annotation: Any) -> bool:
    return any(part is Path for part in _parts(annotation))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    return [part for part in _parts(annotation) if isinstance(part, type) and issubclass(part, BaseModel)]


def _from_validation(path: Path, text: str, model: type[BaseModel], error: ValidationError) -> CloisterError:
    problems = error.errors(include_url=False, include_context=True, include_input=False)
    # A mistyped key is two problems, an unknown key and a missing one: the unknown one is where the typo stands.
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    location = tuple(first["loc"])
    why = f"{_dotted(location)}: {_reason(first)}"
    if len(problems) > 1:
        why += f" (and {len(problems) - 1} more)"
    return _invalid(path, _line_of(text, location), why, todo=_todo(first, location, model))


def _reason(problem: Mapping[str, Any]) -> str:
    match problem["type"]:
        case "missing":
            return "missing"
        case "extra_forbidden":
            return "no such key"
        case _:
            message = str(problem["msg"])
            return message[0].lower() + message[1:]


def _todo(problem: Mapping[str, Any], location: Sequence[str | int], model: type[BaseModel]) -> str:
    context = problem.get("ctx", {})
    match problem["type"]:
        case "literal_error" | "enum":
            return f"allowed values: {context['expected']}"
        case "extra_forbidden":
            owner = _model_at(model, location[:-1])
            return f"allowed keys: {', '.join(sorted(owner.model_fields))}" if owner else "remove the key"
        case "missing":
            return f"add {location[-1]}"
        case "bool_type" | "bool_parsing":
            return "allowed values: true, false"
        case _:
            return "correct the value"


def _model_at(model: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel] | None:
    for step in location:
        if isinstance(step, int):
            continue
        field = model.model_fields.get(step)
        inner = _models_in(field.annotation) if field else []
        if not inner:
            return None
        model = inner[0]
    return model


def _dotted(location: Sequence[str | int]) -> str:
    text = ""
    for step in location:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text or "the file"


def _line_of(text: str, location: Sequence[str | int]) -> int | None:
    """Find the line of a key, or of the nearest table that is there; None when it cannot be told.

    tomllib keeps no positions, and a second TOML parser only for this would be one more thing to trust.
    """
    wanted = [str(step) for step in location if isinstance(step, str)]
    index = next((step for step in location if isinstance(step, int)), 0)
    section: list[str] = []
    best: tuple[int, int] | None = None  # (how much of the location matched, line)
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        header = _SECTION.match(line)
        if header:
            section = _split(header[1])
            seen[header[1]] = seen.get(header[1], 0) + 1
            is_array = line.lstrip().startswith("[[")
            candidate = section if not is_array or seen[header[1]] == index + 1 else []
            section = candidate if is_array else section
        elif key := _KEY.match(line):
            candidate = section + _split(key[1])
        else:
            continue
        if candidate and wanted[: len(candidate)] == candidate and (best is None or len(candidate) > best[0]):
            best = (len(candidate), number)
    return best[1] if best else None


def _split(name: str) -> list[str]:
    return [part.strip().strip("\"'") for part in name.split(".")]


def _line_of_syntax_error(error: tomllib.TOMLDecodeError, text: str) -> int:
    found = re.search(r"at line (\d+)", str(error))
    return int(found[1]) if found else max(1, len(text.splitlines()))  # "at end of document"


def _first_clause(error: tomllib.TOMLDecodeError) -> str:
    message = str(error).partition(" (at ")[0]
    return message[0].lower() + message[1:]


def _invalid(path: Path, line: int | None, why: str, *, todo: str = "correct the file") -> CloisterError:
    place = f"{path}, line {line}" if line else str(path)
    return CloisterError(Code.CONFIG_INVALID, what=f"{place} is not a valid configuration", why=why, todo=todo)
