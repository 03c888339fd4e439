# SPDX-License-Identifier: Apache-2.0
"""A directory of bundles as a source of collateral: no network, the same rules."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cloister.collateral.bundle import CollateralBundle, VerifiedBundle, bundle_path, require_root
from cloister.collateral.documents import Newest
from cloister.collateral.failures import FETCH_HINT, expired
from cloister.collateral.family import Edition, Family
from cloister.collateral.watch import CollateralWatch
from cloister.errors import CloisterError, Code
from cloister.runtime.logging import get_logger
from cloister.runtime.marks import Mark, Marks
from cloister.tdx.collateral import Collateral
from cloister.tdx.trustroot import TrustRoot

_LOOK_EVERY: Final = timedelta(minutes=1)
_Identity = tuple[int, int, int]  # of a file's contents: inode, modification time, size


@dataclass(slots=True)
class _Loaded:
    bundle: VerifiedBundle
    identity: _Identity  # of the file that was looked at last, even if it was not good
    latest: datetime  # the newest time it was used: a clock that steps back does not revive it


class OfflineCollateral:
    """A `CollateralSource` that reads bundles, and reads them again when their files change.

    A file that becomes damaged, older or is removed does not displace what was good. With `marks`, an older one is
    refused after a restart, too.
    """

    def __init__(
        self,
        directory: Path,
        *,
        root: TrustRoot,
        edition: Edition = Edition.STANDARD,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        watch: CollateralWatch | None = None,
        marks: Marks | None = None,
    ) -> None:
        require_root(directory, root)
        self._directory = directory
        self._root = root
        self._edition = edition
        self._clock = clock
        self._marks = marks
        self.watch = watch or CollateralWatch()
        self._looked_at: datetime | None = None
        self._loaded: dict[Family, _Loaded] = {}
        self._log = get_logger()

    async def get(self, fmspc: bytes, ca: str, tee: str) -> Collateral:
        """Return collateral that is valid now, see `CollateralSource`."""
        family = Family.of(fmspc.hex(), ca, tee, self._edition)
        now = self._clock()
        loaded = await self._load(family, now)
        loaded.latest = max(now, loaded.latest)
        self._look(now)
        if loaded.latest > loaded.bundle.expires:
            raise expired(family, loaded.bundle.expires, loaded.latest)
        loaded.bundle.require_valid(now)
        return loaded.bundle.collateral

    async def _load(self, family: Family, now: datetime) -> _Loaded:
        path = bundle_path(self._directory, family)
        known = self._loaded.get(family)
        identity = _identity(path)
        if known is not None and identity in (known.identity, None):
            return known
        if identity is None:
            raise CloisterError(
                Code.COLLATERAL_NOT_FOUND,
                what=f"no collateral for {family}",
                why=f"{path} is not there",
                todo=f"{FETCH_HINT} where there is a network, and `cloister collateral import` here",
            )
        try:
            bundle = await asyncio.to_thread(self._verify, path, family)
            if known is not None:
                bundle.require_not_older(known.bundle.documents)
            await self._remember(bundle)
        except CloisterError as error:
            if known is None:
                raise
            self._log.warning("collateral file not accepted", path=str(path), code=error.code.text, why=error.why)
            known.identity = identity
            return known
        loaded = self._loaded[family] = _Loaded(bundle, identity, now)
        for document in bundle.documents.values():
            self.watch.kept(document, changed=False)
        self._looked_at = None
        return loaded

    async def _remember(self, bundle: VerifiedBundle) -> None:
        """Compare with the newest that was ever here, and note what is newer now."""
        if self._marks is None:
            return
        # Under another root there may be other documents at the same address.
        names = {
            kind: f"collateral/{self._root.fingerprint.hex()}/{document.resource.url}"
            for kind, document in bundle.documents.items()
        }
        found = await self._marks.of(names.values())
        bundle.require_not_older(
            {
                kind: Newest(mark.number, datetime.fromisoformat(mark.detail))
                for kind, name in names.items()
                if (mark := found.get(name)) is not None
            }
        )
        documents = bundle.documents.items()
        marks = {names[kind]: Mark(document.number, document.issued.isoformat()) for kind, document in documents}
        if marks != found:
            await self._marks.put(marks)

    def _look(self, now: datetime) -> None:
        """Warn of what expires soon; looked for once a minute, not with every quote."""
        if self._looked_at is None or abs(now - self._looked_at) >= _LOOK_EVERY:
            self._looked_at = now
            bundles = (loaded.bundle for loaded in self._loaded.values())
            self.watch.look([document for bundle in bundles for document in bundle.documents.values()], now)

    def _verify(self, path: Path, family: Family) -> VerifiedBundle:
        bundle = CollateralBundle.read(path)
        if bundle.family != family:
            raise CloisterError(
                Code.COLLATERAL_INVALID,
                what=f"{path} is not for {family}",
                why=f"it says {bundle.family.name}",
                todo="import it under its own name",
            )
        return bundle.verify(self._root)


def _identity(path: Path) -> _Identity | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
