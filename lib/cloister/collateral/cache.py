# SPDX-License-Identifier: Apache-2.0
"""Collateral from a server, kept: asked for rarely, believed only when it verifies, served only while it is valid.

The rules:
1. the key is the full URL, with edition (`update`) and encoding;
2. what is kept is the exact body, its issuer chain and the time, together;
3. signature, chain and revocation are verified before anything is kept; what fails never displaces what is good;
4. a document expires at the earliest of nextUpdate and every certificate's notAfter: refreshed at 50-75 % of the time
   left, served until that instant whatever happens to the refresh, and never after, nor revived by a clock set back;
5. a lower evaluation or CRL number or an older issue date never replaces what is known, except after `reset`;
6. 404 is believed for minutes; 410 drops the pinned evaluation number; 429 and 503 are waited out; one request per key;
7. sizes, time, TLS and hosts are bounded by the client;
8. CRLs come as DER, PEM or hexadecimal;
9. bundles (bundle.py) do without a server.

One cache is for one root and one edition. Use it in one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from secrets import SystemRandom
from typing import Final

from cloister.collateral.client import Clock, CollateralClient
from cloister.collateral.documents import (
    Document,
    require_not_older,
    require_not_revoked,
    require_valid,
    to_collateral,
    verify_document,
)
from cloister.collateral.failures import Failure, FetchFailed, expired, not_available, not_yet_valid
from cloister.collateral.family import Edition, Family
from cloister.collateral.resources import DocumentKind, Resource, origin
from cloister.collateral.schedule import Hold, hold_after, refresh_at
from cloister.collateral.store import CollateralStore, StoredAnswer
from cloister.collateral.watch import CollateralWatch
from cloister.errors import CloisterError
from cloister.runtime.logging import get_logger
from cloister.tdx.collateral import Collateral
from cloister.tdx.trustroot import TrustRoot

_MAX_HOLDS: Final = 4096  # URLs that failed lately; the oldest is forgotten, and may be asked for again
_LOOK_EVERY_S: Final = 60.0
_ROOT_CRL: Final = DocumentKind.ROOT_CRL


@dataclass(slots=True)
class _Entry:
    document: Document
    refresh_at: datetime
    latest: datetime  # the newest time it was looked at: once seen expired, it stays so until it is fetched again
    withdrawn: bool = False  # its issuer has been revoked since

    def usable(self, now: datetime) -> bool:
        self.latest = max(self.latest, now)
        return not self.withdrawn and self.document.valid_at(now) and self.latest <= self.document.expires

    def due(self, now: datetime) -> bool:
        return not self.usable(now) or now >= self.refresh_at


@dataclass(frozen=True, slots=True)
class Rhythm:
    """Time and chance: what a test decides itself."""

    clock: Clock = field(default=lambda: datetime.now(UTC))  # what documents are valid by
    monotonic: Callable[[], float] = time.monotonic  # seconds: what waiting is measured by
    jitter: Callable[[], float] = field(default_factory=lambda: SystemRandom().random)  # from 0 to 1


class CollateralCache:
    """A `CollateralSource` in front of one server."""

    def __init__(
        self,
        client: CollateralClient,
        store: CollateralStore,
        *,
        root: TrustRoot,
        edition: Edition = Edition.STANDARD,
        evaluation_number: int | None = None,
        rhythm: Rhythm | None = None,
        watch: CollateralWatch | None = None,
    ) -> None:
        self._client = client
        self._store = store
        self._root = root
        self._edition = edition
        self._evaluation_number = evaluation_number  # pinned, until the server says that it is gone
        self._rhythm = rhythm or Rhythm()
        self.watch = watch or CollateralWatch()
        self._log = get_logger()
        self._entries: dict[str, _Entry] = {}
        self._holds: dict[str, Hold] = {}
        self._server_hold: Hold | None = None
        self._flights: dict[str, asyncio.Task[Document]] = {}
        self._sets: dict[Family, tuple[tuple[Document, ...], Collateral]] = {}
        self._load()

    @classmethod
    async def open(
        cls,
        client: CollateralClient,
        path: Path,
        *,
        root: TrustRoot,
        edition: Edition = Edition.STANDARD,
        evaluation_number: int | None = None,
        rhythm: Rhythm | None = None,
        watch: CollateralWatch | None = None,
    ) -> CollateralCache:
        """Open the cache in the file `path`; raise CloisterError when it is of another root, or in use."""

        def build() -> CollateralCache:
            store = CollateralStore.open(path, root_fingerprint=root.fingerprint)
            try:
                return cls(
                    client,
                    store,
                    root=root,
                    edition=edition,
                    evaluation_number=evaluation_number,
                    rhythm=rhythm,
                    watch=watch,
                )
            except CloisterError:
                store.close()
                raise

        return await asyncio.to_thread(build)

    async def get(self, fmspc: bytes, ca: str, tee: str) -> Collateral:
        """Return collateral that is valid now, see `CollateralSource`."""
        family = Family.of(fmspc.hex(), ca, tee, self._edition)
        self._require_clock(self._rhythm.clock())
        try:
            documents = await self._documents(family)
        except _PinGone:
            documents = await self._documents(family)
        now = self._rhythm.clock()
        known = self._sets.get(family)
        if known is None or any(old is not new for old, new in zip(known[0], documents, strict=True)):
            collateral = to_collateral({document.resource.kind: document for document in documents})
            self._sets[family] = known = (documents, collateral)
        # Fetching one of them may have taken until another's end.
        late = min(documents, key=lambda document: document.expires)
        if now > late.expires:
            raise expired(family, late.expires, now)
        return known[1]

    async def refresh_due(self) -> None:
        """Refresh what is due, and warn of what expires soon. Never raises for a server's sake."""
        # The root's list first: it decides whether the others' issuers still count.
        entries = sorted(self._entries.values(), key=lambda entry: entry.document.resource.kind is not _ROOT_CRL)
        for resource in [entry.document.resource for entry in entries]:
            # Asked again for each: while one was fetched, a caller may have had another refreshed.
            current = self._entries.get(resource.url)
            if current is not None and current.due(self._rhythm.clock()):
                with suppress(FetchFailed):
                    await self._fetch(resource)
        self.watch.look([entry.document for entry in self._entries.values()], self._rhythm.clock())

    async def run(self) -> None:
        """Keep the cache fresh until cancelled."""
        while True:
            await self.refresh_due()
            await asyncio.sleep(_LOOK_EVERY_S)

    async def reset(self, family: Family) -> None:
        """Forget a family's documents, so that older ones are accepted again. Nothing is served until then."""
        for resource in self._client.server.resources(family, self._evaluation_number):
            entry = self._entries.pop(resource.url, None)
            self._holds.pop(resource.url, None)
            await self._store.remove(resource.url)
            if entry is not None:
                self.watch.forgotten(entry.document)
        self._server_hold = None

    async def aclose(self) -> None:
        """End requests that are under way, and close the file; the client is closed by whoever made it."""
        flights = list(self._flights.values())
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        await asyncio.to_thread(self._store.close)

    def _load(self) -> None:
        """Verify what the file holds. Expired documents count, too: they say what is newest."""
        now = self._rhythm.clock()
        for stored in self._store.load():
            resource = stored.resource
            try:
                if origin(resource.url) not in self._client.server.origins:
                    continue
                # The time is only what the file claims; nothing was fetched in the future.
                fetched_at = min(stored.fetched_at, now)
                document = verify_document(resource, stored.answer, root=self._root)
            except (ValueError, FetchFailed) as error:
                reason = error.reason if isinstance(error, FetchFailed) else str(error)
                self._log.warning("stored collateral is damaged", url=resource.url, reason=reason)
                continue
            self._admit(document, fetched_at)

    def _require_clock(self, now: datetime) -> None:
        """Refuse a clock that is behind something that was signed and seen: it would make old collateral valid."""
        newest = max((entry.document.issued for entry in self._entries.values()), default=now)
        if now < newest:
            raise not_yet_valid("the newest collateral here", newest, now)

    async def _documents(self, family: Family) -> tuple[Document, ...]:
        root_crl, *others = self._client.server.resources(family, self._evaluation_number)
        # First, so that issuers can be looked up in it before what they signed is kept.
        first = self._ready(root_crl) or await self._obtain(root_crl, family)
        found = [self._ready(resource) for resource in others]
        missing = [resource for resource, document in zip(others, found, strict=True) if document is None]
        fetched = iter(await asyncio.gather(*(self._obtain(resource, family) for resource in missing)))
        return (first, *(document or next(fetched) for document in found))

    def _ready(self, resource: Resource) -> Document | None:
        """Return a usable document from memory, and begin to refresh it when that is due."""
        now = self._rhythm.clock()
        entry = self._entries.get(resource.url)
        if entry is None or entry.document.resource != resource or not entry.usable(now):
            return None
        if entry.due(now):
            with suppress(FetchFailed):  # on hold: later
                self._flight(resource)
        return entry.document

    async def _obtain(self, resource: Resource, family: Family) -> Document:
        """Return a document from the server; raise CloisterError."""
        entry = self._entries.get(resource.url)
        try:
            return await self._fetch(resource)
        except FetchFailed as failed:
            if failed.failure is Failure.GONE and resource.evaluation_number is not None:
                raise _PinGone from None
            if entry is not None and entry.latest > entry.document.expires:
                raise expired(family, entry.document.expires, entry.latest, why=failed.reason) from failed
            raise not_available(family, failed) from failed

    async def _fetch(self, resource: Resource) -> Document:
        # Shielded: a caller that gives up does not take the answer away from the others.
        return await asyncio.shield(self._flight(resource))

    def _flight(self, resource: Resource) -> asyncio.Task[Document]:
        """Return the one request for this URL that is under way, started now if need be; raise FetchFailed on hold."""
        flight = self._flights.get(resource.url)
        if flight is None:
            now_s = self._rhythm.monotonic()
            for hold in (self._server_hold, self._holds.get(resource.url)):
                if hold is not None and hold.active(now_s):
                    raise FetchFailed(hold.failed.failure, hold.failed.reason)
            flight = asyncio.create_task(self._request(resource), name=f"collateral {resource.kind}")
            self._flights[resource.url] = flight
            flight.add_done_callback(lambda done: self._landed(resource.url, done))
        return flight

    def _landed(self, url: str, flight: asyncio.Task[Document]) -> None:
        self._flights.pop(url, None)
        if not flight.cancelled():
            flight.exception()  # a refresh in the background has nobody else to look at it

    async def _request(self, resource: Resource) -> Document:
        """Make one request and keep what it brings, if that is good."""
        try:
            answer = await self._client.fetch(resource)
            fetched_at = self._rhythm.clock()
            document = await asyncio.to_thread(verify_document, resource, answer, root=self._root)
            self._require_good(document)
        except FetchFailed as failed:
            self._put_on_hold(resource, failed)
            raise
        self._holds.pop(resource.url, None)
        known = self._entries.get(resource.url)
        changed = known is None or not known.document.same_as(document)
        self.watch.fetched(resource, changed=changed)
        try:
            await self._store.put(StoredAnswer(resource, answer, fetched_at))
        except CloisterError as error:
            # It is as good in memory. What a full disk costs is the memory of it after a restart.
            self._log.error("collateral could not be stored", url=resource.url, code=error.code.text, why=error.why)
        self._admit(document, fetched_at, changed=changed)
        return document

    def _require_good(self, document: Document) -> None:
        """Revocation, time, and no way back (rules 3 to 5)."""
        self._require_issuer(document)
        known = self._entries.get(document.resource.url)
        if known is not None and known.document.resource == document.resource:
            require_not_older(document, known.document)
        require_valid(document, self._rhythm.clock())

    def _require_issuer(self, document: Document) -> None:
        """Raise FetchFailed when the root's list revokes the document's issuer, or there is no such list."""
        if document.issuer is None:
            return
        root_crl = self._entries.get(self._client.server.root_crl().url)
        if root_crl is None:
            raise FetchFailed(Failure.REVOKED, "there is no root CA CRL to look its issuer up in")
        require_not_revoked(document, root_crl.document)

    def _admit(self, document: Document, fetched_at: datetime, *, changed: bool = False) -> None:
        when = refresh_at(fetched_at, document.expires, self._rhythm.jitter())
        self._entries[document.resource.url] = _Entry(document, when, fetched_at)
        # Also for other documents: the root's list may have changed while this one was written.
        self._withdraw_revoked()
        self.watch.kept(document, changed=changed)

    def _withdraw_revoked(self) -> None:
        """Serve no more of what a revoked issuer signed. Without a root CRL nothing is served until there is one."""
        if self._client.server.root_crl().url not in self._entries:
            return
        for entry in self._entries.values():
            if entry.withdrawn:
                continue
            try:
                self._require_issuer(entry.document)
            except FetchFailed as failed:
                entry.withdrawn = True
                self._log.error("collateral withdrawn", url=entry.document.resource.url, reason=failed.reason)

    def _put_on_hold(self, resource: Resource, failed: FetchFailed) -> None:
        hold = hold_after(failed, self._holds.pop(resource.url, None), self._rhythm.monotonic(), self._rhythm.jitter())
        while len(self._holds) >= _MAX_HOLDS:
            self._holds.pop(next(iter(self._holds)))
        self._holds[resource.url] = hold
        if failed.failure is Failure.GONE and resource.evaluation_number == self._evaluation_number is not None:
            self._evaluation_number = None
            self._log.warning("pinned TCB evaluation is gone", number=resource.evaluation_number)
        if failed.failure is Failure.THROTTLED:
            self._server_hold = hold  # a quota is of the client, not of a URL
        known = self._entries.get(resource.url)
        self.watch.failed(resource, failed, good_until=None if known is None else known.document.expires)


class _PinGone(Exception):
    """The pinned evaluation number is no longer served; the edition counts from now on."""
