# SPDX-License-Identifier: Apache-2.0
"""What the owner of a key signs, and how the broker reads it: the key itself, its policies, its opening. Pure.

The first statement about a key names the signing key of its owner, and from then on that key alone speaks for it.
Whoever can get a certificate with the owner's name can neither plant a key, change a policy nor open data with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister import strictjson
from cloister.didkey import did_key
from cloister.dsse import OPEN_REQUEST, PROVISIONING, RELEASE_POLICY, Envelope, sign
from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.protocol import NONCE_SIZE
from cloister.release.keys import Purpose
from cloister.release.policy import ReleasePolicy, parse_policy
from cloister.strictjson import Members, StrictJsonError

_Statement = TypeVar("_Statement", "Provisioning", "OpenRequest")

_DIGEST: Final = (48,)
_MAX_STATEMENT: Final = 16 * 1024  # bytes; ours have a few hundred
_MAX_KEY_VERSION: Final = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Provisioning:
    """A key comes to be. Digests are SHA-384, 48 bytes, or empty where there is nothing to digest."""

    uri: KeyUri
    owner: str  # SPIFFE id
    signer: str  # did:key of the owner's signing key
    purposes: frozenset[Purpose]
    policy_digest: bytes = b""
    sealed_digest: bytes = b""  # of the sealed material, when the owner brings it
    nonce: bytes = b""  # of BeginImport, 32 bytes, when the owner brings the material

    def signed(self, key: Ed25519PrivateKey) -> bytes:
        """Return the statement in an envelope (JSON) signed by `key`, which has to be the one that `signer` names."""
        return _signed(
            PROVISIONING,
            key,
            {
                "uri": str(self.uri),
                "owner": self.owner,
                "signer": self.signer,
                "purposes": sorted(purpose.value for purpose in self.purposes),
                "policy_digest": self.policy_digest.hex(),
                "sealed_digest": self.sealed_digest.hex(),
                "nonce": self.nonce.hex(),
            },
        )

    @classmethod
    def verified(cls, envelope: bytes) -> Provisioning:
        """Read a statement that its own `signer`, and nobody else, has signed.

        Raises CloisterError: ENVELOPE_INVALID, SIGNATURE_INVALID.
        """
        return _verified(cls._parse, PROVISIONING, envelope)

    @classmethod
    def _parse(cls, members: Members) -> Provisioning:
        purposes = members.texts("purposes", most=len(Purpose))
        statement = cls(
            uri=_uri(members),
            owner=members.text("owner"),
            signer=members.text("signer"),
            purposes=frozenset(Purpose(purpose) for purpose in purposes),
            policy_digest=members.octets("policy_digest", sizes=(0, *_DIGEST)),
            sealed_digest=members.octets("sealed_digest", sizes=(0, *_DIGEST)),
            nonce=members.octets("nonce", sizes=(0, NONCE_SIZE)),
        )
        if len(purposes) != len(statement.purposes):
            raise StrictJsonError("a purpose stands twice")
        return statement


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRequest:
    """A data key leaves for the owner's own machine. Digests are SHA-384, 48 bytes."""

    uri: KeyUri
    key_version: int
    signer: str  # did:key of the owner's signing key
    wrapped_digest: bytes  # of the wrapped data key
    client_nonce: bytes  # 32 bytes
    recipient_digest: bytes  # of the HPKE public key: whoever repeats this request gets nothing that opens
    purpose: str = "export"  # or "seal": to go on with sealing that was interrupted

    def signed(self, key: Ed25519PrivateKey) -> bytes:
        """Return the request in an envelope (JSON) signed by `key`, which has to be the one that `signer` names."""
        return _signed(
            OPEN_REQUEST,
            key,
            {
                "uri": str(self.uri),
                "key_version": self.key_version,
                "signer": self.signer,
                "wrapped_digest": self.wrapped_digest.hex(),
                "client_nonce": self.client_nonce.hex(),
                "recipient_digest": self.recipient_digest.hex(),
                "purpose": self.purpose,
            },
        )

    @classmethod
    def verified(cls, envelope: bytes) -> OpenRequest:
        """Read a request that its own `signer`, and nobody else, has signed.

        Raises CloisterError: ENVELOPE_INVALID, SIGNATURE_INVALID.
        """
        return _verified(cls._parse, OPEN_REQUEST, envelope)

    @classmethod
    def _parse(cls, members: Members) -> OpenRequest:
        return cls(
            uri=_uri(members),
            key_version=members.integer("key_version", highest=_MAX_KEY_VERSION),
            signer=members.text("signer"),
            wrapped_digest=members.octets("wrapped_digest", sizes=_DIGEST),
            client_nonce=members.octets("client_nonce", sizes=(NONCE_SIZE,)),
            recipient_digest=members.octets("recipient_digest", sizes=_DIGEST),
            purpose=members.text("purpose"),
        )


@dataclass(frozen=True, slots=True)
class SignedPolicy:
    """A release policy as it came: what it says, who signed it, and the envelope itself."""

    policy: ReleasePolicy
    yaml: bytes
    envelope: bytes
    signers: frozenset[str]  # did:keys: of the owner, and of those who approve of the change

    @classmethod
    def verified(cls, envelope: bytes) -> SignedPolicy:
        """Verify all signatures and parse the policy; whose signatures are needed is for the caller to say.

        Raises CloisterError: ENVELOPE_INVALID, SIGNATURE_INVALID, POLICY_INVALID.
        """
        opened = Envelope.parse(envelope)
        signers = opened.signers(RELEASE_POLICY)
        return cls(parse_policy(opened.payload), opened.payload, envelope, signers)


def owner_envelope(data: bytes, key: Ed25519PrivateKey) -> SignedPolicy:
    """Return a policy with the owner's signature on it, from its YAML or from an envelope that others have signed.

    Raises CloisterError: ENVELOPE_INVALID, SIGNATURE_INVALID, POLICY_INVALID.
    """
    envelope = Envelope.parse(data) if is_envelope(data) else Envelope(RELEASE_POLICY, data, ())
    return SignedPolicy.verified(envelope.signed_also_by(key).to_bytes())


def is_envelope(data: bytes) -> bool:
    """Say whether a file is meant to be an envelope, rather than the YAML in it; no key of ours is named like that."""
    return data.lstrip()[:1] == b"{" and b'"payloadType"' in data


def _signed(payload_type: str, key: Ed25519PrivateKey, statement: Mapping[str, Any]) -> bytes:
    if statement["signer"] != did_key(key):
        raise ValueError("a statement is signed by the key it names")
    return sign(payload_type, strictjson.dump(dict(statement)), key).to_bytes()


def _verified(parse: Callable[[Members], _Statement], payload_type: str, envelope: bytes) -> _Statement:
    opened = Envelope.parse(envelope)
    signers = opened.signers(payload_type)
    try:
        members = Members(strictjson.load(opened.payload, max_size=_MAX_STATEMENT), "the statement")
        statement = parse(members)
        members.end()
    except (StrictJsonError, ValueError) as error:
        _refuse(Code.ENVELOPE_INVALID, "the signed statement is malformed", str(error))
    if signers != {statement.signer}:
        _refuse(
            Code.SIGNATURE_INVALID,
            "the statement is not signed by the key that it names",
            f"it names {statement.signer[:80]} and is signed by {', '.join(sorted(signers))}",
        )
    return statement


def _uri(members: Members) -> KeyUri:
    try:
        return KeyUri.parse(members.text("uri"))
    except CloisterError as error:
        raise StrictJsonError(error.what) from None


def _refuse(code: Code, what: str, why: str) -> NoReturn:
    raise CloisterError(code, what=what, why=why, todo="make the statement again with this release of cloister")
