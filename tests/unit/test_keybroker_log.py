# SPDX-License-Identifier: Apache-2.0
"""The decision log keeps what was decided, and on what evidence."""

from __future__ import annotations

from pathlib import Path

import apsw
import pytest

from cloister.errors import CloisterError, Code
from cloister.tlv import sha384
from cloister.transparency.entry import Entry
from fakes.keybroker_harness import KEY, TENANT, Broker, a_broker


def an_entry(**changes: object) -> Entry:
    return Entry(
        action="release", tenant=TENANT, key_uri=str(KEY), caller="spiffe://x", granted=True, blocks=(), **changes
    )  # type: ignore[arg-type]


async def tokens(broker: Broker) -> int:
    def count(connection: apsw.Connection) -> int:
        return int(connection.execute("SELECT count(*) FROM evidence").fetchone()[0])

    return await broker.store._database.read(count)


async def test_the_evidence_of_a_decision_is_kept_once(tmp_path: Path) -> None:
    async with a_broker(tmp_path) as broker:
        await broker.create_key()
        await broker.replace_policy(evidence={"max_age": "5m", "nonce": "verifier"})
        td = broker.td()
        token = td.token()
        for _ in range(3):
            await broker.releases.release(td.workload, td.asked(await td.begin(), token))
        entries = [logged.entry for logged in await broker.log() if logged.entry.action == "generate"]
        assert {entry.evidence_digest for entry in entries} == {sha384(token.encode())}
        assert await broker.store.read(lambda t: t.evidence(entries[0].evidence_digest)) == token
        assert await tokens(broker) == 1


async def test_denials_keep_their_evidence_and_garbage_is_not_kept(tmp_path: Path) -> None:
    async with a_broker(tmp_path) as broker:
        await broker.create_key()
        td = broker.td()
        with pytest.raises(CloisterError):
            await td.release(ear={"workload": {"script": bytes(48)}})
        assert await tokens(broker) == 1
        with pytest.raises(CloisterError):
            await broker.releases.release(td.workload, td.asked(await td.begin(), "garbage " * 2000))
        assert await tokens(broker) == 1
        assert await broker.store.read(lambda t: t.evidence(sha384(b"never seen"))) is None


async def test_an_entry_keeps_no_token_but_its_own(tmp_path: Path) -> None:
    async with a_broker(tmp_path) as broker:
        with pytest.raises(ValueError, match="its own"):
            await broker.store.write(
                lambda t: t.append(an_entry(evidence_digest=sha384(b"one")), time_ms=1, token="another")
            )
        assert await broker.log() == []


async def test_an_edited_token_is_refused_when_it_is_read(tmp_path: Path) -> None:
    digest = sha384(b"token")
    async with a_broker(tmp_path) as broker:
        await broker.store.write(lambda t: t.append(an_entry(evidence_digest=digest), time_ms=1, token="token"))
    connection = apsw.Connection(str(tmp_path / "store.sqlite"))
    connection.execute("UPDATE evidence SET token = 'kinder'")
    connection.close()
    async with a_broker(tmp_path) as broker:
        with pytest.raises(CloisterError) as caught:
            await broker.store.read(lambda t: t.evidence(digest))
        assert caught.value.code is Code.STORE_DAMAGED
