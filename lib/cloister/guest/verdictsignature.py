# SPDX-License-Identifier: Apache-2.0
"""Attest's signature on a verdict bundle: that it decided so, and from this.

A bundle proves by itself that its verdict follows from what it holds. The signature says who held it: it is made with
the key of attestation results when the verdict is made, before anything of it is on a disk. A JWS, ES256:

    header   alg, kid of the token key (RFC 7638), typ "cloister-verdict+jwt"
    claims   iss: SPIFFE id of attest; iat: the verdict's time; verdict: "sha384:<hex>", digest of the bundle

    digest   SHA-384(TLV("cloister-verdict-v1", J(bundle without the four below and `signature`),
                         J(`collateral`), `policy`, J(`references`)))
    J        JSON, ASCII, members sorted, without spaces
"""

from __future__ import annotations

import functools
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec

from cloister.ear.jws import open_signed, read_header, sign_claims
from cloister.ear.members import Members, TokenRejected
from cloister.errors import CloisterError, Code
from cloister.guest.verdictbundle import VerdictBundle, collateral_json
from cloister.identity import Role, SpiffeId
from cloister.tdx.collateral import Collateral
from cloister.tlv import sha384, tlv

TYPE: Final = "cloister-verdict+jwt"
_MAX_CHARS: Final = 2048
_APART: Final = frozenset({"collateral", "policy", "references", "signature"})


@dataclass(frozen=True, slots=True)
class VerdictSigner:
    """Attest's token key, its id, and the name of attest."""

    key: ec.EllipticCurvePrivateKey
    key_id: str
    issuer: str

    def sign(
        self, bundle: VerdictBundle, *, collateral: Collateral | None, policy: str, references: Sequence[str]
    ) -> VerdictBundle:
        """Return a bundle that holds nothing of these yet, signed as if it did."""
        text = _canonical(None) if collateral is None else _collateral(collateral)
        core = _canonical(bundle.model_dump(mode="json", exclude=set(_APART)))
        claims = {
            "iss": self.issuer,
            "iat": int(bundle.time.timestamp()),
            "verdict": _digest(core, text, policy, list(references)),
        }
        signature = sign_claims(claims, kind=TYPE, key=self.key, key_id=self.key_id)
        return bundle.model_copy(update={"signature": signature})


def verify_signature(data: bytes, *, keys: Sequence[Mapping[str, str]]) -> str:
    """Verify the signature of a bundle file; return the id of the key, one of `keys` (JWKs), that made it.

    Raises CloisterError(VERDICT_INVALID) when there is none, or it is not attest's over this very bundle.
    """
    bundle = VerdictBundle.parse(data)
    if not bundle.signature:
        raise _invalid("the verdict bundle is not signed", "an earlier version of attest made it, or it was stripped")
    document: dict[str, Any] = json.loads(data)
    try:
        key_id = signing_key_id(bundle)
        claims = Members("payload", open_signed(bundle.signature, kind=TYPE, keys=keys, max_chars=_MAX_CHARS))
        issuer, issued, digest = claims.text("iss"), claims.number("iat", 0, 2**33), claims.text("verdict")
        claims.end()
    except TokenRejected as error:
        raise _invalid("the signature of the verdict bundle does not verify", str(error)) from None
    wanted = _digest(
        _canonical({name: value for name, value in document.items() if name not in _APART}),
        _canonical(document["collateral"]),
        document["policy"],
        document["references"],
    )
    if not hmac.compare_digest(digest, wanted):
        raise _invalid("the verdict bundle is not what attest signed", f"it is {wanted}, {digest} was signed")
    attest = str(SpiffeId.service(bundle.expected.trust_domain, Role.ATTEST))
    if issuer != attest or issued != int(bundle.time.timestamp()):
        when = datetime.fromtimestamp(issued, bundle.time.tzinfo).isoformat()
        raise _invalid("the verdict bundle is signed as something else", f"by {issuer} at {when}")
    return key_id


def signing_key_id(bundle: VerdictBundle) -> str:
    """Return the id of the key that a signature says made it; raise TokenRejected when it is none."""
    return read_header(bundle.signature, kind=TYPE, max_chars=_MAX_CHARS)["kid"]


def _digest(core: bytes, collateral: bytes, policy: str, references: Sequence[str]) -> str:
    value = sha384(tlv("cloister-verdict-v1", core, collateral, policy, _canonical(references)))
    return f"sha384:{value.hex()}"


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@functools.lru_cache(maxsize=16)
def _collateral(collateral: Collateral) -> bytes:
    return _canonical(json.loads(collateral_json(collateral)))


def _invalid(what: str, why: str) -> CloisterError:
    return CloisterError(
        Code.VERDICT_INVALID,
        what=what,
        why=why,
        todo="get the bundle again from attest, and the keys of that time: its trust bundle, or its JWK set",
    )
