# SPDX-License-Identifier: Apache-2.0
"""Signed objects of attest: JWS in compact form, ES256, under a token key of the trust bundle.

`open_signed`, in this order: size and form -> header (exactly alg, kid, typ; ES256 only; no key or URL of the sender's)
-> kid in the given keys -> signature -> strict JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

import jwt
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cloister.ear.members import TokenRejected, b64, parse_object, unb64
from cloister.ear.values import ALGORITHM

_SIGNATURE_SIZE: Final = 64


def sign_claims(claims: Mapping[str, Any], *, kind: str, key: ec.EllipticCurvePrivateKey, key_id: str) -> str:
    """Return claims signed as an object of this kind (`typ`)."""
    payload = json.dumps(claims, separators=(",", ":"), sort_keys=True).encode()
    return jwt.PyJWS().encode(payload, key, algorithm=ALGORITHM, headers={"typ": kind, "kid": key_id})


def open_signed(token: str, *, kind: str, keys: Sequence[Mapping[str, str]], max_chars: int) -> dict[str, Any]:
    """Return the claims of an authentic object of this kind; raise TokenRejected. `keys` are JWKs with `kid`."""
    header = read_header(token, kind=kind, max_chars=max_chars)
    return parse_object(_signed_payload(token, _key_of(header["kid"], keys)), "payload")


def read_header(token: str, *, kind: str, max_chars: int) -> dict[str, str]:
    """Return the header of an object of this form and kind, whoever signed it; raise TokenRejected."""
    if len(token) > max_chars:
        raise TokenRejected("size", f"{len(token)} characters, more than {max_chars}")
    parts = token.split(".")
    if len(parts) != 3:
        raise TokenRejected("form", "a signed token has three parts")
    for part in parts:
        # Only the canonical encoding: otherwise one token would have many digests.
        if not re.fullmatch(r"[A-Za-z0-9_-]+", part, re.ASCII) or b64(unb64(part)) != part:
            raise TokenRejected("form", "not canonical base64url")
    header = parse_object(unb64(parts[0]), "header")
    # `jwk`, `jku`, `x5c`, `x5u` would let the sender name the key, `crit` and `b64` change what is signed.
    if set(header) != {"alg", "kid", "typ"}:
        raise TokenRejected("header", f"members {sorted(header)}, wanted exactly alg, kid, typ")
    if header["alg"] != ALGORITHM:
        raise TokenRejected("alg", f"{header['alg']!r}, only {ALGORITHM} is accepted")
    if header["typ"] != kind:
        raise TokenRejected("typ", f"{header['typ']!r}, not {kind}")
    if not isinstance(header["kid"], str):
        raise TokenRejected("kid", "not text")
    return header


def _key_of(kid: str, keys: Sequence[Mapping[str, str]]) -> ec.EllipticCurvePublicKey:
    for jwk in keys:
        if jwk.get("kid") != kid:
            continue
        if (jwk.get("kty"), jwk.get("crv")) != ("EC", "P-256"):
            raise TokenRejected("kid", "the key of this id is not a P-256 key")
        try:
            return _public_key(jwk["x"], jwk["y"])
        except (KeyError, ValueError):
            raise TokenRejected("kid", "the key of this id is malformed") from None
    raise TokenRejected("kid", "signed by a key that is not in the trust bundle")


@lru_cache(maxsize=16)  # a bundle has a key or two
def _public_key(x: str, y: str) -> ec.EllipticCurvePublicKey:
    at_x, at_y = (int.from_bytes(unb64(coordinate), "big") for coordinate in (x, y))
    return ec.EllipticCurvePublicNumbers(at_x, at_y, ec.SECP256R1()).public_key()


def _signed_payload(token: str, key: ec.EllipticCurvePublicKey) -> bytes:
    """Verify ES256 (RFC 7518, 3.4: r and s, 32 bytes each) over the first two parts; return the second, decoded.

    Not by PyJWT, which looks at every character of the token: that takes ten times as long as the signature.
    """
    signed, _, encoded = token.rpartition(".")
    signature = unb64(encoded)
    try:
        if len(signature) != _SIGNATURE_SIZE:
            raise InvalidSignature
        r, s = (int.from_bytes(half, "big") for half in (signature[:32], signature[32:]))
        key.verify(encode_dss_signature(r, s), signed.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise TokenRejected("signature", "does not verify under the key of its kid") from None
    return unb64(signed.partition(".")[2])
