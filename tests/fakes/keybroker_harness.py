# SPDX-License-Identifier: Apache-2.0
"""A whole key broker in one process: real store, real cryptography, a test CA in place of attest."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from cloister.didkey import did_key
from cloister.ear import Ear, issue
from cloister.hpke import KEM_MLKEM768_X25519, HpkeKeyPair
from cloister.identity import Role, SpiffeId
from cloister.keyuri import KeyUri
from cloister.policyblocks import digest_text
from cloister.protocol import LeaseTerms
from cloister.provisioning import OpenRequest
from cloister.release.approvals import ReleaseApproval
from cloister.release.decide import Peer
from cloister.release.keys import Purpose
from cloister.runtime.pem import read_leaf
from cloister.runtime.server import GrpcServer
from cloister.secret import SecretBytes
from cloister.tlv import sha384
from cloister.transparency.entry import LoggedEntry
from cloister_keybroker.answers import DataKeyAnswer, ReceiptSigner, Recipient
from cloister_keybroker.approvaldesk import ApprovalDesk
from cloister_keybroker.approvalservice import mounted_approvals
from cloister_keybroker.backends import KeyBackend
from cloister_keybroker.backends.embedded import EmbeddedBackend
from cloister_keybroker.datakeys import DataKeyDesk, WrappedKey
from cloister_keybroker.desk import Office, Owner
from cloister_keybroker.destruction import DestructionDesk
from cloister_keybroker.logkey import LogKey
from cloister_keybroker.logservice import CALLERS as LOG_CALLERS
from cloister_keybroker.logservice import mounted_log
from cloister_keybroker.nonces import NonceBook
from cloister_keybroker.owners import NewKey, OwnerDesk
from cloister_keybroker.ownerservice import Desks
from cloister_keybroker.policydesk import PolicyDesk
from cloister_keybroker.policyservice import mounted_policies
from cloister_keybroker.rootkey import RootKey, create_root_key, read_root_key
from cloister_keybroker.sealrecord import SealRecord
from cloister_keybroker.service import CALLERS, mounted
from cloister_keybroker.store import KeyStore
from cloister_keybroker.workloads import Asked, Released, ReleaseDesk, Workload
from fakes.certs import TRUST_DOMAIN, TestCa
from fakes.ear_sample import sample_ear
from fakes.signing import OWNER_KEY, provisioned, signed_policy

TENANT = "hospital-a"
KEY = KeyUri.parse(f"cloister-key://{TENANT}/datasets/reviews")
OTHER_KEY = KeyUri.parse(f"cloister-key://{TENANT}/models/reviews")
OWNER = SpiffeId.of_user(TRUST_DOMAIN, tenant=TENANT, user="data-office")
COLLEAGUE = SpiffeId.of_user(TRUST_DOMAIN, tenant=TENANT, user="intern")
STRANGER = SpiffeId.of_user(TRUST_DOMAIN, tenant="hospital-b", user="data-office")
RANK = SpiffeId.of_rank(TRUST_DOMAIN, tenant=TENANT, job="j-1", rank=1)
SCRIPT = b"\x23" * 48  # what sample_ear says
NO_LEASE = LeaseTerms()
CHANNEL = "TLSv1.3, X25519MLKEM768"

Document = dict[str, Any]


def policy_document(uri: KeyUri = KEY, *, version: int = 1, previous: bytes = b"", **when: Any) -> Document:
    """Return a policy that lets `RANK` of sample_ear in; `when` replaces blocks (None removes one)."""
    metadata = {"name": "reviews", "version": str(version), "owner": str(OWNER)}
    if previous:
        metadata["previous"] = digest_text(previous)
    blocks: Document = {
        "tee": {"type": "tdx", "debug": "deny", "simulated": "allow"},
        "workload": {"script": [digest_text(SCRIPT)], "no_events_after": "cloister.workload.sealed"},
        "identity": {"spiffe": [f"spiffe://{TRUST_DOMAIN}/ns/{TENANT}/job/*/rank/*"]},
        "evidence": {"max_age": "5m", "nonce": "broker"},
    }
    blocks |= when
    return {
        "apiVersion": "cloister.dev/v1",
        "kind": "ReleasePolicy",
        "metadata": metadata,
        "spec": {
            "key": {"uri": str(uri), "purposes": ["train", "serve", "evaluate"]},
            "when": {name: block for name, block in blocks.items() if block is not None},
            "release": {"wrap": ["hpke-x25519-mlkem768"], "lease": "1h"},
        },
    }


def as_yaml(document: Document) -> bytes:
    """Return the document as YAML; JSON with text for every scalar is YAML of the accepted form."""
    return json.dumps(document, ensure_ascii=False).encode()


@dataclass
class Clock:
    """A clock that moves when told to."""

    now: datetime = field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **by: float) -> None:
        self.now += timedelta(**by)


@dataclass
class Approver:
    """Somebody whom policies may ask."""

    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    @property
    def name(self) -> str:
        return did_key(self.key)

    def approve(self, policy_digest: bytes, job: str, *, until: datetime, purpose: Purpose = Purpose.TRAIN) -> bytes:
        """Return a signed approval for KEY."""
        return ReleaseApproval(
            key_uri=KEY,
            purpose=purpose,
            job=job,
            policy_digest=policy_digest,
            expires_ms=int(until.timestamp() * 1000),
        ).signed(self.key)


@dataclass
class Td:
    """A workload as the broker meets it: a certificate, an HPKE key, and tokens about the two."""

    broker: Broker
    spiffe_id: SpiffeId
    certificate_sha256: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    hpke: HpkeKeyPair = field(default_factory=HpkeKeyPair.generate)

    @property
    def workload(self) -> Workload:
        return Workload(Peer(self.spiffe_id, self.certificate_sha256, "TLSv1.3", "X25519MLKEM768"), "request-1")

    def ear(self, *nonces: bytes, **changes: Any) -> Ear:
        """Return what attest would find; `changes` to the Ear, or to its parts as tee= and workload= dicts."""
        found = sample_ear(role=self.spiffe_id.role, now=self.broker.clock())
        who = self.spiffe_id
        workload = dataclasses.replace(
            found.workload,
            tenant=who.tenant,
            job=who.job,
            rank=who.rank if who.role is Role.RANK else None,
            model=who.model,
            backend=who.backend,
            **changes.pop("workload", {}),
        )
        return dataclasses.replace(
            found,
            spiffe_id=str(who),
            nonces=tuple(nonce.hex() for nonce in (b"\x0a" * 32, *nonces)),
            certificate_sha256=self.certificate_sha256,
            hpke_key_digest=sha384(self.hpke.public_bytes),
            tee=dataclasses.replace(found.tee, **changes.pop("tee", {})),
            workload=workload,
            **changes,
        )

    def token(self, *nonces: bytes, **changes: Any) -> str:
        return self.broker.sign(self.ear(*nonces, **changes))

    async def begin(self, key: KeyUri = KEY, purpose: Purpose = Purpose.TRAIN) -> bytes:
        return (await self.broker.releases.begin(self.workload, key, purpose, "")).nonce

    def asked(self, nonce: bytes, token: str, **changes: Any) -> Asked:
        """Return a request for a new data key of KEY; `changes` replace its fields."""
        recipient = Recipient(secrets.token_bytes(32), KEM_MLKEM768_X25519, self.hpke.public_bytes)
        asked = Asked(token, KEY, 0, Purpose.TRAIN, nonce, recipient, b"")
        return dataclasses.replace(asked, **changes)

    async def release(self, *, wrapped: bytes = b"", ear: dict[str, Any] | None = None, **changes: Any) -> Released:
        """Do it right from begin to end; `ear` changes the token, `changes` the request."""
        key, purpose = changes.get("key", KEY), changes.get("purpose", Purpose.TRAIN)
        nonce = await self.begin(key, purpose)
        version = changes.pop("key_version", 1 if wrapped else 0)
        asked = self.asked(nonce, self.token(nonce, **(ear or {})), wrapped=wrapped, key_version=version, **changes)
        return await self.broker.releases.release(self.workload, asked)

    def open(self, released: Released) -> SecretBytes:
        return opened(self.hpke, released.data_key, released.terms)


@dataclass
class Broker:
    """The broker's desks over one store."""

    ca: TestCa
    clock: Clock
    store: KeyStore
    office: Office
    owners: OwnerDesk
    data_keys: DataKeyDesk
    destruction: DestructionDesk
    releases: ReleaseDesk
    nonces: NonceBook
    receipt_key: Ed25519PrivateKey
    log_key: LogKey

    @classmethod
    async def open(
        cls,
        store_path: Path,
        root_key_path: Path,
        ca: TestCa,
        clock: Clock | None = None,
        backend_of: Callable[[RootKey], KeyBackend] = EmbeddedBackend,
    ) -> Broker:
        clock = clock or Clock()
        if not root_key_path.exists():
            create_root_key(root_key_path)
        root_key = read_root_key(root_key_path)
        if not store_path.exists():
            (await KeyStore.create(store_path, root_key, SealRecord())).close()
        store = await KeyStore.open(store_path, root_key)
        backend, receipt_key = backend_of(root_key), Ed25519PrivateKey.generate()
        broker_id, nonces = SpiffeId.service(TRUST_DOMAIN, Role.KEYBROKER), NonceBook()
        log_key = await store.begin_life(receipt_key, broker_id, time_ms=int(clock().timestamp() * 1000))
        signer = ReceiptSigner(receipt_key, log_id=log_key.log_id)
        office = Office(store, backend, signer, broker_id, clock)
        return cls(
            ca,
            clock,
            store,
            office,
            OwnerDesk(office, hpke=HpkeKeyPair.generate()),
            DataKeyDesk(office),
            DestructionDesk(office),
            ReleaseDesk(
                store=store,
                backend=backend,
                signer=signer,
                credentials=ca.credentials(Role.KEYBROKER),
                broker_id=broker_id,
                clock=clock,
                nonces=nonces,
            ),
            nonces,
            receipt_key,
            log_key,
        )

    @property
    def receipt_spki(self) -> bytes:
        """The receipt key as the broker's evidence would name it."""
        return self.receipt_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def sign(self, ear: Ear) -> str:
        return issue(ear, key=self.ca.token_key, key_id=self.ca.token_key_id)

    def td(self, spiffe_id: SpiffeId = RANK) -> Td:
        return Td(self, spiffe_id)

    async def create_key(
        self, document: Document | None = None, uri: KeyUri = KEY, purposes: frozenset[Purpose] = frozenset(Purpose)
    ) -> None:
        """Create a key of OWNER under this policy (default: one that lets RANK in)."""
        yaml = as_yaml(policy_document(uri) if document is None else document)
        await self.owners.create(owner(), new_key(uri, purposes, yaml))

    async def replace_policy(self, **when: Any) -> None:
        """Put the next policy of KEY in force; `when` as for policy_document, release=, cases= and change= besides."""
        record = (await self.owners.get(owner(), KEY)).record
        blocks = {name: when.pop(name) for name in ("release", "cases", "change") if name in when}
        document = policy_document(version=record.policy_version + 1, previous=record.policy_digest, **when)
        document["spec"] |= blocks
        await self.owners.put_policy(owner(), KEY, signed_policy(as_yaml(document)))

    async def generate(self, uri: KeyUri = KEY, who: SpiffeId = OWNER) -> tuple[DataKeyAnswer, SecretBytes]:
        """Make a data key as an owner does; return the answer and the key in it."""
        pair = HpkeKeyPair.generate()
        answer = await self.data_keys.generate(owner(who), uri, recipient(pair))
        return answer, opened(pair, answer)

    async def open_key(
        self,
        wrapped: bytes,
        *,
        uri: KeyUri = KEY,
        version: int = 1,
        who: SpiffeId = OWNER,
        key: Ed25519PrivateKey = OWNER_KEY,
        manifest_digest: bytes = b"",
        signed: dict[str, Any] | None = None,
    ) -> SecretBytes:
        """Open a data key as an owner does; `signed` replaces what the authorization says."""
        pair = HpkeKeyPair.generate()
        to = recipient(pair)
        request = OpenRequest(
            uri=uri,
            key_version=version,
            signer=did_key(key),
            wrapped_digest=sha384(wrapped),
            client_nonce=to.client_nonce,
            recipient_digest=sha384(to.public_key),
        )
        answer = await self.data_keys.open(
            owner(who),
            WrappedKey(uri, version, wrapped),
            to,
            manifest_digest=manifest_digest,
            authorization=dataclasses.replace(request, **(signed or {})).signed(key),
        )
        return opened(pair, answer)

    async def resume_key(
        self, wrapped: bytes, *, uri: KeyUri = KEY, version: int = 1, who: SpiffeId = OWNER, purpose: str = "seal"
    ) -> SecretBytes:
        """Open a data key as an owner does who goes on sealing."""
        pair = HpkeKeyPair.generate()
        to = recipient(pair)
        request = OpenRequest(
            uri=uri,
            key_version=version,
            signer=did_key(OWNER_KEY),
            wrapped_digest=sha384(wrapped),
            client_nonce=to.client_nonce,
            recipient_digest=sha384(to.public_key),
            purpose=purpose,
        )
        key = WrappedKey(uri, version, wrapped)
        answer = await self.data_keys.resume(owner(who), key, to, authorization=request.signed(OWNER_KEY))
        return opened(pair, answer)

    async def log(self, tenant: str = TENANT) -> list[LoggedEntry]:
        """Return a tenant's log, newest first."""
        return await self.store.read(lambda t: t.newest_entries(tenant, key_uri="", limit=1000))


def new_key(uri: KeyUri = KEY, purposes: Iterable[Purpose] = frozenset(Purpose), yaml: bytes = b"") -> NewKey:
    """Return a key of OWNER as it is asked for, with what OWNER_KEY signs about it."""
    envelope = signed_policy(yaml) if yaml else b""
    return NewKey(uri, frozenset(purposes), envelope, provisioned(uri, OWNER, purposes, yaml))


def owner(spiffe_id: SpiffeId = OWNER) -> Owner:
    return Owner(spiffe_id, b"certificate of " + str(spiffe_id).encode(), CHANNEL, "request-1")


def recipient(pair: HpkeKeyPair) -> Recipient:
    return Recipient(secrets.token_bytes(32), KEM_MLKEM768_X25519, pair.public_bytes)


def opened(pair: HpkeKeyPair, answer: DataKeyAnswer, terms: LeaseTerms = NO_LEASE) -> SecretBytes:
    """Verify the receipt as a TD does, then open the data key."""
    receipt = answer.receipt
    message = answer.binding.receipt_message(
        sealed=answer.sealed, terms=terms, log_id=receipt.log_id, index=receipt.place.index, root=receipt.place.root
    )
    load_der_public_key(receipt.receipt_spki_der).verify(receipt.signature, message)  # type: ignore[union-attr,call-arg]
    return pair.open(answer.sealed, info=answer.binding.hpke_info())


@asynccontextmanager
async def a_broker(
    directory: Path, clock: Clock | None = None, backend_of: Callable[[RootKey], KeyBackend] = EmbeddedBackend
) -> AsyncIterator[Broker]:
    """Give a broker over a store in `directory`; opening it again continues."""
    broker = await Broker.open(directory / "store.sqlite", directory / "root.key", TestCa(), clock, backend_of)
    try:
        yield broker
    finally:
        broker.store.close()


@asynccontextmanager
async def a_served_broker(directory: Path, clock: Clock | None = None) -> AsyncIterator[tuple[Broker, str]]:
    """Give a broker behind a real server with mutual TLS, and its endpoint."""
    async with a_broker(directory, clock) as broker:
        server = GrpcServer(
            section="127.0.0.1:0",
            credentials=broker.ca.credentials(Role.KEYBROKER),
            services=[
                *mounted(Desks(broker.owners, broker.data_keys, broker.destruction), broker.releases),
                *mounted_approvals(ApprovalDesk(broker.store, broker.clock)),
                *mounted_policies(PolicyDesk(broker.store, broker.ca.credentials(Role.KEYBROKER)), broker.clock),
                *mounted_log(broker.store, broker.log_key),
            ],
            callers={**CALLERS, **LOG_CALLERS},
        )
        await server.start()
        try:
            yield broker, server.endpoint
        finally:
            await server.drain(0.1)


def leaf_sha256(chain_pem: bytes) -> bytes:
    """Return what `cnf` names for a certificate chain."""
    return read_leaf(chain_pem).sha256
