# SPDX-License-Identifier: Apache-2.0
"""Where EHSM is unsafe and no client depends on it, the development server is strict."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from cloister import ehsm
from cloister.secret import SecretBytes
from cloister_sim.ehsm.server import EhsmServer
from fakes.ehsm_clients import SdkClient


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EhsmServer]:
    async with EhsmServer(tmp_path / "ehsm") as running:
        yield running


@pytest.fixture
async def sdk(server: EhsmServer) -> AsyncIterator[SdkClient]:
    async with SdkClient(server) as client:
        await client.enroll()
        yield client


def body(sdk: SdkClient, **members: Any) -> dict[str, Any]:
    """Return a signed request by the exact rules, whatever is in it."""
    full = {"appid": sdk.appid, "timestamp": sdk.now(), **members}
    return {**full, "sign": ehsm.sign(SecretBytes(sdk.api_key.encode()), full)}


async def message(sdk: SdkClient, request: dict[str, Any], action: str = "ListKey") -> Any:
    return (await sdk.send(action, request)).get("message")


async def test_the_same_bytes_are_refused_also_after_a_restart(tmp_path: Path) -> None:
    async with EhsmServer(tmp_path / "ehsm") as server, SdkClient(server) as sdk:
        await sdk.enroll()
        request = body(sdk, nonce="ab")
        assert await message(sdk, request) == "successful"
        assert "repeated" in await message(sdk, request)
    async with EhsmServer(tmp_path / "ehsm") as server, SdkClient(server) as again:
        assert "repeated" in await message(again, request)
        assert await message(again, body(sdk, nonce="ac")) == "successful"


async def test_ehsms_own_rule_holds_a_known_nonce_with_a_known_time_is_refused(sdk: SdkClient) -> None:
    first, second = str(int(sdk.now()) - 1), sdk.now()
    assert await message(sdk, body(sdk, nonce="n1", timestamp=first)) == "successful"
    assert await message(sdk, body(sdk, nonce="n2", timestamp=second)) == "successful"
    assert "repeated" in await message(sdk, body(sdk, nonce="n1", timestamp=second))
    assert await message(sdk, body(sdk, nonce="n3", timestamp=second)) == "successful"
    assert await message(sdk, body(sdk, nonce="n1", timestamp=str(int(second) + 1))) == "successful"


@pytest.mark.parametrize("nonce", ["", [], {}, None, False, 0, [""], {"ab": "="}, ["ab"]])
async def test_a_request_cannot_be_sent_again_under_another_form_of_its_nonce(sdk: SdkClient, nonce: Any) -> None:
    request = body(sdk, nonce="ab==") if nonce == {"ab": "="} else body(sdk)
    assert await message(sdk, request) == "successful"
    assert await message(sdk, {**request, "nonce": nonce}) in (
        "Timestamp can't be repeated in 20 minutes",
        "param type error",
        "sign error",
    )


async def test_one_signature_counts_once_however_its_text_is_cut_into_fields(sdk: SdkClient) -> None:
    request = body(sdk, nonce="ab", payload={"keyid": "K"})
    shifted = {name: value for name, value in request.items() if name != "payload"} | {"nonce": "ab&payload=keyid=K"}
    assert await message(sdk, shifted) == "successful"
    assert "repeated" in await message(sdk, request)


async def test_a_wrong_signature_uses_up_no_nonce_and_shows_nothing_of_the_payload(sdk: SdkClient) -> None:
    request = body(sdk, nonce="ab", payload={"keyid": "not a key id"})
    forged = {**request, "sign": ehsm.encode(bytes(32))}
    assert await message(sdk, forged, "Encrypt") == "sign error"
    assert await message(sdk, request, "Encrypt") == "Parameter invalid, The keyid length error."


async def test_an_unknown_user_gets_an_answer_without_a_message(sdk: SdkClient) -> None:
    for appid in ("aac3e45a-d3dc-4791-89b6-4ada0e38e6ef", "__proto__", "constructor", "x" * 1000):
        assert await sdk.send("ListKey", body(sdk, appid=appid, nonce="ab")) == {"code": 400, "result": {}}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"timestamp": 1700000000123}, "param type error"),
        ({"timestamp": "170000000012"}, "Timestamp length error"),
        ({"timestamp": "0x19abc012345"}, "Timestamp error"),
        ({"timestamp": "1700000000123"}, "Timestamp error"),
        ({"timestamp": ""}, "Missing required parameters"),
        ({"appid": None}, "Missing required parameters"),
        ({"appid": ["x"]}, "param type error"),
        ({"sign": True}, "param type error"),
        ({"payload": ["x"]}, "param type error"),
        ({"payload": "x"}, "param type error"),
        ({"nonce": "a" * 65}, "Nonce length error"),
        ({"nonce": 1.5}, "param type error"),
    ],
)
async def test_an_envelope_of_another_form_is_refused(sdk: SdkClient, change: Any, expected: str) -> None:
    assert await message(sdk, {**body(sdk, nonce="ab"), **change}) == expected


@pytest.mark.parametrize("minutes", [-10, 10])
async def test_time_is_bounded_on_both_sides(sdk: SdkClient, minutes: int) -> None:
    sdk.skew_ms = minutes * 60_000 + (6_000 if minutes < 0 else -6_000)
    assert (await sdk.ask("ListKey"))["code"] == 200
    sdk.skew_ms = minutes * 60_000 + (-6_000 if minutes < 0 else 6_000)
    assert (await sdk.ask("ListKey"))["message"] == "Timestamp error"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"NaN",
        b'{"appid": NaN}',
        b'{"appid": "a", "appid": "b"}',
        b"\xff",
        b'{"appid": "\\ud800"}',
        b"[" * 50_000,
        b'{"a": 1' + b"0" * 5000 + b"}",
    ],
)
async def test_what_is_not_a_request_gets_an_answer_in_json(sdk: SdkClient, data: bytes) -> None:
    status, answer = await sdk.raw("ListKey", data)
    assert status == 200
    assert json.loads(answer)["message"] in ("Invalid JSON", "Missing required parameters")


async def test_paths_methods_types_and_sizes_are_those_of_ehsm(server: EhsmServer, sdk: SdkClient) -> None:
    request = json.dumps(body(sdk, nonce="ab")).encode()
    assert json.loads((await sdk.raw("ListKey", request, content_type="text/plain"))[1])["code"] == 400
    assert json.loads((await sdk.raw("ListKey", request, method="GET"))[1])["code"] == 404
    assert (await sdk.raw("ListKey", request, method="PUT"))[0] == 404
    assert (await sdk.raw("ListKey", b'{"a": "' + b"x" * ehsm.MAX_BODY + b'"}'))[0] == 413
    assert json.loads((await sdk.raw("listkey", request))[1])["message"] == "API Not Found"
    sdk.path = "/other"
    assert (await sdk.raw("ListKey", request))[0] == 404


async def test_a_text_too_long_for_the_enclave_is_refused_as_there(sdk: SdkClient) -> None:
    key = await sdk.create("EH_AES_GCM_256")
    largest = {"keyid": key, "plaintext": ehsm.encode(bytes(6144)), "aad": ehsm.encode(bytes(32))}
    assert (await sdk.ask("Encrypt", largest))["code"] == 200
    too_long = {**largest, "aad": ehsm.encode(bytes(1024))}
    assert (await sdk.ask("Encrypt", too_long))["message"] == "Unexpected Error"


async def test_a_key_moved_to_another_user_in_the_database_does_not_open(tmp_path: Path) -> None:
    async with EhsmServer(tmp_path / "ehsm") as server, SdkClient(server) as owner, SdkClient(server) as thief:
        await owner.enroll()
        await thief.enroll()
        key = await owner.create("EH_AES_GCM_256")
    connection = apsw.Connection(str(tmp_path / "ehsm" / "ehsm.sqlite"))
    connection.execute("UPDATE keys SET appid = ?", (thief.appid,))
    connection.close()
    async with EhsmServer(tmp_path / "ehsm") as server, SdkClient(server) as again:
        again.appid, again.api_key = thief.appid, thief.api_key
        assert (await again.ask("Encrypt", {"keyid": key, "plaintext": "dGVz"}))["code"] == 500


async def test_no_secret_lies_in_the_clear_beside_the_database(tmp_path: Path) -> None:
    async with EhsmServer(tmp_path / "ehsm") as server, SdkClient(server) as sdk:
        await sdk.enroll()
        await sdk.call("CreateSecret", {"secretName": "name", "secretData": "very secret text"})
    for file in (tmp_path / "ehsm").glob("ehsm.sqlite*"):
        data = file.read_bytes()
        assert b"very secret" not in data
        assert sdk.api_key.encode() not in data
    assert (tmp_path / "ehsm" / "domain.key").stat().st_mode & 0o777 == 0o600
