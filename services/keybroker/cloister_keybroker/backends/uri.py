# SPDX-License-Identifier: Apache-2.0
"""Back ends as the configuration names them: scheme ":" address "?" options, percent-encoded like any URI.

embedded:
ehsm:https://HOST:PORT?ca=FILE&...
transit:https://HOST:PORT/MOUNT?ca=FILE&token=FILE
pkcs11:token=LABEL?module-path=FILE&pin-source=FILE (RFC 7512)

Every scheme takes `name`: what the back end is called in handles, health and logs; the scheme unless it is given. Two
stores of one kind need two names, and a name stays while handles of it are left. Secrets are named by file only.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from urllib.parse import SplitResult, unquote, urlsplit

from cloister.errors import CloisterError, Code
from cloister.secret import SecretBytes

_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,31}")
_MAX_CREDENTIAL_SIZE: Final = 16 * 1024  # bytes; tokens and pins are shorter, certificates are no credentials


@dataclass(frozen=True, slots=True)
class BackendUri:
    """One back end of the configuration. Its parts are decoded, and nothing of it is secret."""

    scheme: str
    address: str
    options: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse; raise CONFIG_INVALID for what is no back end's URI, whatever the scheme."""
        scheme, colon, rest = text.partition(":")
        address, mark, query = rest.partition("?")
        if not colon or not _NAME.fullmatch(scheme):
            raise invalid(text, 'it does not begin with a scheme, such as "embedded:"')
        options: dict[str, str] = {}
        for pair in query.split("&") if mark else ():
            name, equals, value = pair.partition("=")
            if not equals or not name or not value:
                raise invalid(text, f"{pair!r} is not of the form option=value")
            if name in options:
                raise invalid(text, f"the option {name} is there twice")
            options[name] = unquote(value, errors="strict") if _decodable(value) else ""
            if not options[name]:
                raise invalid(text, f"the value of {name} is not percent-encoded UTF-8")
        uri = cls(scheme, address, options)
        if not _NAME.fullmatch(uri.name):
            raise invalid(text, "a name has up to 32 small letters, digits and hyphens, a letter first")
        return uri

    @property
    def name(self) -> str:
        """What the back end is called."""
        return self.options.get("name", self.scheme)

    def only(self, *options: str) -> None:
        """Raise CONFIG_INVALID when there are other options than these and `name`: a misspelt one must not be lost."""
        unknown = sorted(set(self.options) - {*options, "name"})
        if unknown:
            allowed = ", ".join(sorted({*options, "name"}))
            raise invalid(str(self), f"it knows no option {unknown[0]}; the options are {allowed}")

    def required(self, option: str) -> str:
        """Return an option; raise CONFIG_INVALID when it is not there."""
        if option not in self.options:
            raise invalid(str(self), f"the option {option} is missing")
        return self.options[option]

    def file(self, option: str) -> Path:
        """Return the absolute path in a required option."""
        path = Path(self.required(option).removeprefix("file:"))
        if not path.is_absolute():
            raise invalid(str(self), f"{option} is not an absolute path")
        return path

    def https(self) -> SplitResult:
        """Return the address as the https URL that it has to be, without user, query or fragment."""
        try:
            url = urlsplit(self.address)
            fits = url.scheme == "https" and bool(url.hostname) and url.username is None and url.port != 0
        except ValueError:
            fits = False
        if not fits or url.fragment or url.query:
            raise invalid(str(self), f"{self.address!r} is not an https:// address")
        return url

    def __str__(self) -> str:
        return f"{self.scheme}:{self.address}"


def invalid(uri: str, why: str) -> CloisterError:
    """Say what is wrong with a back end in the configuration."""
    return CloisterError(
        Code.CONFIG_INVALID,
        what=f"keybroker.backend: {uri[:200]} is not a back end",
        why=why,
        todo="see docs/keybroker-backends.md for the forms",
    )


def read_credential(path: Path) -> SecretBytes:
    """Read a token, key or PIN from a file, without the line end; raise CloisterError naming the file, never its text.

    The file may be a link and may be readable by a group, as Kubernetes mounts secrets; others must not read it.
    """
    try:
        with path.open("rb") as file:
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode) or mode & 0o007:
                raise _credential_refused(path, f"others may read it (mode {mode & 0o777:04o})", f"chmod 600 {path}")
            data = file.read(_MAX_CREDENTIAL_SIZE + 1)
    except FileNotFoundError:
        raise CloisterError(
            Code.FILE_NOT_FOUND,
            what=f"there is no credential at {path}",
            why="the back end cannot be used without it",
            todo="correct the path in keybroker.backend, or put the file there",
        ) from None
    except OSError as error:
        raise _credential_refused(path, error.strerror or "input/output error", "let the broker read it") from None
    data = data.removesuffix(b"\n").removesuffix(b"\r")
    if not data or len(data) > _MAX_CREDENTIAL_SIZE or b"\n" in data:
        raise _credential_refused(path, "it is empty, or not one line", "put the credential there, on one line")
    return SecretBytes(data)


def _credential_refused(path: Path, why: str, todo: str) -> CloisterError:
    return CloisterError(Code.CONFIG_INVALID, what=f"the credential {path} is refused", why=why, todo=todo)


def _decodable(value: str) -> bool:
    try:
        unquote(value, errors="strict")
    except UnicodeDecodeError:
        return False
    return True
