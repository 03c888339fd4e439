# SPDX-License-Identifier: Apache-2.0
"""To go on with interrupted sealing an owner gets a data key again; nobody gets any other key that way."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.errors import CloisterError, Code
from cloister.release.keys import Purpose
from cloister_keybroker.datakeys import WrappedKey
from cloister_keybroker.datasets import Publication
from fakes.keybroker_harness import KEY, OWNER, Clock, a_broker, owner

TRAIN_ONLY = frozenset({Purpose.TRAIN})


async def refusal(resumed: object) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        await resumed  # type: ignore[misc]
    return caught.value


async def test_an_owner_goes_on_with_the_key_it_was_given_to_seal_with(tmp_path: Path) -> None:
    async with a_broker(tmp_path) as broker:
        await broker.create_key(purposes=TRAIN_ONLY)
        answer, secret = await broker.generate()
        assert await broker.resume_key(answer.wrapped) == secret
        assert await broker.resume_key(answer.wrapped) == secret
        newest = (await broker.log())[0].entry
        assert (newest.action, newest.purpose, newest.granted) == ("resume", "seal", True)


async def test_what_a_workload_sealed_does_not_open_like_this(tmp_path: Path) -> None:
    """A model that was trained under a key without purpose export stays inside."""
    async with a_broker(tmp_path) as broker:
        await broker.create_key(purposes=TRAIN_ONLY)
        released = await broker.td().release()
        error = await refusal(broker.resume_key(released.data_key.wrapped))
        assert error.code is Code.RELEASE_DENIED
        assert "data_key.sealing" in error.what
        assert not (await broker.log())[0].entry.granted


async def test_what_was_published_does_not_open_like_this(tmp_path: Path) -> None:
    async with a_broker(tmp_path) as broker:
        await broker.create_key(purposes=TRAIN_ONLY)
        answer, _ = await broker.generate()
        publication = Publication("reviews", 1, b"m" * 48)
        await broker.data_keys.publish(owner(), WrappedKey(KEY, 1, answer.wrapped), publication, b"")
        error = await refusal(broker.resume_key(answer.wrapped))
        assert error.code is Code.RELEASE_DENIED
        assert "published" in error.why
        found = await broker.data_keys.published(owner(), KEY, "reviews")
        assert found is not None
        assert (found.version, found.manifest_digest) == (1, b"m" * 48)
        assert await broker.data_keys.published(owner(), KEY, "others") is None


async def test_after_seven_days_sealing_begins_anew(tmp_path: Path) -> None:
    clock = Clock()
    async with a_broker(tmp_path, clock) as broker:
        await broker.create_key(purposes=TRAIN_ONLY)
        answer, secret = await broker.generate()
        clock.advance(days=6.9)
        assert await broker.resume_key(answer.wrapped) == secret
        clock.advance(days=0.2)
        assert (await refusal(broker.resume_key(answer.wrapped))).code is Code.RELEASE_DENIED


async def test_a_signature_for_export_or_for_sealing_is_good_for_that_only(tmp_path: Path) -> None:
    async with a_broker(tmp_path) as broker:
        await broker.create_key()
        answer, _ = await broker.generate()
        assert (await refusal(broker.resume_key(answer.wrapped, purpose="export"))).code is Code.SIGNATURE_INVALID
        assert (
            await refusal(broker.open_key(answer.wrapped, signed={"purpose": "seal"}))
        ).code is Code.SIGNATURE_INVALID


async def test_a_disabled_key_and_another_key_give_nothing(tmp_path: Path) -> None:
    from cloister.release.keys import KeyState

    async with a_broker(tmp_path) as broker:
        await broker.create_key(purposes=TRAIN_ONLY)
        answer, _ = await broker.generate()
        changed = bytearray(answer.wrapped)
        changed[-1] ^= 1
        assert (await refusal(broker.resume_key(bytes(changed)))).code is Code.WRAPPED_KEY_INVALID
        stranger = type(OWNER).of_user(OWNER.trust_domain, tenant=OWNER.tenant, user="stranger")
        assert (await refusal(broker.resume_key(answer.wrapped, who=stranger))).code is Code.CALLER_NOT_ALLOWED
        await broker.owners.set_state(owner(), KEY, KeyState.DISABLED)
        assert (await refusal(broker.resume_key(answer.wrapped))).code is Code.KEY_DISABLED
