# SPDX-License-Identifier: Apache-2.0
"""The PCK certificate chain of a quote, down to a configured root (rows P1 to P8)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NoReturn

from cryptography import x509

from cloister.tdx.certificate import (
    ECDSA_SHA256,
    Certificate,
    Window,
    load_certificate,
    require_end_entity,
    require_issuer,
    require_name,
    require_within,
    split_pem,
    verify_signature,
)
from cloister.tdx.check import Check
from cloister.tdx.der import DerError
from cloister.tdx.pckextension import SGX_EXTENSION_OID, PckExtension
from cloister.tdx.quote import QuoteRejected
from cloister.tdx.trustroot import ROOT_NAME, TrustRoot

__all__ = ["CA_NAMES", "ECDSA_SHA256", "PckChain", "TrustRoot", "load_pck_chain", "verify_pck_chain"]

CA_NAMES: Final = ("Intel SGX PCK Platform CA", "Intel SGX PCK Processor CA")
LEAF_NAME: Final = "Intel SGX PCK Certificate"


@dataclass(frozen=True, slots=True)
class PckChain:
    """What a chain says once it leads to a configured root. It holds at all times inside `windows`."""

    root: TrustRoot
    ca: Certificate
    leaf: Certificate
    ca_name: str
    pck: PckExtension
    windows: tuple[Window, ...]

    @property
    def checks(self) -> tuple[Check, ...]:
        start, end = max(window.start for window in self.windows), min(window.end for window in self.windows)
        return (
            Check("P1", True, "three certificates, leaf to root", "as wanted"),
            Check("P2", True, "a configured root", f"SHA-256 {self.root.fingerprint.hex()}"),
            Check("P3", True, "ECDSA P-256 with SHA-256, each signed by the next", "all verify"),
            Check("P4", True, "CAs that may issue, a leaf that may not", "as wanted"),
            Check("P5", True, f"{LEAF_NAME} under a PCK CA under {ROOT_NAME}", f"under {self.ca_name}"),
            Check("P6", True, "valid now", f"from {start:%Y-%m-%dT%H:%M:%SZ} to {end:%Y-%m-%dT%H:%M:%SZ}"),
            Check("P7", True, "one SGX extension, strict DER", f"FMSPC {self.pck.fmspc.hex()}"),
            Check("P8", True, "no unknown critical and no duplicate extension", "none"),
        )


def verify_pck_chain(pem: bytes, *, roots: Sequence[TrustRoot], now: datetime) -> PckChain:
    """Verify leaf, CA and root; raise QuoteRejected P1 to P8. `now` is aware."""
    chain = load_pck_chain(pem, roots=roots)
    # P6: all three are valid now.
    require_within(chain.windows, now)
    return chain


def load_pck_chain(pem: bytes, *, roots: Sequence[TrustRoot]) -> PckChain:
    """Verify all but the time (P6); raise QuoteRejected P1 to P5, P7, P8."""
    # P1: exactly three certificates, leaf first.
    leaf_der, ca_der, root_der = split_pem(pem, 3)

    # P2: the last one is a configured root, byte for byte; what is used is the configured one.
    root = next((root for root in roots if root.certificate_der == root_der), None)
    if root is None:
        fingerprint = hashlib.sha256(root_der).hexdigest()
        _reject("P2", f"the chain ends in a root that is not configured here (SHA-256 {fingerprint})")
    leaf = load_certificate(leaf_der, "leaf")
    ca = load_certificate(ca_der, "CA")

    # P3: P-256 keys, ECDSA-SHA256 signatures, each by the next one's key.
    verify_signature(ca, root.certificate.key)
    verify_signature(leaf, ca.key)

    # P4: who may issue, and who may not. The root was looked at when it was configured.
    require_issuer(ca, depth=0)
    require_end_entity(leaf)

    # P5: roles by name and by position.
    ca_name = require_name(ca, CA_NAMES)
    require_name(leaf, (LEAF_NAME,))
    if leaf.issuer_der != ca.subject_der or ca.issuer_der != root.certificate.subject_der:
        _reject("P5", "a certificate of the chain names another issuer than the one above it")

    # P7: one SGX extension, exactly as specified. P8 was seen to with the extensions of P4.
    pck = _sgx_extension(leaf)

    windows = tuple(certificate.window("P6") for certificate in (leaf, ca, root.certificate))
    return PckChain(root, ca, leaf, ca_name, pck, windows)


def _sgx_extension(leaf: Certificate) -> PckExtension:
    try:
        value = leaf.x509.extensions.get_extension_for_oid(SGX_EXTENSION_OID).value
    except x509.ExtensionNotFound:
        raise QuoteRejected("P7", "the leaf certificate has no SGX extension") from None
    if not isinstance(value, x509.UnrecognizedExtension):
        _reject("P7", "the SGX extension is not one")
    try:
        return PckExtension.parse(value.value)
    except DerError as error:
        raise QuoteRejected("P7", f"SGX extension: {error}") from None


def _reject(check: str, reason: str) -> NoReturn:
    raise QuoteRejected(check, reason)
