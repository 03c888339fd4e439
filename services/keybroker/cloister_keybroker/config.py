# SPDX-License-Identifier: Apache-2.0
"""The broker's configuration file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from cloister.errors import CloisterError
from cloister.identity import Role, SpiffeId
from cloister.runtime.config import DIRECTORY, ConfigModel, GuestSection, ServiceSection
from cloister_keybroker.backends.uri import BackendUri
from cloister_keybroker.sealrecord import Source

STORE_FILE: Final = "keybroker.sqlite"  # in service.state_dir


@dataclass(frozen=True, slots=True)
class RootKeyPlace:
    """Where the root key comes from; `file` is set for Source.FILE only."""

    source: Source
    file: Path = Path()


def _root_key_place(value: Any, info: ValidationInfo) -> RootKeyPlace:
    source, _, path = value.partition(":") if isinstance(value, str) else ("", "", "")
    if source == Source.FILE and path:
        directory = (info.context or {}).get(DIRECTORY, Path())
        return RootKeyPlace(Source.FILE, (directory / path).resolve())
    if source in (Source.SHARES, Source.PASSPHRASE) and value == source:
        return RootKeyPlace(Source(source))
    raise ValueError('wanted "file:PATH", "shares" or "passphrase"')


def _backend_uri(value: str) -> str:
    try:
        BackendUri.parse(value)
    except CloisterError as error:
        raise ValueError(error.why) from None
    return value


BackendText = Annotated[str, AfterValidator(_backend_uri)]


class KeybrokerSection(ConfigModel):
    """[keybroker]: where root key and wrapping keys come from, and who may unseal, back up and migrate the store."""

    root_key: Annotated[RootKeyPlace, BeforeValidator(_root_key_place)]
    # SPIFFE ids of users. None: the root key is a file and nobody may do any of it.
    operators: tuple[str, ...] = ()
    # Where new keys go, and where older ones still are: docs/keybroker-backends.md.
    backend: BackendText = "embedded:"
    former_backends: tuple[BackendText, ...] = ()
    # What one identity may ask: a second, at a time, in flight. A decision costs a millisecond and a kilobyte of log.
    calls_per_s: float = Field(default=50.0, gt=0, le=10_000)
    calls_burst: int = Field(default=500, gt=0, le=100_000)
    calls_at_once: int = Field(default=64, gt=0, le=1000)

    @field_validator("operators")
    @classmethod
    def _users(cls, operators: tuple[str, ...]) -> tuple[str, ...]:
        for operator in operators:
            try:
                role = SpiffeId.parse(operator).role
            except CloisterError as error:
                raise ValueError(error.what) from None
            if role is not Role.USER:
                raise ValueError(f"{operator} is not a user")
        return operators


class Config(ConfigModel):
    """The whole file."""

    service: ServiceSection
    guest: GuestSection
    keybroker: KeybrokerSection
