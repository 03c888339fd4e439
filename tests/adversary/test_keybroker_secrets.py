# SPDX-License-Identifier: Apache-2.0
"""A whole run of a broker, then a search: no key it used stands in anything that it wrote, nor beside its name."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import shamir_mnemonic

from cloister.errors import CloisterError
from cloister.guest.keys import KeyClient
from cloister.guest.operator import OperatorClient, OwnHolders
from cloister.guest.ownerkeys import OwnerKeyClient
from cloister.keyuri import KeyUri
from cloister.secret import SecretBytes
from cloister_keybroker import logkey
from cloister_keybroker.__main__ import restore_backup
from cloister_keybroker.backends import KeyRef
from cloister_keybroker.backends.embedded import EmbeddedBackend
from cloister_keybroker.rootkey import RootKey
from cloister_keybroker.store import KeyStore
from fakes.keybroker_process import BrokerProcess, a_policy, a_rank, a_stack, the_user, the_verified_broker
from fakes.signing import OWNER_KEY

URI = "cloister-key://hospital-a/datasets/reviews"
IMPORTED = "cloister-key://hospital-a/datasets/brought"


def forms(secret: bytes) -> Iterator[bytes]:
    """Yield how a secret could stand in a file: bytes, hexadecimal, a Python literal, Base64 at any offset."""
    yield secret
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    yield repr(secret)[2:-1].encode()
    for before in range(3):
        # The characters that do not depend on what stands before and behind.
        encoded = base64.b64encode(bytes(before) + secret)
        yield encoded[4 if before else 0 : -4]
        yield base64.urlsafe_b64encode(bytes(before) + secret)[4 if before else 0 : -4]


async def keys_of_the_store(path: Path, root_key: RootKey) -> list[SecretBytes]:
    """Return what only the root key opens: wrapping keys of all versions, and the log's key."""
    store = await KeyStore.open(path, root_key)
    backend, found = EmbeddedBackend(root_key), []
    for uri, number, handle in await store.read(lambda transaction: transaction.versions_at(backend.name)):
        stored = await store.read(lambda t, uri=uri: t.key(uri))
        assert stored is not None
        found.append(await backend.wrapping_key(KeyRef.of(stored.record, number), handle))
    log_key = await store._database.read(lambda connection: logkey.load(connection, root_key))
    store.close()
    assert log_key is not None
    return [*found, SecretBytes(log_key.private.private_bytes_raw())]


async def test_no_key_of_a_whole_run_stands_in_anything_it_wrote(tmp_path: Path) -> None:
    secrets: list[SecretBytes] = []
    async with a_stack("shares") as (attest, broker):
        await broker.start()
        credentials = await the_user(attest)
        operator = OperatorClient(credentials, await the_verified_broker(broker, credentials))
        old, new = OwnHolders(3), OwnHolders(2)
        shares = [share.words for share in old.open(await operator.initialize(old.public_keys, threshold=2))]
        for share in shares[:2]:
            await operator.hand_in(share)

        verified = await the_verified_broker(broker, credentials)
        owner = OwnerKeyClient(credentials, broker.endpoint, signing_key=OWNER_KEY, verified=verified)
        policy = a_policy(attest, URI, simulated=True)
        await owner.create_key(URI, purposes=["train", "export"], policy=policy)
        made = await owner.generate_data_key(URI)
        rank = await a_rank(attest)
        client = KeyClient(rank, broker.endpoint)
        released = await client.release(URI, "train", wrapped=made.wrapped, key_version=1)
        fresh = await client.release(URI, "train", wrapped=None)
        with pytest.raises(CloisterError):
            await client.release(URI, "serve", wrapped=made.wrapped, key_version=1)
        await owner.rotate(URI)
        brought = SecretBytes(os.urandom(32))
        await owner.import_key(IMPORTED, brought, purposes=["export"])
        another = await owner.generate_data_key(IMPORTED)
        assert (await owner.open_data_key(IMPORTED, key_version=1, wrapped=another.wrapped)).secret == another.secret
        (tmp_path / "backup").write_bytes(b"".join([chunk async for chunk in operator.backup()]))
        seen = beside_its_name(broker)

        sealed, name = await operator.rekey(new.public_keys, threshold=2)
        newer = [share.words for share in new.open(sealed)]
        for share in shares[:2]:
            await operator.show(share, name)
        with pytest.raises(CloisterError):
            await operator.hand_in(shares[0])
        for share in newer:
            await operator.hand_in(share)
        await operator.seal()
        await rank.aclose()
        await broker.stop(kill=True)
        arguments = [str(tmp_path / "backup"), "--state-dir", str(tmp_path / "restored")]
        assert await asyncio.to_thread(restore_backup, arguments) == 0

        roots = [
            SecretBytes(shamir_mnemonic.combine_mnemonics([share.reveal().decode() for share in some]))
            for some in (shares[:2], newer)
        ]
        wrapping = await keys_of_the_store(broker.store, RootKey(roots[1]))
        assert brought in wrapping
        assert len(wrapping) == 4
        secrets += [made.secret, released.secret, fresh.secret, another.secret, brought, *roots, *wrapping]
        texts = [*shares, *newer, *(SecretBytes(b" ".join(share.reveal().split()[5:12])) for share in shares)]
        derived = [part for root in roots for part in vars(RootKey(root)).values() if isinstance(part, SecretBytes)]
        assert len(derived) >= 6
        searched = 0
        for path in [*broker.directory.rglob("*"), *tmp_path.rglob("*")]:
            if not path.is_file() or path.suffix == ".pem":
                continue
            data = path.read_bytes()
            searched += 1
            for secret in (*secrets, *derived):
                for form in forms(secret.reveal()):
                    assert form not in data, f"{path} holds a key"
            for text in texts:
                assert text.reveal() not in data, f"{path} holds a share"
        assert searched > 10
        assert seen
        for secret in (*secrets, *texts):
            assert not any(form in seen for form in forms(secret.reveal()))


def beside_its_name(broker: BrokerProcess) -> bytes:
    """Return the broker's command line and environment, as others may see them; look at the size of its cores, too."""
    assert broker.process is not None
    process = Path(f"/proc/{broker.process.pid}")
    limits = (process / "limits").read_text()
    assert next(line for line in limits.splitlines() if "core file" in line).split()[4:6] == ["0", "0"]
    found = (process / "cmdline").read_bytes()
    if os.geteuid() == 0:  # the process is not dumpable: its own user may not look either
        found += (process / "environ").read_bytes()
    return found


def test_the_search_would_find_them() -> None:
    """Whatever form a key is written in."""
    key = os.urandom(32)
    uri = KeyUri.parse(URI)
    for written in (
        key,
        f"key={key.hex()}".encode(),
        f"KEY {key.hex().upper()}".encode(),
        f"{uri} {key!r}".encode(),
        base64.b64encode(b"x" + key + b"y"),
        base64.b64encode(b"xy" + key + b"yz"),
        base64.urlsafe_b64encode(b"xyz" + key + b"yz"),
    ):
        assert any(form in written for form in forms(key))
