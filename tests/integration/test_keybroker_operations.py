# SPDX-License-Identifier: Apache-2.0
"""What operators do with a broker, from the first store to a backup that is restored: over the wire, as processes."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cloister import hpke
from cloister.api.keybroker.v1 import keybroker_pb2 as pb
from cloister.api.keybroker.v1 import keybroker_pb2_grpc as rpc
from cloister.errors import CloisterError, Code
from cloister.guest.operator import OperatorClient, OwnHolders
from cloister.holderkey import SealedShare, create_holder_key, read_holder_key, read_holder_public
from cloister.hpke import KEM_MLKEM768_X25519, HpkeKeyPair
from cloister.identity import Role
from cloister.protocol import unseal_info
from cloister.runtime.channel import invoke, open_channel
from cloister.runtime.credentials import StaticCredentials
from cloister.runtime.endpoints import read_endpoints
from cloister.secret import SecretBytes
from cloister_keybroker.__main__ import restore_backup
from fakes.keybroker_process import BrokerProcess, a_stack, the_user, the_verified_broker

PASSPHRASE = SecretBytes(b"correct horse battery staple")
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
BROKER = "cloister.api.keybroker.v1.BrokerService"
KEYS = "cloister.api.keybroker.v1.KeyOwnerService"


async def the_operator(broker: BrokerProcess) -> OperatorClient:
    credentials = await the_user(broker.attest)
    return OperatorClient(credentials, await the_verified_broker(broker, credentials))


async def list_keys(broker: BrokerProcess) -> pb.ListKeysResponse:
    credentials = await the_user(broker.attest)
    async with open_channel(broker.endpoint, role=Role.KEYBROKER, credentials=credentials) as channel:
        method = rpc.KeyOwnerServiceStub(channel).ListKeys
        return await invoke(method, pb.ListKeysRequest(), timeout_s=10, what="list the keys")  # type: ignore[no-any-return]


async def health(broker: BrokerProcess) -> dict[str, int]:
    async with grpc.aio.insecure_channel(read_endpoints(broker.endpoints_file)["health"]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answers = [(name, await stub.Check(health_pb2.HealthCheckRequest(service=name))) for name in ("", BROKER, KEYS)]
    return {name: answer.status for name, answer in answers}


async def code_of(call: object) -> Code:
    with pytest.raises(CloisterError) as caught:
        await call  # type: ignore[misc]
    return caught.value.code


async def test_a_broker_of_shares_from_the_first_day_to_a_restored_backup(tmp_path: Path) -> None:
    async with a_stack("shares") as (_, broker):
        await broker.start()
        operator = await the_operator(broker)
        assert (await operator.status()).state == pb.SEAL_STATE_UNINITIALIZED
        assert await code_of(list_keys(broker)) is Code.BROKER_SEALED
        assert await health(broker) == {"": NOT_SERVING, BROKER: SERVING, KEYS: NOT_SERVING}

        # The ceremony: two holders with keys of their own.
        holders = [tmp_path / name for name in ("ada.key", "grace.key")]
        publics = [read_holder_public(create_holder_key(holder)) for holder in holders]
        sealed = [SealedShare.parse(share.to_bytes()) for share in await operator.initialize(publics, threshold=2)]
        with pytest.raises(CloisterError, match="does not open with this key"):
            sealed[0].open(read_holder_key(holders[1]))
        shares = [share.open(read_holder_key(holder)) for share, holder in zip(sealed, holders, strict=True)]
        status = await operator.hand_in(shares[0])
        assert (status.state, status.have, status.need) == (pb.SEAL_STATE_SEALED, 1, 2)
        assert await code_of(operator.hand_in(shares[0])) is Code.SHARE_INVALID
        status = await operator.hand_in(shares[1])
        assert status.state == pb.SEAL_STATE_UNSEALED
        assert list((await list_keys(broker)).keys) == []
        assert await health(broker) == {"": SERVING, BROKER: SERVING, KEYS: SERVING}
        backends = await operator.backend_status()
        assert (backends.name, backends.healthy, backends.problem) == ("embedded", True, "")
        assert (await operator.migrate()).left == 0

        saved = b"".join([chunk async for chunk in operator.backup()])
        (tmp_path / "backup").write_bytes(saved)

        # After a crash the broker is sealed again.
        await broker.stop(kill=True)
        broker.endpoints_file.unlink()
        await broker.start()
        operator = await the_operator(broker)
        assert await code_of(list_keys(broker)) is Code.BROKER_SEALED
        for share in shares:
            await operator.hand_in(share)
        assert list((await list_keys(broker)).keys) == []

        # New shares, for people at this machine; the old ones are of no use from then on.
        own = OwnHolders(3)
        _, forgotten = await operator.rekey(own.public_keys, threshold=2)
        sealed, name = await operator.rekey(own.public_keys, threshold=2)
        new = own.open(sealed)
        # A share for one replacement is not used for another, nor is one that was meant to unseal.
        assert await code_of(operator.show(shares[0], forgotten)) is Code.UNSEAL_REFUSED
        assert await code_of(operator.hand_in(shares[0])) is Code.UNSEAL_REFUSED
        assert await code_of(operator.hand_in(new[0].words)) is Code.UNSEAL_REFUSED
        assert ((await operator.status()).have, (await operator.status()).need) == (0, 2)
        for share in shares:
            await operator.show(share, name)
        for share in new[:2]:
            status = await operator.hand_in(share.words)
        assert (status.state, status.need) == (pb.SEAL_STATE_UNSEALED, 0)
        await operator.seal()
        assert await code_of(list_keys(broker)) is Code.BROKER_SEALED
        assert await code_of(operator.hand_in(shares[0])) is Code.SHARE_INVALID
        for share in new[1:]:
            status = await operator.hand_in(share.words)
        assert status.state == pb.SEAL_STATE_UNSEALED
        assert await broker.stop() == 0

        # The disk is lost; the backup is of the time of the first shares.
        for file in broker.store.parent.glob(f"{broker.store.name}*"):
            file.unlink()
        await broker.start()
        assert (await (await the_operator(broker)).status()).state == pb.SEAL_STATE_UNINITIALIZED
        await broker.stop()
        arguments = [str(tmp_path / "backup"), "--state-dir", str(broker.store.parent)]
        assert await asyncio.to_thread(restore_backup, arguments) == 0
        await broker.start()
        operator = await the_operator(broker)
        assert await code_of(operator.hand_in(new[0].words)) is Code.SHARE_INVALID
        for share in shares:
            status = await operator.hand_in(share)
        assert status.state == pb.SEAL_STATE_UNSEALED
        assert not list(broker.store.parent.glob("*.restored"))
        assert await broker.stop() == 0
        for secret in [*shares, *(share.words for share in new)]:
            for path in [*broker.directory.rglob("*"), tmp_path / "backup"]:
                if path.is_file():
                    assert secret.reveal() not in path.read_bytes(), path


async def test_a_broker_of_a_passphrase() -> None:
    async with a_stack("passphrase") as (_, broker):
        await broker.start()
        operator = await the_operator(broker)
        await operator.initialize_with_passphrase(PASSPHRASE)
        assert await code_of(operator.hand_in(SecretBytes(b"another passphrase!"))) is Code.UNSEAL_REFUSED
        assert await code_of(operator.hand_in(PASSPHRASE)) is Code.RATE_LIMITED
        while (await operator.status()).state == pb.SEAL_STATE_SEALED:
            await asyncio.sleep(0.05)
            with suppress(CloisterError):
                await operator.hand_in(PASSPHRASE)
        again = SecretBytes(b"quite another one, of 30 bytes")
        name = await operator.rekey_with_passphrase(again)
        assert await code_of(operator.hand_in(again)) is Code.UNSEAL_REFUSED
        await operator.show(PASSPHRASE, name)
        assert (await operator.hand_in(again)).state == pb.SEAL_STATE_UNSEALED
        await operator.seal()
        assert (await operator.hand_in(again)).state == pb.SEAL_STATE_UNSEALED
        assert await broker.stop() == 0
        for path in broker.directory.rglob("*"):
            if path.is_file():
                assert PASSPHRASE.reveal() not in path.read_bytes(), path


async def test_who_is_no_operator_is_told_nothing_and_changes_nothing() -> None:
    async with a_stack("shares") as (attest, broker):
        text = broker.config_file
        text.write_text(text.read_text().replace(str(attest.user_id), f"{attest.user_id}-else"))
        await broker.start()
        credentials = await the_user(attest)
        trainer = await attest.service(Role.TRAINER)
        for caller in (credentials, trainer):
            async with open_channel(broker.endpoint, role=Role.KEYBROKER, credentials=caller) as channel:
                stub = rpc.BrokerServiceStub(channel)
                for method, request in (
                    (stub.GetSealStatus, pb.GetSealStatusRequest()),
                    (stub.InitializeStore, pb.InitializeStoreRequest()),
                    (stub.Unseal, pb.UnsealRequest()),
                    (stub.Seal, pb.SealRequest()),
                    (stub.Rekey, pb.RekeyRequest()),
                    (stub.MigrateKeys, pb.MigrateKeysRequest()),
                    (stub.GetBackendStatus, pb.GetBackendStatusRequest()),
                ):
                    called = invoke(method, request, timeout_s=10, what="try")
                    assert await code_of(called) is Code.CALLER_NOT_ALLOWED
        await trainer.aclose()
        assert not broker.store.exists()


async def unseal(broker: BrokerProcess, credentials: StaticCredentials, data: bytes) -> pb.UnsealResponse:
    async with open_channel(broker.endpoint, role=Role.KEYBROKER, credentials=credentials) as channel:
        method = rpc.BrokerServiceStub(channel).Unseal
        return await invoke(method, pb.UnsealRequest(sealed=data), timeout_s=10, what="unseal")  # type: ignore[no-any-return]


async def test_requests_that_cannot_be_right_make_no_store_and_unseal_none() -> None:
    kem = KEM_MLKEM768_X25519
    wrong = {
        "nothing": pb.InitializeStoreRequest(),
        "no holders": pb.InitializeStoreRequest(threshold=2, hpke_kem_id=kem),
        "no keys": pb.InitializeStoreRequest(threshold=2, hpke_kem_id=kem, holder_public_keys=[b"k", b"l"]),
        "another KEM": pb.InitializeStoreRequest(threshold=2, hpke_kem_id=1, holder_public_keys=[b"k", b"l"]),
        "one holder twice": pb.InitializeStoreRequest(threshold=2, hpke_kem_id=kem, holder_public_keys=[b"k"] * 2),
        "seventeen": pb.InitializeStoreRequest(
            threshold=2, hpke_kem_id=kem, holder_public_keys=[bytes([n]) * 1216 for n in range(17)]
        ),
        "both": pb.InitializeStoreRequest(threshold=1, sealed_passphrase=b"x"),
    }
    async with a_stack("shares") as (attest, broker):
        await broker.start()
        credentials = await the_user(attest)
        async with open_channel(broker.endpoint, role=Role.KEYBROKER, credentials=credentials) as channel:
            method = rpc.BrokerServiceStub(channel).InitializeStore
            for name, request in wrong.items():
                called = invoke(method, request, timeout_s=10, what=name)
                assert await code_of(called) is Code.ARGUMENT_INVALID, name
            passphrase = pb.InitializeStoreRequest(sealed_passphrase=b"x")
            assert await code_of(invoke(method, passphrase, timeout_s=10, what="try")) is Code.UNSEAL_REFUSED
        assert not broker.store.exists()
        operator = await the_operator(broker)
        assert await code_of(operator.initialize_with_passphrase(PASSPHRASE)) is Code.CONFIG_INVALID
        assert await code_of(operator.rekey_file()) is Code.CONFIG_INVALID
        assert await code_of(operator.migrate()) is Code.BROKER_SEALED

        # What was sealed for something else does not count.
        own = OwnHolders(2)
        shares = own.open(await operator.initialize(own.public_keys, threshold=2))
        status = await operator.status()
        broker_id = f"spiffe://{attest.user_id.trust_domain}/service/keybroker"

        def sealed(**changes: object) -> bytes:
            fields = {"action": "unseal", "broker_id": broker_id, "nonce": status.nonce, **changes}
            info = unseal_info(**fields)  # type: ignore[arg-type]
            return hpke.seal(status.hpke_public_key, shares[0].words, info=info)

        wrong = [
            sealed(action="rekey"),
            sealed(broker_id=broker_id + "s"),
            sealed(nonce=b"\x00" * 32),
            hpke.seal(HpkeKeyPair.generate().public_bytes, shares[0].words, info=b""),
            b"noise",
        ]
        for attempt in wrong:
            assert await code_of(unseal(broker, credentials, attempt)) is Code.UNSEAL_REFUSED
        assert await code_of(unseal(broker, credentials, b"x" * 5000)) is Code.ARGUMENT_INVALID
        recorded = sealed()
        assert (await unseal(broker, credentials, recorded)).status.have == 1
        await operator.hand_in(shares[1].words)
        await operator.seal()
        # Somebody who recorded it hands it in again: it was for the time before.
        assert await code_of(unseal(broker, credentials, recorded)) is Code.UNSEAL_REFUSED
