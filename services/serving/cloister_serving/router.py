# SPDX-License-Identifier: Apache-2.0
"""Decisions of the gateway: who sees which model, which cores it gets, what a request and an answer may be. Pure."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cloister.errors import CloisterError, Code
from cloister.identity import is_name

MAX_TEXTS: Final = 256
MAX_TEXT_BYTES: Final = 64 << 10
MAX_LABEL: Final = 256  # characters
MODELS_PER_CORE: Final = 4  # each holds its weights and some 300 MB; more would only take turns
DIGEST_SIZE: Final = 48


class State(enum.StrEnum):
    """Where a model stands."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A deployed model of one tenant; the name is the tenant's own."""

    tenant: str
    name: str
    owner: str  # SPIFFE id
    archive_digest: bytes  # 48 bytes
    cores: tuple[int, ...]
    created_unix_ms: int
    state: State = State.LOADING
    reason: str = ""  # one line, when it failed
    process_id: int = 0  # of the worker; 0 when there is none
    timings_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return self.tenant, self.name


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one text."""

    label: str
    probability: float


def check_core_plan(*, gateway_cores: Sequence[int], backend_cores: Sequence[int], available: Iterable[int]) -> None:
    """Refuse a plan that cannot hold on this machine: CloisterError(CORES_INSUFFICIENT)."""
    present = sorted(available)
    shown = ", ".join(map(str, present))
    if not gateway_cores or not backend_cores:
        raise _cores("gateway and backends need at least one core each", f"this process may use the cores {shown}")
    missing = sorted((set(gateway_cores) | set(backend_cores)) - set(present))
    if missing:
        cores = ", ".join(map(str, missing))
        raise _cores(f"there is no core {cores} for this process", f"it may use the cores {shown}")
    both = sorted(set(gateway_cores) & set(backend_cores))
    if both:
        cores = ", ".join(map(str, both))
        raise _cores(
            f"gateway and backends share core {cores}", "a busy backend would make the gateway wait on its own core"
        )


def choose_cores(
    requested: Sequence[int], *, backend_cores: Sequence[int], models: Iterable[ModelRecord]
) -> tuple[int, ...]:
    """Return the cores of a new backend: those asked for, or the one with the fewest models."""
    load = dict.fromkeys(backend_cores, 0)
    for model in models:
        for core in model.cores if model.state is not State.FAILED else ():
            if core in load:
                load[core] += 1
    shown = ", ".join(map(str, backend_cores))
    chosen = tuple(sorted(set(requested))) or (min(backend_cores, key=lambda core: (load[core], core)),)
    foreign = [core for core in chosen if core not in load]
    if foreign:
        cores = ", ".join(map(str, foreign))
        raise _cores(f"core {cores} is not a backend core of this gateway", f"its backend cores are {shown}")
    full = [core for core in chosen if load[core] >= MODELS_PER_CORE]
    if full:
        raise _cores(f"core {full[0]} already serves {load[full[0]]} models", f"at most {MODELS_PER_CORE} share one")
    return chosen


def check_deployment(name: str, archive_digest: bytes, existing: ModelRecord | None) -> None:
    """Refuse a deployment that cannot begin; one in place of a failed model of the same name can."""
    if not is_name(name):
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"{name[:80]!r} is not a model name",
            why="a name has 1 to 63 characters of a-z, 0-9 and -, and begins and ends with a letter or digit",
            todo="choose another name",
        )
    if len(archive_digest) != DIGEST_SIZE:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what="the archive digest is not a SHA-384",
            why=f"it has {len(archive_digest)} bytes, not {DIGEST_SIZE}",
            todo="give the digest that UploadArchive returned",
        )
    if existing is not None and existing.state is not State.FAILED:
        raise CloisterError(
            Code.MODEL_EXISTS,
            what=f"a model {name} is deployed",
            why=f"it is {existing.state}",
            todo="remove it first, or choose another name",
        )


def not_found(name: str) -> CloisterError:
    """Return the one answer for a model that is not there and for one of another tenant."""
    shown = name if is_name(name) else repr(name[:80])
    return CloisterError(
        Code.MODEL_NOT_FOUND,
        what=f"you have no model {shown}",
        why="models are visible to the users of their own tenant",
        todo="list your models with `cloister model list`",
    )


def route(model: ModelRecord | None, *, name: str) -> ModelRecord:
    """Return the model that answers, or say why none does; `model` is what the caller's tenant has of this name."""
    if model is None:
        raise not_found(name)
    if model.state is State.READY:
        return model
    loading = model.state is State.LOADING
    raise CloisterError(
        Code.BACKEND_DOWN,
        what=f"the model {name} {'is still loading' if loading else 'has no running backend'}",
        why="" if loading else model.reason,
        todo="try again in a moment" if loading else "deploy the model again",
    )


def check_texts(texts: Sequence[str]) -> None:
    """Refuse a request out of bounds: CloisterError(ARGUMENT_INVALID) that names the text."""
    if not 1 <= len(texts) <= MAX_TEXTS:
        raise _request(f"a request holds 1 to {MAX_TEXTS} texts, not {len(texts)}")
    for index, text in enumerate(texts):
        try:
            size = len(text.encode())
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
            raise _request(f"text {index} is not valid Unicode") from None
        if not text.strip():
            raise _request(f"text {index} is empty")
        if size > MAX_TEXT_BYTES:
            raise _request(f"text {index} has {size} bytes; at most {MAX_TEXT_BYTES} are taken")


def body_of(texts: Sequence[str]) -> bytes:
    """Return what a handler gets."""
    return json.dumps({"texts": list(texts)}, ensure_ascii=False).encode()


def texts_from_json(body: bytes) -> list[str]:
    """Parse {"texts": [...]}, or the same under "instances", strictly."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise _request("the body is not JSON") from None
    match document:
        case {"texts": list(texts)} | {"instances": list(texts)} if len(document) == 1 and all(
            isinstance(text, str) for text in texts
        ):
            return texts
    raise _request('the body is not of the form {"texts": ["...", "..."]}')


def predictions_from(body: bytes, *, count: int) -> tuple[Prediction, ...]:
    """Parse what a handler answered; raise ValueError when it is not one label and probability for each text."""
    try:
        document = json.loads(body)
    except RecursionError:
        raise ValueError("the answer is nested too deeply") from None
    if not isinstance(document, list) or len(document) != count:
        raise ValueError(f"the answer is not a list of {count} predictions")
    return tuple(_prediction(item) for item in document)


def _prediction(item: object) -> Prediction:
    match item:
        case {"label": str(label), "probability": float(probability)} if (
            len(label) <= MAX_LABEL and math.isfinite(probability) and 0 <= probability <= 1
        ):
            label.encode()  # half of a surrogate pair is a ValueError here, and would be one on the wire
            return Prediction(label, probability)
    raise ValueError("a prediction is not a label and a probability from 0 to 1")


def _request(why: str) -> CloisterError:
    return CloisterError(
        Code.ARGUMENT_INVALID, what="this request cannot be answered", why=why, todo="correct the request"
    )


def _cores(what: str, why: str) -> CloisterError:
    return CloisterError(
        Code.CORES_INSUFFICIENT, what=what, why=why, todo="set gateway_cores and backend_cores to cores of this machine"
    )
