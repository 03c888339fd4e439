# SPDX-License-Identifier: Apache-2.0
"""A wrapping key split with a custodian: one half opens nothing, and every use asks for the other."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import CloisterError, Code
from cloister.release.keys import KeyState, Purpose
from cloister.secret import SecretBytes
from cloister_keybroker.backends import KeyRef, Lifetime
from cloister_keybroker.backends.remote import Handle, RemoteBackend
from cloister_keybroker.rootkey import RootKey
from fakes.custodian_in_memory import MemoryCustodian, Moments
from fakes.keybroker_harness import KEY, OTHER_KEY

REF = KeyRef(KEY, 1, KeyState.ENABLED, frozenset({Purpose.TRAIN}))
YEAR = Lifetime(rewrap_after=timedelta(days=300), refuse_after=timedelta(days=340))


class Room:
    """A remote back end with everything around it."""

    def __init__(self, directory: Path) -> None:
        self.root = RootKey(SecretBytes(secrets.token_bytes(32)))
        self.custodian, self.clock, self.canary = MemoryCustodian(), Moments(), directory / "canary"
        self.backend = self.reopened(self.root)

    def reopened(self, root: RootKey) -> RemoteBackend:
        return RemoteBackend(self.custodian, root, clock=self.clock, canary_file=self.canary)


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


async def refused(code: Code, attempt: object) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        await attempt  # type: ignore[misc]
    assert caught.value.code is code
    return caught.value


async def test_neither_the_custodian_nor_the_root_key_opens_anything_alone(room: Room) -> None:
    handle = await room.backend.create(REF)
    fresh = await room.backend.generate(REF, handle)
    assert await room.backend.unwrap(REF, handle, fresh.wrapped) == fresh.secret
    # The custodian and the store in other hands: another root key.
    other = room.reopened(RootKey(SecretBytes(secrets.token_bytes(32))))
    await refused(Code.STORE_DAMAGED, other.unwrap(REF, handle, fresh.wrapped))
    # The root key and the store in other hands: the custodian is asked, and has no such key.
    room.custodian.keys.clear()
    await refused(Code.CUSTODIAN_KEY_LOST, room.backend.unwrap(REF, handle, fresh.wrapped))


async def test_the_custodian_never_sees_a_wrapping_key_a_data_key_or_a_name(room: Room) -> None:
    secret = SecretBytes(secrets.token_bytes(32))
    parsed = Handle.parse(await room.backend.import_key(REF, secret))
    part = await room.custodian.unwrap(parsed.locator, parsed.wrapped_part, REF.custodian_aad())
    assert part != secret
    assert str(KEY).encode() not in parsed.locator + parsed.wrapped_part + REF.custodian_aad()


async def test_every_use_asks_the_custodian_once(room: Room) -> None:
    handle = await room.backend.create(REF)
    fresh = await room.backend.generate(REF, handle)
    room.custodian.calls.clear()
    await room.backend.unwrap(REF, handle, fresh.wrapped)
    await room.backend.unwrap(REF, handle, fresh.wrapped)
    assert room.custodian.calls == ["unwrap", "unwrap"]


async def test_what_cannot_be_a_wrapped_key_is_refused_without_asking(room: Room) -> None:
    handle = await room.backend.create(REF)
    fresh = await room.backend.generate(REF, handle)
    room.custodian.calls.clear()
    for wrapped in (b"", fresh.wrapped[:-1], b"\x02" + fresh.wrapped[1:]):
        await refused(Code.WRAPPED_KEY_INVALID, room.backend.unwrap(REF, handle, wrapped))
    assert room.custodian.calls == []


@pytest.mark.parametrize(
    "other",
    [
        replace(REF, uri=OTHER_KEY),
        replace(REF, version=2),
        replace(REF, purposes=frozenset({Purpose.SERVE})),
    ],
)
async def test_a_part_is_bound_to_key_version_and_purposes_at_the_custodian(room: Room, other: KeyRef) -> None:
    handle = await room.backend.create(REF)
    fresh = await room.backend.generate(REF, handle)
    await refused(Code.CUSTODIAN_REFUSED, room.backend.unwrap(other, handle, fresh.wrapped))


async def test_an_edited_state_or_handle_does_not_open(room: Room) -> None:
    handle = await room.backend.create(REF)
    fresh = await room.backend.generate(REF, handle)
    disabled = replace(REF, state=KeyState.DISABLED)
    await refused(Code.STORE_DAMAGED, room.backend.unwrap(disabled, handle, fresh.wrapped))
    parsed = Handle.parse(handle)
    for forged in (
        replace(parsed, created_ms=parsed.created_ms + 1),
        replace(parsed, backend="other"),
        replace(parsed, sealed_key=parsed.sealed_key[:-1] + bytes([parsed.sealed_key[-1] ^ 1])),
    ):
        await refused(Code.STORE_DAMAGED, room.backend.unwrap(REF, forged.encode(), fresh.wrapped))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_handle_raise_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        Handle.parse(data)


async def test_a_handle_survives_its_encoding(room: Room) -> None:
    handle = await room.backend.create(REF)
    assert Handle.parse(handle).encode() == handle
    assert len(handle) < 1024


async def test_a_disabled_key_is_refused_by_the_custodian_too(room: Room) -> None:
    handle = await room.backend.create(REF)
    fresh = await room.backend.generate(REF, handle)
    disabled = await room.backend.restate(REF, handle, KeyState.DISABLED)
    # Even with the old row and the old handle back in the store.
    await refused(Code.KEY_DISABLED, room.backend.unwrap(REF, handle, fresh.wrapped))
    back = await room.backend.restate(replace(REF, state=KeyState.DISABLED), disabled, KeyState.ENABLED)
    assert await room.backend.unwrap(REF, back, fresh.wrapped) == fresh.secret


async def test_a_change_of_state_that_was_cut_off_can_be_repeated(room: Room) -> None:
    handle = await room.backend.create(REF)
    await room.backend.restate(REF, handle, KeyState.DISABLED)  # and the broker died before it stored the new handle
    again = await room.backend.restate(REF, handle, KeyState.DISABLED)
    enabled = await room.backend.restate(replace(REF, state=KeyState.DISABLED), again, KeyState.ENABLED)
    await room.backend.generate(REF, enabled)


async def test_a_key_that_could_not_be_finished_is_not_left_at_the_custodian(room: Room) -> None:
    class Broken(MemoryCustodian):
        async def generate(self, locator: bytes, aad: bytes) -> object:  # type: ignore[override]
            raise CloisterError(Code.CUSTODIAN_UNAVAILABLE, what="gone in the middle")

    room.custodian = Broken()
    await refused(Code.CUSTODIAN_UNAVAILABLE, room.reopened(room.root).create(REF))
    assert room.custodian.keys == {}


async def test_a_key_is_rewrapped_when_it_is_due_and_opens_what_it_opened(room: Room) -> None:
    room.custodian.lifetime = YEAR
    handle = await room.backend.create(REF)
    fresh = await room.backend.generate(REF, handle)
    room.clock.advance(days=299)
    assert await room.backend.maintain(REF, handle, room.clock()) is None
    room.clock.advance(days=1)
    renewed = await room.backend.maintain(REF, handle, room.clock())
    assert renewed is not None
    await room.backend.destroy(REF, handle)
    await room.backend.destroy(REF, handle)
    assert len(room.custodian.keys) == 1
    room.clock.advance(days=250)
    assert await room.backend.unwrap(REF, renewed, fresh.wrapped) == fresh.secret


async def test_a_key_that_is_about_to_vanish_is_refused_until_it_is_rewrapped(room: Room) -> None:
    room.custodian.lifetime = YEAR
    handle = await room.backend.create(REF)
    fresh = await room.backend.generate(REF, handle)
    room.clock.advance(days=340)
    error = await refused(Code.CUSTODIAN_KEY_EXPIRING, room.backend.unwrap(REF, handle, fresh.wrapped))
    assert "340 days" in error.why
    renewed = await room.backend.maintain(REF, handle, room.clock())
    assert renewed is not None
    assert await room.backend.unwrap(REF, renewed, fresh.wrapped) == fresh.secret


async def test_a_disabled_key_is_rewrapped_too_and_stays_disabled(room: Room) -> None:
    room.custodian.lifetime = YEAR
    disabled, ref = replace(REF, state=KeyState.DISABLED), REF
    handle = await room.backend.restate(ref, await room.backend.create(ref), KeyState.DISABLED)
    room.clock.advance(days=301)
    renewed = await room.backend.maintain(disabled, handle, room.clock())
    assert renewed is not None
    assert room.custodian.disabled == set(room.custodian.keys)
    await room.backend.restate(disabled, renewed, KeyState.ENABLED)


async def test_another_root_key_takes_over_without_a_new_key_at_the_custodian(room: Room) -> None:
    handle = await room.backend.create(REF)
    fresh = await room.backend.generate(REF, handle)
    after = RootKey(SecretBytes(secrets.token_bytes(32)))
    moved = await room.backend.rekey(REF, handle, after)
    assert await room.reopened(after).unwrap(REF, moved, fresh.wrapped) == fresh.secret
    await refused(Code.STORE_DAMAGED, room.backend.unwrap(REF, moved, fresh.wrapped))
    assert len(room.custodian.keys) == 1


async def test_a_part_of_another_length_is_not_believed(room: Room) -> None:
    class Short(MemoryCustodian):
        async def unwrap(self, locator: bytes, wrapped: bytes, aad: bytes) -> SecretBytes:
            return SecretBytes(b"\x00" * 31)

    handle = await room.backend.create(REF)
    room.custodian = Short()
    await refused(Code.CUSTODIAN_ANSWER_INVALID, room.reopened(room.root).generate(REF, handle))


async def test_the_canary_is_made_once_and_noticed_when_it_does_not_open(room: Room) -> None:
    await room.backend.check()
    await room.reopened(room.root).check()
    assert room.custodian.calls.count("create") == 1
    room.custodian.away = True
    await refused(Code.CUSTODIAN_UNAVAILABLE, room.backend.check())
    room.custodian.away = False
    await room.backend.check()
    room.custodian.keys.clear()
    await refused(Code.CUSTODIAN_KEY_LOST, room.backend.check())


async def test_the_canary_is_renewed_before_the_custodian_deletes_it(room: Room) -> None:
    room.custodian.lifetime = YEAR
    await room.backend.check()
    first = set(room.custodian.keys)
    room.clock.advance(days=301)
    await room.backend.check()
    assert len(room.custodian.keys) == 1
    assert set(room.custodian.keys) != first


async def test_a_damaged_canary_is_said_to_be_damaged(room: Room) -> None:
    await room.backend.check()
    room.canary.write_bytes(room.canary.read_bytes()[:-1])
    error = await refused(Code.STORE_DAMAGED, room.backend.check())
    assert "canary" in error.what


async def test_a_canary_that_cannot_be_finished_does_not_make_a_key_at_every_check(room: Room) -> None:
    class Half(MemoryCustodian):
        async def generate(self, locator: bytes, aad: bytes) -> object:  # type: ignore[override]
            raise CloisterError(Code.CUSTODIAN_REFUSED, what="keys may be made and not used")

    room.custodian = half = Half()
    for _ in range(3):
        await refused(Code.CUSTODIAN_REFUSED, room.reopened(room.root).check())
    assert len(half.keys) == 1
    room.custodian = MemoryCustodian(keys=half.keys)
    await room.reopened(room.root).check()
    assert len(half.keys) == 1


async def test_a_custodian_that_asks_is_told_what_is_in_use_the_canary_among_it(room: Room) -> None:
    class Remembering(MemoryCustodian):
        told: list[bytes]

        async def reconcile(self, in_use: Collection[bytes]) -> None:
            self.told = sorted(in_use)

    await room.backend.reconcile([])  # one that does not ask
    room.custodian = remembering = Remembering()
    backend = room.reopened(room.root)
    handle = await backend.create(REF)
    await backend.check()
    await backend.reconcile([handle])
    assert remembering.told == sorted(remembering.keys)
    assert len(remembering.told) == 2
