# SPDX-License-Identifier: Apache-2.0
"""kill -9 at any moment: what was acknowledged is there after the restart, and the log verifies."""

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
from cloister.tlv import sha384
from fakes import keybroker_harness
from fakes.certs import TestCa
from fakes.keybroker_harness import Broker, owner

ROUNDS = 6
OPERATIONS_PER_ROUND = 120  # at most; each round ends at a random one


def run_and_kill(store: Path, root_key: Path, after: int, bytes_more: int) -> list[dict[str, Any]]:
    """Run a broker until it has acknowledged `after` operations, kill it a little later, return what it acknowledged.

    The little is a random number of bytes of its output: the kill falls into any part of an operation.
    """
    tests = Path(keybroker_harness.__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, keybroker_harness.__file__, str(store), str(root_key)],
        stdout=subprocess.PIPE,
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
    return [json.loads(line) for line in whole][1:]


@pytest.mark.timeout(180)
async def test_no_acknowledged_key_is_lost_when_the_broker_is_killed(tmp_path: Path) -> None:
    store, root_key = tmp_path / "store.sqlite", tmp_path / "root.key"
    acknowledged: list[dict[str, Any]] = []
    for _ in range(ROUNDS):
        acknowledged += run_and_kill(
            store, root_key, after=secrets.randbelow(OPERATIONS_PER_ROUND), bytes_more=1 + secrets.randbelow(400)
        )
        # Opening verifies log, head and every key row.
        broker = await Broker.open(store, root_key, TestCa())
        try:
            await check(broker, acknowledged)
        finally:
            broker.store.close()


async def check(broker: Broker, acknowledged: list[dict[str, Any]]) -> None:
    """Every acknowledged operation is in the log, every key is there, and its data keys open."""
    log = {logged.index: logged.entry for logged in await whole_log(broker)}
    assert sorted(log) == list(range(len(log)))
    disabled = {fact["uri"] for fact in acknowledged if fact["what"] == "disable"}
    for fact in acknowledged:
        uri = KeyUri.parse(fact["uri"])
        if "index" in fact:
            assert (log[fact["index"]].key_uri, log[fact["index"]].granted) == (fact["uri"], True)
        if fact["what"] == "create":
            await broker.owners.get(owner(), uri)
        elif fact["what"] == "disable":
            assert (await broker.owners.get(owner(), uri)).record.state is KeyState.DISABLED
        elif fact["what"] == "generate" and fact["uri"] not in disabled:
            try:
                secret = await broker.open_key(bytes.fromhex(fact["wrapped"]), uri=uri)
            except CloisterError as error:
                # Killed between the durable `disable` and its acknowledgement.
                if error.code is not Code.KEY_DISABLED:
                    raise
                continue
            assert sha384(secret.reveal()).hex() == fact["secret"]


async def whole_log(broker: Broker) -> list[Any]:
    """Return the tenant's entries and those of no tenant: there are no others."""
    return await broker.store.read(
        lambda t: [logged for tenant in (keybroker_harness.TENANT, "") for logged in t.log.newest(tenant, limit=10**6)]
    )
