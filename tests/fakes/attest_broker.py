# SPDX-License-Identifier: Apache-2.0
"""A key broker without a store: it speaks the release protocol, honestly unless told how to lie."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister import ear, hpke
from cloister.api.keybroker.v1 import keybroker_pb2 as pb
from cloister.api.keybroker.v1 import keybroker_pb2_grpc as rpc
from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Identity
from cloister.guest.evidence_service import EVIDENCE_CALLERS, mounted_evidence
from cloister.identity import Role
from cloister.protocol import LeaseTerms, ReleaseBinding
from cloister.runtime.caller import current_caller
from cloister.runtime.server import GrpcServer, Mounted
from cloister.secret import SecretBytes
from cloister.tlv import sha384
from fakes.attest_harness import ATTEST_ID, TRUST_DOMAIN, LocalAttest
from fakes.signing import OWNER_SIGNER

PACKAGE = "cloister.api.keybroker.v1"
BROKER_ID = f"spiffe://{TRUST_DOMAIN}/service/keybroker"
POLICY_DIGEST = b"\x31" * 48
NO_LEASE = LeaseTerms()
DATA_KEY = b"\x77" * 32
PURPOSE_TEXT = {pb.PURPOSE_TRAIN: "train", pb.PURPOSE_SERVE: "serve", pb.PURPOSE_EVALUATE: "evaluate"}


def _as_it_is(binding: ReleaseBinding) -> ReleaseBinding:
    return binding


def _nothing(response: Any) -> None:
    return None


async def _absent(_request: Any, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this broker does not do that")


@dataclass
class Broker(rpc.KeyReleaseServiceServicer, rpc.KeyOwnerServiceServicer):
    """`bind` changes what it seals and signs over, `spoil` what it answers."""

    attest: LocalAttest
    identity: Identity
    wants_fresh: bool = False
    bind: Callable[[ReleaseBinding], ReleaseBinding] = _as_it_is
    spoil_begin: Callable[[Any], None] = _nothing
    spoil: Callable[[Any], None] = _nothing
    secret: bytes = DATA_KEY
    receipt_key: ed25519.Ed25519PrivateKey | None = None
    endpoint: str = ""
    signer: str = OWNER_SIGNER
    releases: list[str] = field(default_factory=list)
    lease_ms: int = 3_600_000
    refusals: list[CloisterError] = field(default_factory=list)  # one for each of the next releases
    renewals: list[tuple[str, int]] = field(default_factory=list)  # key and version
    renewed: asyncio.Event = field(default_factory=asyncio.Event)

    async def BeginRelease(self, request: pb.BeginReleaseRequest, _context: Any) -> pb.BeginReleaseResponse:
        self._nonce = secrets.token_bytes(32)
        response = pb.BeginReleaseResponse(
            nonce=self._nonce, policy_version=1, policy_digest=POLICY_DIGEST, fresh_enough=not self.wants_fresh,
            hpke_kem_ids=[hpke.KEM_MLKEM768_X25519],
        )  # fmt: skip
        self.spoil_begin(response)
        return response

    async def Release(self, request: pb.ReleaseRequest, _context: Any) -> pb.ReleaseResponse:
        token = ear.verify(
            request.attestation_result, keys=self.attest.bundle.token_keys, issuer=ATTEST_ID,
            audience=f"spiffe://{TRUST_DOMAIN}", now=self.attest.clock(),
        )  # fmt: skip
        caller = current_caller()
        if token.certificate_sha256 != caller.certificate_sha256:
            raise CloisterError(Code.TOKEN_INVALID, what="the token is bound to another certificate")
        if self.wants_fresh and self._nonce.hex() not in token.nonces:
            raise CloisterError(Code.TOKEN_INVALID, what="the evidence is not over the broker's nonce")
        if self.refusals:
            raise self.refusals.pop(0)
        renewal = request.WhichOneof("data_key") == "renew"
        if renewal:
            self.renewals.append((request.key_uri, request.key_version))
            self.renewed.set()
        else:
            self.releases.append(token.certificate_sha256.hex())
        wrapped = b"" if renewal else request.wrapped or b"a new wrapped key"
        binding = ReleaseBinding(
            key_uri=request.key_uri, key_version=request.key_version or 1, purpose=PURPOSE_TEXT[request.purpose],
            policy_digest=POLICY_DIGEST, evidence_digest=sha384(request.attestation_result.encode()),
            client_nonce=request.client_nonce, broker_nonce=request.broker_nonce, broker_id=BROKER_ID,
            wrapped_digest=sha384(wrapped),
        )  # fmt: skip
        now_ms = int(self.attest.clock().timestamp() * 1000)
        terms = LeaseTerms(1, now_ms, now_ms + self.lease_ms)
        data_key, receipt = self._answer(binding, wrapped, b"" if renewal else request.hpke_public_key, terms)
        response = pb.ReleaseResponse(
            data_key=data_key, receipt=receipt, policy_version=terms.policy_version, policy_digest=POLICY_DIGEST,
            decided_unix_ms=terms.decided_ms, lease_until_unix_ms=terms.lease_until_ms,
        )  # fmt: skip
        self.spoil(response)
        return response

    async def GenerateDataKey(self, request: pb.GenerateDataKeyRequest, _context: Any) -> pb.GenerateDataKeyResponse:
        return pb.GenerateDataKeyResponse(**self._for_owner(request, "seal", 1, b"a new wrapped key"))

    async def OpenDataKey(self, request: pb.OpenDataKeyRequest, _context: Any) -> pb.OpenDataKeyResponse:
        return pb.OpenDataKeyResponse(**self._for_owner(request, "export", request.key_version, request.wrapped))

    async def ListKeys(self, request: pb.ListKeysRequest, _context: Any) -> pb.ListKeysResponse:
        first = not request.page_token
        return pb.ListKeysResponse(
            keys=[pb.Key(uri=f"cloister-key://hospital-a/{'one' if first else 'two'}")],
            next_page_token="more" if first else "",
        )

    async def CreateKey(self, request: pb.CreateKeyRequest, _context: Any) -> pb.CreateKeyResponse:
        return pb.CreateKeyResponse(key=pb.Key(uri=request.uri, purposes=request.purposes, signer=self.signer))

    async def GetKey(self, request: pb.GetKeyRequest, _context: Any) -> pb.GetKeyResponse:
        return pb.GetKeyResponse(key=pb.Key(uri=request.uri, signer=self.signer))

    async def EnableKey(self, request: pb.EnableKeyRequest, _context: Any) -> pb.EnableKeyResponse:
        return pb.EnableKeyResponse(key=pb.Key(uri=request.uri, state=pb.KEY_STATE_ENABLED))

    async def DisableKey(self, request: pb.DisableKeyRequest, _context: Any) -> pb.DisableKeyResponse:
        return pb.DisableKeyResponse(key=pb.Key(uri=request.uri, state=pb.KEY_STATE_DISABLED))

    async def PutReleasePolicy(self, request: pb.PutReleasePolicyRequest, _context: Any) -> pb.PutReleasePolicyResponse:
        return pb.PutReleasePolicyResponse(key=pb.Key(uri=request.uri, policy_version=2))

    async def GetReleasePolicy(
        self, _request: pb.GetReleasePolicyRequest, _context: Any
    ) -> pb.GetReleasePolicyResponse:
        return pb.GetReleasePolicyResponse(policy_yaml=b"policy", version=1, digest=POLICY_DIGEST)

    def _for_owner(self, request: Any, purpose: str, version: int, wrapped: bytes) -> dict[str, Any]:
        binding = ReleaseBinding(
            key_uri=request.key_uri, key_version=version, purpose=purpose, policy_digest=b"",
            evidence_digest=sha384(current_caller().certificate_der), client_nonce=request.client_nonce,
            broker_nonce=b"", broker_id=BROKER_ID, wrapped_digest=sha384(wrapped),
        )  # fmt: skip
        data_key, receipt = self._answer(binding, wrapped, request.hpke_public_key)
        response = pb.GenerateDataKeyResponse(data_key=data_key, receipt=receipt)
        self.spoil(response)
        return {"data_key": response.data_key, "receipt": response.receipt}

    def _answer(
        self, binding: ReleaseBinding, wrapped: bytes, recipient: bytes, terms: LeaseTerms = NO_LEASE
    ) -> tuple[pb.SealedDataKey, pb.Receipt]:
        bound = self.bind(binding)
        sealed = hpke.seal(recipient, SecretBytes(self.secret), info=bound.hpke_info()) if recipient else b""
        key = self.receipt_key or self.identity.guest.keys.receipt
        spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        log_id, root = sha384(spki), hashlib.sha256(b"log").digest()
        message = bound.receipt_message(sealed=sealed, terms=terms, log_id=log_id, index=7, root=root)
        data_key = pb.SealedDataKey(
            sealed=sealed, wrapped=wrapped, key_uri=binding.key_uri, key_version=binding.key_version
        )
        receipt = pb.Receipt(signature=key.sign(message), log_id=log_id, index=7, root=root, receipt_spki_der=spki)
        return data_key, receipt


def lies(**fields: Any) -> Callable[[ReleaseBinding], ReleaseBinding]:
    """Seal and sign over a binding in which these fields are others."""
    return lambda binding: replace(binding, **fields)


@asynccontextmanager
async def broker(attest: LocalAttest) -> AsyncIterator[Broker]:
    """Enrol and serve a broker."""
    identity = await attest.enrol(attest.td(Role.KEYBROKER))
    servicer = Broker(attest, identity)
    for name in (method for method in dir(servicer) if method[0].isupper()):
        if not inspect.iscoroutinefunction(getattr(servicer, name)):
            setattr(servicer, name, _absent)
    everyone = frozenset({Role.RANK, Role.BACKEND, Role.USER})
    methods = [
        f"/{service.full_name}/{method.name}"
        for name in ("KeyReleaseService", "KeyOwnerService")
        for service in [pb.DESCRIPTOR.services_by_name[name]]
        for method in service.methods
    ]
    server = GrpcServer(
        section="127.0.0.1:0",
        credentials=identity,
        services=[
            Mounted(f"{PACKAGE}.KeyReleaseService", rpc.add_KeyReleaseServiceServicer_to_server, servicer),
            Mounted(f"{PACKAGE}.KeyOwnerService", rpc.add_KeyOwnerServiceServicer_to_server, servicer),
            mounted_evidence(identity),
        ],
        callers={**dict.fromkeys(methods, everyone), **EVIDENCE_CALLERS},
    )
    await server.start()
    servicer.endpoint = server.endpoint
    try:
        yield servicer
    finally:
        await server.drain(0)
        await identity.aclose()
