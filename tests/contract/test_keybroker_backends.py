# SPDX-License-Identifier: Apache-2.0
"""What every back end does, unchanged against each: what a data key opens does not depend on where its key lives."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cloister.errors import CloisterError, Code
from cloister.release.keys import KeyState, Purpose
from cloister.secret import SecretBytes
from cloister_keybroker.backends import Capability, KeyRef
from cloister_keybroker.backends.factory import Backends, open_backends
from cloister_keybroker.backends.wrapping import WRAPPED_SIZE
from cloister_keybroker.rootkey import RootKey
from fakes.custodian_in_memory import Moments
from fakes.ehsm_place import EhsmPlace
from fakes.keybroker_harness import KEY, OTHER_KEY
from fakes.softhsm_token import SoftToken
from fakes.transit_server import TransitServer

KINDS = ("embedded", "ehsm", "pkcs11", "transit")
REF = KeyRef(KEY, 1, KeyState.ENABLED, frozenset({Purpose.TRAIN, Purpose.EVALUATE}))
DISABLED = replace(REF, state=KeyState.DISABLED)


@dataclass
class Place:
    """One back end, open, and what it takes to open it again."""

    backend: Backends
    uri: str
    root: RootKey
    directory: Path

    async def opened(self, *, root: RootKey | None = None, first: str = "", former: tuple[str, ...] = ()) -> Backends:
        return await open_backends(
            first or self.uri, former, root or self.root, state_dir=self.directory, clock=Moments()
        )


@pytest.fixture(params=KINDS)
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    async with AsyncExitStack() as stack:
        match request.param:
            case "ehsm":
                uri = (await stack.enter_async_context(EhsmPlace(tmp_path / "ehsm", clock=Moments()))).uri
            case "pkcs11":
                token = SoftToken()
                stack.callback(token.close)
                uri = token.uri
            case "transit":
                uri = (await stack.enter_async_context(TransitServer())).uri
            case _:
                uri = "embedded:"
        root = RootKey(SecretBytes(secrets.token_bytes(32)))
        backend = await open_backends(uri, (), root, state_dir=tmp_path, clock=Moments())
        stack.push_async_callback(backend.aclose)
        yield Place(backend, uri, root, tmp_path)


async def refused(attempt: object, *codes: Code) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        await attempt  # type: ignore[misc]
    assert caught.value.code in codes
    return caught.value


async def test_a_data_key_opens_again_and_never_repeats(place: Place) -> None:
    handle = await place.backend.create(REF)
    first, second = await place.backend.generate(REF, handle), await place.backend.generate(REF, handle)
    assert len(first.secret) == 32
    assert first.secret != second.secret
    assert len(first.wrapped) == len(second.wrapped) == WRAPPED_SIZE
    assert await place.backend.unwrap(REF, handle, first.wrapped) == first.secret
    assert len(handle) <= 1024
    assert await place.backend.create(REF) != handle


async def test_another_broker_over_the_same_store_opens_it(place: Place) -> None:
    handle = await place.backend.create(REF)
    fresh = await place.backend.generate(REF, handle)
    again = await place.opened()
    assert await again.unwrap(REF, handle, fresh.wrapped) == fresh.secret
    await again.aclose()


async def test_what_is_not_of_this_key_version_does_not_open(place: Place) -> None:
    handle, other = await place.backend.create(REF), await place.backend.create(REF)
    fresh = await place.backend.generate(REF, handle)
    await refused(place.backend.unwrap(REF, other, fresh.wrapped), Code.WRAPPED_KEY_INVALID)
    flipped = fresh.wrapped[:-1] + bytes([fresh.wrapped[-1] ^ 1])
    for wrapped in (flipped, fresh.wrapped[:-1], b"", b"\x02" + fresh.wrapped[1:]):
        await refused(place.backend.unwrap(REF, handle, wrapped), Code.WRAPPED_KEY_INVALID)


@pytest.mark.parametrize("wrong", [replace(REF, uri=OTHER_KEY), replace(REF, version=2), DISABLED])
async def test_a_handle_is_bound_to_key_version_and_state(place: Place, wrong: KeyRef) -> None:
    handle = await place.backend.create(REF)
    fresh = await place.backend.generate(REF, handle)
    await refused(place.backend.unwrap(wrong, handle, fresh.wrapped), Code.STORE_DAMAGED, Code.CUSTODIAN_REFUSED)


async def test_another_root_key_opens_nothing(place: Place) -> None:
    handle = await place.backend.create(REF)
    fresh = await place.backend.generate(REF, handle)
    other = await place.opened(root=RootKey(SecretBytes(secrets.token_bytes(32))))
    await refused(other.unwrap(REF, handle, fresh.wrapped), Code.STORE_DAMAGED)
    await other.aclose()


async def test_an_imported_key_wraps_and_a_data_key_is_wrapped_anew(place: Place) -> None:
    handle = await place.backend.import_key(REF, SecretBytes(b"\x2a" * 32))
    newer = replace(REF, version=2)
    newest = await place.backend.create(newer)
    fresh = await place.backend.generate(REF, handle)
    again = await place.backend.wrap(newer, newest, fresh.secret)
    assert await place.backend.unwrap(newer, newest, again) == fresh.secret
    assert await place.backend.wrapping_key(REF, handle) == SecretBytes(b"\x2a" * 32)


async def test_disabling_and_enabling_keeps_what_was_wrapped(place: Place) -> None:
    handle = await place.backend.create(REF)
    fresh = await place.backend.generate(REF, handle)
    disabled = await place.backend.restate(REF, handle, KeyState.DISABLED)
    enabled = await place.backend.restate(DISABLED, disabled, KeyState.ENABLED)
    assert await place.backend.unwrap(REF, enabled, fresh.wrapped) == fresh.secret
    # A change that got as far as the back end and no further is repeated.
    await place.backend.restate(REF, enabled, KeyState.DISABLED)
    await place.backend.restate(REF, enabled, KeyState.DISABLED)


async def test_a_disabled_key_is_refused_where_that_is_promised(place: Place) -> None:
    handle = await place.backend.create(REF)
    fresh = await place.backend.generate(REF, handle)
    disabled = await place.backend.restate(REF, handle, KeyState.DISABLED)
    if Capability.DISABLE in place.backend.capabilities:
        # Whatever the broker's database says: this is the handle from before.
        await refused(place.backend.unwrap(REF, handle, fresh.wrapped), Code.KEY_DISABLED)
        await refused(place.backend.unwrap(DISABLED, disabled, fresh.wrapped), Code.KEY_DISABLED)


async def test_destruction_may_be_repeated_and_is_final_where_that_is_promised(place: Place) -> None:
    handle = await place.backend.create(REF)
    fresh = await place.backend.generate(REF, handle)
    await place.backend.destroy(REF, handle)
    await place.backend.destroy(REF, handle)
    if Capability.DESTROY in place.backend.capabilities:
        await refused(place.backend.unwrap(REF, handle, fresh.wrapped), Code.CUSTODIAN_KEY_LOST)


async def test_a_disabled_key_is_destroyed_too(place: Place) -> None:
    disabled = await place.backend.restate(REF, await place.backend.create(REF), KeyState.DISABLED)
    await place.backend.destroy(DISABLED, disabled)


async def test_a_key_moves_in_and_out_and_sealed_data_stays_as_it_is(place: Place) -> None:
    embedded = await place.opened(first="embedded:")
    handle = await embedded.create(REF)
    fresh = await embedded.generate(REF, handle)
    moved = await place.backend.move(REF, handle)
    if place.backend.name == "embedded":
        assert moved is None
        return
    assert moved is not None
    assert await place.backend.unwrap(REF, moved, fresh.wrapped) == fresh.secret
    back = await (await place.opened(first="embedded:", former=(place.uri,))).move(REF, moved)
    assert back is not None
    assert await embedded.unwrap(REF, back, fresh.wrapped) == fresh.secret


async def test_a_disabled_key_moves_and_stays_disabled(place: Place) -> None:
    if place.backend.name == "embedded":
        return
    disabled = await place.backend.restate(REF, await place.backend.create(REF), KeyState.DISABLED)
    home = await place.opened(first="embedded:", former=(place.uri,))
    moved = await home.move(DISABLED, disabled)
    assert moved is not None
    await home.restate(DISABLED, moved, KeyState.ENABLED)
    await refused(place.backend.unwrap(DISABLED, disabled, secrets.token_bytes(WRAPPED_SIZE)), Code.WRAPPED_KEY_INVALID)
    returned = await place.backend.move(DISABLED, moved)
    assert returned is not None


async def test_another_root_key_takes_over(place: Place) -> None:
    handle = await place.backend.create(REF)
    fresh = await place.backend.generate(REF, handle)
    after = RootKey(SecretBytes(secrets.token_bytes(32)))
    moved = await place.backend.rekey(REF, handle, after)
    heir = await place.opened(root=after)
    assert await heir.unwrap(REF, moved, fresh.wrapped) == fresh.secret
    await heir.aclose()


async def test_the_canary_lives(place: Place) -> None:
    await place.backend.check()
    await place.backend.check()


async def test_many_calls_at_once_keep_their_answers_apart(place: Place) -> None:
    handle = await place.backend.create(REF)
    fresh = await asyncio.gather(*(place.backend.generate(REF, handle) for _ in range(24)))
    opened = await asyncio.gather(*(place.backend.unwrap(REF, handle, key.wrapped) for key in fresh))
    assert opened == [key.secret for key in fresh]


async def test_a_handle_of_a_back_end_that_is_not_configured_says_which_one_is_missing(place: Place) -> None:
    if place.backend.name == "embedded":
        return
    handle = await place.backend.create(REF)
    error = await refused((await place.opened(first="embedded:")).generate(REF, handle), Code.BACKEND_NOT_CONFIGURED)
    assert place.backend.name in error.why
