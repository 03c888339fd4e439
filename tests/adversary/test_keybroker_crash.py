# SPDX-License-Identifier: Apache-2.0
"""kill -9 at any moment: what was acknowledged is there after the restart, nothing is half made, the log verifies."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.release.keys import KeyState
from cloister.secret import SecretBytes
from cloister_keybroker.rootkey import create_root_key, read_root_key
from cloister_keybroker.sealrecord import SealRecord, Source
from cloister_keybroker.store import KeyStore
from fakes import keybroker_crasher
from fakes.certs import TestCa
from fakes.keybroker_crasher import digest
from fakes.keybroker_harness import TENANT, Broker, owner
from fakes.keybroker_vault import a_vault, opens

OPERATIONS = 500
REKEYS = 40


def run_and_kill(what: str, directory: Path, after: int, bytes_more: int) -> list[dict[str, Any]]:
    """Run a broker until it has acknowledged `after` operations, kill it a little later, return what it acknowledged.

    The little is a random number of bytes of its output: the kill falls into any part of an operation.
    """
    tests = Path(keybroker_crasher.__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, keybroker_crasher.__file__, what, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(tests)},
    )
    assert process.stdout is not None
    lines: list[bytes] = []
    try:
        while len(lines) <= after:
            line = process.stdout.readline()
            assert line, "the broker ended by itself"
            lines.append(line)
        lines.append(process.stdout.read1(bytes_more))
    finally:
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
        process.wait()
    whole = (b"".join(lines) + rest).split(b"\n")[:-1]  # a line that was cut acknowledges nothing
    found = [json.loads(line) for line in whole if line.startswith(b"{")]
    return found[1:]


@pytest.mark.timeout(240)
async def test_no_acknowledged_key_is_lost_when_the_broker_is_killed(tmp_path: Path) -> None:
    acknowledged: list[dict[str, Any]] = []
    while len(acknowledged) < OPERATIONS:
        after, more = 1 + secrets.randbelow(140), 1 + secrets.randbelow(400)
        acknowledged += run_and_kill("keys", tmp_path, after, more)
        # Opening verifies log, head and every key row.
        broker = await Broker.open(tmp_path / "store.sqlite", tmp_path / "root.key", TestCa())
        try:
            await broker.destruction.carry_out()  # what a crash cut short is finished
            await check(broker, acknowledged)
            await check_that_nothing_is_half_made(broker)
        finally:
            broker.store.close()


async def check(broker: Broker, acknowledged: list[dict[str, Any]]) -> None:
    """Every acknowledged operation is in the log, every key is there, and its data keys open."""
    log = {logged.index: logged.entry for logged in await whole_log(broker)}
    assert sorted(log) == list(range(len(log)))
    done = {(fact["what"], fact["uri"]) for fact in acknowledged}
    for fact in acknowledged:
        uri = KeyUri.parse(fact["uri"])
        if "index" in fact:
            assert (log[fact["index"]].key_uri, log[fact["index"]].granted) == (fact["uri"], True)
        record = (await broker.owners.get(owner(), uri)).record
        if fact["what"] == "rotate":
            assert record.newest == 2
        elif fact["what"] == "disable":
            assert record.state is KeyState.DISABLED
        elif fact["what"] == "schedule":
            assert record.state in (KeyState.DESTRUCTION_SCHEDULED, KeyState.DESTROYED)
        elif fact["what"] == "destroy":
            assert record.state is KeyState.DESTROYED
        elif fact["what"] == "generate":
            try:
                wrapped = bytes.fromhex(fact["wrapped"])
                secret = await broker.open_key(wrapped, uri=uri, version=fact["version"])
            except CloisterError as error:
                # Closed by its owner, perhaps without an acknowledgement: killed just before that.
                assert error.code in (Code.KEY_DISABLED, Code.KEY_STATE), str(error)  # noqa: PT017
                assert record.state is not KeyState.ENABLED
                continue
            assert digest(secret) == fact["secret"]
            assert ("disable", fact["uri"]) not in done


async def check_that_nothing_is_half_made(broker: Broker) -> None:
    """Every key that is there is whole: all its versions open what they wrap, or it is closed and says so."""
    for listed in await broker.owners.list(owner(), after="", limit=1000):
        record = listed.record
        versions = await broker.store.read(lambda t, record=record: t.versions(record))
        assert len(versions) == (0 if record.state is KeyState.DESTROYED else record.newest)
        if record.state is KeyState.ENABLED:
            answer, secret = await broker.generate(record.uri)
            assert await broker.open_key(answer.wrapped, uri=record.uri, version=record.newest) == secret


async def whole_log(broker: Broker) -> list[Any]:
    """Return the tenant's entries and those of no tenant: there are no others."""
    return await broker.store.read(
        lambda t: [logged for tenant in (TENANT, "") for logged in t.log.newest(tenant, limit=10**6)]
    )


@pytest.mark.timeout(240)
async def test_a_root_key_is_the_old_one_or_the_new_one_when_the_broker_is_killed(tmp_path: Path) -> None:
    create_root_key(tmp_path / "root.key")
    (await KeyStore.create(tmp_path / "store.sqlite", read_root_key(tmp_path / "root.key"), SealRecord())).close()
    acknowledged: list[dict[str, Any]] = []
    while sum(fact["what"] == "rekey" for fact in acknowledged) < REKEYS:
        after, more = 1 + secrets.randbelow(24), 1 + secrets.randbelow(700)
        acknowledged += run_and_kill("rekey", tmp_path, after, more)
        async with a_vault(tmp_path, Source.FILE) as vault:
            opened = vault.vault.opened
            for fact in acknowledged:
                if fact["what"] == "generate":
                    data, uri = bytes.fromhex(fact["wrapped"]), KeyUri.parse(fact["uri"])
                    assert digest(await opens(opened.store, opened.backends, data, uri)) == fact["secret"]
        present = digest(SecretBytes((tmp_path / "root.key").read_bytes()))
        replaced = [fact["file"] for fact in acknowledged if fact["what"] == "rekey"]
        assert present not in replaced[:-1]
