# SPDX-License-Identifier: Apache-2.0
"""ECDSA P-256 signatures and keys as quotes and collateral carry them: bare numbers, big-endian."""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cloister.tdx.certificate import ECDSA_SHA256

# FIPS 186-5, P-256.
FIELD: Final = 0xFFFFFFFF00000001000000000000000000000000FFFFFFFFFFFFFFFFFFFFFFFF
ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
SIGNATURE_SIZE: Final = 64


def public_key(point: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key with coordinates x || y (64 bytes); raise ValueError unless it is a point below p."""
    x, y = int.from_bytes(point[:32], "big"), int.from_bytes(point[32:], "big")
    if x >= FIELD or y >= FIELD:
        raise ValueError("a coordinate is not below p")
    return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + point)


def to_der(signature: bytes) -> bytes:
    """Return r || s (64 bytes) as DER, which is what `cryptography` verifies; high s is valid.

    Raise ValueError unless 1 <= r, s < n.
    """
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    if not (0 < r < ORDER and 0 < s < ORDER):
        raise ValueError("r or s is not between 1 and n - 1")
    return encode_dss_signature(r, s)


def verifies(key: ec.EllipticCurvePublicKey, signature_der: bytes, message: bytes) -> bool:
    """Say whether this key signed the message, with SHA-256."""
    try:
        key.verify(signature_der, message, ECDSA_SHA256)
    except InvalidSignature:
        return False
    return True
