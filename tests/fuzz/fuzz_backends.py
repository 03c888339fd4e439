# SPDX-License-Identifier: Apache-2.0
"""Fuzz what the back ends read: handles and canaries from a disk, URIs. Run: python tests/fuzz/fuzz_backends.py"""

from __future__ import annotations

import sys
from contextlib import suppress

import atheris

with atheris.instrument_imports(include=["cloister.tlv", "cloister_keybroker.backends"]):
    from cloister.errors import CloisterError, Code
    from cloister_keybroker.backends.canary import Kept
    from cloister_keybroker.backends.remote import Handle
    from cloister_keybroker.backends.uri import BackendUri

_HANDLE = Handle("transit", b"cloister-00", b"vault:v1:AAAA", 1_800_000_000_000, b"\x01" * 61).encode()
_CANARY = Kept("transit", b"cloister-00", b"vault:v1:AAAA", 1_800_000_000_000, b"\x02" * 48).encode()
_URI = b"transit:https://vault:8200/transit?ca=/ca.pem&token=/token&name=vault%2D1"


def one_input(data: bytes) -> None:
    """Parse bytes as they are, and bytes written into what is right."""
    parse(data, data, data)
    if len(data) > 3:
        place, cut = int.from_bytes(data[:2], "big"), data[2]
        parse(*(seed[: place % len(seed)] + data[3:] + seed[place % len(seed) + cut :] for seed in SEEDS))


SEEDS = (_HANDLE, _CANARY, _URI)


def parse(handle: bytes, canary: bytes, uri: bytes) -> None:
    """Raise for anything but a value that encodes to the same bytes, or the one error of each."""
    with suppress(ValueError):
        if Handle.parse(handle).encode() != handle:
            raise AssertionError("a handle with two encodings")
    with suppress(ValueError):
        if Kept.parse(canary).encode() != canary:
            raise AssertionError("a canary with two encodings")
    try:
        found = BackendUri.parse(uri.decode(errors="replace"))
        if found.scheme == "transit":
            found.https()
    except CloisterError as error:
        if error.code is not Code.CONFIG_INVALID:
            raise


if __name__ == "__main__":
    parse(*SEEDS)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
