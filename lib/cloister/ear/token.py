# SPDX-License-Identifier: Apache-2.0
"""Issue and verify attestation results as signed tokens (JWS, ES256).

`verify`, in this order: form, header, key, signature, strict JSON (cloister.ear.jws) -> shape -> issuer, audience ->
iat, nbf, exp, lifetime.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec

from cloister.ear.jws import open_signed, read_header, sign_claims
from cloister.ear.members import Members, TokenRejected, b64, digest_text, parse_object, unb64
from cloister.ear.shape import read_claims
from cloister.ear.values import ALGORITHM, MAX_LIFETIME, PROFILE, TYPE, Ear
from cloister.tlv import sha384

MAX_TOKEN_CHARS: Final = 16 * 1024  # a token with 64 data sets has about 9,000


def public_jwk(key: ec.EllipticCurvePublicKey) -> dict[str, str]:
    """Return a P-256 public key as JWK; `kid` is its thumbprint (RFC 7638)."""
    numbers = key.public_numbers()
    jwk = {
        "crv": "P-256",
        "kty": "EC",
        "x": b64(numbers.x.to_bytes(32, "big")),
        "y": b64(numbers.y.to_bytes(32, "big")),
    }
    thumbprint = hashlib.sha256(json.dumps(jwk, sort_keys=True, separators=(",", ":")).encode()).digest()
    return {**jwk, "alg": ALGORITHM, "use": "sig", "kid": b64(thumbprint)}


def issue(ear: Ear, *, key: ec.EllipticCurvePrivateKey, key_id: str) -> str:
    """Return the signed token; ValueError when its lifetime is longer than five minutes or not positive."""
    issued, expires = int(ear.issued_at.timestamp()), int(ear.expires_at.timestamp())
    if not 0 < expires - issued <= MAX_LIFETIME.total_seconds():
        raise ValueError("an attestation result lives for 1 second to 5 minutes")
    return sign_claims(_claims(ear, issued, expires), kind=TYPE, key=key, key_id=key_id)


def _claims(ear: Ear, issued: int, expires: int) -> dict[str, Any]:
    tee, workload = ear.tee, ear.workload
    vector = {name: int(value) for name, value in ear.trustworthiness.items()}
    common = {"ear_status": ear.status, "ear_appraisal_policy_ids": [digest_text(ear.policy_digest)]}
    return {
        "eat_profile": PROFILE,
        "iss": ear.issuer,
        "aud": ear.audience,
        "sub": ear.spiffe_id,
        "iat": issued,
        "nbf": issued,
        "exp": expires,
        "jti": ear.token_id,
        "eat_nonce": list(ear.nonces),
        "cnf": {"x5t#S256": b64(ear.certificate_sha256)},
        "ear_verifier_id": {"build": ear.verifier_id, "developer": "https://cloister.dev"},
        "cloister_hpke_key": digest_text(ear.hpke_key_digest),
        "cloister_inputs": {name: digest_text(value) for name, value in ear.inputs.items()},
        "submods": {
            "cpu0": {
                **common,
                "ear_trustworthiness_vector": vector,
                "cloister_tdx": {
                    "mr_td": tee.mr_td.hex(),
                    "mr_seam": tee.mr_seam.hex(),
                    "rtmrs": [rtmr.hex() for rtmr in tee.rtmrs],
                    "debug": tee.debug,
                    "simulated": tee.simulated,
                    "fmspc": tee.fmspc.hex(),
                    "piid": tee.piid.hex(),
                    "tcb_status": tee.tcb_status,
                    "tcb_date": tee.tcb_date,
                    "advisories": list(tee.advisories),
                    "tcb_evaluation": tee.tcb_evaluation,
                    "collateral_issued": tee.collateral_issued,
                    "collateral_expires": tee.collateral_expires,
                },
            },
            "workload0": {
                **common,
                "cloister_workload": {
                    "role": str(workload.role),
                    "environment": digest_text(workload.environment),
                    "trust_bundle": digest_text(workload.trust_bundle),
                    "script": digest_text(workload.script),
                    "config": digest_text(workload.config),
                    "datasets": [digest_text(digest) for digest in workload.datasets],
                    "tenant": workload.tenant,
                    "job": workload.job,
                    "rank": workload.rank,
                    "world_size": workload.world_size,
                    "model": workload.model,
                    "backend": workload.backend,
                },
            },
        },
    }


@dataclass(frozen=True, slots=True)
class Authentic:
    """What a token says whose signature was verified: true of it for ever, whatever the time is."""

    ear: Ear
    not_before: datetime
    digest: bytes  # SHA-384 of the token, 48 bytes


def authenticate(token: str, *, keys: Sequence[Mapping[str, str]]) -> Authentic:
    """Return what an authentic token says; raise TokenRejected for anything else. Its time and audience are unchecked.

    `keys` are the token keys of the trust bundle (JWKs with `kid`).
    """
    claims = open_signed(token, kind=TYPE, keys=keys, max_chars=MAX_TOKEN_CHARS)
    ear, not_before = read_claims(Members("payload", claims))
    return Authentic(ear, not_before, sha384(token.encode("ascii")))


def current(authentic: Authentic, *, issuer: str, audience: str, now: datetime, leeway_s: int = 30) -> Ear:
    """Return the result if it is of this issuer, for this audience, at this time; raise TokenRejected otherwise."""
    ear, not_before = authentic.ear, authentic.not_before
    if ear.issuer != issuer:
        raise TokenRejected("iss", f"issued by {ear.issuer}, not by {issuer}")
    if ear.audience != audience:
        raise TokenRejected("aud", f"meant for {ear.audience}, not for {audience}")
    leeway = timedelta(seconds=leeway_s)
    if ear.issued_at > now + leeway:
        raise TokenRejected("iat", f"issued at {ear.issued_at.isoformat()}, which has not come yet")
    if not_before > now + leeway:
        raise TokenRejected("nbf", f"not valid before {not_before.isoformat()}")
    if ear.expires_at <= now - leeway:
        raise TokenRejected("exp", f"expired at {ear.expires_at.isoformat()}")
    if not timedelta() < ear.expires_at - ear.issued_at <= MAX_LIFETIME:
        raise TokenRejected("lifetime", f"lives for {ear.expires_at - ear.issued_at}, more than {MAX_LIFETIME}")
    return ear


def verify(
    token: str, *, keys: Sequence[Mapping[str, str]], issuer: str, audience: str, now: datetime, leeway_s: int = 30
) -> Ear:
    """Return what an authentic, current token for this audience says; raise TokenRejected for anything else.

    `keys` are the token keys of the trust bundle (JWKs with `kid`). The caller still compares
    `certificate_sha256` with its peer's certificate, `hpke_key_digest` with the key it seals to, and `nonces`.
    """
    found = authenticate(token, keys=keys)
    return current(found, issuer=issuer, audience=audience, now=now, leeway_s=leeway_s)


class AuthenticTokens:
    """The tokens last authenticated under one set of keys. A token is shown several times within its five minutes."""

    def __init__(self, capacity: int = 1024) -> None:
        self._capacity = capacity  # tokens; 3 kB each, 16 at most
        self._keys: Sequence[Mapping[str, str]] = ()
        self._found: OrderedDict[str, Authentic] = OrderedDict()

    def authenticate(self, token: str, *, keys: Sequence[Mapping[str, str]]) -> Authentic:
        """Do what `authenticate` does, once for each token and set of keys. Rejected tokens are not remembered."""
        if keys is not self._keys and keys != self._keys:
            self._found.clear()
        self._keys = keys
        found = self._found.get(token)
        if found is None:
            found = self._found[token] = authenticate(token, keys=keys)
            if len(self._found) > self._capacity:
                self._found.popitem(last=False)
        else:
            self._found.move_to_end(token)
        return found


def read_unverified(token: str) -> Ear:
    """Return what a token says, whoever signed it and however old it is: to explain it, never to decide by it.

    Raises TokenRejected for what is no token of this form.
    """
    read_header(token, kind=TYPE, max_chars=MAX_TOKEN_CHARS)
    ear, _ = read_claims(Members("payload", parse_object(unb64(token.split(".")[1]), "payload")))
    return ear
