# SPDX-License-Identifier: Apache-2.0
"""Collateral: the nine things that Intel publishes and a quote is judged by (rows R1 to R6, T1, T2, Q1, X2).

1. X2      sizes, before anything is parsed
2. R1, R6  the root's revocation list
3. R2, R3  the PCK CA under the root, not revoked, and its revocation list
4. T1, R5  the chain of the TCB info's signer: "Intel SGX TCB Signing" directly under the root, not revoked
   T2      its signature over the exact text, and only then the text
5. Q1, R5  the same for the quoting enclave's identity

`Collateral` is claimed, `VerifiedCollateral` holds at all times inside its windows: time is not asked for here, so that
what was verified can be kept, and is asked against `now` at every use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, NoReturn

from cloister.tdx import ecdsa
from cloister.tdx.certificate import (
    Certificate,
    Window,
    load_certificate,
    require_end_entity,
    require_issuer,
    require_name,
    split_pem,
    verify_signature,
)
from cloister.tdx.check import Check
from cloister.tdx.crl import MAX_CRL_SIZE, RevocationList, to_der, verify_crl
from cloister.tdx.pckchain import CA_NAMES, PckChain
from cloister.tdx.quote import QuoteRejected
from cloister.tdx.tcbinfo import QeIdentity, TcbInfo
from cloister.tdx.trustroot import TrustRoot

TCB_SIGNING_NAME: Final = "Intel SGX TCB Signing"

# Bytes, and what is too large or missing is refused as. Real ones: 2 KB, 12 KB, 2 KB; lists 1 to 10 KB, twice in hex.
_LIMITS: Final = {
    "pck_crl_issuer_chain": (16 * 1024, "R2"),
    "root_ca_crl": (2 * MAX_CRL_SIZE + 2, "R6"),
    "pck_crl": (2 * MAX_CRL_SIZE + 2, "R6"),
    "tcb_info_issuer_chain": (16 * 1024, "T1"),
    "tcb_info": (1024 * 1024, "T2"),
    "tcb_info_signature": (256, "T2"),
    "qe_identity_issuer_chain": (16 * 1024, "Q1"),
    "qe_identity": (256 * 1024, "Q1"),
    "qe_identity_signature": (256, "Q1"),
}
MAX_COLLATERAL_SIZE: Final = 16 * 1024 * 1024  # bytes, of the JSON form


@dataclass(frozen=True, slots=True)
class Collateral:
    """The nine parts as they were received; nothing is verified. An absent part is empty."""

    pck_crl_issuer_chain: bytes  # PEM: PCK CA, root
    root_ca_crl: bytes  # DER, PEM or hex
    pck_crl: bytes  # DER, PEM or hex
    tcb_info_issuer_chain: bytes  # PEM: TCB signing, root
    tcb_info: bytes  # the exact text that was signed
    tcb_info_signature: bytes  # 128 hex digits: r || s
    qe_identity_issuer_chain: bytes  # PEM: TCB signing, root
    qe_identity: bytes  # the exact text that was signed
    qe_identity_signature: bytes  # 128 hex digits
    digest: bytes = field(init=False, repr=False, compare=False)  # 32 bytes: SHA-256 of all parts and their lengths

    def __post_init__(self) -> None:
        state = hashlib.sha256()
        for name in _LIMITS:
            part = getattr(self, name)
            state.update(len(part).to_bytes(8, "big"))
            state.update(part)
        object.__setattr__(self, "digest", state.digest())

    @classmethod
    def of(cls, parts: Mapping[str, object]) -> Collateral:
        """Take the nine parts, text or bytes, from a mapping; what is absent or of another type becomes empty.

        That an absent part is refused, and by which row, is for `verify_collateral` to say.
        """
        return cls(**{name: _bytes(parts.get(name)) for name in _LIMITS})

    @classmethod
    def parse(cls, data: bytes) -> Collateral:
        """Read the JSON form, one object of nine strings; raise QuoteRejected X2 for anything else."""
        if len(data) > MAX_COLLATERAL_SIZE:
            _reject("X2", f"{len(data)} bytes of collateral; at most {MAX_COLLATERAL_SIZE}")
        try:
            parts = json.loads(data.decode())
        except (ValueError, RecursionError):
            raise QuoteRejected("X2", "the collateral is not UTF-8 JSON") from None
        if not isinstance(parts, dict):
            _reject("X2", "the collateral is not an object")
        return cls.of(parts)

    def to_json(self) -> bytes:
        """Return the JSON form; revocation lists in hex whatever form they came in."""
        parts: dict[str, str] = {}
        for name in _LIMITS:
            part: bytes = getattr(self, name)
            parts[name] = to_der(part, name).hex() if name.endswith("_crl") else part.decode()
        return json.dumps(parts).encode()


@dataclass(frozen=True, slots=True)
class VerifiedCollateral:
    """Collateral that its signers signed, under this root; only `verify_collateral` makes one."""

    root: TrustRoot
    digest: bytes
    tcb_info: TcbInfo
    qe_identity: QeIdentity
    root_crl: RevocationList
    pck_crl: RevocationList
    pck_ca: Certificate
    signer: Certificate  # of the TCB info
    windows: tuple[Window, ...]

    @property
    def expires(self) -> datetime:
        """The first moment after which a part of it is not valid any more."""
        return min(window.end for window in self.windows)

    @property
    def checks(self) -> tuple[Check, ...]:
        root_crl, pck_crl, signer = self.root_crl, self.pck_crl, self.signer.window("T1")
        return (
            Check("R1", True, "a list signed by the root", f"number {root_crl.number}, {_span(root_crl.window)}"),
            Check("R2", True, "a list signed by the PCK CA", f"number {pck_crl.number}, {_span(pck_crl.window)}"),
            Check("R3-R6", True, "no certificate revoked", "none"),
            Check("T1", True, f"TCB info signed by {TCB_SIGNING_NAME} under the root", _span(signer)),
            Check("T2-T7", True, "TCB info, strict JSON, valid now", _span(self.tcb_info.window)),
            Check("Q1-Q3", True, "a QE identity, strict JSON, valid now", _span(self.qe_identity.window)),
        )

    def require_not_revoked(self, chain: PckChain) -> None:
        """Require that the lists are about this chain, and do not name it (R2, R3, R4)."""
        ca = self.pck_ca
        if (chain.ca.subject_der, chain.ca.spki_der) != (ca.subject_der, ca.spki_der):
            _reject("R2", "the PCK revocation list is not of the CA that issued the platform's certificate")
        # Intel has issued its CAs' certificates more than once: the one in the quote counts, too.
        self.root_crl.require_not_revoked(chain.ca, "R3")
        self.pck_crl.require_not_revoked(chain.leaf, "R4")

    def require_not_older(self, than: VerifiedCollateral) -> None:
        """Require that this may replace `than`, collateral of the same platforms (T13): nothing in it goes back."""
        old, new = than.tcb_info, self.tcb_info
        if new.evaluation_number < old.evaluation_number:
            _reject("T13", f"TCB evaluation {new.evaluation_number} after {old.evaluation_number}")
        if self.qe_identity.evaluation_number < than.qe_identity.evaluation_number:
            _reject("T13", "the QE identity is of an earlier TCB evaluation than one seen before")
        if new.window.start < old.window.start:
            _reject("T13", "the TCB info was issued before one seen before")
        for mine, theirs in ((self.root_crl, than.root_crl), (self.pck_crl, than.pck_crl)):
            if (mine.number or 0) < (theirs.number or 0):
                _reject("T13", "a revocation list has a lower number than one seen before")


def verify_collateral(collateral: Collateral, chain: PckChain) -> VerifiedCollateral:
    """Verify everything but the time, under the root of this chain; raise QuoteRejected with the row that fails.

    Whether the chain itself is revoked is asked of the result.
    """
    root = chain.root
    # 1. X2: sizes; a part that is not there is refused by the row that needs it.
    for name, (limit, row) in _LIMITS.items():
        size = len(getattr(collateral, name))
        if size > limit:
            _reject("X2", f"{name} has {size} bytes; at most {limit}")
        if size == 0:
            _reject(row, f"{name} is missing")
    issuer = root.certificate
    # 2. R1, R6: the root's list.
    root_crl = verify_crl(to_der(collateral.root_ca_crl, "root CRL"), issuer, check="R1", what="root CRL")
    # 3. R2, R3: the CA's list.
    ca = load_issuer(collateral.pck_crl_issuer_chain, root, "R2", CA_NAMES, "PCK CA", chain.ca)
    root_crl.require_not_revoked(ca, "R3")
    pck_crl = verify_crl(to_der(collateral.pck_crl, "PCK CRL"), ca, check="R2", what="PCK CRL")
    # 4. T1, R5, T2: TCB info.
    signer = load_issuer(collateral.tcb_info_issuer_chain, root, "T1", (TCB_SIGNING_NAME,), "TCB signing")
    root_crl.require_not_revoked(signer, "R5")
    require_signed(signer, collateral.tcb_info_signature, collateral.tcb_info, "T2", "TCB info")
    tcb_info = TcbInfo.parse(collateral.tcb_info)
    # 5. Q1, R5: the quoting enclave's identity. As a rule the chain is the same.
    if collateral.qe_identity_issuer_chain == collateral.tcb_info_issuer_chain:
        qe_signer = signer
    else:
        qe_signer = load_issuer(collateral.qe_identity_issuer_chain, root, "Q1", (TCB_SIGNING_NAME,), "QE signing")
        root_crl.require_not_revoked(qe_signer, "R5")
    require_signed(qe_signer, collateral.qe_identity_signature, collateral.qe_identity, "Q1", "QE identity")
    qe_identity = QeIdentity.parse(collateral.qe_identity)
    windows = (
        root_crl.window,
        ca.window("R2"),
        pck_crl.window,
        signer.window("T1"),
        tcb_info.window,
        qe_signer.window("Q1"),
        qe_identity.window,
    )
    return VerifiedCollateral(root, collateral.digest, tcb_info, qe_identity, root_crl, pck_crl, ca, signer, windows)


def load_issuer(
    pem: bytes, root: TrustRoot, check: str, names: tuple[str, ...], what: str, known: Certificate | None = None
) -> Certificate:
    """Return the first of exactly two certificates: of this role, issued by the root itself, revoked or not.

    Raises QuoteRejected(check) that names `what`. `names` are those that the role goes by: a CA of platforms, or a
    signer, which is no CA. `known` is a certificate of that role that was verified under this root before.
    """
    try:
        der, root_der = split_pem(pem, 2)
        if root_der != root.certificate_der:
            _reject(check, "the chain does not end in the root that the quote is under")
        if known is not None and der == known.der:
            return known
        certificate = load_certificate(der, what)
        verify_signature(certificate, root.certificate.key)
        if certificate.issuer_der != root.certificate.subject_der:
            _reject(check, "the certificate names another issuer than the root")
        require_name(certificate, names)
        if set(names) <= set(CA_NAMES):
            require_issuer(certificate, depth=0)
        else:
            require_end_entity(certificate)
    except QuoteRejected as error:
        raise QuoteRejected(check, f"issuer chain of {what}: {error.reason}") from None
    return certificate


def require_signed(signer: Certificate, signature: bytes, text: bytes, check: str, what: str) -> None:
    """Require that a signature (128 hexadecimal digits) is the signer's over this exact text."""
    try:
        raw = bytes.fromhex(signature.decode("ascii")) if signature.isalnum() else b""
    except ValueError:
        raw = b""
    if len(raw) != ecdsa.SIGNATURE_SIZE:
        _reject(check, f"the signature of the {what} is not 64 bytes in hex")
    try:
        der = ecdsa.to_der(raw)
    except ValueError as error:
        raise QuoteRejected(check, f"the signature of the {what}: {error}") from None
    if not ecdsa.verifies(signer.key, der, text):
        _reject(check, f"the {what} is not signed by its issuer")


def _span(window: Window) -> str:
    return f"from {window.start:%Y-%m-%dT%H:%M:%SZ} to {window.end:%Y-%m-%dT%H:%M:%SZ}"


def _bytes(part: object) -> bytes:
    if isinstance(part, bytes):
        return part
    # A lone surrogate is not text that was signed; "replace" makes it something that does not verify.
    return part.encode(errors="replace") if isinstance(part, str) else b""


def _reject(check: str, reason: str) -> NoReturn:
    raise QuoteRejected(check, reason)
