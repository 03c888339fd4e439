# SPDX-License-Identifier: Apache-2.0
"""The trust bundle: which CAs stand for which role, and which keys sign attestation results.

Every TD measures the bundle it was started with, so its bytes are canonical: JSON with sorted keys, no spaces, ASCII.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NoReturn

from cryptography import x509

from cloister.errors import CloisterError, Code
from cloister.identity import Role
from cloister.runtime.pem import PemInvalid, is_issued_by, read_certificates
from cloister.tlv import sha384

MAX_BUNDLE_BYTES: Final = 256 * 1024  # seven intermediates of 1 KiB, twice during a CA change, and some room
_MAX_CERTIFICATES: Final = 4  # per role: the CA in force, and its neighbours while CAs change
_MAX_TOKEN_KEYS: Final = 8
_DOMAIN: Final = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_EPOCH: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_FIELDS: Final = frozenset({"trust_domain", "epoch", "sequence", "root_pem", "intermediates", "token_keys"})
_MAX_SEQUENCE: Final = 2**53 - 1  # what every JSON reader keeps
_JWK_FIELDS: Final = frozenset({"kty", "crv", "x", "y", "kid", "alg", "use"})


@dataclass(frozen=True, slots=True)
class TrustBundle:
    """What a process trusts. `root_pem` and each intermediate hold one certificate, or a few while CAs change.

    `epoch` is the newest. `sequence` rises with every change of CAs: a trust update below it is an old one.
    """

    trust_domain: str
    epoch: str
    root_pem: bytes
    intermediates: Mapping[Role, bytes]
    token_keys: tuple[Mapping[str, str], ...]
    sequence: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "intermediates", MappingProxyType(dict(self.intermediates)))
        object.__setattr__(self, "token_keys", tuple(MappingProxyType(dict(key)) for key in self.token_keys))
        self._check()

    @classmethod
    def parse(cls, data: bytes) -> TrustBundle:
        """Parse the JSON form; raise CloisterError(BUNDLE_INVALID) for anything unexpected in it."""
        if len(data) > MAX_BUNDLE_BYTES:
            _refuse(f"longer than {MAX_BUNDLE_BYTES} bytes")
        try:
            fields = json.loads(data.decode("ascii"), object_pairs_hook=_object)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            _refuse(f"not JSON in ASCII: {type(error).__name__}")
        if not isinstance(fields, dict) or set(fields) != _FIELDS:
            _refuse(f"must be an object with exactly the fields {', '.join(sorted(_FIELDS))}")
        by_role, keys = fields["intermediates"], fields["token_keys"]
        if not isinstance(by_role, dict) or not isinstance(keys, list):
            _refuse("intermediates must be an object and token_keys a list")
        try:
            intermediates = {Role(role): _text(pem).encode("ascii") for role, pem in by_role.items()}
        except ValueError:
            _refuse(f"intermediates are named by role: {', '.join(Role)}; PEM is ASCII")
        for key in keys:
            if not isinstance(key, dict) or not all(isinstance(value, str) for value in key.values()):
                _refuse("a token key is an object of strings")
        return cls(
            trust_domain=_text(fields["trust_domain"]),
            epoch=_text(fields["epoch"]),
            root_pem=_text(fields["root_pem"]).encode("ascii"),
            intermediates=intermediates,
            token_keys=tuple(keys),
            sequence=_number(fields["sequence"]),
        )

    def to_bytes(self) -> bytes:
        """Return the canonical JSON form."""
        fields = {
            "trust_domain": self.trust_domain,
            "epoch": self.epoch,
            "sequence": self.sequence,
            "root_pem": self.root_pem.decode("ascii"),
            "intermediates": {str(role): pem.decode("ascii") for role, pem in self.intermediates.items()},
            "token_keys": [dict(key) for key in self.token_keys],
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")

    @property
    def digest(self) -> bytes:
        """SHA-384 of the canonical form (48 bytes): what a TD measures."""
        return sha384(self.to_bytes())

    def intermediate(self, role: Role) -> bytes:
        """Return the CA certificates of a role (PEM); raise CloisterError(BUNDLE_INVALID) when it has none."""
        if role not in self.intermediates:
            _refuse(f"it names no CA for the role {role}")
        return self.intermediates[role]

    def _check(self) -> None:
        if not _DOMAIN.fullmatch(self.trust_domain):
            _refuse("trust_domain is not a SPIFFE trust domain")
        if not _EPOCH.fullmatch(self.epoch):
            _refuse("epoch is 1 to 128 characters of A-Z a-z 0-9 . _ : -")
        if not self.intermediates:
            _refuse("it names no CA for any role")
        roots = _authorities("root_pem", self.root_pem)
        for role, pem in self.intermediates.items():
            for certificate in _authorities(f"the CA of {role}", pem):
                if not any(is_issued_by(certificate, root) for root in roots):
                    _refuse(f"the CA of {role} was not issued by the root")
        if len(self.token_keys) > _MAX_TOKEN_KEYS:
            _refuse(f"more than {_MAX_TOKEN_KEYS} token keys")
        names = [_token_key_name(key) for key in self.token_keys]
        if len(set(names)) != len(names):
            _refuse("two token keys have the same kid")


def _authorities(name: str, pem: bytes) -> tuple[x509.Certificate, ...]:
    try:
        found = read_certificates(pem)
        for certificate in found:
            if not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
                _refuse(f"{name} is not a CA certificate")
    except (PemInvalid, ValueError, x509.ExtensionNotFound) as error:
        _refuse(f"{name}: {error}")
    if len(found) > _MAX_CERTIFICATES:
        _refuse(f"{name} holds more than {_MAX_CERTIFICATES} certificates")
    return found


def _token_key_name(key: Mapping[str, str]) -> str:
    # "d" would be a private key; an unknown field could change what a JOSE library does with the key.
    if not set(key) <= _JWK_FIELDS or not {"kty", "crv", "x", "y", "kid"} <= set(key):
        _refuse("a token key has exactly kty, crv, x, y, kid and at most alg and use")
    if (key["kty"], key["crv"]) != ("EC", "P-256") or key.get("alg", "ES256") != "ES256":
        _refuse("token keys are P-256 keys for ES256")
    if not key["kid"]:
        _refuse("a token key has an empty kid")
    return key["kid"]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        _refuse("a field occurs twice")
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isascii():
        _refuse("trust_domain, epoch and PEM fields are ASCII text")
    return value


def _number(value: Any) -> int:
    # bool is an int in Python and true is not a number in JSON.
    if type(value) is not int or not 0 <= value <= _MAX_SEQUENCE:
        _refuse(f"sequence is an integer from 0 to {_MAX_SEQUENCE}")
    return value


def _refuse(why: str) -> NoReturn:
    raise CloisterError(
        Code.BUNDLE_INVALID,
        what="this is not a trust bundle",
        why=why,
        todo="fetch the bundle again from where your administrator publishes it",
    ) from None
