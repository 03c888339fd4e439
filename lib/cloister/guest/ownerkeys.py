# SPDX-License-Identifier: Apache-2.0
"""An owner's keys at the broker (release protocol, A): made, changed and used from a machine of its own.

What a new key and a policy are is signed here, with the owner's signing key; data keys leave the broker for this
machine only sealed to a key of this call, and with a receipt that is checked before they are used.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister import hpke
from cloister.api.keybroker.v1 import keybroker_pb2, keybroker_pb2_grpc
from cloister.didkey import did_key
from cloister.errors import CloisterError, Code
from cloister.guest.keys import PURPOSES
from cloister.guest.owner import VerifiedService, pinned_channel
from cloister.guest.receipt import check_receipt, fetch_receipt_key, open_answer, refuse
from cloister.hpke import KEM_MLKEM768_X25519, HpkeKeyPair
from cloister.identity import Role, SpiffeId
from cloister.keyuri import KeyUri
from cloister.protocol import NONCE_SIZE, ReleaseBinding, import_info
from cloister.provisioning import OpenRequest, Provisioning, SignedPolicy, owner_envelope
from cloister.release.keys import Purpose
from cloister.runtime.channel import invoke, open_channel
from cloister.runtime.credentials import CredentialSource, StaticCredentials, TlsMaterial
from cloister.runtime.pem import read_leaf
from cloister.sealed.datakey import DataKey
from cloister.secret import SecretBytes
from cloister.tlv import sha384
from cloister.transparency.documents import SignedReceipt

_CALL_TIMEOUT_S: Final = 20.0
OWNER_PURPOSES: Final = {**PURPOSES, "export": keybroker_pb2.PURPOSE_EXPORT}


class OwnerKeyClient:
    """The keys of one owner. With `verified`, only that very broker is spoken to."""

    def __init__(
        self,
        credentials: CredentialSource,
        endpoint: str,
        *,
        signing_key: Ed25519PrivateKey,
        verified: VerifiedService | None = None,
        keep: Callable[[SignedReceipt], object] = lambda _receipt: None,
    ) -> None:
        """`keep` takes every receipt that was verified."""
        self._keep = keep
        self._credentials = credentials
        self._endpoint = endpoint
        self._signing_key = signing_key
        self._verified = verified

    @property
    def signer(self) -> str:
        """The did:key of the owner's signing key."""
        return did_key(self._signing_key)

    async def create_key(self, uri: str, *, purposes: Sequence[str], policy: bytes = b"") -> keybroker_pb2.Key:
        """Create a key for purposes of OWNER_PURPOSES; without a policy nothing is released with it yet.

        `policy` is YAML, or an envelope that was signed elsewhere; the owner's signature is added to it here.
        """
        wanted = _purposes(purposes)
        signed = self._signed(policy)
        request = keybroker_pb2.CreateKeyRequest(
            uri=uri,
            purposes=[OWNER_PURPOSES[purpose] for purpose in sorted(wanted)],
            policy_envelope=signed.envelope if signed else b"",
            provisioning=self._provisioning(uri, wanted, signed).signed(self._signing_key),
        )
        return self._mine(await self._key("CreateKey", request, f"create the key {uri}"))

    async def import_key(
        self, uri: str, secret: SecretBytes, *, purposes: Sequence[str], policy: bytes = b""
    ) -> keybroker_pb2.Key:
        """Create a key from material (32 bytes) of the owner's own, sealed to the broker that was verified."""
        if self._verified is None:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what="key material is given to a verified broker only",
                why="nobody has verified the evidence of this one",
                todo="verify it first: cloister key import does",
            )
        wanted = _purposes(purposes)
        signed = self._signed(policy)
        what = f"import the key {uri}"
        material = self._credentials.current()
        evidence = self._verified.evidence
        async with self._channel(material) as channel:
            stub = keybroker_pb2_grpc.KeyOwnerServiceStub(channel)
            begun: keybroker_pb2.BeginImportResponse = await invoke(
                stub.BeginImport, keybroker_pb2.BeginImportRequest(), timeout_s=_CALL_TIMEOUT_S, what=what
            )
            info = import_info(
                key_uri=uri, key_version=1, policy_digest=signed.policy.digest if signed else b"", nonce=begun.nonce
            )
            # Sealed to the key that the evidence is over, whatever the answer says.
            sealed = hpke.seal(evidence.hpke_public_key, secret, info=info)
            statement = self._provisioning(uri, wanted, signed, sealed_digest=sha384(sealed), nonce=begun.nonce)
            request = keybroker_pb2.ImportKeyRequest(
                uri=uri,
                purposes=[OWNER_PURPOSES[purpose] for purpose in sorted(wanted)],
                policy_envelope=signed.envelope if signed else b"",
                provisioning=statement.signed(self._signing_key),
                sealed=sealed,
                nonce=begun.nonce,
            )
            response: keybroker_pb2.ImportKeyResponse = await invoke(
                stub.ImportKey, request, timeout_s=_CALL_TIMEOUT_S, what=what
            )
        binding = ReleaseBinding(
            key_uri=uri,
            key_version=1,
            purpose="import",
            policy_digest=statement.policy_digest,
            evidence_digest=sha384(read_leaf(material.chain_pem).der),
            client_nonce=b"",
            broker_nonce=begun.nonce,
            broker_id=str(SpiffeId.service(material.spiffe_id.trust_domain, Role.KEYBROKER)),
            wrapped_digest=b"",
        )
        receipt = response.receipt
        message = check_receipt(receipt, binding=binding, sealed=sealed, receipt_spki_der=evidence.receipt_spki_der)
        self._keep(SignedReceipt(message, receipt.signature))
        return self._mine(response.key)

    async def show(self, uri: str) -> keybroker_pb2.Key:
        """Return one key of the caller's tenant."""
        return await self._key("GetKey", keybroker_pb2.GetKeyRequest(uri=uri), f"show the key {uri}")

    async def list(self) -> list[keybroker_pb2.Key]:
        """Return all keys of the caller's tenant."""
        keys: list[keybroker_pb2.Key] = []
        request = keybroker_pb2.ListKeysRequest(page_size=1000)
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

    async def rotate(self, uri: str) -> keybroker_pb2.Key:
        """Make a new version; older ones still open what they wrapped."""
        return await self._key("RotateKey", keybroker_pb2.RotateKeyRequest(uri=uri), f"rotate the key {uri}")

    async def retire(self, uri: str, min_version: int) -> keybroker_pb2.Key:
        """Let versions before `min_version` open nothing any more, for good."""
        request = keybroker_pb2.RetireVersionsRequest(uri=uri, min_version=min_version)
        return await self._key("RetireVersions", request, f"retire versions of the key {uri}")

    async def schedule_destruction(self, uri: str, *, waiting_period_s: int = 0) -> keybroker_pb2.Key:
        """Stop every use of a key and destroy it after a waiting period (0: 30 days)."""
        request = keybroker_pb2.ScheduleDestructionRequest(uri=uri, waiting_period_s=waiting_period_s)
        return await self._key("ScheduleDestruction", request, f"schedule the destruction of the key {uri}")

    async def cancel_destruction(self, uri: str) -> keybroker_pb2.Key:
        """Call a destruction off; the key is disabled then."""
        request = keybroker_pb2.CancelDestructionRequest(uri=uri)
        return await self._key("CancelDestruction", request, f"call off the destruction of the key {uri}")

    async def put_policy(self, uri: str, policy: bytes) -> keybroker_pb2.Key:
        """Put the successor of the release policy in force: YAML, or an envelope with signatures of others on it."""
        signed = self._signed(policy)
        request = keybroker_pb2.PutReleasePolicyRequest(uri=uri, policy_envelope=signed.envelope if signed else b"")
        return await self._key("PutReleasePolicy", request, f"put the policy of {uri} in force")

    async def withdraw_policy(self, uri: str) -> keybroker_pb2.Key:
        """Release nothing until a successor of the policy is put in force."""
        request = keybroker_pb2.WithdrawReleasePolicyRequest(uri=uri)
        return await self._key("WithdrawReleasePolicy", request, f"withdraw the policy of {uri}")

    async def policy(self, uri: str) -> keybroker_pb2.GetReleasePolicyResponse:
        """Return the newest release policy, in force or withdrawn."""
        request = keybroker_pb2.GetReleasePolicyRequest(uri=uri)
        response: keybroker_pb2.GetReleasePolicyResponse = await self._call(
            "GetReleasePolicy", request, f"show the policy of {uri}"
        )
        return response

    async def generate_data_key(self, uri: str) -> DataKey:
        """Return a new data key, sealed to a key made for this call, to seal with on this machine.

        Raises SIGNATURE_INVALID when the key was provisioned with another signing key: somebody else's policies would
        decide over what is sealed.
        """
        self._mine(await self.show(uri))
        recipient, nonce = HpkeKeyPair.generate(), secrets.token_bytes(NONCE_SIZE)
        request = keybroker_pb2.GenerateDataKeyRequest(
            key_uri=uri,
            client_nonce=nonce,
            hpke_kem_id=KEM_MLKEM768_X25519,
            hpke_public_key=recipient.public_bytes,
        )
        return await self._data_key("GenerateDataKey", request, recipient, "seal", None)

    async def open_data_key(
        self, uri: str, *, key_version: int, wrapped: bytes, manifest_digest: bytes = b""
    ) -> DataKey:
        """Return a data key again, from the header of a sealed object; the key must allow export.

        `manifest_digest` is SHA-384 of the manifest (48 bytes) when the object is of a sealed directory.
        """
        return await self._open(uri, key_version, wrapped, "export", manifest_digest)

    async def resume_data_key(self, uri: str, *, key_version: int, wrapped: bytes) -> DataKey:
        """Return a data key that `generate_data_key` gave, to go on with sealing that was interrupted.

        Raises RELEASE_DENIED after seven days, and once a directory under it was published.
        """
        return await self._open(uri, key_version, wrapped, "seal", b"")

    async def _open(self, uri: str, key_version: int, wrapped: bytes, purpose: str, manifest_digest: bytes) -> DataKey:
        recipient, nonce = HpkeKeyPair.generate(), secrets.token_bytes(NONCE_SIZE)
        authorization = OpenRequest(
            uri=KeyUri.parse(uri),
            key_version=key_version,
            signer=self.signer,
            wrapped_digest=sha384(wrapped),
            client_nonce=nonce,
            recipient_digest=sha384(recipient.public_bytes),
            purpose=purpose,
        )
        request = keybroker_pb2.OpenDataKeyRequest(
            key_uri=uri,
            key_version=key_version,
            wrapped=wrapped,
            client_nonce=nonce,
            hpke_kem_id=KEM_MLKEM768_X25519,
            hpke_public_key=recipient.public_bytes,
            manifest_digest=manifest_digest,
            authorization=authorization.signed(self._signing_key),
            resume_sealing=purpose == "seal",
        )
        return await self._data_key("OpenDataKey", request, recipient, purpose, request)

    async def published_manifest(self, uri: str, dataset_id: str) -> tuple[int, bytes]:
        """Return version and manifest digest (48 bytes) of the newest published version; 0 and empty for none."""
        request = keybroker_pb2.GetPublishedManifestRequest(key_uri=uri, dataset_id=dataset_id)
        answer: keybroker_pb2.GetPublishedManifestResponse = await self._call(
            "GetPublishedManifest", request, f"look for published versions of {dataset_id}"
        )
        return answer.version, answer.manifest_digest

    async def rewrap_data_key(
        self, uri: str, *, key_version: int, wrapped: bytes
    ) -> keybroker_pb2.RewrapDataKeyResponse:
        """Return the data key wrapped under the newest version; it does not leave the broker in the clear."""
        request = keybroker_pb2.RewrapDataKeyRequest(key_uri=uri, key_version=key_version, wrapped=wrapped)
        response: keybroker_pb2.RewrapDataKeyResponse = await self._call(
            "RewrapDataKey", request, f"wrap a data key of {uri} again"
        )
        return response

    async def publish_manifest(
        self,
        uri: str,
        *,
        dataset_id: str,
        version: int,
        manifest_digest: bytes,
        parent_digest: bytes,
        key_version: int,
        wrapped: bytes,
    ) -> None:
        """Tell the broker the newest version of a sealed directory; digests are SHA-384 of manifests (48 bytes).

        From then on the data key is refused to whoever holds an older version. May be repeated.
        """
        request = keybroker_pb2.PublishManifestRequest(
            key_uri=uri,
            dataset_id=dataset_id,
            version=version,
            manifest_digest=manifest_digest,
            wrapped=wrapped,
            key_version=key_version,
            parent_digest=parent_digest,
        )
        await self._call("PublishManifest", request, f"publish version {version} of {dataset_id}")

    def _signed(self, policy: bytes) -> SignedPolicy | None:
        return owner_envelope(policy, self._signing_key) if policy else None

    def _provisioning(
        self,
        uri: str,
        purposes: frozenset[Purpose],
        policy: SignedPolicy | None,
        *,
        sealed_digest: bytes = b"",
        nonce: bytes = b"",
    ) -> Provisioning:
        return Provisioning(
            uri=KeyUri.parse(uri),
            owner=str(self._credentials.current().spiffe_id),
            signer=self.signer,
            purposes=purposes,
            policy_digest=policy.policy.digest if policy else b"",
            sealed_digest=sealed_digest,
            nonce=nonce,
        )

    def _mine(self, key: keybroker_pb2.Key) -> keybroker_pb2.Key:
        """Raise SIGNATURE_INVALID unless the key answers to this owner's signing key."""
        if key.signer != self.signer:
            raise CloisterError(
                Code.SIGNATURE_INVALID,
                what=f"{key.uri} was not created with your signing key",
                why=f"its signer is {key.signer}, yours is {self.signer}",
                todo="seal nothing with it: whoever holds that key decides who may open it",
            )
        return key

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
        self._keep(received.receipt)
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


def _purposes(names: Sequence[str]) -> frozenset[Purpose]:
    unknown = [name for name in names if name not in OWNER_PURPOSES]
    if unknown:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"{unknown[0]!r} is not a purpose of a key",
            why=f"purposes are {', '.join(OWNER_PURPOSES)}",
            todo="choose from these",
        )
    return frozenset(Purpose(name) for name in names)
