# SPDX-License-Identifier: Apache-2.0
"""Data keys for owners: new ones to seal with, old ones to open with, and the versions of what was sealed with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta

from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.protocol import ReleaseBinding
from cloister.provisioning import OpenRequest
from cloister.release.blocks import Block
from cloister.release.keys import KeyState, Purpose
from cloister.secret import SecretBytes
from cloister.tlv import sha384
from cloister.transparency.entry import Entry, LoggedEntry
from cloister_keybroker.answers import DataKeyAnswer, Recipient, argument_error, check_wrapped
from cloister_keybroker.backends import KeyRef
from cloister_keybroker.datasets import Publication, checked_successor, data_key_digest, version_block
from cloister_keybroker.desk import Desk, Owner
from cloister_keybroker.log import LogPlace
from cloister_keybroker.transaction import StoredKey, Transaction

_DIGEST_SIZE = 48
_RESUMABLE = timedelta(days=7)
_RESUME_LOOKBACK = 1000  # entries of the key's log: some 3 MB, read when sealing is resumed and never else
_MAX_DATASET_VERSION = 2**53 - 1  # the integers that every JSON reader keeps
_MAX_DATASET_ID = 255  # bytes, as in the header of a sealed file

_REWRAP = "rewrap-data-key"  # in the log; a version that is made again at its back end is a "rewrap"


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """A wrapped data key, as it stands in the header of a sealed object."""

    uri: KeyUri
    version: int
    wrapped: bytes

    def check(self) -> None:
        """Raise ARGUMENT_INVALID for what no sealed object holds."""
        check_wrapped(self.wrapped)
        if not self.version:
            raise argument_error("key_version", "0", "the version from the header of the sealed object")


class DataKeyDesk(Desk):
    """Give data keys to their owner."""

    async def generate(self, owner: Owner, uri: KeyUri, recipient: Recipient) -> DataKeyAnswer:
        """Make a data key under the newest version, to seal with on the owner's own machine."""
        recipient.check()
        stored = await self._usable(owner, uri, "generate", "seal")
        version = stored.record.newest
        fresh = await self._backend.generate(KeyRef.of(stored.record, version), stored.material().handle)
        binding = self._binding(owner, WrappedKey(uri, version, fresh.wrapped), "seal", recipient)
        return await self._answer(owner, "generate", binding, recipient.seal(fresh.secret, binding), fresh.wrapped)

    async def resume(
        self, owner: Owner, key: WrappedKey, recipient: Recipient, *, authorization: bytes
    ) -> DataKeyAnswer:
        """Unwrap a data key for the owner who was given it to seal with, and was interrupted.

        Only of a key that this owner asked for in the last seven days, and before anything sealed with it was
        published: what a workload sealed, and what is in use, does not open like this.
        """
        recipient.check()
        key.check()
        stored = await self._usable(owner, key.uri, "resume", "seal", version=key.version)
        await self._authorize(owner, stored, key, recipient, authorization, "seal")
        secret = await self._unwrap(owner, stored, key, "resume")

        def find(transaction: Transaction) -> tuple[bool, bool]:
            published = transaction.registry(stored.record).demanded(secret) is not None
            since = self._office.now_ms() - int(_RESUMABLE.total_seconds() * 1000)
            entries = transaction.newest_entries(key.uri.tenant, key_uri=str(key.uri), limit=_RESUME_LOOKBACK)
            return published, any(_given(entry, owner, key, since) for entry in entries)

        published, given = await self._store.read(find)
        block = Block("data_key.sealing", given and not published, "given to you to seal with, not published", "")
        if not block.ok:
            got = "published" if published else "not one of yours of the last seven days"
            await self._deny(owner, "resume", key.uri, replace(block, got=got))
            raise CloisterError(
                Code.RELEASE_DENIED,
                what=f"{key.uri} gives no data key to go on sealing: block {block.name}",
                why=f"wanted {block.wanted}; got {got}",
                todo="seal anew, into another directory",
            )
        binding = self._binding(owner, key, "seal", recipient)
        return await self._answer(owner, "resume", binding, recipient.seal(secret, binding), key.wrapped)

    async def published(self, owner: Owner, uri: KeyUri, dataset_id: str) -> Publication | None:
        """Return the newest version of a data set of the caller's tenant."""
        stored = await self.get(owner, uri)
        return await self._store.read(lambda transaction: transaction.registry(stored.record).newest(dataset_id))

    async def open(
        self, owner: Owner, key: WrappedKey, recipient: Recipient, *, manifest_digest: bytes, authorization: bytes
    ) -> DataKeyAnswer:
        """Unwrap a data key for the owner's own machine; the key must have been created with purpose export.

        `authorization` is the owner's signature over this request: a certificate alone opens nothing.
        `manifest_digest` is that of the directory about to be opened, empty for a single file.
        """
        recipient.check()
        key.check()
        stored = await self._usable(owner, key.uri, "open", "export", version=key.version, export=True)
        await self._authorize(owner, stored, key, recipient, authorization, "export")
        secret = await self._unwrap(owner, stored, key, "open")
        demanded = await self._store.read(lambda transaction: transaction.registry(stored.record).demanded(secret))
        block = version_block(demanded, (manifest_digest,) if manifest_digest else ())
        if block is not None and not block.ok:
            await self._deny(owner, "open", key.uri, block)
            raise CloisterError(
                Code.RELEASE_DENIED,
                what=f"{key.uri} gives no data key to export: block {block.name}",
                why=f"wanted {block.wanted}; got {block.got}",
                todo="open the newest version of the data set",
            )
        binding = self._binding(owner, key, "export", recipient)
        return await self._answer(owner, "open", binding, recipient.seal(secret, binding), key.wrapped)

    async def rewrap(self, owner: Owner, key: WrappedKey) -> WrappedKey:
        """Wrap a data key under the newest version; it does not leave the broker in the clear."""
        key.check()
        stored = await self._usable(owner, key.uri, _REWRAP, "rewrap", version=key.version)
        secret = await self._unwrap(owner, stored, key, _REWRAP)
        newest = stored.record.newest
        current = await self._usable(owner, key.uri, _REWRAP, "rewrap", version=newest)
        wrapped = await self._backend.wrap(KeyRef.of(current.record, newest), current.material().handle, secret)
        answer = WrappedKey(key.uri, newest, wrapped)
        entry = self._grant(owner, _REWRAP, answer)
        await self._store.write(lambda transaction: self._append(transaction, key.uri, entry))
        return answer

    async def publish(self, owner: Owner, key: WrappedKey, publication: Publication, parent_digest: bytes) -> None:
        """Remember the newest version of a data set; nothing happens when it is known already.

        `publication.data_key_digest` is not the caller's to say: the wrapped data key is opened.
        """
        key.check()
        _check_publication(publication, parent_digest)
        async with self._office.changing(key.uri):
            stored = await self._usable(owner, key.uri, "publish", "publish", version=key.version)
            secret = await self._unwrap(owner, stored, key, "publish")
            named = replace(publication, data_key_digest=data_key_digest(secret))
            registry = await self._store.read(lambda transaction: transaction.registry(stored.record))
            try:
                if not checked_successor(registry, named, parent_digest):
                    return
            except CloisterError as error:
                newest = registry.newest(publication.dataset_id)
                wanted = f"a successor of version {newest.version}" if newest else "a data key of its own"
                await self._deny(owner, "publish", key.uri, Block("dataset.version", False, wanted, error.why))
                raise
            record = replace(stored.record, publications=registry.size + 1, published=named.chained(registry.head))

            def work(transaction: Transaction) -> None:
                transaction.update_key(record)
                transaction.insert_publication(record, named)
                transaction.append(self._entry(owner, "publish", record), time_ms=self._office.now_ms())

            await self._store.write(work)

    async def _usable(
        self, owner: Owner, uri: KeyUri, action: str, purpose: str, *, version: int = 0, export: bool = False
    ) -> StoredKey:
        """Return an owned, enabled key that has the version (0: the newest) and, for export, the purpose."""
        stored = await self._owned(owner, uri, action, version=version)
        record = stored.record
        blocks = [Block("key.state", record.state is KeyState.ENABLED, KeyState.ENABLED.value, record.state.value)]
        if export:
            purposes = ", ".join(sorted(record.purposes))
            blocks.append(Block("key.purposes", Purpose.EXPORT in record.purposes, Purpose.EXPORT.value, purposes))
        if version:
            ok = record.min_version <= version <= record.newest
            blocks.append(Block("key.version", ok, f"{record.min_version} to {record.newest}", str(version)))
        failed = next((block for block in blocks if not block.ok), None)
        if failed is None:
            return stored
        await self._deny(owner, action, uri, *blocks)
        code, todo = _ADVICE[failed.name]
        raise CloisterError(
            code,
            what=f"{uri} gives no data key to {purpose}: block {failed.name}",
            why=f"wanted {failed.wanted}; got {failed.got}",
            todo=todo,
        )

    async def _authorize(
        self,
        owner: Owner,
        stored: StoredKey,
        key: WrappedKey,
        recipient: Recipient,
        authorization: bytes,
        purpose: str,
    ) -> None:
        """Raise SIGNATURE_INVALID unless the key's signer signed for this data key, and for this recipient."""
        wanted = OpenRequest(
            uri=key.uri,
            key_version=key.version,
            signer=stored.record.signer,
            wrapped_digest=sha384(key.wrapped),
            client_nonce=recipient.client_nonce,
            recipient_digest=sha384(recipient.public_key),
            purpose=purpose,
        )
        try:
            if not authorization:
                raise _unsigned(key.uri, "authorization is empty")
            found = OpenRequest.verified(authorization)
            if found != wanted:
                raise _unsigned(key.uri, f"the signature is by {found.signer}, or over another request")
        except CloisterError as error:
            await self._deny(owner, "open", key.uri, Block("owner.signature", False, wanted.signer, error.why))
            raise

    async def _unwrap(self, owner: Owner, stored: StoredKey, key: WrappedKey, action: str) -> SecretBytes:
        ref = KeyRef.of(stored.record, key.version)
        try:
            return await self._backend.unwrap(ref, stored.material().handle, key.wrapped)
        except CloisterError as error:
            if error.code is Code.WRAPPED_KEY_INVALID:
                block = Block("data_key", False, "wrapped under this version", "not")
                await self._deny(owner, action, key.uri, block)
            raise

    def _binding(self, owner: Owner, key: WrappedKey, purpose: str, recipient: Recipient) -> ReleaseBinding:
        return ReleaseBinding(
            key_uri=str(key.uri),
            key_version=key.version,
            purpose=purpose,
            policy_digest=b"",
            evidence_digest=sha384(owner.certificate_der),
            client_nonce=recipient.client_nonce,
            broker_nonce=b"",
            broker_id=str(self._office.broker_id),
            wrapped_digest=sha384(key.wrapped),
        )

    async def _answer(
        self, owner: Owner, action: str, binding: ReleaseBinding, sealed: bytes, wrapped: bytes
    ) -> DataKeyAnswer:
        """Make the grant durable, then sign its receipt."""
        key = WrappedKey(KeyUri.parse(binding.key_uri), binding.key_version, wrapped)
        entry = replace(self._grant(owner, action, key), purpose=binding.purpose)
        place = await self._store.write(lambda transaction: self._append(transaction, key.uri, entry))
        return DataKeyAnswer(sealed, wrapped, binding, self._office.signer.sign(binding, sealed=sealed, place=place))

    def _grant(self, owner: Owner, action: str, key: WrappedKey) -> Entry:
        me = str(owner.spiffe_id)
        return Entry(
            action=action,
            tenant=owner.spiffe_id.tenant,
            key_uri=str(key.uri),
            caller=me,
            granted=True,
            blocks=(Block("key.owner", True, me, me),),
            key_version=key.version,
            channel=owner.channel,
            evidence_digest=sha384(owner.certificate_der),
            wrapped_digest=sha384(key.wrapped),
            request_id=owner.request_id,
        )

    def _append(self, transaction: Transaction, uri: KeyUri, entry: Entry) -> LogPlace:
        """Append a grant; the key may have changed since it was looked at."""
        now = transaction.key(uri)
        if now is None or now.record.state is not KeyState.ENABLED or entry.key_version < now.record.min_version:
            raise CloisterError(
                Code.KEY_DISABLED, what=f"{uri} was changed meanwhile", todo="look at it, and ask again"
            )
        return transaction.append(entry, time_ms=self._office.now_ms())


_ADVICE = {
    "key.state": (Code.KEY_DISABLED, "enable it: cloister key enable"),
    "key.purposes": (Code.RELEASE_DENIED, "only keys created with purpose export open outside a TD"),
    "key.version": (Code.WRAPPED_KEY_INVALID, "use a version that is not retired, from the sealed object's header"),
}


def _given(logged: LoggedEntry, owner: Owner, key: WrappedKey, since_ms: int) -> bool:
    """Say whether an entry is the one in which this owner, not a workload, was given this data key."""
    entry = logged.entry
    return (
        entry.granted
        and entry.action == "generate"
        and entry.caller == str(owner.spiffe_id)
        and entry.wrapped_digest == sha384(key.wrapped)
        and logged.time_ms >= since_ms
    )


def _unsigned(uri: KeyUri, why: str) -> CloisterError:
    return CloisterError(
        Code.SIGNATURE_INVALID,
        what=f"{uri} opens on the owner's machine with the owner's signature only",
        why=why,
        todo="ask with the signing key that the key was created with",
    )


def _check_publication(publication: Publication, parent_digest: bytes) -> None:
    for name, size, wanted in (
        ("manifest_digest", len(publication.manifest_digest), (_DIGEST_SIZE,)),
        ("parent_digest", len(parent_digest), (0, _DIGEST_SIZE)),
    ):
        if size not in wanted:
            raise argument_error(name, f"{size} bytes", f"SHA-384 of a manifest, {_DIGEST_SIZE} bytes")
    size = len(publication.dataset_id.encode())
    if not 0 < size <= _MAX_DATASET_ID or not publication.dataset_id.isprintable():
        raise argument_error("dataset_id", f"{size} bytes", f"1 to {_MAX_DATASET_ID} bytes, printable")
    if not 0 < publication.version <= _MAX_DATASET_VERSION:
        raise argument_error("version", str(publication.version), "a number from 1")
    if (publication.version == 1) != (parent_digest == b""):
        raise argument_error("parent_digest", f"{len(parent_digest)} bytes", "empty for version 1 and for no other")
