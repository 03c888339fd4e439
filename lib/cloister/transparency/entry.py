# SPDX-License-Identifier: Apache-2.0
"""One entry of the decision log: what was asked, who asked, what was decided and on what grounds.

The encoding (TLV, never JSON) is what the Merkle leaf hashes; reading gives back exactly what was written. Every entry
carries 16 random bytes: the leaf hash, which every tenant may see, tells nothing even to who could guess the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cloister.release.blocks import Block
from cloister.tlv import parse_tlv, tlv

SALT_SIZE: Final = 16
_LABEL: Final = "cloister-log-entry-v1"
_FIELDS: Final = 19
MAX_BLOCKS: Final = 64


class EntryInvalid(Exception):
    """Bytes that are not a log entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A decision or a change of a key. Digests are 48 bytes, or empty where there is nothing to digest."""

    action: str  # "release", "create-key", "start" and the like: docs/keys.md names them
    tenant: str  # of the caller: a denial for someone else's key is no news to its owner
    key_uri: str
    caller: str  # SPIFFE id
    granted: bool
    blocks: tuple[Block, ...]
    key_version: int = 0
    purpose: str = ""
    job: str = ""  # what max_per_job counts for
    channel: str = ""  # TLS version and key-exchange group
    policy_digest: bytes = b""
    evidence_digest: bytes = b""  # SHA-384 of the token, or of the owner's certificate
    wrapped_digest: bytes = b""  # SHA-384 of the wrapped data key
    record_digest: bytes = b""  # of the key's record after a change
    request_id: str = ""
    detail: bytes = b""  # what the action is about, in an encoding of the action's own

    def to_bytes(self, *, index: int, time_ms: int, salt: bytes) -> bytes:
        """Return the entry as it stands at this place of the log; the salt is 16 random bytes."""
        blocks = tlv("blocks", *map(_block, self.blocks))
        return tlv(
            _LABEL,
            index,
            time_ms,
            salt,
            self.action,
            self.tenant,
            self.key_uri,
            self.caller,
            int(self.granted),
            self.key_version,
            self.purpose,
            self.job,
            self.channel,
            self.policy_digest,
            self.evidence_digest,
            self.wrapped_digest,
            self.record_digest,
            self.request_id,
            self.detail,
            tlv("block-list", len(self.blocks), blocks),
        )


@dataclass(frozen=True, slots=True)
class LoggedEntry:
    """An entry with its place and time."""

    index: int
    time_ms: int  # Unix milliseconds
    salt: bytes  # 16 bytes
    entry: Entry

    def to_bytes(self) -> bytes:
        """Return the leaf's bytes again."""
        return self.entry.to_bytes(index=self.index, time_ms=self.time_ms, salt=self.salt)

    @classmethod
    def parse(cls, data: bytes) -> LoggedEntry:
        """Decode what `to_bytes` encoded; raise EntryInvalid for anything else."""
        try:
            return cls._parse(data)
        except ValueError:
            raise EntryInvalid("not a log entry") from None

    @classmethod
    def _parse(cls, data: bytes) -> LoggedEntry:
        fields = parse_tlv(data, label=_LABEL, fields=_FIELDS)
        index, time_ms, key_version = (_number(fields[i]) for i in (0, 1, 8))
        if len(fields[2]) != SALT_SIZE:
            raise ValueError("a salt has 16 bytes")
        action, tenant, key_uri, caller = (field.decode() for field in fields[3:7])
        purpose, job, channel = (field.decode() for field in fields[9:12])
        entry = Entry(
            action=action,
            tenant=tenant,
            key_uri=key_uri,
            caller=caller,
            granted=_flag(fields[7]),
            blocks=_blocks(fields[18]),
            key_version=key_version,
            purpose=purpose,
            job=job,
            channel=channel,
            policy_digest=fields[12],
            evidence_digest=fields[13],
            wrapped_digest=fields[14],
            record_digest=fields[15],
            request_id=fields[16].decode(),
            detail=fields[17],
        )
        return cls(index, time_ms, fields[2], entry)


@dataclass(frozen=True, slots=True)
class Outline:
    """What a log is searched and counted by, read without the blocks: thousands are walked at every start."""

    index: int
    tenant: str
    key_uri: str
    job: str
    granted: bool
    policy_digest: bytes
    record_digest: bytes

    @classmethod
    def of(cls, index: int, entry: Entry) -> Outline:
        """Return the outline of an entry at this place."""
        return cls(
            index, entry.tenant, entry.key_uri, entry.job, entry.granted, entry.policy_digest, entry.record_digest
        )

    @classmethod
    def parse(cls, data: bytes) -> Outline:
        """Read the outer fields of an entry; raise EntryInvalid for anything else."""
        try:
            fields = parse_tlv(data, label=_LABEL, fields=_FIELDS)
            tenant, key_uri, job = (fields[i].decode() for i in (4, 5, 10))
            return cls(_number(fields[0]), tenant, key_uri, job, _flag(fields[7]), fields[12], fields[15])
        except ValueError:
            raise EntryInvalid("not a log entry") from None


@lru_cache(maxsize=4096)  # some 25 a request, and nearly all of them are those of the request before
def _block(block: Block) -> bytes:
    return tlv("block", block.name, int(block.ok), block.wanted, block.got)


def _blocks(data: bytes) -> tuple[Block, ...]:
    count, listed = parse_tlv(data, label="block-list", fields=2)
    if _number(count) > MAX_BLOCKS:
        raise ValueError("too many blocks")
    blocks = []
    for block in parse_tlv(listed, label="blocks", fields=_number(count)):
        name, ok, wanted, got = parse_tlv(block, label="block", fields=4)
        blocks.append(Block(name.decode(), _flag(ok), wanted.decode(), got.decode()))
    return tuple(blocks)


def _number(field: bytes) -> int:
    if len(field) != 8:
        raise ValueError("a number has 8 bytes")
    return int.from_bytes(field, "big")


def _flag(field: bytes) -> bool:
    number = _number(field)
    if number > 1:
        raise ValueError("a flag is 0 or 1")
    return number == 1
