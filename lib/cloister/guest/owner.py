# SPDX-License-Identifier: Apache-2.0
"""What an owner does from a machine of its own before it trusts a service: verify its evidence, pin its certificate.

`verify_service_evidence` is protocol A, 1 and 2: the caller's nonce, a quote verified here and not by anybody else,
the expected code, and the TLS leaf on this very connection pinned to the quoted key.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
import time
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.api.common.v1 import evidence_pb2, evidence_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.guest.evidence import Checklist, EvidenceRefused, EvidenceVerifier, Expected, VerifiedEvidence, short
from cloister.identity import Role, dns_name
from cloister.protocol import NONCE_SIZE
from cloister.runtime.address import split_address
from cloister.runtime.channel import invoke
from cloister.runtime.credentials import CredentialSource, TlsMaterial, load_own_chain
from cloister.runtime.limits import Limits
from cloister.runtime.options import channel_options
from cloister.runtime.pem import read_leaf
from cloister.tdx.check import Check

_CALL_TIMEOUT_S: Final = 20.0
_AGAIN_S: Final = 1.0
_BUNDLE_CHECK: Final = "service.trust-bundle"


@dataclass(frozen=True, slots=True)
class VerifiedService:
    """A service whose evidence this machine verified, and the leaf to pin when talking to it."""

    role: Role
    endpoint: str
    evidence: VerifiedEvidence
    checks: tuple[Check, ...]
    leaf_pem: bytes


async def verify_service_evidence(
    endpoint: str,
    *,
    role: Role,
    credentials: CredentialSource,
    verifier: EvidenceVerifier,
    expected_scripts: Collection[bytes],
    now: datetime,
    patience_s: float = 0.0,
) -> VerifiedService:
    """Fetch and verify the evidence of the service at `endpoint`.

    `verifier` is this machine's own: root, collateral and policy; attest is not asked. `expected_scripts` are SHA-384
    digests (48 bytes) of the service's package; none expected means none accepted. A service that does not hold this
    machine's trust bundle is asked again for up to `patience_s` seconds: while a CA changes, one of them learns first.
    Raises CloisterError(EVIDENCE_UNEXPECTED) that names the failed check, or UNREACHABLE.
    """
    end = time.monotonic() + patience_s
    while True:
        found = await _verify_once(endpoint, role, credentials.current(), verifier, expected_scripts, now)
        if isinstance(found, VerifiedService):
            return found
        if found.failed.name != _BUNDLE_CHECK or time.monotonic() + _AGAIN_S > end:
            raise CloisterError(
                Code.EVIDENCE_UNEXPECTED,
                what=f"what answers as {role} at {endpoint} is not to be trusted",
                why=str(found),
                todo="give it no data; compare the installed release with the one that is expected",
            )
        await asyncio.sleep(_AGAIN_S)


async def _verify_once(
    endpoint: str,
    role: Role,
    material: TlsMaterial,
    verifier: EvidenceVerifier,
    expected_scripts: Collection[bytes],
    now: datetime,
) -> VerifiedService | EvidenceRefused:
    leaf_pem = await asyncio.to_thread(_leaf_at, endpoint, role, material)
    me, domain = str(material.spiffe_id), material.spiffe_id.trust_domain
    nonce = secrets.token_bytes(NONCE_SIZE)
    async with pinned_channel(endpoint, role, material, leaf_pem) as channel:
        method = evidence_pb2_grpc.EvidenceServiceStub(channel).GetEvidence
        request = evidence_pb2.GetEvidenceRequest(nonce=nonce, audience=me)
        response = await invoke(method, request, timeout_s=_CALL_TIMEOUT_S, what=f"get the evidence of {role}")
    checklist = Checklist()
    try:
        expected = Expected(nonce, me, domain)
        evidence = await verifier.verify(response.evidence, expected, now=now, checklist=checklist)
        unexpected = Code.EVIDENCE_UNEXPECTED
        checklist.require("service.role", evidence.role is role, unexpected, wanted=role, got=evidence.role)
        script = evidence.workload.script
        checklist.require(
            "service.script",
            any(secrets.compare_digest(script, digest) for digest in expected_scripts),
            unexpected,
            wanted=" or ".join(short(digest) for digest in expected_scripts) or "nothing: no digest is expected",
            got=short(script),
        )
        # What it holds now; what it began with is for attest to judge.
        bundle_digest = evidence.trust_bundle
        checklist.require_equal(_BUNDLE_CHECK, unexpected, wanted=material.bundle.digest, got=bundle_digest)
        leaf_spki = (
            read_leaf(leaf_pem).certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        )
        checklist.require_equal("service.tls-key", unexpected, wanted=evidence.tls_spki_der, got=leaf_spki)
    except EvidenceRefused as error:
        return error
    return VerifiedService(role, endpoint, evidence, checklist.checks, leaf_pem)


def _leaf_at(endpoint: str, role: Role, material: TlsMaterial) -> bytes:
    """Shake hands, check the server's chain and name, and return its leaf (PEM)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=material.bundle.intermediate(role).decode("ascii"))
    load_own_chain(context, material)
    name = dns_name(role, material.bundle.trust_domain)
    try:
        with (
            socket.create_connection(split_address(endpoint), timeout=_CALL_TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=name) as connection,
        ):
            der = connection.getpeercert(binary_form=True) or b""
    except OSError as error:  # ssl.SSLError is one
        raise CloisterError(
            Code.UNREACHABLE,
            what=f"no {role} can be reached at {endpoint}",
            why=str(error),
            todo="check that it runs, and that this certificate and bundle are its own (cloister doctor)",
        ) from None
    return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)


def pinned_channel(endpoint: str, role: Role, material: TlsMaterial, leaf_pem: bytes) -> grpc.aio.Channel:
    """Open a channel that trusts one leaf and nothing else: how to pin in gRPC, whose clients see no certificate."""
    tls = grpc.ssl_channel_credentials(
        root_certificates=leaf_pem,
        private_key=material.private_key_pem.reveal(),
        certificate_chain=material.chain_pem,
    )
    name = dns_name(role, material.bundle.trust_domain)
    return grpc.aio.secure_channel(endpoint, tls, options=channel_options(Limits(), name))
