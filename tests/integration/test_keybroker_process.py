# SPDX-License-Identifier: Apache-2.0
"""The broker as users run it: enrolled with a real attest, keys released to a TD that a real platform quotes for."""

from __future__ import annotations

import pytest

from cloister.errors import CloisterError, Code
from cloister.guest.keys import KeyClient
from cloister.guest.ownerkeys import OwnerKeyClient
from cloister_keybroker.rootkey import create_root_key
from fakes.keybroker_process import a_policy, a_rank, a_stack, the_user, the_verified_broker
from fakes.signing import OWNER_KEY

URI = "cloister-key://hospital-a/datasets/reviews"


async def test_from_a_sealed_key_to_an_attested_rank_and_across_a_restart() -> None:
    async with a_stack() as (attest, broker):
        await broker.start()
        credentials = await the_user(attest)
        await the_verified_broker(broker, credentials)
        owner = OwnerKeyClient(credentials, broker.endpoint, signing_key=OWNER_KEY)
        await owner.create_key(URI, purposes=["train", "export"], policy=a_policy(attest, URI, simulated=False))
        made = await owner.generate_data_key(URI)
        rank = await a_rank(attest)
        with pytest.raises(CloisterError, match=r"block tee\.simulated") as caught:
            await KeyClient(rank, broker.endpoint).release(URI, "train", wrapped=made.wrapped, key_version=1)
        assert caught.value.code is Code.RELEASE_DENIED

        digest = (await owner.policy(URI)).digest.hex()
        allowed = a_policy(attest, URI, simulated=True, version=2, previous=f"sha384:{digest}")
        await owner.put_policy(URI, allowed)
        client = KeyClient(rank, broker.endpoint)
        released = await client.release(URI, "train", wrapped=made.wrapped, key_version=1)
        assert released.secret == made.secret
        again = await client.release(URI, "train", wrapped=made.wrapped, key_version=1)
        assert again.secret == made.secret
        new = await client.release(URI, "train", wrapped=None)
        assert new.secret != made.secret

        await broker.stop(kill=True)
        broker.endpoints_file.unlink()
        await broker.start()
        owner = OwnerKeyClient(credentials, broker.endpoint, signing_key=OWNER_KEY)
        opened = await owner.open_data_key(URI, key_version=1, wrapped=new.wrapped)
        assert opened.secret == new.secret
        await owner.disable(URI)
        with pytest.raises(CloisterError) as caught:
            await KeyClient(rank, broker.endpoint).release(URI, "train", wrapped=made.wrapped, key_version=1)
        assert caught.value.code is Code.KEY_DISABLED
        await rank.aclose()
        assert await broker.stop() == 0
        # What was written anywhere never holds a data key or the root key.
        root = broker.root_key.read_text().strip()
        for path in broker.directory.rglob("*"):
            if path.is_file() and path != broker.root_key:
                data = path.read_bytes()
                for secret in (made.secret.reveal(), new.secret.reveal(), bytes.fromhex(root)):
                    assert secret not in data, path
                    assert secret.hex().encode() not in data, path


@pytest.mark.parametrize(
    "trouble",
    [
        "no root key",
        "open root key",
        "other root key",
        "unknown key in the file",
        "no such back end",
        "no store",
        "empty store",
        "shares",
    ],
)
async def test_a_broker_that_cannot_be_right_does_not_start(trouble: str) -> None:
    async with a_stack() as (_, broker):
        if trouble == "other root key":
            await broker.start()
            assert await broker.stop() == 0
            broker.root_key.unlink()
            create_root_key(broker.root_key)
        elif trouble == "no root key":
            broker.root_key.unlink()
        elif trouble == "open root key":
            broker.root_key.chmod(0o644)
        elif trouble == "no store":
            broker.store.unlink()
        elif trouble == "empty store":
            broker.store.write_bytes(b"")
        elif trouble == "shares":
            broker.config_file.write_text(broker.config_file.read_text().replace("file:root.key", "shares"))
        elif trouble == "no such back end":
            broker.write_config("backend = 'cloud'\n")
        else:
            broker.write_config("cloud = true\n")
        code, log = await broker.fails()
        expected = {
            "no root key": (5, "CLO-1003"),
            "open root key": (2, "CLO-1001"),
            "other root key": (1, "CLO-1310"),
            "unknown key in the file": (
                2,
                "allowed keys: backend, calls_at_once, calls_burst",
            ),
            "no such back end": (2, "it does not begin with a scheme"),
            "no store": (5, "there is no database at"),
            "empty store": (1, "is empty"),
            "shares": (2, "the store's root key comes from: file"),
        }[trouble]
        assert (code, expected[1] in log) == (expected[0], True), log
        # Nothing was made in its place.
        assert not (trouble == "no store" and broker.store.exists())
        assert not (trouble == "no root key" and broker.root_key.exists())
