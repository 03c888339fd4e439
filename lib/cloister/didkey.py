# SPDX-License-Identifier: Apache-2.0
"""Names of Ed25519 public keys: did:key (W3C CCG), "did:key:z" and base58btc of 0xed01 and the 32 bytes.

A name has one form and holds the whole key: whoever has the name can verify, and needs no directory.
"""

from __future__ import annotations

import re
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cloister.errors import CloisterError, Code

_ALPHABET: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_VALUES: Final = {character: value for value, character in enumerate(_ALPHABET)}
_MULTICODEC: Final = b"\xed\x01"  # ed25519-pub, as a varint
_SIZE: Final = len(_MULTICODEC) + 32
# 34 bytes that begin with 0xed are always 47 digits: no leading zeros, no second form.
_DID_KEY: Final = re.compile(r"did:key:z([1-9A-HJ-NP-Za-km-z]{47})", re.ASCII)


def did_key(key: Ed25519PublicKey | Ed25519PrivateKey) -> str:
    """Return the name of a public key, or of a private key's public half (56 characters)."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    number = int.from_bytes(_MULTICODEC + public.public_bytes_raw(), "big")
    digits = ""
    while number:
        number, digit = divmod(number, 58)
        digits = _ALPHABET[digit] + digits
    return f"did:key:z{digits}"


def parse_did_key(text: str) -> Ed25519PublicKey:
    """Return the key of a name; raise CloisterError(ARGUMENT_INVALID) for anything but an Ed25519 did:key."""
    found = _DID_KEY.fullmatch(text)
    if found:
        number = 0
        for character in found[1]:
            number = number * 58 + _VALUES[character]
        if number < 1 << 8 * _SIZE:
            data = number.to_bytes(_SIZE, "big")
            if data.startswith(_MULTICODEC):
                return Ed25519PublicKey.from_public_bytes(data[len(_MULTICODEC) :])
    raise CloisterError(
        Code.ARGUMENT_INVALID,
        what=f"{text[:80]!r} is not the did:key of an Ed25519 key",
        why="such a name is did:key:z6Mk and 44 characters of base58",
        todo="print one with: cloister key signer",
    )


def is_did_key(text: str) -> bool:
    """Say whether this is the did:key of an Ed25519 key."""
    try:
        parse_did_key(text)
    except CloisterError:
        return False
    return True
