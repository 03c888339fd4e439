# SPDX-License-Identifier: Apache-2.0
"""Signed documents: DSSE envelopes (Dead Simple Signing Envelope, v1.0.2) with Ed25519 signatures. Pure.

An envelope is JSON: the payload in base64, its type, and signatures over PAE(type, payload), so that a payload signed
as one type can never be shown as another. `keyid` is the did:key of the signer, that is, the public key itself: there
is nothing to look up. Whether that signer may sign such a payload is for the caller to decide.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, replace
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister import strictjson
from cloister.didkey import did_key, parse_did_key
from cloister.errors import CloisterError, Code
from cloister.strictjson import Members, StrictJsonError, Value

RELEASE_POLICY: Final = "application/vnd.cloister.release-policy.v1+yaml"
PROVISIONING: Final = "application/vnd.cloister.provisioning.v1+json"
OPEN_REQUEST: Final = "application/vnd.cloister.open-request.v1+json"
RELEASE_APPROVAL: Final = "application/vnd.cloister.release-approval.v1+json"

MAX_SIZE: Final = 128 * 1024  # bytes of an envelope: a policy of 64 KiB in base64, and its signatures
MAX_SIGNATURES: Final = 32
_SIGNATURE_SIZE: Final = 64
_MAX_TYPE: Final = 255  # characters
_BASE64: Final = re.compile(r"(?:[A-Za-z0-9+/]*|[A-Za-z0-9_-]*)={0,2}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature; `signer` is the did:key in the envelope, which is believed only after `Envelope.signers`."""

    signer: str
    value: bytes  # 64 bytes


@dataclass(frozen=True, slots=True)
class Envelope:
    """A payload, its type, and who claims to have signed it."""

    payload_type: str
    payload: bytes
    signatures: tuple[Signature, ...]

    @classmethod
    def parse(cls, data: bytes) -> Envelope:
        """Decode an envelope of up to 128 KiB; raise CloisterError(ENVELOPE_INVALID) for anything else.

        Members that DSSE does not define are passed over, as it demands: no signature covers them, nothing reads them.
        """
        try:
            return cls._parse(strictjson.load(data, max_size=MAX_SIZE))
        except StrictJsonError as error:
            raise _invalid(str(error)) from None

    @classmethod
    def _parse(cls, value: Value) -> Envelope:
        members = Members(value, "the envelope")
        payload = _unbase64(members.text("payload", longest=MAX_SIZE), "payload")
        payload_type = members.text("payloadType", longest=_MAX_TYPE)
        items = members.items("signatures", most=MAX_SIGNATURES)
        if not items:
            raise StrictJsonError("the envelope: signatures is empty")
        return cls(payload_type, payload, tuple(_signature(item) for item in items))

    def to_bytes(self) -> bytes:
        """Return the envelope as JSON."""
        return strictjson.dump(
            {
                "payload": base64.b64encode(self.payload).decode(),
                "payloadType": self.payload_type,
                "signatures": [
                    {"keyid": signature.signer, "sig": base64.b64encode(signature.value).decode()}
                    for signature in self.signatures
                ],
            }
        )

    def signers(self, payload_type: str) -> frozenset[str]:
        """Verify every signature; return the did:keys of those who signed this payload as `payload_type`.

        Raises CloisterError: ENVELOPE_INVALID when the payload is of another type, SIGNATURE_INVALID when any
        signature does not verify or a signer stands twice. An envelope is good as a whole or not at all.
        """
        if self.payload_type != payload_type:
            raise CloisterError(
                Code.ENVELOPE_INVALID,
                what="the signed envelope holds another kind of document",
                why=f"its payloadType is {self.payload_type[:80]!r}",
                todo=f"sign the document as {payload_type}",
            )
        message = pae(self.payload_type, self.payload)
        signers: set[str] = set()
        for signature in self.signatures:
            try:
                parse_did_key(signature.signer).verify(signature.value, message)
            except InvalidSignature:
                raise _unsigned(f"the signature of {signature.signer} is not over this document") from None
            except CloisterError as error:
                raise _unsigned(f"keyid: {error.what}") from None
            if signature.signer in signers:
                raise _unsigned(f"{signature.signer} signed twice")
            signers.add(signature.signer)
        return frozenset(signers)

    def signed_also_by(self, key: Ed25519PrivateKey) -> Envelope:
        """Return the envelope with one more signature; one by the same key is replaced."""
        mine = Signature(did_key(key), key.sign(pae(self.payload_type, self.payload)))
        others = tuple(signature for signature in self.signatures if signature.signer != mine.signer)
        return replace(self, signatures=(*others, mine))


def sign(payload_type: str, payload: bytes, *keys: Ed25519PrivateKey) -> Envelope:
    """Return an envelope signed by each of these keys."""
    envelope = Envelope(payload_type, payload, ())
    for key in keys:
        envelope = envelope.signed_also_by(key)
    return envelope


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return the pre-authentication encoding: what is signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _signature(value: Value) -> Signature:
    members = Members(value, "a signature")
    signer = members.text("keyid", longest=_MAX_TYPE)
    data = _unbase64(members.text("sig", longest=_MAX_TYPE), "sig")
    if len(data) != _SIGNATURE_SIZE:
        raise StrictJsonError(f"a signature: sig is not {_SIGNATURE_SIZE} bytes")
    return Signature(signer, data)


def _unbase64(text: str, name: str) -> bytes:
    """Decode base64 of either alphabet (DSSE allows both), padded, with no stray bits."""
    if not _BASE64.fullmatch(text):
        raise StrictJsonError(f"{name} is not base64")
    standard = text.replace("-", "+").replace("_", "/")
    try:
        data = base64.b64decode(standard, validate=True)
    except ValueError:
        raise StrictJsonError(f"{name} is not base64") from None
    if base64.b64encode(data).decode() != standard:
        raise StrictJsonError(f"{name} is not base64")
    return data


def _invalid(why: str) -> CloisterError:
    return CloisterError(
        Code.ENVELOPE_INVALID,
        what="this is not a signed envelope",
        why=why,
        todo="sign the document with cloister policy sign, and send what that wrote",
    )


def _unsigned(why: str) -> CloisterError:
    return CloisterError(
        Code.SIGNATURE_INVALID,
        what="a signature of the envelope does not verify",
        why=why,
        todo="have the document signed again, and change nothing in it afterwards",
    )
