# SPDX-License-Identifier: Apache-2.0
"""Root certificates that quotes and collateral may come from: by configuration, never from a quote."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.errors import CloisterError, Code
from cloister.tdx.certificate import UNREADABLE, Certificate, load_certificate, require_issuer, require_name
from cloister.tdx.quote import QuoteRejected

ROOT_NAME: Final = "Intel SGX Root CA"


@dataclass(frozen=True, slots=True)
class TrustRoot:
    """A root CA that quotes may come from. Only its own bytes are used, never a root that came with a quote."""

    certificate_der: bytes
    simulated: bool  # true for a development root: everything under it says so
    certificate: Certificate = field(init=False, repr=False, compare=False)
    fingerprint: bytes = field(init=False, repr=False, compare=False)  # SHA-256 of the certificate (32 bytes)

    def __post_init__(self) -> None:
        try:
            # P1, P3, P4, P5 and P8 of the root, once and for all.
            certificate = load_certificate(self.certificate_der, "root")
            require_issuer(certificate, depth=1)
            require_name(certificate, (ROOT_NAME,))
        except QuoteRejected as error:
            raise CloisterError(
                Code.CONFIG_INVALID,
                what="a trust root is not usable",
                why=error.reason,
                todo=f"configure a certificate of {ROOT_NAME!r}, P-256, as PEM",
            ) from None
        object.__setattr__(self, "certificate", certificate)
        object.__setattr__(self, "fingerprint", hashlib.sha256(self.certificate_der).digest())

    @classmethod
    def from_pem(cls, pem: bytes, *, simulated: bool) -> TrustRoot:
        """Read one PEM certificate; raise CloisterError(CONFIG_INVALID) when it cannot be a root."""
        try:
            certificate_der = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
        except UNREADABLE:
            raise CloisterError(
                Code.CONFIG_INVALID,
                what="a trust root is not usable",
                why="the file holds no PEM certificate",
                todo="configure the root CA's certificate as PEM",
            ) from None
        return cls(certificate_der, simulated)
