# SPDX-License-Identifier: Apache-2.0
"""The EHSM back end against the development server, while everything on the way goes wrong."""

from __future__ import annotations

import asyncio
import base64
import secrets
import sys
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from cloister.errors import CloisterError, Code
from cloister.release.keys import KeyState, Purpose
from cloister.secret import SecretBytes
from cloister_keybroker.backends import KeyRef
from cloister_keybroker.backends.ehsm.breaker import Breaker
from cloister_keybroker.backends.ehsm.client import EhsmClient
from cloister_keybroker.backends.ehsm.custodian import EhsmCustodian, open_ehsm
from cloister_keybroker.backends.ehsm.failures import Undone
from cloister_keybroker.backends.ehsm.options import EhsmLimits
from cloister_keybroker.backends.factory import open_backends
from cloister_keybroker.backends.uri import BackendUri
from cloister_keybroker.rootkey import RootKey
from cloister_sim.ehsm import faults
from cloister_sim.ehsm.faults import Fault
from cloister_sim.ehsm.quoteactions import MR_ENCLAVE
from cloister_sim.ehsm.service import Generation
from fakes.custodian_in_memory import Moments
from fakes.ehsm_place import EhsmPlace
from fakes.keybroker_harness import KEY

REF = KeyRef(KEY, 1, KeyState.ENABLED, frozenset({Purpose.TRAIN}))
AAD = REF.custodian_aad()
LOCATOR = b"aac3e45a-d3dc-4791-89b6-4ada0e38e6ef"
SHORT = EhsmLimits(connect_s=0.3, total_s=0.4, idle_s=0.05, unwraps=2, changes=1, waiting=1)
DAY = timedelta(days=1)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[EhsmPlace]:
    async with EhsmPlace(tmp_path / "ehsm", clock=Moments()) as running:
        yield running


@pytest.fixture
async def custodian(place: EhsmPlace, tmp_path: Path) -> AsyncIterator[EhsmCustodian]:
    opened = await opened_again(place, tmp_path)
    yield opened
    await opened.aclose()


@pytest.fixture
async def client(place: EhsmPlace) -> AsyncIterator[EhsmClient]:
    made = place.client(SHORT)
    yield made
    await made.aclose()


async def opened_again(place: EhsmPlace, tmp_path: Path) -> EhsmCustodian:
    return await open_ehsm(BackendUri.parse(place.uri), tmp_path, place.clock)


async def refused(attempt: Any, code: Code) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        await attempt
    assert caught.value.code is code, str(caught.value)
    return caught.value


def advance(place: EhsmPlace, **by: float) -> None:
    assert isinstance(place.clock, Moments)
    place.clock.advance(**by)


async def listed(custodian: EhsmCustodian) -> dict[bytes, bool]:
    return {key.keyid.encode(): key.enabled for key in await custodian._client.list_keys()}


# what it does


@pytest.mark.parametrize("generation", Generation)
async def test_a_part_is_bound_to_its_key_at_both_generations(tmp_path: Path, generation: Generation) -> None:
    async with EhsmPlace(tmp_path / "ehsm", clock=Moments(), generation=generation) as place:
        custodian = await opened_again(place, tmp_path)
        locator, other = await custodian.create(REF), await custodian.create(REF)
        part = await custodian.generate(locator, AAD)
        assert await custodian.unwrap(locator, part.wrapped, AAD) == part.secret
        await refused(custodian.unwrap(locator, part.wrapped, secrets.token_bytes(48)), Code.CUSTODIAN_REFUSED)
        await refused(custodian.unwrap(other, part.wrapped, AAD), Code.CUSTODIAN_REFUSED)
        await custodian.aclose()


async def test_a_key_is_disabled_enabled_and_destroyed_there(custodian: EhsmCustodian) -> None:
    locator = await custodian.create(REF)
    part = await custodian.generate(locator, AAD)
    await custodian.disable(locator)
    await refused(custodian.unwrap(locator, part.wrapped, AAD), Code.KEY_DISABLED)
    await custodian.enable(locator)
    await custodian.destroy(locator)
    await custodian.destroy(locator)
    await refused(custodian.unwrap(locator, part.wrapped, AAD), Code.CUSTODIAN_KEY_LOST)


async def test_data_outlives_ehsms_keys_when_they_are_made_again_in_time(place: EhsmPlace, tmp_path: Path) -> None:
    root = RootKey(SecretBytes(secrets.token_bytes(32)))
    backend = await open_backends(place.uri, (), root, state_dir=tmp_path, clock=place.clock)
    handle = await backend.create(REF)
    fresh = await backend.generate(REF, handle)
    advance(place, days=299)
    assert await backend.maintain(REF, handle, place.clock()) is None
    advance(place, days=1)
    renewed = await backend.maintain(REF, handle, place.clock())
    assert renewed is not None
    advance(place, days=40)
    # The old one is refused at 340 days, loudly and before EHSM deletes it.
    await refused(backend.unwrap(REF, handle, fresh.wrapped), Code.CUSTODIAN_KEY_EXPIRING)
    advance(place, days=16)
    assert await place.server.service.sweep() == 1
    assert await backend.unwrap(REF, renewed, fresh.wrapped) == fresh.secret
    await backend.destroy(REF, handle)
    await backend.aclose()


# what goes wrong on the way


@pytest.mark.parametrize(
    "fault",
    [
        Fault("Decrypt", drop=True),
        Fault("Decrypt", drop_answer=True),
        Fault("Decrypt", times=2, change=faults.answer(500, "Server exception.")),
        Fault("Decrypt", change=faults.answer(400, {})),
        Fault("Decrypt", times=2, change=faults.answer(400, "Timestamp can't be repeated in 20 minutes")),
        Fault("Decrypt", body=b"busy", status=503),
    ],
    ids=["dropped", "answer lost", "500 twice", "message is an object", "taken for a replay", "proxy"],
)
async def test_a_harmless_call_is_made_again_and_gives_the_right_part(
    place: EhsmPlace, custodian: EhsmCustodian, fault: Fault
) -> None:
    locator = await custodian.create(REF)
    part = await custodian.generate(locator, AAD)
    before = place.faults.count("Decrypt")
    place.faults.add(replace_fault(fault))
    # The server refuses a signature that it has seen: that this succeeds shows that each attempt has its own.
    assert await custodian.unwrap(locator, part.wrapped, AAD) == part.secret
    assert place.faults.count("Decrypt") - before == fault.times + 1


def replace_fault(fault: Fault) -> Fault:
    """Return a copy: a fault counts down."""
    return replace(fault)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault("Decrypt", times=9, drop=True), Code.CUSTODIAN_UNAVAILABLE),
        (Fault("Decrypt", times=9, change=faults.answer(500, "Server exception.")), Code.CUSTODIAN_UNAVAILABLE),
        (Fault("Decrypt", times=9, change=faults.answer(400, {})), Code.CUSTODIAN_UNAVAILABLE),
        (Fault("Decrypt", change=faults.answer(400, None)), Code.CUSTODIAN_REFUSED),
        (Fault("Decrypt", change=faults.answer(400, "sign error")), Code.CUSTODIAN_REFUSED),
        (Fault("Decrypt", change=faults.answer(404, "API Not Found")), Code.CUSTODIAN_REFUSED),
        (Fault("Decrypt", change=faults.answer(400, "keyid expire")), Code.CUSTODIAN_KEY_LOST),
        (Fault("Decrypt", change=faults.answer(400, "please send this elsewhere")), Code.CUSTODIAN_REFUSED),
        (Fault("Decrypt", change=faults.answer(200, "success!", {})), Code.CUSTODIAN_ANSWER_INVALID),
        (Fault("Decrypt", change=faults.answer(200, "success!", {"plaintext": "dGVz"})), Code.CUSTODIAN_ANSWER_INVALID),
        (Fault("Decrypt", change=lambda _: []), Code.CUSTODIAN_ANSWER_INVALID),
        (Fault("Decrypt", body=b"<html>log in</html>"), Code.CUSTODIAN_ANSWER_INVALID),
        (Fault("Decrypt", body=b"x", status=302), Code.CUSTODIAN_ANSWER_INVALID),
        (Fault("Decrypt", body=b'{"code": 200, "result": {}}' + b" " * 100_000), Code.CUSTODIAN_ANSWER_INVALID),
    ],
)
async def test_a_call_that_does_not_get_an_answer_gives_one_error(
    place: EhsmPlace, custodian: EhsmCustodian, fault: Fault, code: Code
) -> None:
    locator = await custodian.create(REF)
    part = await custodian.generate(locator, AAD)
    place.faults.add(replace_fault(fault))
    error = await refused(custodian.unwrap(locator, part.wrapped, AAD), code)
    assert "elsewhere" not in str(error)
    place.faults.clear()
    assert await custodian.unwrap(locator, part.wrapped, AAD) == part.secret


async def test_a_wrapping_that_does_not_open_is_noticed_before_it_is_relied_on(
    place: EhsmPlace, custodian: EhsmCustodian
) -> None:
    locator = await custodian.create(REF)
    other = await custodian.generate(locator, AAD)

    def swapped(members: dict[str, Any]) -> dict[str, Any]:
        return members | {"result": {"ciphertext": base64.b64encode(other.wrapped).decode()}}

    place.faults.add(Fault("Encrypt", change=swapped))
    await refused(custodian.generate(locator, AAD), Code.CUSTODIAN_ANSWER_INVALID)


async def test_an_answer_never_comes_later_than_the_deadline(place: EhsmPlace, client: EhsmClient) -> None:
    gate = asyncio.Event()
    place.faults.add(Fault("ListKey", gate=gate))
    began = asyncio.get_running_loop().time()
    await refused(client.list_keys(), Code.CUSTODIAN_UNAVAILABLE)
    assert asyncio.get_running_loop().time() - began < SHORT.total_s + 0.3
    gate.set()


async def test_slow_changes_hold_up_no_unwrapping_and_do_not_pile_up(place: EhsmPlace, client: EhsmClient) -> None:
    keyid = await client.create_key()
    wrapped = await client.encrypt(keyid, SecretBytes(bytes(32)), AAD)
    gate = asyncio.Event()
    place.faults.add(Fault("ListKey", times=9, gate=gate))
    slow = [asyncio.create_task(client.list_keys()) for _ in range(2)]  # one runs, one waits
    await asyncio.sleep(0)
    await refused(client.list_keys(), Code.CUSTODIAN_BUSY)
    assert await client.decrypt(keyid, wrapped, AAD) == SecretBytes(bytes(32))
    gate.set()
    assert all(len(keys) == 1 for keys in await asyncio.gather(*slow))


async def test_a_server_that_came_back_is_used_at_once(place: EhsmPlace, custodian: EhsmCustodian) -> None:
    locator = await custodian.create(REF)
    part = await custodian.generate(locator, AAD)
    await place.restart()
    assert await custodian.unwrap(locator, part.wrapped, AAD) == part.secret


async def test_a_connection_that_idled_is_not_used_again(place: EhsmPlace, client: EhsmClient) -> None:
    await client.list_keys()
    await client.list_keys()
    await asyncio.sleep(2 * SHORT.idle_s)
    await client.list_keys()
    first, second, third = place.faults.connections
    assert first == second != third


async def test_the_circuit_opens_and_the_canary_closes_it(place: EhsmPlace) -> None:
    client = place.client(SHORT, Breaker(threshold=2, first_pause_s=0.05))
    keyid = await client.create_key()
    wrapped = await client.encrypt(keyid, SecretBytes(bytes(32)), AAD)
    client.keep_canary(keyid, wrapped, AAD, SecretBytes(bytes(32)))
    failure = place.faults.add(Fault(times=2, drop=True))
    await refused(client.list_keys(), Code.CUSTODIAN_UNAVAILABLE)
    assert failure.times == 0
    sent = len(place.faults.requests)
    await refused(client.list_keys(), Code.CUSTODIAN_UNAVAILABLE)
    assert len(place.faults.requests) == sent  # nobody waits for what is known to fail
    await asyncio.sleep(0.06)
    # The canary opens as something else: the circuit stays open.
    place.faults.add(Fault("Decrypt", change=lambda answer: answer | {"result": {"plaintext": "A" * 42 + "8="}}))
    await refused(client.list_keys(), Code.CUSTODIAN_UNAVAILABLE)
    await asyncio.sleep(0.1)
    assert len(await client.list_keys()) == 1
    assert place.faults.requests[sent:] == ["Decrypt", "Decrypt", "ListKey"]
    await client.aclose()


async def test_without_a_canary_the_list_of_keys_is_the_probe(place: EhsmPlace) -> None:
    client = place.client(SHORT, Breaker(threshold=1, first_pause_s=0.01))
    place.faults.add(Fault(drop=True))
    await refused(client.list_keys(), Code.CUSTODIAN_UNAVAILABLE)
    await asyncio.sleep(0.02)
    place.faults.add(Fault(change=faults.answer(400, {})))
    await refused(client.version(), Code.CUSTODIAN_UNAVAILABLE)
    await asyncio.sleep(0.04)
    await client.version()
    assert place.faults.requests == ["ListKey", "ListKey", "ListKey", "GetVersion"]
    await client.aclose()


async def test_clocks_that_differ_raise_an_alarm_and_then_say_what_is_wrong(
    place: EhsmPlace, custodian: EhsmCustodian
) -> None:
    place.server_clock = lambda: place.clock() + timedelta(minutes=2)
    with capture_logs() as logs:
        await custodian.probe()
        await custodian.probe()
    assert [log["ahead_s"] for log in logs if log["event"] == "clocks differ"] == [120]
    place.server_clock = lambda: place.clock() - timedelta(minutes=11)
    error = await refused(custodian.enable(str(uuid.uuid4()).encode()), Code.CUSTODIAN_REFUSED)
    assert "660 s behind" in error.why


async def test_a_clock_that_is_set_back_does_not_stop_requests(place: EhsmPlace, custodian: EhsmCustodian) -> None:
    locator = await custodian.create(REF)
    advance(place, hours=-1)
    await custodian.enable(locator)


async def test_requests_of_one_millisecond_are_no_replays_to_the_older_generation(tmp_path: Path) -> None:
    async with EhsmPlace(tmp_path / "ehsm", clock=Moments(), generation=Generation.OLD) as place:
        client = place.client()
        await asyncio.gather(*(client.list_keys() for _ in range(8)))
        assert place.faults.count("ListKey") == 8
        await client.aclose()


# keys whose making broke off


async def test_making_a_key_is_never_tried_twice_when_it_may_have_been_done(
    place: EhsmPlace, custodian: EhsmCustodian
) -> None:
    for fault in (
        Fault("CreateKey", drop_answer=True),
        Fault("CreateKey", change=faults.answer(500, "Server exception.")),
    ):
        before = place.faults.count("CreateKey")
        place.faults.add(fault)
        error = await refused(custodian.create(REF), Code.CUSTODIAN_UNAVAILABLE)
        assert not isinstance(error, Undone)
        assert place.faults.count("CreateKey") == before + 1
    assert len(await listed(custodian)) == 2


async def test_a_key_whose_answer_was_lost_is_found_and_disabled_once_nothing_can_come_of_it(
    place: EhsmPlace, custodian: EhsmCustodian, tmp_path: Path
) -> None:
    used = await custodian.create(REF)
    place.faults.add(Fault("CreateKey", drop_answer=True))
    await refused(custodian.create(REF), Code.CUSTODIAN_UNAVAILABLE)
    again = await opened_again(place, tmp_path)  # the broker was killed meanwhile
    await again.reconcile([used])
    assert sum((await listed(again)).values()) == 2  # too early: the request might still be on its way
    advance(place, minutes=21)
    await again.reconcile([used])
    keys = await listed(again)
    assert keys.pop(used)
    assert list(keys.values()) == [False]
    assert not list((tmp_path / "intents-ehsm").iterdir())
    await again.aclose()


async def test_a_key_made_at_another_time_is_not_taken_for_the_lost_one(
    place: EhsmPlace, custodian: EhsmCustodian, tmp_path: Path
) -> None:
    earlier = await custodian.create(REF)
    advance(place, hours=1)
    place.faults.add(Fault("CreateKey", drop=True))
    await refused(custodian.create(REF), Code.CUSTODIAN_UNAVAILABLE)
    advance(place, minutes=30)
    later = await custodian.create(REF)
    again = await opened_again(place, tmp_path)
    await again.reconcile([])
    assert (await listed(again))[earlier] is False  # known by name, and used by nothing
    await again.reconcile([earlier, later])
    await again.aclose()


async def test_a_key_that_nothing_uses_is_disabled_and_a_week_later_deleted(
    place: EhsmPlace, custodian: EhsmCustodian, tmp_path: Path
) -> None:
    unused = await custodian.create(REF)
    await custodian.reconcile([])
    assert (await listed(custodian))[unused]  # of this process, and young: its handle may be on its way to the store
    again = await opened_again(place, tmp_path)
    await again.reconcile([])
    assert not (await listed(again))[unused]
    advance(place, days=6)
    await again.reconcile([])
    assert unused in await listed(again)
    advance(place, days=1)
    await again.reconcile([])
    assert unused not in await listed(again)
    assert not list((tmp_path / "intents-ehsm").iterdir())
    await again.aclose()


async def test_a_key_in_use_is_left_alone_and_its_intent_goes(
    place: EhsmPlace, custodian: EhsmCustodian, tmp_path: Path
) -> None:
    used = await custodian.create(REF)
    assert len(list((tmp_path / "intents-ehsm").iterdir())) == 1
    await custodian.reconcile([used])
    assert (await listed(custodian))[used]
    assert not list((tmp_path / "intents-ehsm").iterdir())


async def test_nothing_is_judged_while_a_key_is_being_made(
    place: EhsmPlace, custodian: EhsmCustodian, tmp_path: Path
) -> None:
    place.faults.add(Fault("CreateKey", drop_answer=True))
    await refused(custodian.create(REF), Code.CUSTODIAN_UNAVAILABLE)
    again = await opened_again(place, tmp_path)
    advance(place, minutes=21)
    gate = asyncio.Event()
    place.faults.add(Fault("CreateKey", answer_gate=gate))
    making = asyncio.create_task(again.create(REF))
    while place.faults.count("CreateKey") < 2:
        await asyncio.sleep(0.01)
    await again.reconcile([])
    assert all((await listed(again)).values())
    gate.set()
    locator = await making
    await again.reconcile([locator])
    keys = await listed(again)
    assert keys.pop(locator)
    assert list(keys.values()) == [False]
    await again.aclose()


async def test_no_intent_stays_when_nothing_can_have_been_made(
    place: EhsmPlace, custodian: EhsmCustodian, tmp_path: Path
) -> None:
    place.faults.add(Fault("CreateKey", change=faults.answer(400, "sign error")))
    assert isinstance(await refused(custodian.create(REF), Code.CUSTODIAN_REFUSED), Undone)
    place.faults.add(Fault("GetVersion", times=9, drop=True))
    await refused(custodian.create(REF), Code.CUSTODIAN_UNAVAILABLE)
    place.faults.clear()
    await place.server.stop()
    await refused(custodian.create(REF), Code.CUSTODIAN_UNAVAILABLE)
    assert not list((tmp_path / "intents-ehsm").iterdir())
    await place.start()


# the enclave's quote


def enclave_policy(place: EhsmPlace, *, root: str = "", **enclave: str) -> str:
    server = place.client_directory.parent / "server"
    members = {"mr_enclave": f'["{MR_ENCLAVE.hex()}"]'} | enclave
    return f"""apiVersion: cloister.dev/v1
kind: EhsmEnclavePolicy
spec:
  root: {root or f"simulated:{server / 'platform' / 'root.pem'}"}
  collateral: {server / "collateral"}
  enclave: {{{", ".join(f"{name}: {value}" for name, value in members.items())}}}
  tcb: {{status: [UpToDate]}}
"""


async def with_policy(place: EhsmPlace, tmp_path: Path, policy: str) -> EhsmCustodian:
    file = tmp_path / "enclave.yaml"
    file.write_text(policy)
    uri = place.uri_with(ca=str(place.client_directory / "ca.pem"), enclave_policy=str(file))
    return await open_ehsm(BackendUri.parse(uri), tmp_path, place.clock)


async def test_a_good_quote_is_asked_for_once_a_day_and_the_log_says_how_little_it_proves(tmp_path: Path) -> None:
    async with EhsmPlace(tmp_path / "ehsm") as place:
        custodian = await with_policy(place, tmp_path, enclave_policy(place))
        with capture_logs() as logs:
            await custodian.probe()
            await custodian.probe()
        (told,) = [log for log in logs if "quote" in log["event"]]
        assert told["bound_to_this_connection"] is False
        assert told["fresh"] is False
        assert told["simulated"] is True
        assert place.faults.count("GenerateQuote") == 1
        await custodian.aclose()


@pytest.mark.parametrize(
    "enclave",
    [
        {"mr_enclave": f'["{"ab" * 32}"]'},
        {"mr_signer": f'["{"ab" * 32}"]'},
        {"min_isv_svn": "2"},
    ],
)
async def test_another_enclave_gets_nothing_to_do(tmp_path: Path, enclave: dict[str, str]) -> None:
    async with EhsmPlace(tmp_path / "ehsm") as place:
        custodian = await with_policy(place, tmp_path, enclave_policy(place, **enclave))
        for attempt in (custodian.probe(), custodian.create(REF), custodian.unwrap(LOCATOR, bytes(60), AAD)):
            await refused(attempt, Code.CUSTODIAN_REFUSED)
        assert set(place.faults.requests) == {"GetVersion", "GenerateQuote"}
        assert place.faults.count("GenerateQuote") == 1  # a failure is remembered for a minute
        await custodian.aclose()


async def test_a_quote_that_cannot_be_had_for_a_while_stops_nothing_and_a_bad_one_does(tmp_path: Path) -> None:
    ahead = [timedelta()]

    def clock() -> datetime:
        return datetime.now(UTC) + ahead[0]

    async with EhsmPlace(tmp_path / "ehsm", clock=clock) as place:
        custodian = await with_policy(place, tmp_path, enclave_policy(place))
        await custodian.create(REF)
        ahead[0] = 2 * DAY
        place.faults.add(Fault("GenerateQuote", times=9, change=faults.answer(500, "Server exception.")))
        await custodian.create(REF)
        place.faults.clear()
        ahead[0] = 3 * DAY
        place.faults.add(Fault("GenerateQuote", change=forged))
        await refused(custodian.create(REF), Code.CUSTODIAN_REFUSED)
        await refused(custodian.create(REF), Code.CUSTODIAN_REFUSED)
        ahead[0] += timedelta(minutes=1)
        await custodian.create(REF)
        # A week without any is the end of it.
        ahead[0] += 8 * DAY
        place.faults.add(Fault("GenerateQuote", times=9, change=faults.answer(500, "Server exception.")))
        await refused(custodian.create(REF), Code.CUSTODIAN_UNAVAILABLE)
        await custodian.aclose()


def forged(members: dict[str, Any]) -> dict[str, Any]:
    """Change a byte of a quote."""
    quote = bytearray(base64.b64decode(members["result"]["quote"]))
    quote[200] ^= 1
    return members | {"result": {"quote": base64.b64encode(quote).decode()}}


async def test_a_quote_under_another_root_is_refused(tmp_path: Path) -> None:
    async with EhsmPlace(tmp_path / "ehsm") as place:
        policy = enclave_policy(place, root="intel").replace(
            str(place.client_directory.parent / "server"), str(tmp_path)
        )
        custodian = await with_policy(place, tmp_path, policy)
        await refused(custodian.probe(), Code.QUOTE_REJECTED)
        await custodian.aclose()


async def test_a_quote_that_was_changed_is_refused(tmp_path: Path) -> None:
    async with EhsmPlace(tmp_path / "ehsm") as place:
        custodian = await with_policy(place, tmp_path, enclave_policy(place))

        place.faults.add(Fault("GenerateQuote", change=forged))
        error = await refused(custodian.probe(), Code.CUSTODIAN_REFUSED)
        assert "does not verify" in error.why
        await custodian.aclose()


# enrolling


async def enrolled(place: EhsmPlace, tmp_path: Path, *arguments: str) -> tuple[int, str, str]:
    command = (
        sys.executable,
        "-m",
        "cloister_keybroker.backends.ehsm",
        place.server.url,
        "--out",
        str(tmp_path / "new"),
    )
    process = await asyncio.create_subprocess_exec(
        *command, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_enrolling_writes_credentials_to_files_only_and_once(tmp_path: Path) -> None:
    async with EhsmPlace(tmp_path / "ehsm") as place:
        ca = ("--ca", str(place.client_directory / "ca.pem"))
        code, out, err = await enrolled(place, tmp_path, *ca)
        assert code == 0, err
        api_key = (tmp_path / "new" / "apikey").read_text().strip()
        assert api_key not in out + err
        assert (tmp_path / "new" / "apikey").stat().st_mode & 0o777 == 0o600
        # The printed line is what the configuration takes.
        line = out.removeprefix('backend = "').strip().removesuffix('"')
        custodian = await open_ehsm(BackendUri.parse(line), tmp_path, place.clock)
        await custodian.create(REF)
        await custodian.aclose()
        code, _, err = await enrolled(place, tmp_path, *ca)
        assert code == 2
        assert "is there already" in err
        assert (tmp_path / "new" / "apikey").read_text().strip() == api_key


async def test_enrolling_believes_nobody_who_is_not_known_beforehand(tmp_path: Path) -> None:
    async with EhsmPlace(tmp_path / "ehsm") as place:
        assert (await enrolled(place, tmp_path))[0] == 2
        code, _, err = await enrolled(place, tmp_path, "--pin", f"sha256:{'0' * 64}")
        assert code == 6
        assert "certificate" in err
        assert place.faults.requests == []
        assert not (tmp_path / "new").exists()
