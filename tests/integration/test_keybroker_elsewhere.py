# SPDX-License-Identifier: Apache-2.0
"""A broker as users run it, with its keys behind another store: by one line, through an outage, and home again."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cloister.errors import CloisterError, Code
from cloister.guest.operator import OperatorClient
from cloister.guest.ownerkeys import OwnerKeyClient
from cloister.runtime.endpoints import read_endpoints
from cloister_keybroker.service import RELEASE_SERVICE
from fakes.keybroker_process import BrokerProcess, a_stack, the_user, the_verified_broker
from fakes.signing import OWNER_KEY
from fakes.transit_server import TransitServer

URI = "cloister-key://hospital-a/datasets/reviews"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """What a probe sees."""

    def __init__(self, broker: BrokerProcess) -> None:
        self._channel = grpc.aio.insecure_channel(read_endpoints(broker.endpoints_file)["health"])
        self._stub: Any = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> Health:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def of(self, service: str) -> int:
        return int((await self._stub.Check(health_pb2.HealthCheckRequest(service=service))).status)

    async def wait_for(self, service: str, wanted: int) -> None:
        async for answer in self._stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=20):
            if answer.status == wanted:
                return


async def test_an_outage_shows_in_health_and_ends_by_itself_and_keys_come_home_again() -> None:
    async with a_stack() as (attest, broker), TransitServer() as transit:
        await transit.stop()
        broker.write_config(f'backend = "{transit.uri}"\n')
        await broker.start()  # it starts while its back end is away
        credentials = await the_user(attest)
        verified = await the_verified_broker(broker, credentials)
        owner = OwnerKeyClient(credentials, broker.endpoint, signing_key=OWNER_KEY)
        operator = OperatorClient(credentials, verified)
        async with Health(broker) as health:
            assert [await health.of(name) for name in ("", RELEASE_SERVICE)] == [SERVING, NOT_SERVING]
            status = await operator.backend_status()
            assert (status.name, status.healthy) == ("transit", False)
            assert "CLO-1340" in status.problem
            with pytest.raises(CloisterError) as caught:
                await owner.create_key(URI, purposes=["train", "export"], policy=b"")
            assert caught.value.code is Code.CUSTODIAN_UNAVAILABLE

            await transit.start()
            await health.wait_for(RELEASE_SERVICE, SERVING)
        await owner.create_key(URI, purposes=["train", "export"], policy=b"")
        made = await owner.generate_data_key(URI)
        assert (await owner.open_data_key(URI, key_version=1, wrapped=made.wrapped)).secret == made.secret
        assert len(transit.keys) == 2  # the canary's and this one
        with pytest.raises(CloisterError) as caught:
            await owner.create_key(URI, purposes=["train"], policy=b"")
        assert caught.value.code is Code.KEY_EXISTS
        assert len(transit.keys) == 2  # nothing is left behind of a name that was taken
        await owner.disable(URI)
        await owner.enable(URI)
        assert await broker.stop() == 0

        # The same keys, with the line changed: first found where they are, then brought home.
        broker.write_config(f'backend = "embedded:"\nformer_backends = ["{transit.uri}"]\n')
        broker.endpoints_file.unlink(missing_ok=True)
        await broker.start()
        verified = await the_verified_broker(broker, credentials)
        owner = OwnerKeyClient(credentials, broker.endpoint, signing_key=OWNER_KEY)
        operator = OperatorClient(credentials, verified)
        assert (await owner.open_data_key(URI, key_version=1, wrapped=made.wrapped)).secret == made.secret
        assert list((await operator.backend_status()).versions) == ["transit: 1"]
        moved = await operator.migrate()
        assert (moved.migrated, moved.left) == (1, 0)
        assert list((await operator.backend_status()).versions) == ["embedded: 1", "old places at transit: 1"]
        await transit.stop()
        assert (await owner.open_data_key(URI, key_version=1, wrapped=made.wrapped)).secret == made.secret
        await broker.stop(kill=True)
        broker.write_config()
        broker.endpoints_file.unlink(missing_ok=True)
        await broker.start()
        owner = OwnerKeyClient(credentials, broker.endpoint, signing_key=OWNER_KEY)
        assert (await owner.open_data_key(URI, key_version=1, wrapped=made.wrapped)).secret == made.secret


async def test_a_token_of_the_back_end_is_in_no_file_and_no_log_of_the_broker() -> None:
    async with a_stack() as (attest, broker), TransitServer() as transit:
        broker.write_config(f'backend = "{transit.uri}"\n')
        await broker.start()
        credentials = await the_user(attest)
        await the_verified_broker(broker, credentials)
        owner = OwnerKeyClient(credentials, broker.endpoint, signing_key=OWNER_KEY)
        await owner.create_key(URI, purposes=["train", "export"], policy=b"")
        transit.tokens.clear()
        with pytest.raises(CloisterError) as caught:
            await owner.generate_data_key(URI)
        assert caught.value.code is Code.CUSTODIAN_REFUSED
        await broker.stop()
        for path in broker.directory.rglob("*"):
            if path.is_file():
                assert transit.token.encode() not in path.read_bytes(), path
