# SPDX-License-Identifier: Apache-2.0
"""Attestation results that look like attest's."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cloister.ear import AFFIRMING, Ear, TeeClaims, WorkloadClaims
from cloister.identity import Role, SpiffeId

TRUST_DOMAIN = "cloister.test"
ISSUER = f"spiffe://{TRUST_DOMAIN}/service/attest"
AUDIENCE = f"spiffe://{TRUST_DOMAIN}"
NOW = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)


def sample_ear(*, role: Role = Role.RANK, now: datetime = NOW, nonces: tuple[str, ...] = ("0a" * 32, "0b" * 32)) -> Ear:
    """Return a result about rank 1 of job j-1 of hospital-a, about a backend, or about a service."""
    match role:
        case Role.RANK:
            subject = SpiffeId.of_rank(TRUST_DOMAIN, tenant="hospital-a", job="j-1", rank=1)
        case Role.BACKEND:
            subject = SpiffeId.of_backend(TRUST_DOMAIN, tenant="hospital-a", model="reviews", backend="b-0")
        case _:
            subject = SpiffeId.service(TRUST_DOMAIN, role)
    return Ear(
        issuer=ISSUER,
        audience=AUDIENCE,
        issued_at=now,
        expires_at=now + timedelta(minutes=5),
        token_id="7f3c",
        nonces=nonces,
        certificate_sha256=bytes(range(32)),
        hpke_key_digest=bytes(range(48)),
        spiffe_id=str(subject),
        status=AFFIRMING,
        trustworthiness={"instance-identity": 2, "executables": 2},
        tee=TeeClaims(
            mr_td=b"\x01" * 48,
            mr_seam=b"\x02" * 48,
            rtmrs=(b"\x10" * 48, b"\x11" * 48, b"\x12" * 48, b"\x13" * 48),
            debug=False,
            simulated=True,
            fmspc=bytes.fromhex("00906ed50000"),
            piid=b"\x05" * 16,
        ),
        workload=WorkloadClaims(
            role=role,
            environment=b"\x21" * 48,
            trust_bundle=b"\x22" * 48,
            script=b"\x23" * 48,
            config=b"\x24" * 48,
            datasets=(b"\x25" * 48,) if role is Role.RANK else (),
            tenant=subject.tenant,
            job=subject.job,
            rank=1 if role is Role.RANK else None,
            world_size=2 if role is Role.RANK else None,
            model=subject.model,
            backend=subject.backend,
        ),
        policy_digest=b"\x31" * 48,
        verifier_id="cloister-attest/0.1.0",
        inputs={"quote": b"\x41" * 48, "event_log": b"\x42" * 48},
    )
