# SPDX-License-Identifier: Apache-2.0
"""What an owner does from a machine of its own: verify a service before trusting it, and hold keys at the broker.

`verify_service` is protocol A, 1 and 2: the caller's nonce, a quote verified here and not by anybody else, the
expected code, and the TLS leaf on this very connection pinned to the quoted key.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.api.common.v1 import evidence_pb2, evidence_pb2_grpc
from cloister.api.keybroker.v1 import keybroker_pb2, keybroker_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.guest.evidence import Checklist, EvidenceRefused, EvidenceVerifier, Expected, VerifiedEvidence, short
from cloister.guest.keys import PURPOSES
from cloister.guest.receipt import fetch_receipt_key, open_answer, refuse
from cloister.hpke import KEM_MLKEM768_X25519, HpkeKeyPair
from cloister.identity import Role, SpiffeId, dns_name
from cloister.protocol import NONCE_SIZE, ReleaseBinding
from cloister.runtime.address import split_address
from cloister.runtime.channel import invoke, open_channel
from cloister.runtime.credentials import CredentialSource, StaticCredentials, TlsMaterial, load_own_chain
from cloister.runtime.limits import Limits
from cloister.runtime.options import channel_options
from cloister.runtime.pem import read_leaf
from cloister.sealed.datakey import DataKey
from cloister.tdx.check import Check
from cloister.tlv import sha384

_CALL_TIMEOUT_S: Final = 20.0
_AGAIN_S: Final = 1.0
_BUNDLE_CHECK: Final = "service.trust-bundle"
OWNER_PURPOSES: Final = {**PURPOSES, "export": keybroker_pb2.PURPOSE_EXPORT}


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


class OwnerKeyClient:
    """An owner's keys at the broker. With `verified`, only that very broker is spoken to."""

    def __init__(
        self, credentials: CredentialSource, endpoint: str, *, verified: VerifiedService | None = None
    ) -> None:
        self._credentials = credentials
        self._endpoint = endpoint
        self._verified = verified

    async def create_key(self, uri: str, *, purposes: Sequence[str], policy_yaml: bytes = b"") -> keybroker_pb2.Key:
        """Create a key for purposes of OWNER_PURPOSES; without a policy nothing is released with it yet."""
        request = keybroker_pb2.CreateKeyRequest(uri=uri, purposes=_purposes(purposes), policy_yaml=policy_yaml)
        return await self._key("CreateKey", request, f"create the key {uri}")

    async def show(self, uri: str) -> keybroker_pb2.Key:
        """Return one key of the caller's tenant."""
        return await self._key("GetKey", keybroker_pb2.GetKeyRequest(uri=uri), f"show the key {uri}")

    async def list(self) -> list[keybroker_pb2.Key]:
        """Return all keys of the caller's tenant."""
        keys: list[keybroker_pb2.Key] = []
        request = keybroker_pb2.ListKeysRequest()
        while True:
            response: keybroker_pb2.ListKeysResponse = await self._call("ListKeys", request, "list the keys")
            keys += response.keys
            if not response.next_page_token:
                return keys
            request.page_token = response.next_page_token

    async def enable(self, uri: str) -> keybroker_pb2.Key:
        """Let a key be used again."""
        return await self._key("EnableKey", keybroker_pb2.EnableKeyRequest(uri=uri), f"enable the key {uri}")

    async def disable(self, uri: str) -> keybroker_pb2.Key:
        """Stop every use of a key."""
        return await self._key("DisableKey", keybroker_pb2.DisableKeyRequest(uri=uri), f"disable the key {uri}")

    async def put_policy(self, uri: str, policy_yaml: bytes) -> keybroker_pb2.Key:
        """Put the successor of the release policy in force."""
        request = keybroker_pb2.PutReleasePolicyRequest(uri=uri, policy_yaml=policy_yaml)
        return await self._key("PutReleasePolicy", request, f"put the policy of {uri} in force")

    async def policy(self, uri: str) -> keybroker_pb2.GetReleasePolicyResponse:
        """Return the release policy in force."""
        request = keybroker_pb2.GetReleasePolicyRequest(uri=uri)
        response: keybroker_pb2.GetReleasePolicyResponse = await self._call(
            "GetReleasePolicy", request, f"show the policy of {uri}"
        )
        return response

    async def generate_data_key(self, uri: str) -> DataKey:
        """Return a new data key, sealed to a key made for this call, to seal with on this machine."""
        recipient, nonce = HpkeKeyPair.generate(), secrets.token_bytes(NONCE_SIZE)
        request = keybroker_pb2.GenerateDataKeyRequest(
            key_uri=uri,
            client_nonce=nonce,
            hpke_kem_id=KEM_MLKEM768_X25519,
            hpke_public_key=recipient.public_bytes,
        )
        return await self._data_key("GenerateDataKey", request, recipient, "seal", None)

    async def open_data_key(self, uri: str, *, key_version: int, wrapped: bytes) -> DataKey:
        """Return a data key again, from the header of a sealed object; the key must allow export."""
        recipient, nonce = HpkeKeyPair.generate(), secrets.token_bytes(NONCE_SIZE)
        request = keybroker_pb2.OpenDataKeyRequest(
            key_uri=uri,
            key_version=key_version,
            wrapped=wrapped,
            client_nonce=nonce,
            hpke_kem_id=KEM_MLKEM768_X25519,
            hpke_public_key=recipient.public_bytes,
        )
        return await self._data_key("OpenDataKey", request, recipient, "export", request)

    async def _data_key(
        self,
        method: str,
        request: keybroker_pb2.GenerateDataKeyRequest | keybroker_pb2.OpenDataKeyRequest,
        recipient: HpkeKeyPair,
        purpose: str,
        existing: keybroker_pb2.OpenDataKeyRequest | None,
    ) -> DataKey:
        # One generation of credentials for the whole exchange: the receipt names the certificate.
        material = self._credentials.current()
        async with self._channel(material) as channel:
            stub = keybroker_pb2_grpc.KeyOwnerServiceStub(channel)
            what = f"get a data key of {request.key_uri}"
            response = await invoke(getattr(stub, method), request, timeout_s=_CALL_TIMEOUT_S, what=what)
            if self._verified is not None:
                receipt_spki = self._verified.evidence.receipt_spki_der
            else:
                receipt_spki = await fetch_receipt_key(channel, caller=material.spiffe_id)
        answer: keybroker_pb2.SealedDataKey = response.data_key
        if existing is not None and answer.key_version != existing.key_version:
            refuse("the answer is under another version of the key than the one asked for")
        binding = ReleaseBinding(
            key_uri=request.key_uri,
            key_version=answer.key_version,
            purpose=purpose,
            policy_digest=b"",
            evidence_digest=sha384(read_leaf(material.chain_pem).der),
            client_nonce=request.client_nonce,
            broker_nonce=b"",
            broker_id=str(SpiffeId.service(material.spiffe_id.trust_domain, Role.KEYBROKER)),
            wrapped_digest=sha384(answer.wrapped if existing is None else existing.wrapped),
        )
        received = open_answer(
            answer, response.receipt, binding=binding, recipient=recipient, receipt_spki_der=receipt_spki
        )
        return received.data_key

    async def _key(self, method: str, request: Any, what: str) -> keybroker_pb2.Key:
        response = await self._call(method, request, what)
        key: keybroker_pb2.Key = response.key
        return key

    async def _call(self, method: str, request: Any, what: str) -> Any:
        async with self._channel(self._credentials.current()) as channel:
            stub = keybroker_pb2_grpc.KeyOwnerServiceStub(channel)
            return await invoke(getattr(stub, method), request, timeout_s=_CALL_TIMEOUT_S, what=what)

    @asynccontextmanager
    async def _channel(self, material: TlsMaterial) -> AsyncIterator[Any]:
        if self._verified is not None:
            async with pinned_channel(self._endpoint, Role.KEYBROKER, material, self._verified.leaf_pem) as channel:
                yield channel
        else:
            credentials = StaticCredentials(material)
            async with open_channel(self._endpoint, role=Role.KEYBROKER, credentials=credentials) as channel:
                yield channel


def _purposes(names: Sequence[str]) -> list[keybroker_pb2.Purpose.ValueType]:
    unknown = [name for name in names if name not in OWNER_PURPOSES]
    if unknown:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"{unknown[0]!r} is not a purpose of a key",
            why=f"purposes are {', '.join(OWNER_PURPOSES)}",
            todo="choose from these",
        )
    return [OWNER_PURPOSES[name] for name in names]


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
