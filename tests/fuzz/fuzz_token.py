# SPDX-License-Identifier: Apache-2.0
"""Fuzz attestation results: any text, and any claims under the right key, are a result or one error; TLV likewise.

Run: python tests/fuzz/fuzz_token.py
"""

from __future__ import annotations

import base64
import sys
from datetime import UTC, datetime
from pathlib import Path

import atheris
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["cloister.ear", "cloister.tlv"]):
    from cloister import ear
    from cloister.tlv import parse_tlv, tlv

from fakes.ear_sample import AUDIENCE, ISSUER, NOW, sample_ear

_KEY = ec.generate_private_key(ec.SECP256R1())
_JWK = ear.public_jwk(_KEY.public_key())
_TOKEN = ear.issue(sample_ear(), key=_KEY, key_id=_JWK["kid"])
_HEADER, _CLAIMS, _ = _TOKEN.split(".")
_PAYLOAD = base64.urlsafe_b64decode(_CLAIMS + "=" * (-len(_CLAIMS) % 4))


def one_input(data: bytes) -> None:
    """Read bytes as a token, as TLV, and written into claims that are then signed."""
    read(data.decode("utf-8", "replace"))
    read_tlv(data)
    if len(data) > 3:
        at, cut = int.from_bytes(data[:2], "big") % len(_PAYLOAD), data[2]
        read(_signed(_PAYLOAD[:at] + data[3:] + _PAYLOAD[at + cut :]))


def read(token: str) -> None:
    """Raise for anything but a result or its one error, and for a result that was not signed for this audience."""
    for now in (NOW, datetime(1970, 1, 1, tzinfo=UTC)):
        try:
            found = ear.verify(token, keys=[_JWK], issuer=ISSUER, audience=AUDIENCE, now=now)
        except ear.TokenRejected:
            continue
        if (found.issuer, found.audience) != (ISSUER, AUDIENCE) or len(found.certificate_sha256) != 32:
            raise AssertionError("a result for somebody else, or about nobody")


def read_tlv(data: bytes) -> None:
    """Raise unless what is read is what was written."""
    try:
        fields = parse_tlv(data, label="cloister-fuzz-v1", fields=3)
    except ValueError:
        return
    if tlv("cloister-fuzz-v1", *fields) != data:
        raise AssertionError("two encodings of the same fields")


def _signed(payload: bytes) -> str:
    text = f"{_HEADER}.{_b64(payload)}"
    r, s = decode_dss_signature(_KEY.sign(text.encode(), ec.ECDSA(SHA256())))
    return f"{text}.{_b64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


if __name__ == "__main__":
    ear.verify(_signed(_PAYLOAD), keys=[_JWK], issuer=ISSUER, audience=AUDIENCE, now=NOW)
    read_tlv(tlv("cloister-fuzz-v1", b"a", b"", b"c"))
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
