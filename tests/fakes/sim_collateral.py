# SPDX-License-Identifier: Apache-2.0
"""Collateral of a simulated platform that says something else in one named way, signed by its own authority."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.tdx.collateral import Collateral
from cloister_sim.collateral import LIFE
from cloister_sim.platform import SimulatedPlatform


def collateral_of(
    platform: SimulatedPlatform,
    now: datetime,
    *,
    status: str = "UpToDate",
    tcb_date: str = "2026-05-13T00:00:00Z",
    advisories: Sequence[str] = (),
    evaluation: int = 20,
    revoked: bool = False,
) -> Collateral:
    """Return what the platform's authority might publish at `now`: `status` is what the platform's own level says."""
    now = now.replace(microsecond=0)
    base = platform.collateral(now)
    info, identity = json.loads(base.tcb_info), json.loads(base.qe_identity)
    info["tcbLevels"][0] |= {"tcbStatus": status, "tcbDate": tcb_date, "advisoryIDs": list(advisories)}
    info["tcbEvaluationDataNumber"] = identity["tcbEvaluationDataNumber"] = evaluation
    for levels in (info["tdxModuleIdentities"][0]["tcbLevels"], identity["tcbLevels"]):
        levels[0]["tcbDate"] = tcb_date
    key = platform._tcb_signing_key
    changed = {name: json.dumps(value).encode() for name, value in (("tcb_info", info), ("qe_identity", identity))}
    signatures = {f"{name}_signature": _sign(key, text) for name, text in changed.items()}
    more: dict[str, Any] = {"pck_crl": _crl(platform, now)} if revoked else {}
    return replace(base, **changed, **signatures, **more)


def _crl(platform: SimulatedPlatform, now: datetime) -> bytes:
    """Return the PCK CA's list with the platform's certificate on it."""
    keys = platform._keys
    entry = x509.RevokedCertificateBuilder().serial_number(keys.pck.serial_number).revocation_date(now).build()
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(keys.ca_key.public_key())
    return (
        x509.CertificateRevocationListBuilder()
        .issuer_name(keys.ca.subject)
        .last_update(now)
        .next_update(now + LIFE)
        .add_extension(authority, critical=False)
        .add_extension(x509.CRLNumber(2**40), critical=False)
        .add_revoked_certificate(entry)
        .sign(keys.ca_key, SHA256())
        .public_bytes(Encoding.DER)
    )


def _sign(key: ec.EllipticCurvePrivateKey, text: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(text, ec.ECDSA(SHA256())))
    return f"{r:064x}{s:064x}".encode()
