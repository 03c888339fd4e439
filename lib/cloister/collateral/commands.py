# SPDX-License-Identifier: Apache-2.0
"""Fetch, export and import bundles: what `cloister collateral` calls.

All three verify everything before they write anything, never put older collateral in the place of newer (unless
`reset`), and write each file whole or not at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cloister.atomicfile import write_atomically
from cloister.collateral.bundle import (
    CollateralBundle,
    VerifiedBundle,
    bundle_path,
    read_bounded,
    require_root,
    save,
)
from cloister.collateral.client import ClientLimits, Clock, CollateralClient
from cloister.collateral.documents import (
    Document,
    require_valid,
    to_collateral,
    verify_document,
)
from cloister.collateral.failures import FETCH_HINT, FetchFailed, not_available
from cloister.collateral.family import Edition, Family, PckCa, Tee
from cloister.collateral.pccsfile import is_platform_collateral, read_platform_collateral
from cloister.collateral.resources import CollateralServer, Resource
from cloister.errors import CloisterError, Code
from cloister.tdx.pckchain import load_pck_chain
from cloister.tdx.quote import Quote, QuoteRejected, parse_quote
from cloister.tdx.trustroot import TrustRoot


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one platform family."""

    family: Family
    path: Path
    evaluation_number: int
    expires: datetime


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of a file: families that were taken, and those that were not, with the reason."""

    taken: tuple[Outcome, ...]
    refused: tuple[tuple[Family, CloisterError], ...]


def family_of(quote: bytes, *, roots: Sequence[TrustRoot], edition: Edition = Edition.STANDARD) -> Family:
    """Return the family of a quote whose PCK chain leads to one of these roots; raise CloisterError(QUOTE_REJECTED)."""
    try:
        parsed = parse_quote(quote)
        chain = load_pck_chain(parsed.signature.pck_chain_pem, roots=roots)
    except QuoteRejected as rejected:
        raise CloisterError(
            Code.QUOTE_REJECTED,
            what="the quote does not say which platform it is of",
            why=f"{rejected.check}: {rejected.reason}",
            todo="look at it with `cloister quote show`",
        ) from None
    ca = next(ca for ca in PckCa if ca.common_name == chain.ca_name)
    return Family(chain.pck.fmspc, ca, Tee.TDX if isinstance(parsed, Quote) else Tee.SGX, edition)


async def fetch(
    families: Sequence[Family],
    directory: Path,
    *,
    server: CollateralServer,
    root: TrustRoot,
    clock: Clock = lambda: datetime.now(UTC),
    limits: ClientLimits | None = None,
    reset: bool = False,
) -> list[Outcome]:
    """Fetch families from a server into bundles; raise CloisterError at the first that cannot be had."""
    outcomes: list[Outcome] = []
    fetched: dict[str, Document] = {}  # families share documents
    async with CollateralClient(server, clock=clock, limits=limits) as client:
        for family in families:
            try:
                documents = [
                    await _document(client, resource, fetched, root, clock) for resource in server.resources(family)
                ]
            except FetchFailed as failed:
                raise not_available(family, failed) from failed
            collateral = to_collateral({document.resource.kind: document for document in documents})
            bundle = CollateralBundle(family, clock(), collateral)
            outcomes.append(await asyncio.to_thread(_save, bundle, directory, root, clock(), reset=reset))
    return outcomes


def export(family: Family, directory: Path, target: Path, *, root: TrustRoot, now: datetime) -> Outcome:
    """Write a family's bundle to a file that can be carried elsewhere; raise CloisterError when it is not good now."""
    require_root(directory, root)
    source = bundle_path(directory, family)
    if not source.exists():
        raise CloisterError(
            Code.COLLATERAL_NOT_FOUND,
            what=f"no collateral for {family}",
            why=f"{source} is not there",
            todo=FETCH_HINT,
        )
    bundle = CollateralBundle.read(source)
    verified = bundle.verify(root)
    verified.require_valid(now)
    write_atomically(target, bundle.to_json(), mode=0o644)
    return _outcome(verified, target)


def import_(source: Path, directory: Path, *, root: TrustRoot, now: datetime, reset: bool = False) -> Imported:
    """Take in a bundle, or the file of a PCCS administrator with many; raise CloisterError when nothing was taken."""
    data = read_bounded(source)
    bundles = (
        read_platform_collateral(data, fetched_at=now)
        if is_platform_collateral(data)
        else [CollateralBundle.parse(data)]
    )
    taken: list[Outcome] = []
    refused: list[tuple[Family, CloisterError]] = []
    for bundle in bundles:
        try:
            taken.append(_save(bundle, directory, root, now, reset=reset))
        except CloisterError as error:
            # A full disk or another root is no matter of one family.
            if error.code in {Code.DISK_FULL, Code.IO_FAILED, Code.CONFIG_INVALID}:
                raise
            refused.append((bundle.family, error))
    if not taken:
        raise refused[0][1]
    return Imported(tuple(taken), tuple(refused))


async def _document(
    client: CollateralClient, resource: Resource, fetched: dict[str, Document], root: TrustRoot, clock: Clock
) -> Document:
    if resource.url not in fetched:
        answer = await client.fetch(resource)
        document = verify_document(resource, answer, root=root)
        require_valid(document, clock())
        fetched[resource.url] = document
    return fetched[resource.url]


def _save(bundle: CollateralBundle, directory: Path, root: TrustRoot, now: datetime, *, reset: bool) -> Outcome:
    path = save(bundle, directory, root=root, now=now, reset=reset)
    return _outcome(bundle.verify(root), path)


def _outcome(verified: VerifiedBundle, path: Path) -> Outcome:
    return Outcome(verified.family, path, verified.evaluation_number, verified.expires)
