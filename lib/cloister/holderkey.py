# SPDX-License-Identifier: Apache-2.0
"""The key of somebody who holds a recovery share, and the share as it is sent to its holder. Pure.

A holder makes a key pair once, gives the public part to whoever makes the store, and gets a share that opens with the
private part only: no operator, and no mail in between, ever sees it.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cloister.atomicfile import file_error, write_atomically
from cloister.errors import CloisterError, Code
from cloister.hpke import PUBLIC_KEY_SIZE, HpkeError, HpkeKeyPair
from cloister.protocol import share_info
from cloister.recovery import MAX_SHARES, MIN_THRESHOLD
from cloister.secret import SecretBytes
from cloister.strictjson import Members, StrictJsonError, load

MAX_FILE: Final = 16 * 1024  # bytes of any of the files here; a public key has 1.6 KiB
_SEED_SIZE: Final = 64 + 32  # ML-KEM-768 (d || z), X25519
_PRIVATE: Final = "cloister-holder-private-1"
_PUBLIC: Final = "cloister-holder-public-1"
_SHARE: Final = "cloister-sealed-share-1"
_NUMBERS: Final = ("number", "count", "threshold")


def create_holder_key(path: Path) -> Path:
    """Write a new private key (0600) and the public one beside it, whose path is returned; overwrite nothing."""
    public = path.with_name(f"{path.name}.pub")
    for file in (path, public):
        if file.exists():
            raise CloisterError(
                Code.FILE_EXISTS,
                what=f"{file} is already there",
                why="shares that were sealed to the key in it could not be opened any more",
                todo="use it, or name another file",
            )
    seed = SecretBytes(secrets.token_bytes(_SEED_SIZE))
    write_atomically(path, _line(_PRIVATE, seed.reveal()))
    write_atomically(public, _line(_PUBLIC, _pair(seed).public_bytes), mode=0o644)
    return public


def read_holder_key(path: Path) -> HpkeKeyPair:
    """Read a private key; raise CloisterError when it is not there or is none."""
    return _pair(SecretBytes(_read(path, _PRIVATE, _SEED_SIZE)))


def read_holder_public(path: Path) -> bytes:
    """Read a public key (1,216 bytes); raise CloisterError when it is not there or is none."""
    return _read(path, _PUBLIC, PUBLIC_KEY_SIZE)


@dataclass(frozen=True, slots=True)
class SealedShare:
    """A recovery share on its way to its holder."""

    broker_id: str  # SPIFFE id
    number: int  # from 1
    count: int
    threshold: int
    sealed: bytes  # HPKE

    def open(self, holder: HpkeKeyPair) -> SecretBytes:
        """Return the share (33 words); raise CloisterError(SHARE_INVALID) for another holder's, or an edited one."""
        info = share_info(broker_id=self.broker_id, number=self.number, count=self.count, threshold=self.threshold)
        try:
            return holder.open(self.sealed, info=info)
        except HpkeError:
            raise CloisterError(
                Code.SHARE_INVALID,
                what="the share does not open with this key",
                why="it was sealed to another holder, or was changed on its way",
                todo="use the private key whose public part you gave away",
            ) from None

    def to_bytes(self) -> bytes:
        """Return the file's form: JSON, one line, ASCII."""
        fields = {
            "format": _SHARE,
            "broker": self.broker_id,
            "number": self.number,
            "count": self.count,
            "threshold": self.threshold,
            "sealed": base64.b64encode(self.sealed).decode("ascii"),
        }
        return json.dumps(fields, sort_keys=True).encode("ascii") + b"\n"

    @classmethod
    def parse(cls, data: bytes) -> SealedShare:
        """Parse the file's form; raise CloisterError(SHARE_INVALID) for anything else."""
        try:
            members = Members(load(data, max_size=MAX_FILE), "a sealed share")
            if members.text("format") != _SHARE:
                raise StrictJsonError("another format")
            broker = members.text("broker")
            number, count, threshold = (members.integer(name, highest=MAX_SHARES) for name in _NUMBERS)
            sealed = base64.b64decode(members.text("sealed", longest=MAX_FILE), validate=True)
            members.end()
            if not (1 <= number <= count and MIN_THRESHOLD <= threshold <= count):
                raise StrictJsonError("numbers that are none of a share")
            return cls(broker, number, count, threshold, sealed)
        except (StrictJsonError, binascii.Error):
            raise CloisterError(
                Code.SHARE_INVALID,
                what="this is no sealed share",
                why="it is not what `cloister broker init` writes for a holder",
                todo="get the file again from whoever made the store",
            ) from None


def _pair(seed: SecretBytes) -> HpkeKeyPair:
    mlkem = MLKEM768PrivateKey.from_seed_bytes(seed.reveal()[:64])
    return HpkeKeyPair.of(mlkem, X25519PrivateKey.from_private_bytes(seed.reveal()[64:]))


def _line(label: str, data: bytes) -> bytes:
    return f"{label} {base64.b64encode(data).decode('ascii')}\n".encode("ascii")


def _read(path: Path, label: str, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise file_error(error, what=f"{path} cannot be read") from None
    found, _, encoded = data.removesuffix(b"\n").partition(b" ")
    if found != label.encode("ascii"):
        _refuse(path, label)
    try:
        key = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        key = b""
    if len(key) != size:
        _refuse(path, label)
    return key


def _refuse(path: Path, label: str) -> NoReturn:
    kind = "private" if label == _PRIVATE else "public"
    raise CloisterError(
        Code.ARGUMENT_INVALID,
        what=f"{path} is not the {kind} key of a holder",
        why=f"it does not hold {label} and a key",
        todo="cloister broker holder-key makes one; the private part opens shares, the public one (.pub) seals them",
    )
