# SPDX-License-Identifier: Apache-2.0
"""SM2 (GB/T 32918): signatures and encryption over the curve of GB/T 32918.5, in plain integers.

Slow and not constant in time: for a development server only, since no package this project depends on has SM2.
"""

from __future__ import annotations

import base64
import hmac
import secrets
from typing import Final

from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SM3, Hash

from cloister_sim import der

P: Final = 0xFFFFFFFEFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF00000000FFFFFFFFFFFFFFFF
A: Final = P - 3
B: Final = 0x28E9FA9E9D9F5E344D5A9E4BCF6509A7F39789F515AB8F92DDBCBD414D940E93
N: Final = 0xFFFFFFFEFFFFFFFFFFFFFFFFFFFFFFFF7203DF6B21C6052B53BBF40939D54123
G: Final = (
    0x32C4AE2C1F1981195F9904466A39C9948FE30BBFF2660BE1715A4589334C74C7,
    0xBC3736A2F4F6779C59BDCEE36B692153D0A9877CC62A474002DF32E52139F0A0,
)
SIZE: Final = 32
SIGNER: Final = b"1234567812345678"  # the identity that the standard proposes, and EHSM uses

_EC_KEY: Final = (1, 2, 840, 10045, 2, 1)
_SM2_CURVE: Final = (1, 2, 156, 10197, 1, 301)

Point = tuple[int, int]


def generate() -> bytes:
    """Return a private key: a number from 1 to N - 2, 32 bytes."""
    return _to_bytes(1 + secrets.randbelow(N - 2))


def public_point(private: bytes) -> Point:
    return _multiply(int.from_bytes(private, "big"), G)


def public_pem(private: bytes) -> str:
    """Return the public key as SubjectPublicKeyInfo in PEM."""
    x, y = public_point(private)
    algorithm = der.sequence(der.oid(_EC_KEY), der.oid(_SM2_CURVE))
    info = der.sequence(algorithm, der.element(0x03, b"\x00\x04" + _to_bytes(x) + _to_bytes(y)))
    text = base64.b64encode(info).decode()
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return "\n".join(["-----BEGIN PUBLIC KEY-----", *lines, "-----END PUBLIC KEY-----", ""])


def sign(private: bytes, message: bytes, *, prehashed: bool = False) -> bytes:
    """Return (r, s) in DER; a prehashed message is the 32 bytes e."""
    d = int.from_bytes(private, "big")
    e = _digest(public_point(private), message, prehashed=prehashed)
    while True:
        k = 1 + secrets.randbelow(N - 1)
        r = (e + _multiply(k, G)[0]) % N
        s = pow(1 + d, -1, N) * (k - r * d) % N
        if r and s and r + k != N:
            return encode_dss_signature(r, s)


def verify(public: Point, message: bytes, signature: bytes, *, prehashed: bool = False) -> bool:
    try:
        r, s = decode_dss_signature(signature)
    except ValueError:
        return False
    t = (r + s) % N
    if not (0 < r < N and 0 < s < N and t):
        return False
    x, _ = _add(_multiply(s, G), _multiply(t, public))
    return (_digest(public, message, prehashed=prehashed) + x) % N == r


def encrypt(public: Point, plaintext: bytes) -> bytes:
    """Return SEQUENCE {x, y, SM3, ciphertext} in DER (GM/T 0009), as OpenSSL writes it."""
    while True:
        k = 1 + secrets.randbelow(N - 1)
        x2, y2 = map(_to_bytes, _multiply(k, public))
        mask = _stream(x2 + y2, len(plaintext))
        if any(mask) or not plaintext:
            break
    x1, y1 = _multiply(k, G)
    masked = bytes(a ^ b for a, b in zip(plaintext, mask, strict=True))
    return der.sequence(der.integer(x1), der.integer(y1), der.octets(_sm3(x2, plaintext, y2)), der.octets(masked))


def decrypt(private: bytes, ciphertext: bytes) -> bytes:
    """Open what `encrypt` made; raise ValueError for anything else."""
    x1, y1, digest, masked = _read(ciphertext)
    if not _on_curve((x1, y1)):
        raise ValueError("not a point of the curve")
    x2, y2 = map(_to_bytes, _multiply(int.from_bytes(private, "big"), (x1, y1)))
    plaintext = bytes(a ^ b for a, b in zip(masked, _stream(x2 + y2, len(masked)), strict=True))
    if not hmac.compare_digest(_sm3(x2, plaintext, y2), digest):
        raise ValueError("the digest differs")
    return plaintext


def _digest(public: Point, message: bytes, *, prehashed: bool) -> int:
    """Return e = SM3(Z || message), with Z of the signer's identity, the curve and the key."""
    if prehashed:
        if len(message) != SIZE:
            raise ValueError("a digest has 32 bytes")
        return int.from_bytes(message, "big")
    curve = b"".join(map(_to_bytes, (A, B, *G, *public)))
    z = _sm3((8 * len(SIGNER)).to_bytes(2, "big"), SIGNER, curve)
    return int.from_bytes(_sm3(z, message), "big")


def _sm3(*parts: bytes) -> bytes:
    state = Hash(SM3())
    for part in parts:
        state.update(part)
    return state.finalize()


def _stream(seed: bytes, size: int) -> bytes:
    blocks = [_sm3(seed, number.to_bytes(4, "big")) for number in range(1, size // SIZE + 2)]
    return b"".join(blocks)[:size]


def _read(data: bytes) -> tuple[int, int, bytes, bytes]:
    """Read SEQUENCE {INTEGER, INTEGER, OCTET STRING (32), OCTET STRING}."""
    content, rest = _element(data, 0x30)
    if rest:
        raise ValueError("bytes behind the ciphertext")
    x, content = _element(content, 0x02)
    y, content = _element(content, 0x02)
    digest, content = _element(content, 0x04)
    masked, content = _element(content, 0x04)
    if content or len(digest) != SIZE:
        raise ValueError("not an SM2 ciphertext")
    return int.from_bytes(x, "big"), int.from_bytes(y, "big"), digest, masked


def _element(data: bytes, tag: int) -> tuple[bytes, bytes]:
    if len(data) < 2 or data[0] != tag:
        raise ValueError("another element was expected")
    size, start = data[1], 2
    if size > 0x80:
        start += size - 0x80
        size = int.from_bytes(data[2:start], "big")
    if start + size > len(data):
        raise ValueError("cut off")
    return data[start : start + size], data[start + size :]


def _to_bytes(number: int) -> bytes:
    return number.to_bytes(SIZE, "big")


def _on_curve(point: Point) -> bool:
    x, y = point
    return 0 <= x < P and 0 <= y < P and (y * y - x * x * x - A * x - B) % P == 0


def _add(first: Point, second: Point) -> Point:
    """Add two points; raise ValueError for the point at infinity, which no correct caller reaches."""
    (x1, y1), (x2, y2) = first, second
    if x1 == x2:
        if (y1 + y2) % P == 0:
            raise ValueError("the point at infinity")
        slope = (3 * x1 * x1 + A) * pow(2 * y1, -1, P) % P
    else:
        slope = (y2 - y1) * pow(x2 - x1, -1, P) % P
    x3 = (slope * slope - x1 - x2) % P
    return x3, (slope * (x1 - x3) - y1) % P


def _multiply(factor: int, point: Point) -> Point:
    """Multiply a point by a number from 1 to N - 1."""
    result: Point | None = None
    while factor:
        if factor & 1:
            result = point if result is None else _add(result, point)
        factor >>= 1
        if factor:
            point = _add(point, point)
    if result is None:
        raise ValueError("the point at infinity")
    return result
