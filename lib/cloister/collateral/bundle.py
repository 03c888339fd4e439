# SPDX-License-Identifier: Apache-2.0
"""Collateral as a file: one JSON object per platform family, usable where there is no network.

    {"format": "cloister-collateral-1", "fmspc": "b0c06f000000", "ca": "platform", "tee": "tdx", "edition": "standard",
     "fetched_at": "2026-11-01T12:00:00Z", "collateral": {nine strings}}

A file may come from anywhere: it is verified against the pinned root whenever it is loaded. A directory of such files
belongs to one root, whose fingerprint is in the file `root`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cloister.atomicfile import file_error, write_atomically
from cloister.collateral.documents import (
    Document,
    Newest,
    from_collateral,
    require_not_older,
    require_not_revoked,
    verify_signed,
)
from cloister.collateral.failures import FetchFailed, expired, not_yet_valid
from cloister.collateral.family import Family
from cloister.collateral.resources import CollateralServer, DocumentKind
from cloister.errors import CloisterError, Code
from cloister.tdx.collateral import MAX_COLLATERAL_SIZE, Collateral
from cloister.tdx.quote import QuoteRejected
from cloister.tdx.trustroot import TrustRoot

FORMAT: Final = "cloister-collateral-1"
_MEMBERS: Final = frozenset({"format", "fmspc", "ca", "tee", "edition", "fetched_at", "collateral"})
_MAX_FILE_BYTES: Final = MAX_COLLATERAL_SIZE + 4096
_ROOT_FILE: Final = "root"


@dataclass(frozen=True, slots=True)
class VerifiedBundle:
    """A bundle whose nine parts verified under a root, and are about its family; when it is valid is another matter."""

    family: Family
    collateral: Collateral
    documents: Mapping[DocumentKind, Document]

    @property
    def expires(self) -> datetime:
        """The last moment at which all parts are valid."""
        return min(document.expires for document in self.documents.values())

    @property
    def valid_from(self) -> datetime:
        return max(document.valid_from for document in self.documents.values())

    @property
    def evaluation_number(self) -> int:
        return self.documents[DocumentKind.TCB_INFO].number

    def require_valid(self, now: datetime) -> None:
        """Raise CloisterError unless all parts are valid now."""
        if now > self.expires:
            raise expired(self.family, self.expires, now)
        if now < self.valid_from:
            raise not_yet_valid(f"collateral for {self.family}", self.valid_from, now)

    def require_not_older(self, known: Mapping[DocumentKind, Document | Newest]) -> None:
        """Raise CloisterError(COLLATERAL_INVALID) when a part of this would set back what is known."""
        try:
            for kind, newest in known.items():
                require_not_older(self.documents[kind], newest)
        except FetchFailed as failed:
            raise CloisterError(
                Code.COLLATERAL_INVALID,
                what=f"collateral for {self.family} is older than what is here",
                why=failed.reason,
                todo="get newer collateral, or accept the older on purpose with --reset",
            ) from None


@dataclass(frozen=True, slots=True)
class CollateralBundle:
    """What a bundle file says, still only claimed."""

    family: Family
    fetched_at: datetime
    collateral: Collateral

    @classmethod
    def parse(cls, data: bytes) -> CollateralBundle:
        """Read the JSON form; raise CloisterError(COLLATERAL_INVALID) for anything else."""
        try:
            members = json.loads(data.decode(), object_pairs_hook=_unique)
            if not isinstance(members, dict) or members.get("format") != FORMAT or members.keys() != _MEMBERS:
                raise ValueError(f"not one object of format {FORMAT}")
            names = [members[name] for name in ("fmspc", "ca", "tee", "edition", "fetched_at")]
            if not all(isinstance(name, str) for name in names) or not isinstance(members["collateral"], dict):
                raise ValueError("a member is of another type")
            fetched_at = datetime.fromisoformat(members["fetched_at"])
            if fetched_at.tzinfo is None:
                raise ValueError("fetched_at has no zone")
            family = Family.of(*names[:4])
        except CloisterError as error:
            raise _invalid(error.what) from None
        except (ValueError, RecursionError) as error:
            raise _invalid(str(error)) from None
        return cls(family, fetched_at.astimezone(UTC), Collateral.of(members["collateral"]))

    @classmethod
    def read(cls, path: Path) -> CollateralBundle:
        """Read a file; raise CloisterError."""
        return cls.parse(read_bounded(path))

    def to_json(self) -> bytes:
        """Return the JSON form; raise CloisterError(COLLATERAL_INVALID) when a part is not text or a CRL."""
        try:
            collateral = json.loads(self.collateral.to_json())
        except (QuoteRejected, ValueError) as error:
            raise _invalid(str(error)) from None
        family = self.family
        members = {
            "format": FORMAT,
            "fmspc": family.fmspc.hex(),
            "ca": family.ca,
            "tee": family.tee,
            "edition": family.edition,
            "fetched_at": f"{self.fetched_at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "collateral": collateral,
        }
        return json.dumps(members, indent=1).encode()

    def verify(self, root: TrustRoot) -> VerifiedBundle:
        """Verify everything but the time; raise CloisterError(COLLATERAL_INVALID)."""
        try:
            signed = from_collateral(self.collateral)
            documents = {
                resource.kind: verify_signed(resource, signed[resource.kind], root=root)
                for resource in CollateralServer.intel().resources(self.family)
            }
            for document in documents.values():
                require_not_revoked(document, documents[DocumentKind.ROOT_CRL])
        except FetchFailed as failed:
            raise CloisterError(
                Code.COLLATERAL_INVALID,
                what=f"collateral for {self.family} does not verify",
                why=failed.reason,
                todo="check where it comes from, and which root is configured",
            ) from None
        return VerifiedBundle(self.family, self.collateral, documents)


def bundle_path(directory: Path, family: Family) -> Path:
    return directory / f"{family.name}.json"


def save(bundle: CollateralBundle, directory: Path, *, root: TrustRoot, now: datetime, reset: bool = False) -> Path:
    """Verify a bundle and put it in the place of the family's older one; raise CloisterError and change nothing.

    `reset` accepts what is older than the one that is there; it accepts nothing that does not verify or has expired.
    """
    verified = bundle.verify(root)
    verified.require_valid(now)
    path = bundle_path(directory, bundle.family)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise file_error(error, what=f"cannot make {directory}") from error
    require_root(directory, root, claim=True)
    if path.exists() and not reset:
        known = _known(path, root)
        if known is not None and known.family == bundle.family:
            verified.require_not_older(known.documents)
    write_atomically(path, bundle.to_json(), mode=0o644)
    return path


def require_root(directory: Path, root: TrustRoot, *, claim: bool = False) -> None:
    """Require that a directory is of this root; `claim` writes the fingerprint where there is none."""
    path = directory / _ROOT_FILE
    wanted = f"{root.fingerprint.hex()}\n".encode()
    if not path.exists():
        if claim:
            write_atomically(path, wanted, mode=0o644)
        return
    if read_bounded(path) != wanted:
        raise CloisterError(
            Code.CONFIG_INVALID,
            what=f"the collateral in {directory} is of another trust root",
            why="Intel's collateral and that of a development root are never kept together",
            todo="name another directory for this root's collateral",
        )


def read_bounded(path: Path) -> bytes:
    """Read a file up to the limit of a bundle; raise CloisterError."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise CloisterError(
            Code.FILE_NOT_FOUND, what=f"{path} is not there", todo="name a bundle, or a platformcollateral file"
        ) from None
    except OSError as error:
        raise file_error(error, what=f"cannot read {path}") from error
    if len(data) > _MAX_FILE_BYTES:
        raise _invalid(f"it is larger than {_MAX_FILE_BYTES} bytes")
    return data


def _known(path: Path, root: TrustRoot) -> VerifiedBundle | None:
    """Return the bundle that is there, valid or not; one that does not verify says nothing about what is newest."""
    try:
        return CollateralBundle.read(path).verify(root)
    except CloisterError as error:
        if error.code is Code.COLLATERAL_INVALID:
            return None
        raise


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member is there twice")
    return members


def _invalid(why: str) -> CloisterError:
    return CloisterError(
        Code.COLLATERAL_INVALID,
        what="this is not a bundle of collateral",
        why=why,
        todo="make one with `cloister collateral fetch` or `export`",
    )
