# SPDX-License-Identifier: Apache-2.0
"""SoftHSM2 as a back end: keys that cannot be read out, a token that is pulled out and comes back, a wrong PIN."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pkcs11
import pytest
from pkcs11 import Attribute

from cloister.errors import CloisterError, Code
from cloister.release.keys import KeyState, Purpose
from cloister.secret import SecretBytes
from cloister_keybroker.backends import KeyRef
from cloister_keybroker.backends.factory import Backends, open_backends
from cloister_keybroker.backends.remote import Handle
from cloister_keybroker.rootkey import RootKey
from fakes.custodian_in_memory import Moments
from fakes.keybroker_harness import KEY
from fakes.softhsm_token import PIN, SoftToken

REF = KeyRef(KEY, 1, KeyState.ENABLED, frozenset({Purpose.TRAIN}))
ROOT = RootKey(SecretBytes(b"\x01" * 32))


@pytest.fixture
def token() -> Iterator[SoftToken]:
    found = SoftToken()
    yield found
    found.close()


@pytest.fixture
async def backend(token: SoftToken, tmp_path: Path) -> AsyncIterator[Backends]:
    found = await opened(token.uri, tmp_path)
    yield found
    await found.aclose()


async def opened(uri: str, directory: Path, *former: str) -> Backends:
    return await open_backends(uri, former, ROOT, state_dir=directory, clock=Moments())


async def refused(code: Code, attempt: object) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        await attempt  # type: ignore[misc]
    assert caught.value.code is code
    return caught.value


def looked_at(token: SoftToken, locator: bytes, work: Any) -> Any:
    """Look at an object in the token as an operator with the PIN does."""
    module = pkcs11.lib(str(token.module))
    module.reinitialize()
    with module.get_token(token_label=token.label).open(rw=True, user_pin=PIN) as session:
        return work(session.get_key(id=locator))


async def test_the_key_in_the_token_cannot_be_read_and_only_encrypts(backend: Backends, token: SoftToken) -> None:
    locator = Handle.parse(await backend.create(REF)).locator
    await backend.aclose()

    def look(key: Any) -> None:
        assert key[Attribute.SENSITIVE]
        assert not key[Attribute.EXTRACTABLE]
        assert key[Attribute.NEVER_EXTRACTABLE]
        assert key[Attribute.LOCAL]
        for use in (Attribute.WRAP, Attribute.UNWRAP, Attribute.SIGN, Attribute.DERIVE):
            assert not key[use]
        with pytest.raises(pkcs11.AttributeSensitive):
            key[Attribute.VALUE]

    looked_at(token, locator, look)


async def test_the_token_learns_no_name(backend: Backends, token: SoftToken) -> None:
    locator = Handle.parse(await backend.create(REF)).locator
    await backend.aclose()
    label = looked_at(token, locator, lambda key: key.label)
    assert label == f"cloister-{locator.hex()}"
    assert "reviews" not in label


async def test_a_token_that_is_pulled_out_is_said_to_be_away_and_used_again_when_it_is_back(
    backend: Backends, token: SoftToken
) -> None:
    handle = await backend.create(REF)
    fresh = await backend.generate(REF, handle)
    await backend.check()
    token.pull_out()
    error = await refused(Code.CUSTODIAN_UNAVAILABLE, backend.unwrap(REF, handle, fresh.wrapped))
    assert "token is not there" in error.why
    await refused(Code.CUSTODIAN_UNAVAILABLE, backend.create(REF))
    await refused(Code.CUSTODIAN_UNAVAILABLE, backend.check())
    token.put_back()
    assert await backend.unwrap(REF, handle, fresh.wrapped) == fresh.secret
    await backend.check()


async def test_a_token_that_was_made_anew_is_not_taken_for_the_old_one(backend: Backends, token: SoftToken) -> None:
    handle = await backend.create(REF)
    fresh = await backend.generate(REF, handle)
    token.pull_out()
    token.initialize()  # the same label, another token
    await refused(Code.CUSTODIAN_KEY_LOST, backend.unwrap(REF, handle, fresh.wrapped))


async def test_a_wrong_pin_is_tried_once(token: SoftToken, tmp_path: Path) -> None:
    token.write_pin("000000")
    backend = await opened(token.uri, tmp_path)
    for _ in range(12):  # a token that counts would be locked by now
        error = await refused(Code.CUSTODIAN_REFUSED, backend.create(REF))
        assert "PIN" in error.why
        assert "000000" not in str(error)
    token.write_pin(PIN)
    await backend.generate(REF, await backend.create(REF))
    await backend.aclose()


async def test_two_tokens_of_one_module_keep_apart(token: SoftToken, tmp_path: Path) -> None:
    """Starting the module afresh for one of them gives the numbers of all sessions out again."""
    first_uri, first_label = token.uri, token.label
    token.label = f"other-{secrets.token_hex(4)}"
    token.initialize()
    both = await opened(first_uri, tmp_path, f"{token.uri}&name=other")
    one, other = both.all()[:2]
    handles = [await one.create(REF), await other.create(REF)]
    for _ in range(3):
        # A part that does not open makes the custodian look whether its token is there.
        broken = Handle.parse(handles[0])
        broken = replace(broken, wrapped_part=broken.wrapped_part[:-1] + bytes([broken.wrapped_part[-1] ^ 1]))
        await refused(Code.CUSTODIAN_REFUSED, one.generate(REF, broken.encode()))
        handles.append(await other.create(REF))
        await other.generate(REF, handles[1])
        await one.generate(REF, handles[0])
    assert first_label != token.label
    for handle in handles[1:]:
        await other.generate(REF, handle)
    await both.aclose()


async def test_a_key_disabled_by_another_broker_is_refused_here_too(backend: Backends, token: SoftToken) -> None:
    handle = await backend.create(REF)
    fresh = await backend.generate(REF, handle)
    locator = Handle.parse(handle).locator
    await backend.aclose()

    def disable(key: Any) -> None:
        key[Attribute.DECRYPT] = False

    looked_at(token, locator, disable)
    await refused(Code.KEY_DISABLED, backend.unwrap(REF, handle, fresh.wrapped))


async def test_the_crowd_goes_through_one_thread(backend: Backends) -> None:
    handles = await asyncio.gather(*(backend.create(REF) for _ in range(8)))
    fresh = await asyncio.gather(*(backend.generate(REF, handle) for handle in handles for _ in range(4)))
    assert len({key.wrapped for key in fresh}) == 32


async def test_what_is_no_module_is_said_to_be_none(token: SoftToken, tmp_path: Path) -> None:
    module = tmp_path / "module.so"
    module.write_bytes(b"no shared object")
    backend = await opened(token.uri.replace(str(token.module), str(module)), tmp_path)
    await refused(Code.CUSTODIAN_UNAVAILABLE, backend.create(REF))
    await backend.aclose()
