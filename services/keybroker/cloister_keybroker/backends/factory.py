# SPDX-License-Identifier: Apache-2.0
"""The back ends of the configuration, as one: new keys go to the first, old ones are found where they are.

A handle says which back end made it. The embedded one is always there: it needs nothing but the root key.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final, TypeAlias

from cloister.errors import CloisterError, Code
from cloister.release.keys import KeyState
from cloister.secret import SecretBytes
from cloister_keybroker.backends import Capability, Clock, Custodian, FreshDataKey, KeyBackend, KeyRef, handle_damaged
from cloister_keybroker.backends.embedded import NAME as EMBEDDED
from cloister_keybroker.backends.embedded import EmbeddedBackend
from cloister_keybroker.backends.remote import Handle, RemoteBackend
from cloister_keybroker.backends.uri import BackendUri, invalid
from cloister_keybroker.backends.wrapping import FORMAT
from cloister_keybroker.rootkey import RootKey

# With the directory for what it has to remember itself, and the time.
OpenCustodian: TypeAlias = Callable[[BackendUri, Path, Clock], Awaitable[Custodian]]


# Loaded when the configuration names them: a broker without them has no HTTP client and no foreign module in it.


async def _open_ehsm(uri: BackendUri, state_dir: Path, clock: Clock) -> Custodian:
    from cloister_keybroker.backends.ehsm.custodian import open_ehsm

    return await open_ehsm(uri, state_dir, clock)


async def _open_pkcs11(uri: BackendUri, _state_dir: Path, _clock: Clock) -> Custodian:
    from cloister_keybroker.backends.pkcs11 import open_pkcs11

    return await open_pkcs11(uri)


async def _open_transit(uri: BackendUri, _state_dir: Path, _clock: Clock) -> Custodian:
    from cloister_keybroker.backends.transit import open_transit

    return await open_transit(uri)


_CUSTODIANS: Final[Mapping[str, OpenCustodian]] = {
    "ehsm": _open_ehsm,
    "pkcs11": _open_pkcs11,
    "transit": _open_transit,
}


class Backends:
    """Several back ends behind the interface of one. `name` and `capabilities` are those of the first."""

    def __init__(self, backends: Sequence[KeyBackend]) -> None:
        self._first = backends[0]
        self._by_name = {backend.name: backend for backend in backends}

    @property
    def name(self) -> str:
        return self._first.name

    @property
    def capabilities(self) -> frozenset[Capability]:
        return self._first.capabilities

    def all(self) -> Sequence[KeyBackend]:
        """Return every back end, the first one first."""
        return list(self._by_name.values())

    def of(self, key: KeyRef, handle: bytes) -> KeyBackend:
        """Return the back end that made a handle."""
        name = backend_of(key, handle)
        if name not in self._by_name:
            raise CloisterError(
                Code.BACKEND_NOT_CONFIGURED,
                what=f"{key.uri}, version {key.version}, is kept by a back end that is not configured",
                why=f"its name is {name}; configured are: {', '.join(sorted(self._by_name))}",
                todo="the operator adds it to keybroker.former_backends, and moves its keys before it goes away",
            )
        return self._by_name[name]

    async def create(self, key: KeyRef) -> bytes:
        return await self._first.create(key)

    async def import_key(self, key: KeyRef, secret: SecretBytes) -> bytes:
        return await self._first.import_key(key, secret)

    async def generate(self, key: KeyRef, handle: bytes) -> FreshDataKey:
        return await self.of(key, handle).generate(key, handle)

    async def unwrap(self, key: KeyRef, handle: bytes, wrapped: bytes) -> SecretBytes:
        return await self.of(key, handle).unwrap(key, handle, wrapped)

    async def wrap(self, key: KeyRef, handle: bytes, secret: SecretBytes) -> bytes:
        return await self.of(key, handle).wrap(key, handle, secret)

    async def restate(self, key: KeyRef, handle: bytes, state: KeyState) -> bytes:
        return await self.of(key, handle).restate(key, handle, state)

    async def destroy(self, key: KeyRef, handle: bytes) -> None:
        await self.of(key, handle).destroy(key, handle)

    async def maintain(self, key: KeyRef, handle: bytes, now: datetime) -> bytes | None:
        return await self.of(key, handle).maintain(key, handle, now)

    async def wrapping_key(self, key: KeyRef, handle: bytes) -> SecretBytes:
        return await self.of(key, handle).wrapping_key(key, handle)

    async def rekey(self, key: KeyRef, handle: bytes, root_key: RootKey) -> bytes:
        return await self.of(key, handle).rekey(key, handle, root_key)

    async def move(self, key: KeyRef, handle: bytes) -> bytes | None:
        """Return the handle of the same wrapping key at the first back end; None when it is there already.

        The old handle stays good until `destroy`: the store replaces it first.
        """
        if self.of(key, handle) is self._first:
            return None
        return await self._first.import_key(key, await self.wrapping_key(key, handle))

    async def reconcile(self, handles: Collection[bytes]) -> None:
        """Tell each back end its own; one that does not answer does not keep the others from it."""
        problems: list[CloisterError] = []
        for backend in self._by_name.values():
            try:
                await backend.reconcile([handle for handle in handles if name_of(handle) == backend.name])
            except CloisterError as error:
                problems.append(error)
        if problems:
            raise problems[0]

    async def check(self) -> None:
        for backend in self._by_name.values():
            await backend.check()

    async def aclose(self) -> None:
        for backend in self._by_name.values():
            await backend.aclose()


def name_of(handle: bytes) -> str | None:
    """Return the name of the back end that made a handle, or None when none did."""
    if handle[:1] == FORMAT:
        return EMBEDDED
    try:
        return Handle.parse(handle).backend
    except ValueError:
        return None


def backend_of(key: KeyRef, handle: bytes) -> str:
    """Return the name of the back end that made a handle; raise STORE_DAMAGED when none did."""
    name = name_of(handle)
    if name is None:
        raise handle_damaged(key)
    return name


async def open_backends(
    backend: str, former: Sequence[str], root_key: RootKey, *, state_dir: Path, clock: Clock
) -> Backends:
    """Open what the configuration names; raise CONFIG_INVALID for what cannot be right.

    `state_dir` keeps their canaries. A back end that is only away at the moment is no error here: `check` says so.
    """
    opened: list[KeyBackend] = []
    try:
        for text in (backend, *former):
            uri = BackendUri.parse(text)
            if any(known.name == uri.name for known in opened):
                raise invalid(text, f"there are two back ends of the name {uri.name}: give one of them another, ?name=")
            opened.append(await _open_one(uri, root_key, state_dir, clock))
        if not any(isinstance(known, EmbeddedBackend) for known in opened):
            opened.append(EmbeddedBackend(root_key))
    except BaseException:
        for known in opened:
            await known.aclose()
        raise
    return Backends(opened)


async def _open_one(uri: BackendUri, root_key: RootKey, state_dir: Path, clock: Clock) -> KeyBackend:
    if uri.scheme == EMBEDDED:
        if uri.address or uri.options:
            raise invalid(str(uri), 'it takes no address and no options: write "embedded:"')
        return EmbeddedBackend(root_key)
    if uri.name == EMBEDDED:
        raise invalid(str(uri), "only the embedded back end has this name")
    if uri.scheme not in _CUSTODIANS:
        raise invalid(str(uri), f"the schemes are {', '.join(['embedded', *sorted(_CUSTODIANS)])}")
    custodian = await _CUSTODIANS[uri.scheme](uri, state_dir, clock)
    return RemoteBackend(custodian, root_key, clock=clock, canary_file=state_dir / f"canary-{uri.name}")
