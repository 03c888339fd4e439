# SPDX-License-Identifier: Apache-2.0
"""A backup: the store's file as it was at one moment, and a trailer by which the root key answers for it.

16 bytes "cloister-backup1" || size of the file (8 bytes) || the file || trailer

The trailer is a TLV that names the file's digest and the log's size and root at that moment, with a MAC under the root
key of that moment. Key material stays wrapped as it is in the store: a backup is of no use without its root key, and
with it and the back ends it is everything.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final

import apsw

from cloister.errors import CloisterError, Code
from cloister.runtime.database import Database
from cloister.tlv import parse_tlv, tlv
from cloister_keybroker import log
from cloister_keybroker.rootkey import RootKey

MAGIC: Final = b"cloister-backup1"
CHUNK: Final = 1024 * 1024  # bytes
_HEADER: Final = len(MAGIC) + 8
_MAX_TRAILER: Final = 4096
_LABEL: Final = "cloister-backup-v1"


@dataclass(frozen=True, slots=True)
class Trailer:
    """What is said about the file before it."""

    created_ms: int  # Unix milliseconds
    broker_id: str  # SPIFFE id
    size_bytes: int
    digest: bytes  # SHA-384 of the file, 48 bytes
    log_size: int
    log_root: bytes  # 32 bytes
    mac: bytes = b""  # 48 bytes

    def sealed(self, root_key: RootKey) -> Trailer:
        """Return the trailer with its MAC."""
        return replace(self, mac=root_key.mac(self._message()))

    def is_of(self, root_key: RootKey) -> bool:
        """Say whether a broker with this root key made it."""
        return hmac.compare_digest(self.mac, root_key.mac(self._message()))

    def to_bytes(self) -> bytes:
        """Return the bytes that end a backup."""
        return tlv(_LABEL, self._message(), self.mac)

    @classmethod
    def parse(cls, data: bytes) -> Trailer:
        """Decode what `to_bytes` encoded; raise ValueError for anything else."""
        message, mac = parse_tlv(data, label=_LABEL, fields=2)
        created, broker, size, digest, log_size, log_root = parse_tlv(message, label="cloister-backup-of-v1", fields=6)
        numbers = [int.from_bytes(number, "big") for number in (created, size, log_size)]
        found = cls(numbers[0], broker.decode(), numbers[1], digest, numbers[2], log_root, mac)
        if found.to_bytes() != data or (len(digest), len(log_root), len(mac)) != (48, 32, 48):
            raise ValueError("not a trailer")
        return found

    def _message(self) -> bytes:
        return tlv(
            "cloister-backup-of-v1",
            self.created_ms,
            self.broker_id,
            self.size_bytes,
            self.digest,
            self.log_size,
            self.log_root,
        )


async def backup(database: Database, root_key: RootKey, *, broker_id: str, created_ms: int) -> AsyncGenerator[bytes]:
    """Yield a backup in chunks of at most 1 MiB, while the broker goes on; durable work before this is in it."""

    def look(connection: apsw.Connection) -> tuple[int, bytes]:
        head = log.DecisionLog(connection, root_key).head()
        return head.size, head.root()

    digest = hashlib.sha384()
    async with database.snapshot(look) as snapshot:
        yield MAGIC + snapshot.size_bytes.to_bytes(8, "big")
        async for chunk in snapshot.chunks(CHUNK):
            digest.update(chunk)
            yield chunk
        log_size, log_root = snapshot.found
        trailer = Trailer(created_ms, broker_id, snapshot.size_bytes, digest.digest(), log_size, log_root)
        yield trailer.sealed(root_key).to_bytes()


def unpack(source: BinaryIO, target: BinaryIO, *, name: str) -> Trailer:
    """Copy the file out of a backup; raise BACKUP_INVALID unless it is whole and what its trailer says.

    Whether the trailer is genuine takes the root key: `Trailer.is_of`.
    """
    header = source.read(_HEADER)
    if len(header) != _HEADER or not header.startswith(MAGIC):
        raise invalid(name, "it does not begin like one")
    size = left = int.from_bytes(header[len(MAGIC) :], "big")
    digest = hashlib.sha384()
    while left:
        chunk = source.read(min(CHUNK, left))
        if not chunk:
            raise invalid(name, "it is cut")
        digest.update(chunk)
        target.write(chunk)
        left -= len(chunk)
    try:
        trailer = Trailer.parse(source.read(_MAX_TRAILER + 1))
    except ValueError:
        raise invalid(name, "it is cut, or something is behind its end") from None
    if trailer.size_bytes != size or not hmac.compare_digest(trailer.digest, digest.digest()):
        raise invalid(name, "it is not what its own trailer says: a bit of it has changed")
    return trailer


def invalid(name: str, why: str) -> CloisterError:
    """Say that a file is no backup that can be used."""
    return CloisterError(
        Code.BACKUP_INVALID,
        what=f"{name} is not a backup that can be restored",
        why=why,
        todo="take another copy of it, or an older backup",
    )


def pending_trailer(store: Path) -> Path:
    """Return where the trailer of a restored store waits for the root key that can judge it."""
    return store.with_name(f"{store.name}.restored")
