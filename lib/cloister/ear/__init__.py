# SPDX-License-Identifier: Apache-2.0
"""Attestation results: what attest found about a TD, as a signed token (EAR in a JWT).

Claim names follow draft-ietf-rats-ear-04 and RFC 9711 (EAT); what those leave open carries the prefix `cloister_`.
The token is bound to one certificate (`cnf`, RFC 8705) and one HPKE key, so it is worth nothing to anyone else, and
it may be shown several times within its five minutes: what a relying party uses once is its own nonce, not `jti`.
"""

from __future__ import annotations

from cloister.ear.members import TokenRejected
from cloister.ear.token import AuthenticTokens, current, issue, public_jwk, read_unverified, verify
from cloister.ear.values import (
    AFFIRMING,
    MAX_LIFETIME,
    STATUSES,
    TRUST_CLAIMS,
    WARNING,
    Ear,
    TeeClaims,
    WorkloadClaims,
)

__all__ = [
    "AFFIRMING",
    "MAX_LIFETIME",
    "STATUSES",
    "TRUST_CLAIMS",
    "WARNING",
    "AuthenticTokens",
    "Ear",
    "TeeClaims",
    "TokenRejected",
    "WorkloadClaims",
    "current",
    "issue",
    "public_jwk",
    "read_unverified",
    "verify",
]
