# SPDX-License-Identifier: Apache-2.0
"""Where a policy asks for approvals nothing is released without them, and none counts for more than it says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import apsw
import pytest

from cloister.errors import CloisterError, Code
from cloister.policyblocks import digest_text
from cloister.release.keys import Purpose, job_of
from cloister_keybroker.approvaldesk import ApprovalDesk, Messenger, Standing
from fakes.keybroker_harness import (
    CHANNEL,
    COLLEAGUE,
    KEY,
    OTHER_KEY,
    RANK,
    STRANGER,
    TENANT,
    Approver,
    Broker,
    a_broker,
    owner,
    policy_document,
)

JOB = job_of(RANK)
MESSENGER = Messenger(COLLEAGUE, CHANNEL)


class World:
    """A broker with a key for which two of three have to approve."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.approvers = [Approver() for _ in range(3)]
        self.desk = ApprovalDesk(broker.store, broker.clock)
        self.td = broker.td()

    @property
    def rule(self) -> dict[str, object]:
        return {"threshold": "2", "of": [approver.name for approver in self.approvers]}

    async def digest(self) -> bytes:
        return (await self.broker.owners.get(owner(), KEY)).record.policy_digest

    async def approve(self, *numbers: int, job: str = JOB, hours: float = 1, purpose: Purpose = Purpose.TRAIN) -> None:
        until = self.broker.clock() + timedelta(hours=hours)
        for number in numbers:
            envelope = self.approvers[number].approve(await self.digest(), job, until=until, purpose=purpose)
            await self.desk.submit(MESSENGER, envelope)

    async def lacking(self, have: int, **request: object) -> None:
        """Ask for a data key; be refused for want of approvals, `have` of them being there."""
        with pytest.raises(CloisterError) as caught:
            await self.td.release(**request)  # type: ignore[arg-type]
        assert (caught.value.code, caught.value.block) == (Code.APPROVALS_MISSING, "release.approvals")
        block = next(b for b in (await self.broker.log())[0].entry.blocks if b.name == "release.approvals")
        assert (block.ok, block.got.count("did:key:")) == (False, have)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with a_broker(tmp_path) as broker:
        found = World(broker)
        document = policy_document()
        document["spec"]["release"]["approvals"] = found.rule
        await broker.create_key(document)
        yield found


async def test_as_many_approvals_as_the_policy_asks_for_release(world: World) -> None:
    await world.lacking(0)
    await world.approve(0)
    await world.lacking(1)
    await world.approve(2)
    released = await world.td.release()
    assert world.td.open(released)
    block = next(b for b in (await world.broker.log())[0].entry.blocks if b.name == "release.approvals")
    assert set(block.got.split(", ")) == {world.approvers[0].name, world.approvers[2].name}


class ApprovedMeanwhile:
    """The broker's store, where the approvals come in just before a release is written."""

    def __init__(self, world: World) -> None:
        self._store, self._world, self._done = world.broker.store, world, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def write(self, work: Any) -> Any:
        if not self._done:
            self._done = True
            await self._world.approve(0, 1)
        return await self._store.write(work)


async def test_a_release_that_is_approved_while_it_is_decided_has_its_data_key(world: World) -> None:
    """The log never says that something was released which was not."""
    world.broker.releases._store = ApprovedMeanwhile(world)  # type: ignore[assignment]
    assert len(world.td.open(await world.td.release())) == 32
    newest = (await world.broker.log())[0].entry
    assert (newest.action, newest.granted) == ("generate", True)


async def test_one_approver_counts_once(world: World) -> None:
    await world.approve(1, 1, 1)
    await world.lacking(1)
    assert len(await world.desk.list(MESSENGER, KEY)) == 1


async def test_an_approval_ends(world: World) -> None:
    await world.approve(0, hours=2)
    await world.approve(1, hours=1)
    await world.td.release()
    world.broker.clock.advance(hours=1)
    await world.lacking(1)


async def test_an_approval_that_ends_ends_the_lease(world: World) -> None:
    await world.approve(0, 1)
    await world.td.release()
    await world.td.release(renewal=True, key_version=1)
    world.broker.clock.advance(hours=1)
    await world.lacking(0, renewal=True, key_version=1)


@pytest.mark.parametrize("job", [f"{TENANT}/job/j-2", f"{TENANT}/model/j-1"])
async def test_an_approval_is_for_one_job(world: World, job: str) -> None:
    await world.approve(0, 1, 2, job=job)
    await world.lacking(0)


async def test_an_approval_is_for_one_purpose(world: World) -> None:
    await world.approve(0, 1, purpose=Purpose.EVALUATE)
    await world.lacking(0)
    await world.td.release(purpose=Purpose.EVALUATE)


async def test_an_approval_is_for_the_policy_that_was_read(world: World) -> None:
    await world.approve(0, 1)
    await world.td.release()
    await world.broker.replace_policy(release={"lease": "2h", "approvals": world.rule})
    await world.lacking(0)
    await world.approve(0, 1)
    await world.td.release()


async def test_an_approval_does_not_replace_any_other_block(world: World) -> None:
    await world.approve(0, 1, 2)
    with pytest.raises(CloisterError) as caught:
        await world.td.release(ear={"workload": {"script": b"\x99" * 48}})
    assert caught.value.block == "workload.script"


async def test_who_signed_counts_and_not_who_hands_it_in(world: World) -> None:
    until = world.broker.clock() + timedelta(hours=1)
    standing = await world.desk.submit(MESSENGER, world.approvers[0].approve(await world.digest(), JOB, until=until))
    assert standing == Standing(have=1, need=2)
    with pytest.raises(CloisterError) as caught:
        await world.desk.submit(MESSENGER, Approver().approve(await world.digest(), JOB, until=until))
    assert caught.value.code is Code.APPROVAL_INVALID
    entry = (await world.broker.log())[0].entry
    assert (entry.action, entry.granted, entry.caller) == ("approve", False, str(COLLEAGUE))
    await world.lacking(1)


async def test_an_expired_or_foreign_approval_is_not_taken(world: World) -> None:
    digest, now = await world.digest(), world.broker.clock()
    for envelope in (
        world.approvers[0].approve(digest, JOB, until=now),
        world.approvers[0].approve(digest, JOB, until=now + timedelta(days=31)),
        world.approvers[0].approve(bytes(48), JOB, until=now + timedelta(hours=1)),
    ):
        with pytest.raises(CloisterError) as caught:
            await world.desk.submit(MESSENGER, envelope)
        assert caught.value.code is Code.APPROVAL_INVALID
    assert await world.desk.list(MESSENGER, KEY) == []


async def test_another_tenant_learns_nothing(world: World) -> None:
    stranger = Messenger(STRANGER, CHANNEL)
    until = world.broker.clock() + timedelta(hours=1)
    envelope = world.approvers[0].approve(await world.digest(), JOB, until=until)
    for attempt in (world.desk.submit(stranger, envelope), world.desk.list(stranger, KEY)):
        with pytest.raises(CloisterError) as caught:
            await attempt
        assert caught.value.code is Code.KEY_NOT_FOUND
    with pytest.raises(CloisterError) as absent:
        await world.desk.list(MESSENGER, OTHER_KEY)
    assert absent.value.code is Code.KEY_NOT_FOUND


async def test_approvals_for_a_policy_that_asks_for_none_are_refused(world: World) -> None:
    await world.broker.replace_policy()
    with pytest.raises(CloisterError) as caught:
        await world.approve(0)
    assert caught.value.code is Code.APPROVAL_INVALID


@pytest.mark.parametrize("column", ["job", "purpose", "approver", "expires_ms"])
async def test_a_row_written_into_the_file_is_worth_nothing(world: World, tmp_path: Path, column: str) -> None:
    """An operator who edits the database has approvals of other jobs, purposes, people and times, and no signature."""
    await world.approve(0, job=f"{TENANT}/job/j-2" if column == "job" else JOB, hours=1)
    await world.approve(1, purpose=Purpose.EVALUATE if column == "purpose" else Purpose.TRAIN)
    values = {"job": JOB, "purpose": "train", "approver": world.approvers[2].name, "expires_ms": 2**53}
    statement = "UPDATE approvals SET {0} = ?" + (" WHERE approver = ?" if column == "approver" else "")
    arguments = (values[column], world.approvers[0].name) if column == "approver" else (values[column],)
    if column == "expires_ms":
        world.broker.clock.advance(hours=1)
    world.broker.store.close()
    connection = apsw.Connection(str(tmp_path / "store.sqlite"))
    connection.execute(statement.format(column), arguments)
    connection.close()
    async with a_broker(tmp_path, world.broker.clock) as broker:
        world.broker.store, world.td = broker.store, broker.td()
        world.broker, world.desk = broker, ApprovalDesk(broker.store, broker.clock)
        await world.lacking({"job": 1, "purpose": 1, "approver": 1, "expires_ms": 0}[column])


async def test_expired_approvals_make_room(world: World) -> None:
    await world.approve(0, 1, hours=1)
    world.broker.clock.advance(hours=2)
    await world.approve(2)
    rows = await world.broker.store.read(lambda t: t._connection.execute("SELECT count(*) FROM approvals").fetchone())
    assert rows == (1,)


async def test_the_digest_of_an_approval_is_in_the_log(world: World) -> None:
    await world.approve(0)
    entry = (await world.broker.log())[0].entry
    assert (entry.action, entry.granted, entry.purpose) == ("approve", True, "train")
    assert JOB in entry.blocks[0].got
    assert digest_text(entry.policy_digest) == digest_text(await world.digest())
