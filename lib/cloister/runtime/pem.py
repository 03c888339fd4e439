# SPDX-License-Identifier: Apache-2.0
"""PEM and X.509 reading that raises one error type."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding

_MAX_PEM_BYTES: Final = 64 * 1024  # a chain of ours has two certificates of about 1 KiB


class PemInvalid(ValueError):
    """PEM or certificates that are not what they should be."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """What authorisation needs of a peer's certificate."""

    certificate: x509.Certificate
    der: bytes
    sha256: bytes
    uris: tuple[str, ...]
    not_after: datetime
    issuer_key_id: bytes  # authority key identifier (20 bytes); empty when there is none


def read_certificates(pem: bytes) -> tuple[x509.Certificate, ...]:
    """Return the certificates of a PEM text, at least one; raise PemInvalid."""
    if len(pem) > _MAX_PEM_BYTES:
        raise PemInvalid(f"PEM text longer than {_MAX_PEM_BYTES} bytes")
    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise PemInvalid(f"not a PEM certificate: {error}") from None
    if not found:
        raise PemInvalid("no certificate in the PEM text")
    return tuple(found)


def uri_names(certificate: x509.Certificate) -> tuple[str, ...]:
    """Return all URI subject alternative names; raise PemInvalid when the extension does not parse."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return tuple(names.get_values_for_type(x509.UniformResourceIdentifier))
    except x509.ExtensionNotFound:
        return ()
    except ValueError as error:
        raise PemInvalid(f"subject alternative names do not parse: {error}") from None


# Peers come back with the same certificate on every call of a connection: parse it once.
@functools.lru_cache(maxsize=1024)
def read_leaf(pem: bytes) -> Leaf:
    """Return the first certificate of a PEM text; raise PemInvalid."""
    certificate = read_certificates(pem)[0]
    der = certificate.public_bytes(Encoding.DER)
    return Leaf(
        certificate=certificate,
        der=der,
        sha256=hashlib.sha256(der).digest(),
        uris=uri_names(certificate),
        not_after=certificate.not_valid_after_utc,
        issuer_key_id=_issuer_key_id(certificate),
    )


def _issuer_key_id(certificate: x509.Certificate) -> bytes:
    try:
        found = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    except x509.ExtensionNotFound:
        return b""
    except ValueError as error:
        raise PemInvalid(f"authority key identifier does not parse: {error}") from None
    return found.key_identifier or b""


def is_issued_by(leaf: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Say whether the issuer's key signed the leaf under the issuer's name."""
    try:
        leaf.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


@functools.lru_cache(maxsize=4096)
def is_leaf_of(leaf_pem: bytes, issuers_pem: bytes) -> bool:
    """Say whether the first certificate of `leaf_pem` was issued by one of `issuers_pem`."""
    leaf = read_leaf(leaf_pem).certificate
    return any(is_issued_by(leaf, issuer) for issuer in read_certificates(issuers_pem))
