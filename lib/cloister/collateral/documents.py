# SPDX-License-Identifier: Apache-2.0
"""A document that verified: what may be stored, and what a stored one may be replaced by.

1. form          the signed text is in the answer
2. T1, Q1, R2    its issuer chain: two certificates, the right role, directly under the pinned root
3. T2, R1, R2    its signature; only then is it parsed
4. T3, T5, Q2    it is what was asked for: TEE, FMSPC, CA, evaluation number
5. R3, R5        its issuer is not on the root's list
6. T7, Q3, R1    it is valid now
7. T13           it is not older than what is known

Steps 1 to 4 hold at all times, so that what was read from a disk, even expired, still says what is newest. The whole
set is verified once more where it is used, by `cloister.tdx`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cloister.collateral.decode import Answer, SignedText, decode, decode_crl
from cloister.collateral.failures import Failure, FetchFailed, kind_text
from cloister.collateral.family import PckCa, Tee
from cloister.collateral.resources import DocumentKind, Resource
from cloister.tdx.certificate import Certificate, Window
from cloister.tdx.collateral import TCB_SIGNING_NAME, Collateral, load_issuer, require_signed
from cloister.tdx.crl import RevocationList, verify_crl
from cloister.tdx.quote import QuoteRejected
from cloister.tdx.tcbinfo import QeIdentity, TcbInfo
from cloister.tdx.trustroot import TrustRoot

TCB_INFO_ID: Final = {Tee.TDX: "TDX", Tee.SGX: "SGX"}
_ROWS: Final = {DocumentKind.TCB_INFO: "T1", DocumentKind.QE_IDENTITY: "Q1", DocumentKind.PCK_CRL: "R2"}
QE_IDENTITY_ID: Final = {Tee.TDX: "TD_QE", Tee.SGX: "QE"}


@dataclass(frozen=True, slots=True)
class Newest:
    """What is remembered of a document: enough to know an older one."""

    number: int
    issued: datetime


@dataclass(frozen=True, slots=True)
class Document:
    """One verified document; it holds at all times inside its windows."""

    resource: Resource
    signed: SignedText
    number: int  # TCB evaluation number, or CRL number
    issued: datetime
    valid_from: datetime
    expires: datetime  # the last moment at which all of it is valid: nextUpdate, and every certificate's notAfter
    issuer: Certificate | None  # whom the root's list could revoke; None for that list itself
    revocations: RevocationList | None  # of a CRL

    def valid_at(self, now: datetime) -> bool:
        """Say whether `now` is inside all windows; both ends belong to them."""
        return self.valid_from <= now <= self.expires

    def same_as(self, other: Document) -> bool:
        """Say whether the server sent the same signed text again."""
        return self.signed == other.signed


def verify_document(resource: Resource, answer: Answer, *, root: TrustRoot) -> Document:
    """Verify an answer, all but time and revocation (steps 1 to 4); raise FetchFailed."""
    return verify_signed(resource, decode(resource.kind, answer), root=root)


def verify_signed(resource: Resource, signed: SignedText, *, root: TrustRoot) -> Document:
    """Verify signed text, all but time and revocation (steps 2 to 4); raise FetchFailed(UNAUTHENTIC)."""
    what = kind_text(resource.kind)
    try:
        if resource.kind is DocumentKind.ROOT_CRL:
            issuer, holder = None, root.certificate
        else:
            issuer = holder = _issuer(resource, signed.chain_pem, root)
        if resource.kind.is_crl:
            check = "R1" if issuer is None else "R2"
            crl = verify_crl(signed.text, holder, check=check, what=what)
            number, window = crl.number or 0, crl.window
        else:
            crl = None
            row = "T2" if resource.kind is DocumentKind.TCB_INFO else "Q1"
            require_signed(holder, signed.signature, signed.text, row, what)
            number, window = _read(resource, signed.text)
    except QuoteRejected as rejected:
        raise FetchFailed(
            Failure.UNAUTHENTIC, f"the {what} does not verify ({rejected.check}): {rejected.reason}"
        ) from None
    windows = [window, root.certificate.window("P6")]
    if issuer is not None:
        windows.append(issuer.window(_ROWS[resource.kind]))
    return Document(
        resource=resource,
        signed=signed,
        number=number,
        issued=window.start,
        valid_from=max(window.start for window in windows),
        expires=min(window.end for window in windows),
        issuer=issuer,
        revocations=crl,
    )


def require_not_revoked(document: Document, root_crl: Document) -> None:
    """Raise FetchFailed(REVOKED) when the root's list names the document's issuer (step 5)."""
    if document.issuer is None or root_crl.revocations is None:
        return
    try:
        root_crl.revocations.require_not_revoked(document.issuer, "R5")
    except QuoteRejected as rejected:
        what = kind_text(document.resource.kind)
        raise FetchFailed(Failure.REVOKED, f"the {what} is of a revoked issuer: {rejected.reason}") from None


def require_valid(document: Document, now: datetime) -> None:
    """Raise FetchFailed(EXPIRED, NOT_YET_VALID) outside of the document's windows (step 6)."""
    what = kind_text(document.resource.kind)
    if now > document.expires:
        raise FetchFailed(
            Failure.EXPIRED, f"the {what} that is served expired at {document.expires:%Y-%m-%d %H:%M} UTC"
        )
    if now < document.valid_from:
        raise FetchFailed(
            Failure.NOT_YET_VALID,
            f"the {what} is valid from {document.valid_from:%Y-%m-%d %H:%M} UTC; the clock says {now:%Y-%m-%d %H:%M}",
        )


def require_not_older(document: Document, known: Document | Newest) -> None:
    """Raise FetchFailed(OLDER) when a document would set back what is known under its URL (step 7)."""
    what = kind_text(document.resource.kind)
    if document.number < known.number:
        name = "CRL number" if document.resource.kind.is_crl else "TCB evaluation number"
        raise FetchFailed(
            Failure.OLDER, f"the {what} has {name} {document.number}, and {known.number} is known already"
        )
    if document.issued < known.issued:
        raise FetchFailed(
            Failure.OLDER,
            f"the {what} was issued at {document.issued:%Y-%m-%d %H:%M:%S}, "
            f"and one of {known.issued:%Y-%m-%d %H:%M:%S} is known already",
        )


def to_collateral(documents: Mapping[DocumentKind, Document]) -> Collateral:
    """Put the four documents together, as a verifier of quotes wants them."""
    tcb_info, qe_identity = documents[DocumentKind.TCB_INFO].signed, documents[DocumentKind.QE_IDENTITY].signed
    pck_crl, root_crl = documents[DocumentKind.PCK_CRL].signed, documents[DocumentKind.ROOT_CRL].signed
    return Collateral(
        pck_crl_issuer_chain=pck_crl.chain_pem,
        root_ca_crl=root_crl.text,
        pck_crl=pck_crl.text,
        tcb_info_issuer_chain=tcb_info.chain_pem,
        tcb_info=tcb_info.text,
        tcb_info_signature=tcb_info.signature,
        qe_identity_issuer_chain=qe_identity.chain_pem,
        qe_identity=qe_identity.text,
        qe_identity_signature=qe_identity.signature,
    )


def from_collateral(collateral: Collateral) -> dict[DocumentKind, SignedText]:
    """Take the nine parts apart; raise FetchFailed(NOT_COLLATERAL) when a CRL is not one."""
    signer = collateral.tcb_info_issuer_chain
    return {
        DocumentKind.ROOT_CRL: SignedText(decode_crl(collateral.root_ca_crl), b"", b""),
        DocumentKind.PCK_CRL: SignedText(decode_crl(collateral.pck_crl), b"", collateral.pck_crl_issuer_chain),
        DocumentKind.TCB_INFO: SignedText(collateral.tcb_info, collateral.tcb_info_signature, signer),
        DocumentKind.QE_IDENTITY: SignedText(
            collateral.qe_identity, collateral.qe_identity_signature, collateral.qe_identity_issuer_chain
        ),
    }


def _issuer(resource: Resource, pem: bytes, root: TrustRoot) -> Certificate:
    """Return who signed: the first of two certificates, of the right role, under the pinned root (step 2)."""
    if resource.kind is DocumentKind.PCK_CRL:
        names = tuple(ca.common_name for ca in PckCa if resource.ca in (None, ca))
        return load_issuer(pem, root, "R2", names, "PCK CA")
    return load_issuer(pem, root, _ROWS[resource.kind], (TCB_SIGNING_NAME,), "TCB signing")


def _read(resource: Resource, text: bytes) -> tuple[int, Window]:
    """Parse signed JSON and compare it with what was asked for (step 4); return evaluation number and window."""
    tee = resource.tee or Tee.TDX
    document: TcbInfo | QeIdentity
    if resource.kind is DocumentKind.TCB_INFO:
        document = info = TcbInfo.parse(text)
        if info.id != TCB_INFO_ID[tee]:
            raise QuoteRejected("T3", f"it is about {info.id}, and {TCB_INFO_ID[tee]} was asked for")
        if info.fmspc != resource.fmspc:
            raise QuoteRejected("T5", f"it is about FMSPC {info.fmspc.hex()}, which was not asked for")
    else:
        document = identity = QeIdentity.parse(text)
        if identity.id != QE_IDENTITY_ID[tee]:
            raise QuoteRejected("Q2", f"it is about {identity.id}, and {QE_IDENTITY_ID[tee]} was asked for")
    if resource.evaluation_number not in (None, document.evaluation_number):
        # A PCCS ignores the number that it is asked for.
        raise QuoteRejected("T13", f"it is of evaluation {document.evaluation_number}, which was not asked for")
    return document.evaluation_number, document.window
