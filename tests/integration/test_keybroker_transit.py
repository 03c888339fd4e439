# SPDX-License-Identifier: Apache-2.0
"""The transit API as a back end: what the server may see, and what happens when it is away, sealed or another."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from cloister.errors import CloisterError, Code
from cloister.release.keys import KeyState, Purpose
from cloister.secret import SecretBytes
from cloister_keybroker.backends import KeyRef
from cloister_keybroker.backends.factory import Backends, open_backends
from cloister_keybroker.backends.remote import Handle
from cloister_keybroker.rootkey import RootKey
from fakes.custodian_in_memory import Moments
from fakes.keybroker_harness import KEY
from fakes.localhost_tls import server_context
from fakes.transit_server import Token, TransitServer

REF = KeyRef(KEY, 1, KeyState.ENABLED, frozenset({Purpose.TRAIN}))
ROOT = RootKey(SecretBytes(b"\x01" * 32))


@pytest.fixture
async def server() -> AsyncIterator[TransitServer]:
    async with TransitServer("teams/a/transit") as found:
        yield found


@pytest.fixture
async def backend(server: TransitServer, tmp_path: Path) -> AsyncIterator[Backends]:
    found = await opened(server.uri, tmp_path)
    yield found
    await found.aclose()


async def opened(uri: str, directory: Path) -> Backends:
    return await open_backends(uri, (), ROOT, state_dir=directory, clock=Moments())


async def refused(code: Code, attempt: object) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        await attempt  # type: ignore[misc]
    assert caught.value.code is code
    return caught.value


async def test_the_server_learns_no_name_and_the_key_is_not_exportable(
    backend: Backends, server: TransitServer
) -> None:
    bodies: list[bytes] = []

    async def listen(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.read())
        return await server._route(request)

    server.replies = [listen, listen]
    handle = await backend.create(REF)
    assert json.loads(bodies[0])["exportable"] is False
    assert all(b"reviews" not in body for body in bodies)
    assert all("reviews" not in request for request in server.requests)
    assert Handle.parse(handle).locator.startswith(b"cloister-")


async def test_one_use_is_one_request(backend: Backends, server: TransitServer) -> None:
    handle = await backend.create(REF)
    fresh = await backend.generate(REF, handle)
    server.requests.clear()
    await backend.unwrap(REF, handle, fresh.wrapped)
    assert len(server.requests) == 1


async def test_a_key_rotated_at_the_server_still_opens(backend: Backends, server: TransitServer) -> None:
    handle = await backend.create(REF)
    fresh = await backend.generate(REF, handle)
    for key in server.keys.values():
        key.versions.append(b"\x07" * 32)
    assert await backend.unwrap(REF, handle, fresh.wrapped) == fresh.secret


@pytest.mark.parametrize("disablings", [1, 2])
async def test_enabling_undoes_disabling_however_often_it_was_done(
    backend: Backends, server: TransitServer, disablings: int
) -> None:
    handle = await backend.create(REF)
    fresh = await backend.generate(REF, handle)
    for _ in range(disablings):
        disabled = await backend.restate(REF, handle, KeyState.DISABLED)
    assert all(key.min_decryption_version > 1 for key in server.keys.values())
    enabled = await backend.restate(replace(REF, state=KeyState.DISABLED), disabled, KeyState.ENABLED)
    assert await backend.unwrap(REF, enabled, fresh.wrapped) == fresh.secret


async def test_a_token_replaced_by_an_agent_is_used_at_once(backend: Backends, server: TransitServer) -> None:
    handle = await backend.create(REF)
    server.tokens = {"s.next": Token()}
    error = await refused(Code.CUSTODIAN_REFUSED, backend.generate(REF, handle))
    assert "token" in error.why
    assert server.token not in str(error)
    server.write_token("s.next")
    await backend.generate(REF, handle)


async def test_a_token_is_renewed_when_half_of_its_life_is_over(backend: Backends, server: TransitServer) -> None:
    token = server.tokens[server.token]
    await backend.check()
    assert token.renewals == 0
    token.ttl = token.creation_ttl // 2 - 1
    await backend.check()
    assert token.renewals == 1
    server.tokens[server.token] = Token(ttl=10, renewable=False)
    await backend.check()
    assert server.tokens[server.token].renewals == 0


async def test_a_sealed_server_is_said_to_be_sealed(backend: Backends, server: TransitServer) -> None:
    handle = await backend.create(REF)
    server.sealed = True
    error = await refused(Code.CUSTODIAN_UNAVAILABLE, backend.check())
    assert "sealed" in error.why
    await refused(Code.CUSTODIAN_UNAVAILABLE, backend.generate(REF, handle))
    server.sealed = False
    await backend.generate(REF, handle)


async def test_a_server_that_went_away_is_used_again_when_it_is_back(backend: Backends, server: TransitServer) -> None:
    handle = await backend.create(REF)
    await server.stop()
    await refused(Code.CUSTODIAN_UNAVAILABLE, backend.generate(REF, handle))
    await server.start()
    await backend.generate(REF, handle)


async def test_a_connection_that_breaks_is_tried_once_more(backend: Backends, server: TransitServer) -> None:
    handle = await backend.create(REF)

    async def hang_up(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    server.replies = [hang_up]
    await backend.generate(REF, handle)
    server.replies = [hang_up, hang_up]
    await refused(Code.CUSTODIAN_UNAVAILABLE, backend.generate(REF, handle))


async def test_a_server_of_another_ca_is_refused(backend: Backends, server: TransitServer, tmp_path: Path) -> None:
    _, other = server_context(tmp_path, "other")
    liar = await opened(server.uri.replace(str(server.ca_file), str(other)), tmp_path)
    error = await refused(Code.CUSTODIAN_REFUSED, liar.create(REF))
    assert "certificate" in error.why
    assert server.requests == []
    await liar.aclose()


async def test_a_redirect_is_not_followed_and_does_not_pass_for_success(
    backend: Backends, server: TransitServer
) -> None:
    async def redirect(request: web.Request) -> web.StreamResponse:
        raise web.HTTPTemporaryRedirect(f"https://127.0.0.1:{server.port}/v1/elsewhere")

    server.replies = [redirect]
    await refused(Code.CUSTODIAN_ANSWER_INVALID, backend.create(REF))
    assert not any("elsewhere" in request for request in server.requests)


async def test_a_mount_that_is_not_there_is_no_lost_key(server: TransitServer, tmp_path: Path) -> None:
    backend = await opened(server.uri, tmp_path)
    handle = await backend.create(REF)
    server.mount = "moved"
    error = await refused(Code.CUSTODIAN_REFUSED, backend.generate(REF, handle))
    assert "mount" in error.why
    await refused(Code.CUSTODIAN_REFUSED, backend.destroy(REF, handle))
    await backend.aclose()


async def test_an_associated_data_is_sent_with_every_part(backend: Backends, server: TransitServer) -> None:
    handle = await backend.create(REF)
    seen: list[str] = []

    async def listen(request: web.Request) -> web.StreamResponse:
        seen.append((await request.json())["associated_data"])
        return await server._route(request)

    server.replies = [listen]
    await backend.generate(REF, handle)
    assert seen == [base64.b64encode(REF.custodian_aad()).decode()]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"null",
        b'{"data": null}',
        b'{"data": {}}',
        b'{"data": {"plaintext": 5}}',
        b'{"data": {"plaintext": "!"}}',
        b'{"data": {"plaintext": "AAAA"}}',
        b'{"data": {"plaintext": "' + base64.b64encode(b"\x00" * 33) + b'"}}',
    ],
)
async def test_an_answer_that_is_none_is_not_believed(backend: Backends, server: TransitServer, body: bytes) -> None:
    handle = await backend.create(REF)
    fresh = await backend.generate(REF, handle)

    async def nonsense(request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type="application/json")

    server.replies = [nonsense]
    await refused(Code.CUSTODIAN_ANSWER_INVALID, backend.unwrap(REF, handle, fresh.wrapped))


async def test_another_key_in_the_answer_opens_nothing(backend: Backends, server: TransitServer) -> None:
    handle = await backend.create(REF)

    async def lie(request: web.Request) -> web.StreamResponse:
        return web.json_response({"data": {"plaintext": base64.b64encode(b"\x00" * 32).decode()}})

    server.replies = [lie]
    await refused(Code.STORE_DAMAGED, backend.generate(REF, handle))


async def test_a_slow_server_costs_no_more_than_the_deadline(backend: Backends, server: TransitServer) -> None:
    handle = await backend.create(REF)
    asked, answer = asyncio.Event(), asyncio.Event()

    async def wait(request: web.Request) -> web.StreamResponse:
        asked.set()
        await answer.wait()
        return web.Response(status=503)

    server.replies = [wait]
    slow = asyncio.ensure_future(backend.generate(REF, handle))
    await asked.wait()
    # Others are served meanwhile: one slow answer holds one thread of several.
    await asyncio.gather(*(backend.generate(REF, handle) for _ in range(8)))
    answer.set()
    await refused(Code.CUSTODIAN_UNAVAILABLE, slow)
