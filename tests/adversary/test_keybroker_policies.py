# SPDX-License-Identifier: Apache-2.0
"""A policy that contradicts itself never comes into force, and what a denial says is stable."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cloister.errors import CloisterError, Code
from cloister.policyblocks import digest_text
from fakes.keybroker_harness import KEY, Broker, Document, a_broker, owner, policy_document

OTHER = digest_text(b"\x99" * 48)


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with a_broker(tmp_path) as opened:
        yield opened


def with_cases(*cases: Document) -> Document:
    document = policy_document()
    document["spec"]["cases"] = list(cases)
    return document


JOB: Document = {"name": "the job", "expect": "allow"}
ANY_SCRIPT: Document = {"name": "any script", "set": {"workload.script": OTHER}, "expect": "allow"}


async def test_a_key_is_not_created_under_a_policy_whose_cases_fail(broker: Broker) -> None:
    with pytest.raises(CloisterError) as caught:
        await broker.create_key(with_cases(JOB, ANY_SCRIPT))
    assert caught.value.code is Code.CASE_FAILED
    with pytest.raises(CloisterError) as caught:
        await broker.owners.get(owner(), KEY)
    assert caught.value.code is Code.KEY_NOT_FOUND
    await broker.create_key(with_cases(JOB))
    await broker.td().release()


async def test_a_policy_whose_cases_fail_leaves_the_one_in_force(broker: Broker) -> None:
    await broker.create_key()
    with pytest.raises(CloisterError) as caught:
        await broker.replace_policy(cases=[ANY_SCRIPT])
    assert caught.value.code is Code.CASE_FAILED
    assert (await broker.owners.get(owner(), KEY)).record.policy_version == 1
    await broker.td().release()
    await broker.replace_policy(cases=[JOB])
    assert (await broker.owners.get(owner(), KEY)).record.policy_version == 2
