# SPDX-License-Identifier: Apache-2.0
"""A custodian that speaks the transit API of OpenBao and Vault, with a key of its own for every key version.

transit:https://HOST:PORT/MOUNT?ca=FILE&token=FILE[&namespace=NAMESPACE]

Documented calls only (api-docs/secret/transit). A part is random bytes of ours, encrypted with associated data; what
`datakey` and `rewrap` return could not be bound to anything: neither call takes associated data. Disabling is what the
API has for it: rotate, then let nothing be decrypted that an older version encrypted.

The token is read from its file for every call, so an agent may replace it at any time; a token that can be renewed is
renewed by `probe` when half of its life is over. Answers are told apart by status, not by their texts.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from cloister.errors import CloisterError, Code
from cloister.secret import SecretBytes
from cloister_keybroker.backends import PART_SIZE, Capability, FreshPart, KeyRef, Lifetime
from cloister_keybroker.backends.failures import answer_invalid, key_disabled, key_lost, refused, unavailable
from cloister_keybroker.backends.uri import BackendUri, invalid, read_credential
from cloister_keybroker.backends.workers import Threads, Workers

try:
    import hvac
    import requests
    from hvac import exceptions
except ImportError:  # the extra `transit` is not installed: `open_transit` says so
    hvac = None

_T = TypeVar("_T")
_THREADS: Final = 8
_WAITING: Final = 64  # calls that run or wait
_CONNECT_S: Final = 2.0
_READ_S: Final = 3.0
_DEADLINE_S: Final = 5.0  # of one custodian call, whatever it takes
_MOUNT: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}(?:/[A-Za-z0-9_.-]{1,64}){0,7}")
_CIPHERTEXT: Final = re.compile(r"vault:v([1-9][0-9]{0,8}):[A-Za-z0-9+/]{1,400}={0,2}")


class TransitCustodian:
    """Keys of one mount of a transit secrets engine."""

    lifetime: Lifetime | None = None
    capabilities = frozenset({Capability.DISABLE, Capability.DESTROY, Capability.NON_EXTRACTABLE})

    def __init__(self, uri: BackendUri) -> None:
        """Use `open_transit`."""
        url = uri.https()
        self.name = uri.name
        self._mount = url.path.strip("/")
        if not _MOUNT.fullmatch(self._mount):
            raise invalid(str(uri), "the address does not end with the path of a mount, such as /transit")
        self._url = f"https://{url.netloc}"
        self._ca_file = uri.file("ca")
        self._token_file = uri.file("token")
        self._namespace = uri.options.get("namespace")
        self._threads = Threads(self.name, _THREADS)
        self._workers = Workers(self.name, self._threads, limit=_WAITING, deadline_s=_DEADLINE_S)
        self._local = threading.local()  # a session of `requests` belongs to one thread
        self._sessions: list[Any] = []

    async def create(self, key: KeyRef) -> bytes:  # noqa: ARG002 - the server learns nothing about the key
        locator = f"cloister-{secrets.token_hex(16)}"

        def work(transit: Any) -> bytes:
            self._done(transit.create_key(locator, key_type="aes256-gcm96", exportable=False, mount_point=self._mount))
            return locator.encode()

        return await self._run(work)

    async def generate(self, locator: bytes, aad: bytes) -> FreshPart:
        secret = os.urandom(PART_SIZE)

        def work(transit: Any) -> FreshPart:
            answer = transit.encrypt_data(
                locator.decode(), plaintext=_b64(secret), associated_data=_b64(aad), mount_point=self._mount
            )
            ciphertext = self._text(answer, "ciphertext")
            if not _CIPHERTEXT.fullmatch(ciphertext):
                raise answer_invalid(self.name, "the ciphertext is not of the form vault:v1:base64")
            return FreshPart(SecretBytes(secret), ciphertext.encode())

        return await self._run(work)

    async def unwrap(self, locator: bytes, wrapped: bytes, aad: bytes) -> SecretBytes:
        ciphertext = _CIPHERTEXT.fullmatch(wrapped.decode("ascii", errors="replace"))
        if ciphertext is None:
            raise refused(
                self.name, "what the store has is not of the form vault:v1:base64", "the stored key is damaged"
            )

        def work(transit: Any) -> SecretBytes:
            try:
                answer = transit.decrypt_data(
                    locator.decode(), ciphertext[0], associated_data=_b64(aad), mount_point=self._mount
                )
            except exceptions.InvalidRequest:
                raise self._why_not(transit, locator.decode(), int(ciphertext[1])) from None
            try:
                return SecretBytes(base64.b64decode(self._text(answer, "plaintext"), validate=True))
            except binascii.Error:
                raise answer_invalid(self.name, "the plaintext is not base64") from None

        return await self._run(work)

    async def enable(self, locator: bytes) -> None:
        def work(transit: Any) -> None:
            self._key(transit, locator.decode())
            self._configure(transit, locator.decode(), min_decryption_version=1)

        await self._run(work)

    async def disable(self, locator: bytes) -> None:
        def work(transit: Any) -> None:
            name = locator.decode()
            self._key(transit, name)
            self._done(transit.rotate_key(name, mount_point=self._mount))
            newest = self._number(self._key(transit, name), "latest_version")
            self._configure(transit, name, min_decryption_version=newest)

        await self._run(work)

    async def destroy(self, locator: bytes) -> None:
        def work(transit: Any) -> None:
            name = locator.decode()
            try:
                self._key(transit, name)
            except CloisterError as error:
                if error.code is Code.CUSTODIAN_KEY_LOST:
                    return
                raise
            self._configure(transit, name, deletion_allowed=True)
            self._done(transit.delete_key(name, mount_point=self._mount))

        await self._run(work)

    async def probe(self) -> None:
        await self._workers.run(lambda: self._attempt(self._probe))

    async def aclose(self) -> None:
        self._threads.close()
        for session in self._sessions:
            session.close()

    def _probe(self, client: Any) -> None:
        health = client.sys.read_health_status(standby_ok=True, performance_standby_code=200, method="GET")
        if not isinstance(health, Mapping):
            states = {501: "it is not initialized", 503: "it is sealed"}
            raise unavailable(self.name, states.get(health.status_code, f"its health is {health.status_code}"))
        token = self._mapping(client.auth.token.lookup_self(), "data")
        left, whole = self._number(token, "ttl"), self._number(token, "creation_ttl")
        # A life of 0 is one without end. What cannot be renewed is for the agent that writes the file to replace.
        if token.get("renewable") is True and whole and left * 2 < whole:
            client.auth.token.renew_self()

    async def _run(self, work: Callable[[Any], _T]) -> _T:
        return await self._workers.run(lambda: self._attempt(lambda client: work(client.secrets.transit)))

    def _attempt(self, work: Callable[[Any], _T]) -> _T:
        """Do it, and once more when the connection broke: every call here may be repeated."""
        for attempt in (1, 2):
            try:
                return work(self._client())
            except requests.exceptions.Timeout:
                raise unavailable(self.name, "it did not answer in time") from None
            except requests.exceptions.SSLError:
                raise refused(
                    self.name,
                    "its certificate is not of the configured CA, or is for another host",
                    "correct ca or the host in keybroker.backend",
                ) from None
            except requests.exceptions.ConnectionError:
                if attempt == 2:
                    raise unavailable(self.name, "no connection to it") from None
            except (requests.exceptions.RequestException, ValueError):
                raise answer_invalid(self.name, "it is not an answer of the transit API") from None
            except exceptions.VaultError as error:
                raise self._refusal(error) from None
        raise AssertionError("unreachable")

    def _client(self) -> Any:
        """Return this thread's client, with the token that is in the file now."""
        client = getattr(self._local, "client", None)
        token = read_credential(self._token_file).reveal().decode("ascii", errors="replace")
        if client is None:
            session = requests.Session()
            session.trust_env = False  # no proxy and no .netrc from the environment
            session.verify = str(self._ca_file)
            client = hvac.Client(
                url=self._url,
                token=token,
                timeout=(_CONNECT_S, _READ_S),
                allow_redirects=False,  # a redirect would take the token along
                session=session,
                namespace=self._namespace,
            )
            self._local.client = client
            self._sessions.append(session)
        client.token = token
        return client

    def _refusal(self, error: Exception) -> CloisterError:
        why = f"it answered: {type(error).__name__}"
        if isinstance(error, exceptions.Forbidden | exceptions.Unauthorized):
            todo = "give it a token that is valid and may use the mount: see docs/keybroker-backends.md"
            return refused(self.name, "its token is not valid, or may not do this", todo)
        if isinstance(error, exceptions.InvalidPath):
            return refused(
                self.name, "there is no transit engine at this mount", "check the mount in keybroker.backend"
            )
        if isinstance(error, exceptions.InvalidRequest):
            return refused(self.name, why)
        return unavailable(self.name, why)

    def _why_not(self, transit: Any, name: str, version: int) -> CloisterError:
        """Find out why a ciphertext was refused: the status is 400 for everything."""
        if version < self._number(self._key(transit, name), "min_decryption_version"):
            return key_disabled(self.name)
        return refused(self.name, "it does not open what the store says it wrapped", "the stored key is damaged")

    def _key(self, transit: Any, name: str) -> Mapping[str, Any]:
        """Return what the server says of a key; raise CUSTODIAN_KEY_LOST when there is none."""
        try:
            return self._mapping(transit.read_key(name, mount_point=self._mount), "data")
        except exceptions.InvalidPath as error:
            if error.errors != []:  # a missing key has no text; a missing mount, or a proxy's page, has one
                raise
            raise key_lost(self.name) from None

    def _configure(self, transit: Any, name: str, **values: int) -> None:
        self._done(transit.update_key_configuration(name, **values, mount_point=self._mount))

    def _done(self, answer: object) -> None:
        """Raise CUSTODIAN_ANSWER_INVALID unless a change was made: a redirect, say, is no error to `hvac`."""
        if not isinstance(answer, Mapping) and getattr(answer, "status_code", 0) != 204:
            raise answer_invalid(self.name, f"its status is {getattr(answer, 'status_code', 'unknown')}")

    def _mapping(self, answer: object, member: str) -> Mapping[str, Any]:
        inner = answer.get(member) if isinstance(answer, Mapping) else None
        if not isinstance(inner, Mapping):
            raise answer_invalid(self.name, f"there is no object {member!r} in it")
        return inner

    def _text(self, answer: object, member: str) -> str:
        value = self._mapping(answer, "data").get(member)
        if not isinstance(value, str):
            raise answer_invalid(self.name, f"there is no text {member!r} in it")
        return value

    def _number(self, values: Mapping[str, Any], member: str) -> int:
        value = values.get(member)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise answer_invalid(self.name, f"there is no number {member!r} in it")
        return value


async def open_transit(uri: BackendUri) -> TransitCustodian:
    """Prepare a custodian of the configuration; whether the server is there shows with the first call."""
    uri.only("ca", "token", "namespace")
    if hvac is None:
        raise CloisterError(
            Code.PREREQUISITE_MISSING,
            what="transit back ends need the package hvac",
            why="it is not installed",
            todo="pip install 'cloister[transit]'",
        )
    custodian = TransitCustodian(uri)
    if not uri.file("ca").is_file():
        raise invalid(str(uri), f"there is no CA file at {uri.file('ca')}")
    read_credential(uri.file("token"))
    return custodian


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
