# SPDX-License-Identifier: Apache-2.0
"""Certificate requests: nothing in them counts but the key, and that its holder signed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.errors import Code
from cloister.guest.evidence import Checklist, load_p256_spki

_MAX_CSR: Final = 8 * 1024  # one under P-256 without a name has about 200 bytes


@dataclass(frozen=True, slots=True)
class RequestedKey:
    """A P-256 key whose holder asks for a certificate."""

    public_key: ec.EllipticCurvePublicKey
    spki_der: bytes


def read_request(csr_der: bytes, checklist: Checklist) -> RequestedKey:
    """Return the key of a PKCS#10 request that is signed under it; raise EvidenceRefused(CSR_INVALID)."""
    code = Code.CSR_INVALID
    size = len(csr_der)
    checklist.require("csr.size", size <= _MAX_CSR, code, wanted=f"at most {_MAX_CSR} bytes", got=f"{size} bytes")
    try:
        request = x509.load_der_x509_csr(csr_der)
        spki = request.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        signed = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm):
        checklist.refuse("csr.form", code, wanted="a PKCS#10 request", got="something else")
    checklist.require("csr.form", True, code, wanted="a PKCS#10 request", got="a PKCS#10 request")
    checklist.require("csr.signature", signed, code, wanted="verifies", got="verifies" if signed else "does not")
    key = load_p256_spki(spki)
    if key is None:
        checklist.refuse("csr.algorithm", code, wanted="a P-256 key", got="another kind of key")
    checklist.require("csr.algorithm", True, code, wanted="a P-256 key", got="a P-256 key")
    return RequestedKey(key, spki)
