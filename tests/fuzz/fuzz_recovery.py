# SPDX-License-Identifier: Apache-2.0
"""Fuzz shares and sealed roots: any bytes end in their error. Run: python tests/fuzz/fuzz_recovery.py"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["cloister.recovery", "shamir_mnemonic"]):
    from cloister.errors import CloisterError, Code
    from cloister.recovery import SealedRoot, ShareCollector, split
    from cloister.secret import SecretBytes

_KEY = SecretBytes(bytes(32))
_SPLIT = split(_KEY, threshold=2, count=3)
_SHARE = _SPLIT.mnemonics[0].reveal()
_SEALED = SealedRoot.seal(SecretBytes(b"secret"), _KEY, purpose="fuzz", shares=_SPLIT.public)
_FILE = _SEALED.to_bytes()


def one_input(data: bytes) -> None:
    """Feed bytes as they are, and bytes written into a genuine share and a genuine file."""
    place = int.from_bytes(data[:2], "big")
    for share in (data, _SHARE[: place % len(_SHARE)] + data[2:], _edited(_SHARE, place, data[2:])):
        _share(share)
    for file in (data, _edited(_FILE, place, data[2:])):
        _file(file)


def _edited(whole: bytes, place: int, edit: bytes) -> bytes:
    place %= len(whole)
    return whole[:place] + edit + whole[place + len(edit) :]


def _share(data: bytes) -> None:
    try:
        number = ShareCollector(_SPLIT.public).add(SecretBytes(data))
    except CloisterError as error:
        if error.code is not Code.SHARE_INVALID:
            raise
        return
    if number != 1 or data.lower().split() != _SHARE.split():
        raise AssertionError("a share that was not made was taken")


def _file(data: bytes) -> None:
    try:
        found = SealedRoot.parse(data, purpose="fuzz")
        found.open(_KEY)
    except CloisterError as error:
        if error.code is not Code.SEALED_ROOT_INVALID:
            raise
        return
    if found != _SEALED:
        raise AssertionError("an edited file opened")


if __name__ == "__main__":
    one_input(b"")
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
