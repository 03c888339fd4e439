# SPDX-License-Identifier: Apache-2.0
"""Fuzz what operators bring: sealed shares, seal records and backups end in one error each, or read back the same.

Run: python tests/fuzz/fuzz_operations.py
"""

from __future__ import annotations

import hashlib
import io
import sys

import atheris

with atheris.instrument_imports(include=["cloister", "cloister_keybroker"]):
    from cloister.errors import CloisterError, Code
    from cloister.holderkey import SealedShare
    from cloister.recovery import ShareSet
    from cloister.secret import SecretBytes
    from cloister_keybroker.backup import MAGIC, Trailer, unpack
    from cloister_keybroker.rootkey import RootKey
    from cloister_keybroker.sealrecord import SealRecord, SealRecordInvalid, Stretching

_ROOT = RootKey(SecretBytes(bytes(32)))
_FILE = b"a file" * 10
_TRAILER = Trailer(1, "spiffe://cloister.dev/service/keybroker", 60, hashlib.sha384(_FILE).digest(), 3, bytes(32))
_SEEDS = (
    SealedShare("spiffe://cloister.dev/service/keybroker", 1, 3, 2, b"sealed").to_bytes(),
    SealRecord(shares=ShareSet(2, (bytes(32), b"\x01" * 32))).to_bytes(),
    SealRecord(stretching=Stretching(bytes(32))).to_bytes(),
    MAGIC + len(_FILE).to_bytes(8, "big") + _FILE + _TRAILER.sealed(_ROOT).to_bytes(),
)


def one_input(data: bytes) -> None:
    """Try bytes as they are, and written into a good one of each kind."""
    parse(data)
    if len(data) > 3:
        for seed in _SEEDS:
            place, cut = int.from_bytes(data[:2], "big") % len(seed), data[2]
            parse(seed[:place] + data[3:] + seed[place + cut :])


def parse(data: bytes) -> None:
    """Parse as each kind; raise for anything but the errors they promise."""
    try:
        share = SealedShare.parse(data)
        if SealedShare.parse(share.to_bytes()) != share:
            raise AssertionError("a share that does not read back")
    except CloisterError as error:
        if error.code is not Code.SHARE_INVALID:
            raise
    try:
        if SealRecord.parse(data).to_bytes() != data:
            raise AssertionError("two encodings of one record")
    except SealRecordInvalid:
        pass
    target = io.BytesIO()
    try:
        trailer = unpack(io.BytesIO(data), target, name="it")
        if hashlib.sha384(target.getvalue()).digest() != trailer.digest:
            raise AssertionError("a file that is not what its trailer says")
        if trailer.is_of(_ROOT) and trailer != _TRAILER.sealed(_ROOT):
            raise AssertionError("a trailer that nobody made")
    except CloisterError as error:
        if error.code is not Code.BACKUP_INVALID:
            raise


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
