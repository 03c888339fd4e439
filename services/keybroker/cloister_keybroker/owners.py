# SPDX-License-Identifier: Apache-2.0
"""What owners do with their keys: create, import, rotate, retire, enable, disable; put and withdraw policies.

A key belongs to the identity that created it, and to the signing key that its provisioning statement names: a
certificate lets its holder ask, but a new key and a new policy need that key's signature as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

from cloister.errors import CloisterError, Code
from cloister.hpke import HpkeError, HpkeKeyPair
from cloister.keyuri import KeyUri
from cloister.protocol import ReleaseBinding, import_info
from cloister.provisioning import Provisioning, SignedPolicy
from cloister.release.blocks import Block
from cloister.release.cases import check_cases
from cloister.release.keys import KeyState, Purpose
from cloister.release.policy import parse_policy
from cloister.secret import SecretBytes
from cloister.tlv import sha384
from cloister_keybroker.answers import Receipt, argument_error
from cloister_keybroker.backends import WRAPPING_KEY_SIZE, KeyRef
from cloister_keybroker.desk import Desk, Office, Owner
from cloister_keybroker.keys import KeyRecord, KeyVersion
from cloister_keybroker.log import LogPlace
from cloister_keybroker.nonces import NonceBook
from cloister_keybroker.succession import PolicyRefused, check_signer, check_subject, check_successor
from cloister_keybroker.transaction import ListedKey, StoredPolicy, Transaction

# A start reads and authenticates every key: 50,000 take about two seconds.
MAX_KEYS: Final = 50_000  # of one tenant
# Every change of state goes to the back end for each version: a rotation a day for more than a year.
MAX_VERSIONS: Final = 400  # of one key
MAX_SEALED: Final = 4096  # bytes of sealed key material; ours are 1,168
_IMPORT: Final = "import"  # what a nonce of BeginImport is for


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key as its owner asks for it; envelopes are JSON, `policy` is empty when nothing shall be released yet."""

    uri: KeyUri
    purposes: frozenset[Purpose]
    policy: bytes
    provisioning: bytes


class OwnerDesk(Desk):
    """Keys and their policies."""

    def __init__(self, office: Office, *, hpke: HpkeKeyPair, nonces: NonceBook | None = None) -> None:
        super().__init__(office)
        self._hpke = hpke
        self._nonces = nonces or NonceBook()

    @property
    def hpke_public_key(self) -> bytes:
        """The key that imported material is sealed to: the one in the broker's evidence."""
        return self._hpke.public_bytes

    async def create(self, owner: Owner, new: NewKey) -> KeyRecord:
        """Create a key with its first version, and put its policy in force when there is one."""
        record, policy = await self._provisioned(owner, "create-key", new, sealed_digest=b"", nonce=b"")
        handle = await self._backend.create(KeyRef.of(record, 1))
        await self._insert(owner, "create-key", record, handle, policy)
        return record

    def begin_import(self, owner: Owner) -> bytes:
        """Return a nonce for `import_key`."""
        return self._nonces.give(owner.spiffe_id, _IMPORT, self._office.clock())

    async def import_key(self, owner: Owner, new: NewKey, *, sealed: bytes, nonce: bytes) -> Receipt:
        """Create a key from material (32 bytes) that its owner sealed to this broker; return a receipt for it."""
        if not 0 < len(sealed) <= MAX_SEALED:
            raise argument_error("sealed", f"{len(sealed)} bytes", f"1 to {MAX_SEALED} bytes")
        problem = self._nonces.take(nonce, owner.spiffe_id, _IMPORT, self._office.clock())
        if problem:
            raise CloisterError(
                Code.NONCE_UNKNOWN,
                what=f"{new.uri} is not imported",
                why=f"got {problem}",
                todo="call BeginImport again and use its nonce once, within 60 s",
            )
        record, policy = await self._provisioned(owner, "import-key", new, sealed_digest=sha384(sealed), nonce=nonce)
        record = replace(record, imported=True)
        info = import_info(
            key_uri=str(new.uri), key_version=record.newest, policy_digest=record.policy_digest, nonce=nonce
        )
        try:
            secret: SecretBytes = self._hpke.open(sealed, info=info)
        except HpkeError:
            raise argument_error(
                "sealed", "what this broker cannot open", "sealed to the key of its evidence, over this nonce"
            ) from None
        if len(secret) != WRAPPING_KEY_SIZE:
            raise argument_error("sealed", f"{len(secret)} bytes in it", f"{WRAPPING_KEY_SIZE} bytes of key material")
        handle = await self._backend.import_key(KeyRef.of(record, record.newest), secret)
        place = await self._insert(owner, "import-key", record, handle, policy)
        binding = ReleaseBinding(
            key_uri=str(new.uri),
            key_version=record.newest,
            purpose=_IMPORT,
            policy_digest=record.policy_digest,
            evidence_digest=sha384(owner.certificate_der),
            client_nonce=b"",
            broker_nonce=nonce,
            broker_id=str(self._office.broker_id),
            wrapped_digest=b"",
        )
        return self._office.signer.sign(binding, sealed=sealed, place=place)

    async def list(self, owner: Owner, *, after: str, limit: int) -> Sequence[ListedKey]:
        """Return up to `limit` keys of the caller's tenant, by URI, behind `after`."""
        return await self._store.read(lambda t: t.keys(owner.spiffe_id.tenant, after=after, limit=limit))

    async def set_state(self, owner: Owner, uri: KeyUri, state: KeyState) -> KeyRecord:
        """Enable or disable a key; nothing changes when it already is."""
        action = "enable" if state is KeyState.ENABLED else "disable"
        async with self._office.changing(uri):
            before = await self._changeable(owner, uri, action, KeyState.ENABLED, KeyState.DISABLED)
            if before.state is state:
                return before
            record = replace(before, state=state)
            await self._restate(owner, action, before, record)
        return record

    async def rotate(self, owner: Owner, uri: KeyUri) -> KeyRecord:
        """Make a new version; older ones still open what they wrapped."""
        async with self._office.changing(uri):
            before = await self._changeable(owner, uri, "rotate", KeyState.ENABLED, KeyState.DISABLED)
            if before.newest >= MAX_VERSIONS:
                raise _quota(f"{uri} gets no further version", f"it has {MAX_VERSIONS}, as many as a key can have")
            record = replace(before, newest=before.newest + 1)
            handle = await self._backend.create(KeyRef.of(record, record.newest))
            version = KeyVersion(record.newest, handle, self._backend.name, self._office.now_ms())
            await self._made(record, handle, self._change(owner, "rotate", record, version))
        return record

    async def retire(self, owner: Owner, uri: KeyUri, min_version: int) -> KeyRecord:
        """Let versions before `min_version` open nothing any more, for good."""
        async with self._office.changing(uri):
            before = await self._changeable(owner, uri, "retire", KeyState.ENABLED, KeyState.DISABLED)
            if before.min_version == min_version:
                return before
            if not before.min_version < min_version <= before.newest:
                wanted = f"{before.min_version} to {before.newest}: it never goes down"
                raise argument_error("min_version", str(min_version), wanted)
            record = replace(before, min_version=min_version)
            await self._change(owner, "retire", record)
        return record

    async def put_policy(self, owner: Owner, uri: KeyUri, envelope: bytes) -> KeyRecord:
        """Put a policy in force: signed by the key's signer, the successor of the newest one by version and digest."""
        async with self._office.changing(uri):
            before = await self._changeable(
                owner, uri, "put-policy", KeyState.ENABLED, KeyState.DISABLED, KeyState.DESTRUCTION_SCHEDULED
            )
            newest = (await self.get(owner, uri)).policy
            signed = _signed_policy(envelope)
            check_subject(before, signed.policy)
            check_cases(signed.policy, self._office.clock())
            try:
                check_signer(before, signed)
                check_successor(before, parse_policy(newest.yaml) if newest else None, signed)
            except PolicyRefused as refused:
                # An attempt to change or roll back a policy is worth remembering.
                await self._deny(owner, "put-policy", uri, refused.grounds)
                raise
            record = replace(
                before,
                policy_version=signed.policy.version,
                policy_digest=signed.policy.digest,
                policy_withdrawn=False,
            )

            def work(transaction: Transaction) -> None:
                transaction.insert_policy(uri, signed.policy.version, StoredPolicy(signed.yaml, signed.envelope))
                transaction.update_key(record)
                transaction.append(self._entry(owner, "put-policy", record), time_ms=self._office.now_ms())

            await self._store.write(work)
        return record

    async def withdraw_policy(self, owner: Owner, uri: KeyUri) -> KeyRecord:
        """Release nothing until a signed successor of the policy is put in force."""
        async with self._office.changing(uri):
            before = await self._changeable(
                owner, uri, "withdraw-policy", KeyState.ENABLED, KeyState.DISABLED, KeyState.DESTRUCTION_SCHEDULED
            )
            if before.policy_withdrawn or before.policy_version == 0:
                return before
            record = replace(before, policy_withdrawn=True)
            await self._change(owner, "withdraw-policy", record)
        return record

    async def _provisioned(
        self, owner: Owner, action: str, new: NewKey, *, sealed_digest: bytes, nonce: bytes
    ) -> tuple[KeyRecord, SignedPolicy | None]:
        """Check what the owner signed about a new key; return its record to be, and its policy."""
        if not new.purposes:
            raise argument_error("purposes", "none", f"some of: {', '.join(Purpose)}")
        if new.uri.tenant != owner.spiffe_id.tenant:
            block = Block("key.tenant", False, owner.spiffe_id.tenant, new.uri.tenant)
            await self._deny(owner, action, new.uri, block)
            raise CloisterError(
                Code.CALLER_NOT_ALLOWED,
                what=f"{new.uri} is not yours to create",
                why=f"your certificate is of the tenant {owner.spiffe_id.tenant}",
                todo=f"name it cloister-key://{owner.spiffe_id.tenant}/...",
            )
        try:
            statement = _statement(new)
            policy = _signed_policy(new.policy) if new.policy else None
            record = KeyRecord(
                uri=new.uri,
                owner=str(owner.spiffe_id),
                signer=statement.signer,
                state=KeyState.ENABLED,
                purposes=new.purposes,
                created_ms=self._office.now_ms(),
                policy_version=policy.policy.version if policy else 0,
                policy_digest=policy.policy.digest if policy else b"",
            )
            asked = Provisioning(
                uri=record.uri,
                owner=record.owner,
                signer=record.signer,
                purposes=record.purposes,
                policy_digest=record.policy_digest,
                sealed_digest=sealed_digest,
                nonce=nonce,
            )
            _check_statement(statement, asked)
            if policy is not None:
                check_signer(record, policy)
        except CloisterError as error:
            if error.code is Code.SIGNATURE_INVALID:
                block = Block("provisioning", False, "signed by the owner for this request", error.why)
                await self._deny(owner, action, new.uri, block)
            raise
        if policy is not None:
            check_subject(record, policy.policy)
            check_cases(policy.policy, self._office.clock())
            check_successor(replace(record, policy_version=0, policy_digest=b""), None, policy)
        await self._store.read(lambda transaction: _check_free(transaction, new.uri))
        return record, policy

    async def _insert(
        self, owner: Owner, action: str, record: KeyRecord, handle: bytes, policy: SignedPolicy | None
    ) -> LogPlace:
        """Store a new key; what the back end made for a name that is taken is destroyed again."""
        version = KeyVersion(record.newest, handle, self._backend.name, record.created_ms)

        def work(transaction: Transaction) -> LogPlace:
            _check_free(transaction, record.uri)  # again: another request may have been faster
            transaction.insert_key(record, version)
            if policy is not None:
                transaction.insert_policy(record.uri, record.policy_version, StoredPolicy(policy.yaml, policy.envelope))
            return transaction.append(self._entry(owner, action, record), time_ms=record.created_ms)

        return await self._made(record, handle, self._store.write(work))


def _signed_policy(envelope: bytes) -> SignedPolicy:
    if not envelope:
        raise CloisterError(
            Code.SIGNATURE_INVALID,
            what="a release policy is put in force with its owner's signature only",
            why="policy_envelope is empty",
            todo="sign it: cloister policy sign",
        )
    return SignedPolicy.verified(envelope)


def _statement(new: NewKey) -> Provisioning:
    if not new.provisioning:
        raise CloisterError(
            Code.SIGNATURE_INVALID,
            what=f"{new.uri} is not created without its owner's signature",
            why="provisioning is empty",
            todo="sign a provisioning statement: cloister key create does",
        )
    return Provisioning.verified(new.provisioning)


def _check_statement(statement: Provisioning, asked: Provisioning) -> None:
    """Raise SIGNATURE_INVALID unless what was signed is what is asked for."""
    for field in fields(Provisioning):
        if getattr(statement, field.name) != getattr(asked, field.name):
            raise CloisterError(
                Code.SIGNATURE_INVALID,
                what=f"what the owner signed is not what is asked for: {field.name}",
                why=f"signed {_text(getattr(statement, field.name))}, asked {_text(getattr(asked, field.name))}",
                todo="sign the statement for this very request",
            )


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex() or "none"
    return ", ".join(sorted(value)) if isinstance(value, frozenset) else str(value)


def _check_free(transaction: Transaction, uri: KeyUri) -> None:
    if transaction.key(uri) is not None:
        raise CloisterError(
            Code.KEY_EXISTS,
            what=f"{uri} exists",
            why="a key's name is taken once and for all",
            todo="use it, or choose another name",
        )
    if transaction.count_keys(uri.tenant) >= MAX_KEYS:
        raise _quota(f"{uri} is not created", f"the tenant has {MAX_KEYS} keys, as many as it can have")


def _quota(what: str, why: str) -> CloisterError:
    return CloisterError(Code.KEY_QUOTA, what=what, why=why, todo="ask the operator, or use what there is")
