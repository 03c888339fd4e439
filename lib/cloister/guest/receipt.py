# SPDX-License-Identifier: Apache-2.0
"""The broker's answer, believed only when its receipt says the same: for TDs and for owners alike."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from cryptography.exceptions import InvalidSignature

from cloister.api.common.v1 import evidence_pb2, evidence_pb2_grpc
from cloister.api.keybroker.v1 import keybroker_pb2
from cloister.errors import CloisterError, Code
from cloister.guest.evidence import load_ed25519_spki, report_data_of
from cloister.hpke import HpkeError, HpkeKeyPair
from cloister.identity import Role, SpiffeId
from cloister.protocol import NONCE_SIZE, LeaseTerms, ReleaseBinding
from cloister.runtime.channel import invoke
from cloister.sealed.datakey import DATA_KEY_SIZE, DataKey
from cloister.tdx.quote import Quote, QuoteRejected
from cloister.tlv import sha384, tlv
from cloister.transparency.documents import SignedReceipt

_CALL_TIMEOUT_S: Final = 20.0
_LOG_ID_SIZE: Final = 48  # SHA-384 of the log's own key; which log it is, the owner's audit compares
_ROOT_SIZE: Final = 32  # SHA-256, RFC 6962
_NO_LEASE: Final = LeaseTerms()  # the owner's own calls


@dataclass(frozen=True, slots=True)
class Received:
    """A data key, the digest of the receipt for it (48 bytes) as the TD records it, and the receipt to be kept."""

    data_key: DataKey
    receipt_digest: bytes
    receipt: SignedReceipt


def open_answer(
    answer: keybroker_pb2.SealedDataKey,
    receipt: keybroker_pb2.Receipt,
    *,
    binding: ReleaseBinding,
    recipient: HpkeKeyPair,
    receipt_spki_der: bytes,
    terms: LeaseTerms = _NO_LEASE,
) -> Received:
    """Check that the answer is what `binding` says and the broker signed it, then open it.

    Everything in `binding` is the caller's own knowledge; what the broker chose (version, wrapped key) the caller
    compared with its request before. `terms` is the lease as the broker's answer says it. Raises
    CloisterError(RECEIPT_INVALID).
    """
    message = check_answer(answer, receipt, binding=binding, receipt_spki_der=receipt_spki_der, terms=terms)
    try:
        secret = recipient.open(answer.sealed, info=binding.hpke_info())
    except HpkeError as error:
        refuse(str(error))
    if len(secret) != DATA_KEY_SIZE:
        refuse(f"a data key of {len(secret)} bytes instead of {DATA_KEY_SIZE}")
    data_key = DataKey(secret, answer.wrapped, answer.key_uri, answer.key_version)
    digest = sha384(tlv("cloister-receipt-digest-v1", message, receipt.signature))
    return Received(data_key, digest, SignedReceipt(message, receipt.signature))


def check_answer(
    answer: keybroker_pb2.SealedDataKey,
    receipt: keybroker_pb2.Receipt,
    *,
    binding: ReleaseBinding,
    receipt_spki_der: bytes,
    terms: LeaseTerms,
) -> bytes:
    """Check an answer without opening it, see `open_answer`; return the message that the receipt signs."""
    if answer.key_uri != binding.key_uri or answer.key_version != binding.key_version:
        refuse("the answer is about another key than the one asked for")
    if not secrets.compare_digest(sha384(answer.wrapped), binding.wrapped_digest):
        refuse("the answer carries another wrapped key than the one asked for")
    return check_receipt(receipt, binding=binding, sealed=answer.sealed, receipt_spki_der=receipt_spki_der, terms=terms)


def check_receipt(
    receipt: keybroker_pb2.Receipt,
    *,
    binding: ReleaseBinding,
    sealed: bytes,
    receipt_spki_der: bytes,
    terms: LeaseTerms = _NO_LEASE,
) -> bytes:
    """Check that the broker signed this binding and this sealed value; return what it signed.

    Raises CloisterError(RECEIPT_INVALID).
    """
    key = load_ed25519_spki(receipt_spki_der)
    if key is None or not secrets.compare_digest(receipt.receipt_spki_der, receipt_spki_der):
        refuse("the receipt is under another key than the broker's evidence names")
    if len(receipt.log_id) != _LOG_ID_SIZE or len(receipt.root) != _ROOT_SIZE:
        refuse("the receipt names no log, or no root of it")
    message = binding.receipt_message(
        sealed=sealed, terms=terms, log_id=receipt.log_id, index=receipt.index, root=receipt.root
    )
    try:
        key.verify(receipt.signature, message)
    except InvalidSignature:
        refuse("the signature of the receipt does not verify over what was asked and answered")
    return message


async def fetch_receipt_key(channel: Any, *, caller: SpiffeId) -> bytes:
    """Return the receipt key (SubjectPublicKeyInfo, DER) that the broker's evidence names.

    The channel is to a certificate that attest issued to a broker, so attest has verified that quote's signatures;
    here the evidence must be fresh, addressed to us, and its report_data must be over this receipt key.
    """
    nonce = secrets.token_bytes(NONCE_SIZE)
    request = evidence_pb2.GetEvidenceRequest(nonce=nonce, audience=str(caller))
    method = evidence_pb2_grpc.EvidenceServiceStub(channel).GetEvidence
    response = await invoke(method, request, timeout_s=_CALL_TIMEOUT_S, what="get the key broker's evidence")
    evidence: evidence_pb2.Evidence = response.evidence
    addressed = (evidence.role, evidence.trust_domain, evidence.audience, evidence.nonce)
    if addressed != (str(Role.KEYBROKER), caller.trust_domain, str(caller), nonce):
        refuse("the broker's evidence is not an answer to this question")
    try:
        quoted = Quote.parse(evidence.quote).body.report_data
    except QuoteRejected as error:
        refuse(f"the broker's quote: {error}")
    if not secrets.compare_digest(quoted, report_data_of(evidence)):
        refuse("the broker's quote is over other keys than its evidence names")
    if load_ed25519_spki(evidence.receipt_spki_der) is None:
        refuse("the broker's evidence names no Ed25519 receipt key")
    return evidence.receipt_spki_der


def refuse(why: str) -> NoReturn:
    """Raise CloisterError(RECEIPT_INVALID)."""
    raise CloisterError(
        Code.RECEIPT_INVALID,
        what="the key broker's answer is not to be trusted",
        why=why,
        todo="do not use this data key; check which broker answers at this address",
    )
