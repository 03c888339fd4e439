# SPDX-License-Identifier: Apache-2.0
"""What owners do with their keys. The owner is the identity that created the key; the tenant is its certificate's.

Users of the same tenant may see a key; only its owner changes or uses it. A key of another tenant is not looked up at
all, so it cannot be told from one that does not exist.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from cloister.errors import CloisterError, Code
from cloister.identity import SpiffeId
from cloister.keyuri import KeyUri
from cloister.policyblocks import digest_text
from cloister.protocol import ReleaseBinding
from cloister.release.blocks import Block
from cloister.release.cases import check_cases
from cloister.release.keys import KeyState, Purpose
from cloister.release.policy import ReleasePolicy, parse_policy
from cloister.tlv import sha384
from cloister.transparency.entry import Entry
from cloister_keybroker.answers import DataKeyAnswer, ReceiptSigner, Recipient, check_wrapped, key_not_found
from cloister_keybroker.backends import KeyBackend, KeyRef
from cloister_keybroker.keys import KeyRecord, KeyVersion
from cloister_keybroker.store import KeyStore
from cloister_keybroker.transaction import ListedKey, StoredKey, StoredPolicy, Transaction

MAX_PAGE: Final = 1000


@dataclass(frozen=True, slots=True)
class Owner:
    """The authenticated user behind a call."""

    spiffe_id: SpiffeId
    certificate_der: bytes
    channel: str
    request_id: str = ""


class OwnerDesk:
    """Create keys, put policies, hand data keys to their owner."""

    def __init__(
        self,
        *,
        store: KeyStore,
        backend: KeyBackend,
        signer: ReceiptSigner,
        broker_id: str,
        clock: Callable[[], datetime],
    ) -> None:
        self._store = store
        self._backend = backend
        self._signer = signer
        self._broker_id = broker_id
        self._clock = clock
        # A change reads, asks the back end, then writes: changes go one after the other so that none is lost.
        self._changing = asyncio.Lock()

    async def create(self, owner: Owner, uri: KeyUri, purposes: Iterable[Purpose], policy_yaml: bytes) -> KeyRecord:
        """Create a key with its first version, and put its policy in force when there is one."""
        wanted = frozenset(purposes)
        if not wanted:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what="a key without a purpose is of no use",
                why="purposes is empty",
                todo=f"name some of: {', '.join(Purpose)}",
            )
        if uri.tenant != owner.spiffe_id.tenant:
            block = Block("key.tenant", False, owner.spiffe_id.tenant, uri.tenant)
            await self._log(owner, "create-key", str(uri), block)
            raise CloisterError(
                Code.CALLER_NOT_ALLOWED,
                what=f"{uri} is not yours to create",
                why=f"your certificate is of the tenant {owner.spiffe_id.tenant}",
                todo=f"name it cloister-key://{owner.spiffe_id.tenant}/...",
            )
        record = KeyRecord(
            uri=uri,
            owner=str(owner.spiffe_id),
            signer="",
            state=KeyState.ENABLED,
            purposes=wanted,
            created_ms=self._now_ms(),
        )
        if policy_yaml:
            policy = _policy_for(record, policy_yaml)
            check_cases(policy, self._clock())
            _check_successor(record, policy)
            record = replace(record, policy_version=policy.version, policy_digest=policy.digest)
        handle = await self._backend.create(KeyRef.of(record, 1))
        version = KeyVersion(1, handle, self._backend.name, record.created_ms)

        def work(transaction: Transaction) -> None:
            if transaction.key(uri) is not None:
                raise CloisterError(
                    Code.KEY_EXISTS,
                    what=f"{uri} exists",
                    why="a key's name is taken once and for all",
                    todo="use it, or choose another name",
                )
            transaction.insert_key(record, version)
            if policy_yaml:
                transaction.insert_policy(uri, record.policy_version, StoredPolicy(policy_yaml, b""))
            transaction.append(self._change(owner, "create-key", record), time_ms=record.created_ms)

        async with self._changing:
            await self._store.write(work)
        return record

    async def get(self, owner: Owner, uri: KeyUri, *, version: int = 0) -> StoredKey:
        """Return a key of the caller's tenant, with its policy."""
        stored = None
        if uri.tenant == owner.spiffe_id.tenant:
            stored = await self._store.read(lambda transaction: transaction.key(uri, version=version))
        if stored is None:
            raise key_not_found(str(uri))
        return stored

    async def list(self, owner: Owner, *, after: str, limit: int) -> Sequence[ListedKey]:
        """Return up to `limit` keys of the caller's tenant, by URI, behind `after`."""
        return await self._store.read(lambda t: t.keys(owner.spiffe_id.tenant, after=after, limit=limit))

    async def set_state(self, owner: Owner, uri: KeyUri, state: KeyState) -> KeyRecord:
        """Enable or disable a key; nothing changes when it already is."""
        action = "enable" if state is KeyState.ENABLED else "disable"
        async with self._changing:
            stored = await self._owned(owner, uri, action)
            if stored.record.state is state:
                return stored.record
            record = replace(stored.record, state=state)
            versions = [
                replace(
                    version,
                    handle=await self._backend.restate(KeyRef.of(stored.record, version.number), version.handle, state),
                )
                for version in await self._store.read(lambda transaction: transaction.versions(stored.record))
            ]

            def work(transaction: Transaction) -> None:
                transaction.update_key(record)
                for version in versions:
                    transaction.put_version(uri, version)
                transaction.append(self._change(owner, action, record), time_ms=self._now_ms())

            await self._store.write(work)
        return record

    async def put_policy(self, owner: Owner, uri: KeyUri, policy_yaml: bytes) -> KeyRecord:
        """Put a policy in force: the successor of the present one, by version and digest."""
        async with self._changing:
            stored = await self._owned(owner, uri, "put-policy")
            policy = _policy_for(stored.record, policy_yaml)
            check_cases(policy, self._clock())
            try:
                _check_successor(stored.record, policy)
            except CloisterError as error:
                # An attempt to roll a policy back is worth remembering.
                block = Block("policy.version", False, _successor_text(stored.record), error.why)
                await self._log(owner, "put-policy", str(uri), block)
                raise
            record = replace(stored.record, policy_version=policy.version, policy_digest=policy.digest)

            def work(transaction: Transaction) -> None:
                transaction.insert_policy(uri, policy.version, StoredPolicy(policy_yaml, b""))
                transaction.update_key(record)
                transaction.append(self._change(owner, "put-policy", record), time_ms=self._now_ms())

            await self._store.write(work)
        return record

    async def generate(self, owner: Owner, uri: KeyUri, recipient: Recipient) -> DataKeyAnswer:
        """Make a data key under the newest version, to seal with on the owner's own machine."""
        recipient.check()
        stored = await self._usable(owner, uri, "generate", "seal", version=0, export=False)
        version = stored.record.newest
        fresh = await self._backend.generate(KeyRef.of(stored.record, version), stored.material().handle)
        binding = self._binding(owner, uri, version, "seal", recipient, fresh.wrapped)
        return await self._answer(owner, "generate", binding, recipient.seal(fresh.secret, binding), fresh.wrapped)

    async def open(
        self, owner: Owner, uri: KeyUri, version: int, wrapped: bytes, recipient: Recipient
    ) -> DataKeyAnswer:
        """Unwrap a data key for the owner's own machine; the key must have been created with purpose export."""
        recipient.check()
        check_wrapped(wrapped)
        stored = await self._usable(owner, uri, "open", "export", version=version, export=True)
        ref = KeyRef.of(stored.record, version)
        try:
            secret = await self._backend.unwrap(ref, stored.material().handle, wrapped)
        except CloisterError as error:
            if error.code is Code.WRAPPED_KEY_INVALID:
                await self._log(owner, "open", str(uri), Block("data_key", False, "wrapped under this version", "not"))
            raise
        binding = self._binding(owner, uri, version, "export", recipient, wrapped)
        return await self._answer(owner, "open", binding, recipient.seal(secret, binding), wrapped)

    async def _owned(self, owner: Owner, uri: KeyUri, action: str, version: int = 0) -> StoredKey:
        """Return a key that the caller owns; log and refuse otherwise."""
        try:
            stored = await self.get(owner, uri, version=version)
        except CloisterError as error:
            if error.code is Code.KEY_NOT_FOUND:
                await self._log(owner, action, str(uri), Block("key", False, "a key of this tenant", "none"))
            raise
        if stored.record.owner != str(owner.spiffe_id):
            await self._log(
                owner, action, str(uri), Block("key.owner", False, stored.record.owner, str(owner.spiffe_id))
            )
            raise CloisterError(
                Code.CALLER_NOT_ALLOWED,
                what=f"{uri} is not yours to use or change",
                why=f"it belongs to {stored.record.owner}",
                todo="ask its owner",
            )
        return stored

    async def _usable(
        self, owner: Owner, uri: KeyUri, action: str, purpose: str, *, version: int, export: bool
    ) -> StoredKey:
        """Return an owned, enabled key with the version (0: the newest); for export it has the version and purpose."""
        stored = await self._owned(owner, uri, action, version)
        record = stored.record
        blocks = [Block("key.state", record.state is KeyState.ENABLED, KeyState.ENABLED.value, record.state.value)]
        errors = {"key.state": (Code.KEY_DISABLED, "enable it: cloister key enable")}
        if export:
            purposes = ", ".join(sorted(record.purposes))
            blocks.append(Block("key.purposes", Purpose.EXPORT in record.purposes, Purpose.EXPORT.value, purposes))
            blocks.append(Block("key.version", 1 <= version <= record.newest, f"1 to {record.newest}", str(version)))
            errors["key.purposes"] = (Code.RELEASE_DENIED, "only keys created with purpose export open outside a TD")
            errors["key.version"] = (Code.WRAPPED_KEY_INVALID, "use the version from the header of the sealed object")
        failed = next((block for block in blocks if not block.ok), None)
        if failed is None:
            return stored
        await self._log(owner, action, str(uri), *blocks)
        code, todo = errors[failed.name]
        raise CloisterError(
            code,
            what=f"{uri} gives no data key to {purpose}: block {failed.name}",
            why=f"wanted {failed.wanted}; got {failed.got}",
            todo=todo,
        )

    def _binding(
        self, owner: Owner, uri: KeyUri, version: int, purpose: str, recipient: Recipient, wrapped: bytes
    ) -> ReleaseBinding:
        return ReleaseBinding(
            key_uri=str(uri),
            key_version=version,
            purpose=purpose,
            policy_digest=b"",
            evidence_digest=sha384(owner.certificate_der),
            client_nonce=recipient.client_nonce,
            broker_nonce=b"",
            broker_id=self._broker_id,
            wrapped_digest=sha384(wrapped),
        )

    async def _answer(
        self, owner: Owner, action: str, binding: ReleaseBinding, sealed: bytes, wrapped: bytes
    ) -> DataKeyAnswer:
        """Make the grant durable, then sign its receipt; the key may have changed since it was looked at."""
        uri = KeyUri.parse(binding.key_uri)
        entry = Entry(
            action=action,
            tenant=owner.spiffe_id.tenant,
            key_uri=binding.key_uri,
            caller=str(owner.spiffe_id),
            granted=True,
            blocks=(Block("key.owner", True, str(owner.spiffe_id), str(owner.spiffe_id)),),
            key_version=binding.key_version,
            purpose=binding.purpose,
            channel=owner.channel,
            evidence_digest=binding.evidence_digest,
            wrapped_digest=binding.wrapped_digest,
            request_id=owner.request_id,
        )

        def work(transaction: Transaction) -> DataKeyAnswer:
            now = transaction.key(uri)
            if now is None or now.record.state is not KeyState.ENABLED:
                raise CloisterError(Code.KEY_DISABLED, what=f"{uri} was disabled meanwhile", todo="enable it")
            place = transaction.append(entry, time_ms=self._now_ms())
            return DataKeyAnswer(sealed, wrapped, binding, self._signer.sign(binding, sealed=sealed, place=place))

        return await self._store.write(work)

    def _change(self, owner: Owner, action: str, record: KeyRecord) -> Entry:
        return Entry(
            action=action,
            tenant=owner.spiffe_id.tenant,
            key_uri=str(record.uri),
            caller=str(owner.spiffe_id),
            granted=True,
            blocks=(Block("key.owner", True, record.owner, str(owner.spiffe_id)),),
            key_version=record.newest,
            channel=owner.channel,
            policy_digest=record.policy_digest,
            evidence_digest=sha384(owner.certificate_der),
            record_digest=record.digest(),
            request_id=owner.request_id,
        )

    async def _log(self, owner: Owner, action: str, key_uri: str, *blocks: Block) -> None:
        """Make a denial durable."""
        entry = Entry(
            action=action,
            tenant=owner.spiffe_id.tenant,
            key_uri=key_uri,
            caller=str(owner.spiffe_id),
            granted=False,
            blocks=blocks,
            channel=owner.channel,
            evidence_digest=sha384(owner.certificate_der),
            request_id=owner.request_id,
        )
        await self._store.write(lambda transaction: transaction.append(entry, time_ms=self._now_ms()))

    def _now_ms(self) -> int:
        return int(self._clock().timestamp() * 1000)


def _policy_for(record: KeyRecord, policy_yaml: bytes) -> ReleasePolicy:
    """Parse a policy and check that it is about this key and of its owner."""
    policy = parse_policy(policy_yaml)
    for place, wanted, got in (
        ("spec.key.uri", str(record.uri), str(policy.key)),
        ("metadata.owner", record.owner, policy.owner),
    ):
        if wanted != got:
            raise CloisterError(
                Code.POLICY_INVALID,
                what=f"{place}: {got} is not allowed",
                why=f"wanted {wanted}",
                todo=f"write {wanted}",
            )
    return policy


def _check_successor(record: KeyRecord, policy: ReleasePolicy) -> None:
    """Raise POLICY_VERSION unless the policy follows the one in force: no gap, no way back, no fork."""
    if (policy.version, policy.previous) == (record.policy_version + 1, record.policy_digest):
        return
    got = f"version {policy.version}" + (f", previous {digest_text(policy.previous)}" if policy.previous else "")
    raise CloisterError(
        Code.POLICY_VERSION,
        what=f"the policy does not follow the one in force for {record.uri}",
        why=f"wanted {_successor_text(record)}; got {got}",
        todo="read the policy in force, and write its successor",
    )


def _successor_text(record: KeyRecord) -> str:
    text = f"version {record.policy_version + 1}"
    return f"{text}, previous {digest_text(record.policy_digest)}" if record.policy_version else text
