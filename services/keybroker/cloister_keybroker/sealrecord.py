# SPDX-License-Identifier: Apache-2.0
"""What the store itself says about its root key: how it can be had again. Public, and pure.

The broker reads it while it is sealed, so nothing authenticates it then; it is under the root key's MAC, which is
checked as soon as there is a root key. An edited record only leads to a root key that the store does not recognise.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from cloister.recovery import MAX_SHARES, ShareSet
from cloister.tlv import parse_tlv, tlv

SALT_SIZE: Final = 32
_FINGERPRINT_SIZE: Final = 32
# RFC 9106, 4: the cost of one guess. 256 MiB three times is most of a second on one core.
MEMORY_KIB: Final = 256 * 1024
ITERATIONS: Final = 3
LANES: Final = 4
_MAX_MEMORY_KIB: Final = 1024 * 1024  # a record that asks for more was edited to keep the broker from starting
_MAX_ITERATIONS: Final = 16
_MAX_LANES: Final = 16


class Source(enum.StrEnum):
    """Where a root key comes from."""

    FILE = "file"
    PASSPHRASE = "passphrase"  # noqa: S105 - a name
    SHARES = "shares"


class SealRecordInvalid(Exception):
    """Bytes that are not a seal record."""


@dataclass(frozen=True, slots=True)
class Stretching:
    """Argon2id (RFC 9106) from a passphrase to the root key."""

    salt: bytes  # 32 bytes
    memory_kib: int = MEMORY_KIB
    iterations: int = ITERATIONS
    lanes: int = LANES

    def __post_init__(self) -> None:
        if (
            len(self.salt) != SALT_SIZE
            or not 8 * self.lanes <= self.memory_kib <= _MAX_MEMORY_KIB
            or not 1 <= self.iterations <= _MAX_ITERATIONS
            or not 1 <= self.lanes <= _MAX_LANES
        ):
            raise ValueError("not parameters of Argon2id that this release uses")


@dataclass(frozen=True, slots=True)
class SealRecord:
    """Exactly one of `shares` and `stretching` is set, none of them for a file."""

    shares: ShareSet | None = None
    stretching: Stretching | None = None

    def __post_init__(self) -> None:
        if self.shares is not None and self.stretching is not None:
            raise ValueError("a root key has one source")

    @property
    def source(self) -> Source:
        """Where the root key comes from."""
        if self.shares is not None:
            return Source.SHARES
        return Source.PASSPHRASE if self.stretching is not None else Source.FILE

    def to_bytes(self) -> bytes:
        """Return the record as the store keeps it."""
        if self.shares is not None:
            prints = self.shares.fingerprints
            return tlv("cloister-seal-shares-v1", self.shares.threshold, b"".join(prints))
        if self.stretching is not None:
            s = self.stretching
            return tlv("cloister-seal-passphrase-v1", s.salt, s.memory_kib, s.iterations, s.lanes)
        return tlv("cloister-seal-file-v1")

    @classmethod
    def parse(cls, data: bytes) -> SealRecord:
        """Decode what `to_bytes` encoded; raise SealRecordInvalid for anything else."""
        try:
            found = cls._parse(data)
        except ValueError:
            raise SealRecordInvalid("not a seal record") from None
        if found.to_bytes() != data:
            raise SealRecordInvalid("not a seal record")
        return found

    @classmethod
    def _parse(cls, data: bytes) -> SealRecord:
        if data == tlv("cloister-seal-file-v1"):
            return cls()
        if b"cloister-seal-shares-v1" in data[:64]:
            threshold, prints = parse_tlv(data, label="cloister-seal-shares-v1", fields=2)
            if len(prints) > MAX_SHARES * _FINGERPRINT_SIZE:
                raise ValueError("too many shares")
            size = _FINGERPRINT_SIZE
            fingerprints = tuple(prints[at : at + size] for at in range(0, len(prints), size))
            return cls(shares=ShareSet(int.from_bytes(threshold, "big"), fingerprints))
        salt, *numbers = parse_tlv(data, label="cloister-seal-passphrase-v1", fields=4)
        memory, iterations, lanes = (int.from_bytes(number, "big") for number in numbers)
        return cls(stretching=Stretching(salt, memory, iterations, lanes))
