# SPDX-License-Identifier: Apache-2.0
"""Checks in the order in which they were made, and the refusal that names the first that failed."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from typing import NoReturn

from cloister.errors import CloisterError, Code
from cloister.tdx.check import Check


class EvidenceRefused(Exception):
    """Evidence that failed at least one of `checks`; the first that failed is `failed`."""

    def __init__(self, code: Code, checks: tuple[Check, ...], todo: str = "") -> None:
        self.failed = next(check for check in checks if not check.ok)
        super().__init__(f"{self.failed.name}: wanted {self.failed.wanted}, got {self.failed.got}")
        self.code = code
        self.checks = checks
        self._todo = todo or "compare the workload with what is registered; the verdict is on record"

    def public(self, what: str) -> CloisterError:
        """Return the error for whoever sent the evidence."""
        return CloisterError(self.code, what=what, why=str(self), todo=self._todo)


class Checklist:
    """Checks in the order in which they were made; one that fails ends the matter."""

    def __init__(self) -> None:
        self._checks: list[Check] = []

    @property
    def checks(self) -> tuple[Check, ...]:
        return tuple(self._checks)

    def require(self, name: str, ok: bool, code: Code, *, wanted: object, got: object) -> None:
        """Record a check; raise EvidenceRefused when it failed."""
        self._checks.append(Check(name, ok, _public(wanted), _public(got)))
        if not ok:
            raise EvidenceRefused(code, self.checks)

    def refuse(self, name: str, code: Code, *, wanted: object, got: object, todo: str = "") -> NoReturn:
        """Record a check that failed, and raise; `todo` is what its sender can do about it."""
        self._checks.append(Check(name, False, _public(wanted), _public(got)))
        raise EvidenceRefused(code, self.checks, todo)

    def require_equal(self, name: str, code: Code, *, wanted: bytes, got: bytes) -> None:
        """Record a comparison of digests, nonces or keys; constant time."""
        self.require(name, hmac.compare_digest(wanted, got), code, wanted=short(wanted), got=short(got))

    def require_all(self, checks: Iterable[Check], code: Code) -> None:
        """Record checks that were made together, so that all that is wrong shows; raise when any of them failed."""
        found = [Check(check.name, check.ok, _public(check.wanted), _public(check.got)) for check in checks]
        self._checks += found
        if not all(check.ok for check in found):
            raise EvidenceRefused(code, self.checks)


def short(value: bytes) -> str:
    """Return the beginning of a digest or key in hexadecimal, as it stands in verdicts."""
    return value.hex() if len(value) <= 48 else f"{value[:32].hex()}... ({len(value)} bytes)"


def _public(value: object) -> str:
    """Return short printable ASCII: part of it may have been written by the sender."""
    return str(value)[:500].encode("ascii", "backslashreplace").decode("ascii")[:500]
