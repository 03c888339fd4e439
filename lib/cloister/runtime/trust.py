# SPDX-License-Identifier: Apache-2.0
"""Trust that changes while a process runs: signed updates, and what of them is believed.

A process begins with a bundle that it measured. Attest tells what became of it in updates: the bundle in force, and
what was revoked. An update is believed when

1. a root of the bundle that is held now signed it: whoever made what is trusted says what is trusted next
2. it is of the same trust domain
3. it is not older than what is held: neither its own sequence nor its bundle's is lower, and of the same sequence there
   is one bundle only

It may come by any way, since nothing about its way is believed. Holding it back is possible, and then certificates run
out within the hour.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NoReturn

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.errors import CloisterError, Code
from cloister.runtime.bundle import MAX_BUNDLE_BYTES, TrustBundle
from cloister.runtime.credentials import NOTHING_REVOKED, Revoked
from cloister.runtime.pem import read_certificates
from cloister.strictjson import Members, StrictJsonError, Value, dump, load
from cloister.tlv import tlv

FORMAT: Final = "cloister-trust-update-1"
MAX_CERTIFICATES: Final = 4096  # revoked one by one; more than that is an epoch's worth, and ended with it
MAX_AUTHORITIES: Final = 256  # seven of an epoch
_LEAF_HEX: Final = 64  # characters of a SHA-256
_KEY_ID_HEX: Final = 40  # characters of a key identifier (RFC 5280, 4.2.1.2)
_MAX_PAYLOAD: Final = MAX_BUNDLE_BYTES * 2 + MAX_CERTIFICATES * (_LEAF_HEX + 3) + MAX_AUTHORITIES * (_KEY_ID_HEX + 3)
MAX_UPDATE_BYTES: Final = 2 * _MAX_PAYLOAD
_MAX_SIGNATURES: Final = 16


@dataclass(frozen=True, slots=True)
class Trust:
    """What a process trusts now."""

    bundle: TrustBundle
    sequence: int  # of the update it came by; a bundle from a file has its own
    revoked: Revoked = NOTHING_REVOKED

    @classmethod
    def of(cls, bundle: TrustBundle) -> Trust:
        """Begin with a bundle."""
        return cls(bundle, bundle.sequence)


@dataclass(frozen=True, slots=True)
class SigningRoot:
    """A root, and the key that signs updates with it."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def sign_update(trust: Trust, roots: Iterable[SigningRoot]) -> bytes:
    """Return an update in the form that travels: JSON, the payload in base64 beside a signature of each root."""
    payload = dump(
        {
            "format": FORMAT,
            "sequence": trust.sequence,
            "bundle": trust.bundle.to_bytes().decode("ascii"),
            "certificates": sorted(leaf.hex() for leaf in trust.revoked.certificates),
            "authorities": sorted(key_id.hex() for key_id in trust.revoked.authorities),
        }
    )
    signatures = [
        {
            "root": _fingerprint(root.certificate),
            "signature": root.key.sign(_message(payload), ec.ECDSA(SHA256())).hex(),
        }
        for root in roots
    ]
    return dump({"payload": base64.b64encode(payload).decode("ascii"), "signatures": signatures})


def adopt(held: Trust, data: bytes) -> Trust:
    """Return what is trusted after this update; raise CloisterError(BUNDLE_INVALID) when it is not to be believed."""
    try:
        payload = _signed_by_one_of(read_certificates(held.bundle.root_pem), data)  # 1
        found = _parse(payload)
    except (StrictJsonError, ValueError):
        _refuse("it does not parse")
    if found.bundle.trust_domain != held.bundle.trust_domain:  # 2
        _refuse(f"it is of the trust domain {found.bundle.trust_domain}")
    if found.sequence < max(held.sequence, found.bundle.sequence) or found.bundle.sequence < held.bundle.sequence:  # 3
        _refuse(f"it is older than what is held (sequence {found.sequence}, held {held.sequence})")
    if found.bundle.sequence == held.bundle.sequence and found.bundle.digest != held.bundle.digest:
        _refuse("it holds another bundle under the same number")
    return found


def _signed_by_one_of(roots: Iterable[x509.Certificate], data: bytes) -> bytes:
    """Return the payload when one of these roots signed it."""
    members = Members(load(data, max_size=MAX_UPDATE_BYTES), "the update")
    payload = _base64(members.text("payload", longest=2 * _MAX_PAYLOAD))
    items = members.items("signatures", most=_MAX_SIGNATURES)
    members.end()
    signatures = dict(_signature(item) for item in items)
    if not any(_signed(payload, signatures.get(_fingerprint(root), b""), root) for root in roots):
        _refuse("no root that is trusted here has signed it: its CA is another one, or began anew")
    return payload


def _signed(payload: bytes, signature: bytes, root: x509.Certificate) -> bool:
    key = root.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return False
    try:
        key.verify(signature, _message(payload), ec.ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


def _parse(payload: bytes) -> Trust:
    members = Members(load(payload, max_size=_MAX_PAYLOAD), "the payload")
    if members.text("format") != FORMAT:
        _refuse(f"it is not of the form {FORMAT}")
    sequence = members.integer("sequence")
    bundle = TrustBundle.parse(members.text("bundle", longest=MAX_BUNDLE_BYTES).encode("ascii"))
    certificates = members.texts("certificates", most=MAX_CERTIFICATES, longest=_LEAF_HEX)
    authorities = members.texts("authorities", most=MAX_AUTHORITIES, longest=_KEY_ID_HEX)
    members.end()
    revoked = Revoked(
        frozenset(_octets(text, _LEAF_HEX) for text in certificates),
        frozenset(_octets(text, _KEY_ID_HEX) for text in authorities),
    )
    return Trust(bundle, sequence, revoked)


def _signature(item: Value) -> tuple[str, bytes]:
    members = Members(item, "a signature")
    found = members.text("root", longest=_LEAF_HEX), bytes.fromhex(members.text("signature", longest=256))
    members.end()
    return found


def _message(payload: bytes) -> bytes:
    # A label of its own: these keys sign certificates, too, and those begin with an ASN.1 tag.
    return tlv(FORMAT, payload)


def _fingerprint(root: x509.Certificate) -> str:
    return hashlib.sha256(root.public_bytes(Encoding.DER)).hexdigest()


def _octets(text: str, digits: int) -> bytes:
    if len(text) != digits:
        raise ValueError("digest")
    return bytes.fromhex(text)


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except binascii.Error:
        raise ValueError("base64") from None


def _refuse(why: str) -> NoReturn:
    raise CloisterError(
        Code.BUNDLE_INVALID,
        what="this trust update is not to be believed",
        why=why,
        todo="if attest's CA began anew, start this workload again with the present trust bundle",
    ) from None
