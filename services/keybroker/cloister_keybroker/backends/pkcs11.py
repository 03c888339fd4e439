# SPDX-License-Identifier: Apache-2.0
"""A custodian behind PKCS#11: any HSM, with an AES-256 key of its own for every key version, never extractable.

pkcs11:token=LABEL[;serial=SERIAL]?module-path=FILE&pin-source=FILE   (RFC 7512; the PIN itself is not accepted)

part as wrapped = nonce (12) || CKM_AES_GCM(key, part; AAD)

All calls of the process go through one thread: modules differ in what they allow, and SoftHSM2 crashes the process
when sessions of several threads meet. What fails is tried once more with the module started afresh: PKCS#11 gives the
same general error for a token that was pulled out as for a ciphertext that does not open. So a token that is back is
used again with the next call.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, TypeVar
from urllib.parse import unquote

from cloister.errors import CloisterError, Code
from cloister.runtime.logging import get_logger
from cloister.secret import SecretBytes
from cloister_keybroker.backends import PART_SIZE, Capability, FreshPart, KeyRef, Lifetime
from cloister_keybroker.backends.failures import key_disabled, key_lost, refused, unavailable
from cloister_keybroker.backends.uri import BackendUri, invalid, read_credential
from cloister_keybroker.backends.workers import Threads, Workers

try:
    import pkcs11
    from pkcs11 import Attribute, GCMParams, KeyType, Mechanism
except ImportError:  # the extra `hsm` is not installed: `open_pkcs11` says so
    pkcs11 = None

_T = TypeVar("_T")
_THREAD: Final = Threads("pkcs11", 1)
_WAITING: Final = 64  # calls; an HSM answers hundreds in a second
_DEADLINE_S: Final = 5.0
_NONCE_SIZE: Final = 12
_TAG_BITS: Final = 128
_CACHED_KEYS: Final = 4096  # object handles; looking one up walks through the token in some modules
_ATTRIBUTES: Final = ("token", "serial")

# How often each module was started afresh. All sessions end with that, and their numbers are given out again: a session
# of an earlier start must not be used, it may be somebody else's by now. Touched by the one thread only.
_starts: Counter[str] = Counter()


class Pkcs11Custodian:
    """Keys in one token."""

    lifetime: Lifetime | None = None
    capabilities = frozenset({Capability.DISABLE, Capability.DESTROY, Capability.NON_EXTRACTABLE})

    def __init__(self, uri: BackendUri) -> None:
        """Use `open_pkcs11`."""
        self.name = uri.name
        self._token = _token_attributes(uri)
        self._module = str(uri.file("module-path"))
        self._pin_file = uri.file("pin-source")
        self._workers = Workers(self.name, _THREAD, limit=_WAITING, deadline_s=_DEADLINE_S)
        # Touched by the one thread only:
        self._session: Any = None
        self._start = 0  # the start of the module that the session belongs to
        self._keys: dict[bytes, Any] = {}
        self._refused_pin: SecretBytes | None = None  # not tried again: a token locks itself after a few

    async def create(self, key: KeyRef) -> bytes:  # noqa: ARG002 - the token learns nothing about the key
        locator = secrets.token_bytes(16)

        def work() -> bytes:
            self._session.generate_key(
                KeyType.AES,
                256,
                id=locator,
                label=f"cloister-{locator.hex()}",
                store=True,
                template={
                    Attribute.PRIVATE: True,
                    Attribute.SENSITIVE: True,
                    Attribute.EXTRACTABLE: False,
                    Attribute.ENCRYPT: True,
                    Attribute.DECRYPT: True,
                    Attribute.WRAP: False,
                    Attribute.UNWRAP: False,
                    Attribute.SIGN: False,
                    Attribute.VERIFY: False,
                    Attribute.DERIVE: False,
                },
            )
            return locator

        return await self._run(work)

    async def generate(self, locator: bytes, aad: bytes) -> FreshPart:
        secret, nonce = os.urandom(PART_SIZE), os.urandom(_NONCE_SIZE)

        def work() -> FreshPart:
            key = self._usable(locator)
            parameters = GCMParams(nonce, aad, _TAG_BITS)
            sealed = key.encrypt(secret, mechanism=Mechanism.AES_GCM, mechanism_param=parameters)
            return FreshPart(SecretBytes(secret), nonce + sealed)

        return await self._run(work)

    async def unwrap(self, locator: bytes, wrapped: bytes, aad: bytes) -> SecretBytes:
        def work() -> SecretBytes:
            key = self._usable(locator)
            parameters = GCMParams(wrapped[:_NONCE_SIZE], aad, _TAG_BITS)
            return SecretBytes(
                key.decrypt(wrapped[_NONCE_SIZE:], mechanism=Mechanism.AES_GCM, mechanism_param=parameters)
            )

        return await self._run(work)

    async def enable(self, locator: bytes) -> None:
        await self._run(lambda: self._set_usable(locator, True))

    async def disable(self, locator: bytes) -> None:
        await self._run(lambda: self._set_usable(locator, False))

    async def destroy(self, locator: bytes) -> None:
        def work() -> None:
            self._keys.pop(locator, None)
            for key in list(self._session.get_objects({Attribute.ID: locator})):
                key.destroy()

        await self._run(work)

    async def probe(self) -> None:
        await self._run(lambda: self._session.generate_random(8))

    async def aclose(self) -> None:
        try:
            await self._workers.run(self._close_session)
        except CloisterError as error:  # a token that hangs must not keep the rest from closing
            get_logger().info("a PKCS#11 session did not close", backend=self.name, problem=str(error))

    async def _run(self, work: Callable[[], _T]) -> _T:
        return await self._workers.run(lambda: self._attempt(work))

    def _attempt(self, work: Callable[[], _T]) -> _T:
        try:
            if self._session is None or self._start != _starts[self._module]:
                self._open_session()
            return work()
        except pkcs11.PKCS11Error as error:
            get_logger().info("a PKCS#11 module is started afresh", backend=self.name, problem=_text(error))
        try:
            pkcs11.lib(self._module).reinitialize()
            _starts[self._module] += 1
            self._open_session()
        except pkcs11.PKCS11Error as error:
            raise self._no_session(error) from None
        try:
            return work()
        except pkcs11.NoSuchKey:
            raise key_lost(self.name) from None
        except pkcs11.PKCS11Error as error:
            why = f"the token said {_text(error)}: the stored key is damaged, or the token does not do AES-GCM"
            raise refused(self.name, why) from None

    def _open_session(self) -> None:
        self._session = None
        self._keys.clear()
        pin = read_credential(self._pin_file)
        if pin == self._refused_pin:
            raise self._pin_refused()
        token = pkcs11.lib(self._module).get_token(**self._token)
        try:
            self._session = token.open(rw=True, user_pin=pin.reveal().decode(errors="replace"))
        except (pkcs11.PinIncorrect, pkcs11.PinInvalid, pkcs11.PinLenRange, pkcs11.PinLocked, pkcs11.PinExpired):
            self._refused_pin = pin
            raise self._pin_refused() from None
        self._start = _starts[self._module]
        self._refused_pin = None

    def _close_session(self) -> None:
        session, self._session = self._session, None
        self._keys.clear()
        if session is None or self._start != _starts[self._module]:
            return
        try:
            session.close()
        except pkcs11.PKCS11Error as error:
            get_logger().info("a PKCS#11 session did not close", backend=self.name, problem=_text(error))

    def _usable(self, locator: bytes) -> Any:
        """Return a key that may be used; whether it may is part of its type, so it is looked up once."""
        key = self._keys.get(locator)
        if key is None:
            key = self._session.get_key(id=locator)
            if not key[Attribute.DECRYPT]:
                raise key_disabled(self.name)
            if len(self._keys) >= _CACHED_KEYS:
                self._keys.clear()
            self._keys[locator] = key
        return key

    def _set_usable(self, locator: bytes, usable: bool) -> None:
        self._keys.pop(locator, None)
        key = self._session.get_key(id=locator)
        key[Attribute.DECRYPT] = usable
        key[Attribute.ENCRYPT] = usable

    def _pin_refused(self) -> CloisterError:
        return refused(
            self.name,
            "the token does not accept the PIN; it is not tried again until the file changes",
            "correct the file that pin-source names, before the token locks itself",
        )

    def _no_session(self, error: Exception) -> CloisterError:
        return unavailable(
            self.name,
            f"its token is not there: {_text(error)}",
            "connect the token, or correct token, serial and module-path in keybroker.backend",
        )


async def open_pkcs11(uri: BackendUri) -> Pkcs11Custodian:
    """Prepare a custodian of the configuration; whether the token is there shows with the first call."""
    uri.only("module-path", "pin-source")
    if pkcs11 is None:
        raise CloisterError(
            Code.PREREQUISITE_MISSING,
            what="PKCS#11 back ends need the package python-pkcs11",
            why="it is not installed",
            todo="pip install 'cloister[hsm]'",
        )
    custodian = Pkcs11Custodian(uri)
    if not uri.file("module-path").is_file():
        raise invalid(str(uri), f"there is no module at {uri.file('module-path')}")
    read_credential(uri.file("pin-source"))
    return custodian


def _token_attributes(uri: BackendUri) -> dict[str, Any]:
    found: dict[str, str] = {}
    for pair in uri.address.split(";"):
        name, equals, value = pair.partition("=")
        if name not in _ATTRIBUTES or not equals or not value or name in found:
            raise invalid(str(uri), f"{pair!r} is not token=LABEL or serial=SERIAL")
        found[name] = unquote(value)
    attributes: dict[str, Any] = {}
    if "token" in found:
        attributes["token_label"] = found["token"]
    if "serial" in found:
        attributes["token_serial"] = found["serial"].encode()
    return attributes


def _text(error: Exception) -> str:
    """Name a PKCS#11 error; most have no text of their own."""
    return " ".join([type(error).__name__, *[str(argument) for argument in error.args[:1]]])
