# SPDX-License-Identifier: Apache-2.0
"""Whoever stands in EHSM's place, or runs its host, gets nothing that opens data, and no wrong key in."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister import ehsm
from cloister.errors import CloisterError, Code
from cloister.release.keys import KeyState, Purpose
from cloister.secret import SecretBytes
from cloister_keybroker.backends import KeyRef
from cloister_keybroker.backends.ehsm.breaker import Breaker
from cloister_keybroker.backends.ehsm.calls import Calls
from cloister_keybroker.backends.ehsm.client import EhsmClient
from cloister_keybroker.backends.ehsm.options import EhsmLimits, EhsmOptions
from cloister_keybroker.backends.factory import Backends, open_backends
from cloister_keybroker.backends.uri import BackendUri
from cloister_keybroker.rootkey import RootKey
from cloister_sim.ehsm.faults import Fault
from cloister_sim.ehsm.server import EhsmServer
from fakes.ehsm_place import EhsmPlace
from fakes.keybroker_harness import KEY, OTHER_KEY
from fakes.old_certificate import old_server

REF = KeyRef(KEY, 1, KeyState.ENABLED, frozenset({Purpose.TRAIN}))
OTHER = replace(REF, uri=OTHER_KEY)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[EhsmPlace]:
    async with EhsmPlace(tmp_path / "ehsm") as running:
        yield running


@pytest.fixture
async def backend(place: EhsmPlace, tmp_path: Path) -> AsyncIterator[Backends]:
    root = RootKey(SecretBytes(secrets.token_bytes(32)))
    opened = await open_backends(place.uri, (), root, state_dir=tmp_path, clock=place.clock)
    yield opened
    await opened.aclose()


def client_of(place: EhsmPlace, uri: str, limits: EhsmLimits | None = None) -> EhsmClient:
    options = replace(EhsmOptions.of(BackendUri.parse(uri)), limits=limits or EhsmLimits())
    return EhsmClient(Calls(options, clock=place.clock, breaker=Breaker()))


def spki_pin(certificate_file: Path) -> str:
    key = x509.load_pem_x509_certificate(certificate_file.read_bytes()).public_key()
    digest = hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()
    return f"sha256:{digest}"


async def refused(attempt: Any, *codes: Code) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        await attempt
    assert caught.value.code in codes, str(caught.value)
    return caught.value


# who answers


async def test_a_server_with_another_certificate_sees_no_request(place: EhsmPlace, tmp_path: Path) -> None:
    async with EhsmServer(tmp_path / "impostor", listen="127.0.0.1:0") as impostor:
        client = client_of(place, place.uri.replace(place.server.url, impostor.url))
        error = await refused(client.list_keys(), Code.CUSTODIAN_REFUSED)
        assert "certificate" in error.why
        assert impostor.faults.requests == []
        await client.aclose()


async def test_the_services_own_event_loop_checks_the_pin_too(place: EhsmPlace) -> None:
    def attempt(pin: str) -> Code | None:
        async def run() -> Code | None:
            client = client_of(place, place.uri_with(pin=pin))
            try:
                await client.list_keys()
            except CloisterError as error:
                return error.code
            finally:
                await client.aclose()
            return None

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run())

    right = spki_pin(place.client_directory / "ca.pem")
    assert await asyncio.to_thread(attempt, right) is None
    assert await asyncio.to_thread(attempt, f"sha256:{'0' * 64}") is Code.CUSTODIAN_REFUSED
    assert place.faults.count("ListKey") == 1


@pytest.mark.parametrize("with_ca", [True, False])
async def test_a_pinned_key_is_enough_and_holds_beside_a_ca(place: EhsmPlace, with_ca: bool) -> None:
    ca_file = place.client_directory / "ca.pem"
    ca = {"ca": str(ca_file)} if with_ca else {}
    right = client_of(place, place.uri_with(pin=f"sha256:{'0' * 64},{spki_pin(ca_file)}", **ca))
    assert await right.list_keys() == ()
    wrong = client_of(place, place.uri_with(pin=f"sha256:{'0' * 64}", **ca))
    await refused(wrong.list_keys(), Code.CUSTODIAN_REFUSED)
    assert place.faults.count("ListKey") == 1
    await right.aclose()
    await wrong.aclose()


async def test_a_certificate_for_another_name_is_refused_unless_it_is_named(place: EhsmPlace, tmp_path: Path) -> None:
    answer = b'{"code": 200, "message": "successful", "result": {"list": []}}'
    async with old_server(tmp_path, answer) as (port, certificate_file, spki):
        here = place.uri_with(ca=str(certificate_file)).replace(place.server.url, f"https://127.0.0.1:{port}")
        unnamed = client_of(place, here)
        await refused(unnamed.list_keys(), Code.CUSTODIAN_REFUSED)
        # EHSM's own certificate: X.509 version 1, CN=ehsm, no alternative name.
        named = client_of(place, f"{here}&server-name=ehsm")
        assert await named.list_keys() == ()
        pin = hashlib.sha256(spki).hexdigest()
        uri = place.uri_with(pin=f"sha256:{pin}").replace(place.server.url, f"https://127.0.0.1:{port}")
        pinned = client_of(place, uri)
        assert await pinned.list_keys() == ()
        for client in (unnamed, named, pinned):
            await client.aclose()


async def test_a_port_that_never_answers_the_handshake_costs_the_connect_limit_only(place: EhsmPlace) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    limits = EhsmLimits(connect_s=0.1, total_s=5.0)
    client = client_of(place, place.uri.replace(place.server.url, f"https://127.0.0.1:{port}"), limits)
    began = asyncio.get_running_loop().time()
    await refused(client.list_keys(), Code.CUSTODIAN_UNAVAILABLE)
    assert asyncio.get_running_loop().time() - began < 2.0
    await client.aclose()
    server.close()


async def test_a_ca_file_without_a_certificate_is_a_configuration_error(place: EhsmPlace, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("nothing")
    for name in ("empty.pem", "missing.pem"):
        with pytest.raises(CloisterError) as caught:
            client_of(place, place.uri_with(ca=str(tmp_path / name)))
        assert caught.value.code is Code.CONFIG_INVALID


# what EHSM's host can do


async def test_the_host_sees_no_name_and_nothing_that_opens_data(place: EhsmPlace, backend: Backends) -> None:
    seen: list[str] = []
    place.server.service.post = spying(place.server.service.post, seen)  # type: ignore[method-assign]
    handle = await backend.create(REF)
    fresh = await backend.generate(REF, handle)
    assert await backend.unwrap(REF, handle, fresh.wrapped) == fresh.secret
    everything = "".join(seen)
    assert KEY.tenant not in everything
    for secret in (fresh.secret, await backend.wrapping_key(REF, handle)):
        assert ehsm.encode(secret.reveal()) not in everything


def spying(post: Any, seen: list[str]) -> Any:
    """Return what the host's Node service sees: every body in, every answer out."""

    async def spied(action: str, body: bytes) -> Any:
        answer = await post(action, body)
        seen.append(body.decode() + answer.to_json().decode())
        return answer

    return spied


async def test_a_part_of_the_hosts_making_opens_nothing(place: EhsmPlace, backend: Backends) -> None:
    handle = await backend.create(REF)
    fresh = await backend.generate(REF, handle)
    lie = {"plaintext": ehsm.encode(secrets.token_bytes(32))}
    place.faults.add(Fault("Decrypt", change=lambda answer: answer | {"result": lie}))
    await refused(backend.unwrap(REF, handle, fresh.wrapped), Code.STORE_DAMAGED)


async def test_another_keys_part_given_back_for_this_one_opens_nothing(place: EhsmPlace, backend: Backends) -> None:
    answers: list[Any] = []

    def keep(answer: dict[str, Any]) -> Any:
        answers.append(answer["result"])
        return answer

    other, handle = await backend.create(OTHER), await backend.create(REF)
    of_other, fresh = await backend.generate(OTHER, other), await backend.generate(REF, handle)
    place.faults.add(Fault("Decrypt", change=keep))
    await backend.unwrap(OTHER, other, of_other.wrapped)
    place.faults.add(Fault("Decrypt", change=lambda answer: answer | {"result": answers[0]}))
    await refused(backend.unwrap(REF, handle, fresh.wrapped), Code.STORE_DAMAGED)


async def test_ehsm_alone_does_not_open_a_handle_without_the_root_key(
    place: EhsmPlace, backend: Backends, tmp_path: Path
) -> None:
    handle = await backend.create(REF)
    fresh = await backend.generate(REF, handle)
    thief_root = RootKey(SecretBytes(secrets.token_bytes(32)))
    thief = await open_backends(place.uri, (), thief_root, state_dir=tmp_path, clock=place.clock)
    await refused(thief.unwrap(REF, handle, fresh.wrapped), Code.STORE_DAMAGED)
    await thief.aclose()


async def test_the_broker_alone_does_not_open_a_handle_without_ehsm(
    place: EhsmPlace, backend: Backends, tmp_path: Path
) -> None:
    handle = await backend.create(REF)
    fresh = await backend.generate(REF, handle)
    await place.server.stop()
    await refused(backend.unwrap(REF, handle, fresh.wrapped), Code.CUSTODIAN_UNAVAILABLE)
    # Another EHSM in its place, under the same certificate, has no such key.
    for name in ("ehsm.sqlite", "ehsm.sqlite-wal", "ehsm.sqlite-shm"):
        (tmp_path / "ehsm" / "server" / name).unlink(missing_ok=True)
    await place.start()
    await refused(backend.unwrap(REF, handle, fresh.wrapped), Code.CUSTODIAN_REFUSED, Code.CUSTODIAN_KEY_LOST)


async def test_a_deletion_that_is_only_claimed_is_noticed(place: EhsmPlace, backend: Backends) -> None:
    handle = await backend.create(REF)
    place.faults.add(Fault("DeleteKey", body=b'{"code": 200, "message": "successful", "result": {}}'))
    error = await refused(backend.destroy(REF, handle), Code.CUSTODIAN_REFUSED)
    assert "still lists" in error.why


async def test_an_answer_cannot_make_the_broker_talk_to_another_host(place: EhsmPlace, backend: Backends) -> None:
    place.faults.add(Fault("CreateKey", body=b"", status=307))
    await refused(backend.create(REF), Code.CUSTODIAN_ANSWER_INVALID)


async def test_credentials_and_parts_are_in_no_error_and_no_representation(place: EhsmPlace) -> None:
    options = place.options()
    assert options.api_key.reveal().decode() not in repr(options)
