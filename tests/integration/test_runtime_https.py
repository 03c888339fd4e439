# SPDX-License-Identifier: Apache-2.0
"""The TLS context for HTTPS follows the same rules as gRPC: role, one identity, rotation, no key on disk."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from cloister.errors import CloisterError, Code
from cloister.identity import Role, dns_name
from cloister.runtime.caller import Caller, caller_of_tls
from cloister.runtime.credentials import Revoked, StaticCredentials, TlsMaterial, load_own_chain, server_ssl_context
from cloister.runtime.pem import read_leaf
from fakes.certs import TestCa, some_id


class HttpsLike:
    """A server that answers each connection with who it is, or why not."""

    def __init__(self, credentials: StaticCredentials, roles: list[Role]) -> None:
        self.context = server_ssl_context(credentials, roles)
        self.credentials = credentials
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.outcomes: list[Caller | Exception] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self.socket.accept()
            except OSError:
                return
            try:
                with self.context.wrap_socket(plain, server_side=True) as connection:
                    trusted = self.credentials.current()
                    now = datetime.now(UTC)
                    caller = caller_of_tls(connection, "test", trusted.bundle, now, revoked=trusted.revoked)
                    self.outcomes.append(caller)
                    connection.sendall(str(caller.spiffe_id).encode())
            except (CloisterError, OSError) as error:
                self.outcomes.append(error)

    def ask(self, ca: TestCa, material: TlsMaterial | None) -> tuple[str, str]:
        """Return what the server said and who it was (its certificate's serial number)."""
        context = ssl.create_default_context(cadata=ca.bundle.root_pem.decode())
        if material:
            load_own_chain(context, material)
        host = self.socket.getsockname()
        with (
            socket.create_connection(host, timeout=5) as plain,
            context.wrap_socket(plain, server_hostname=dns_name(Role.GATEWAY, ca.trust_domain)) as connection,
        ):
            serial = connection.getpeercert()["serialNumber"]  # type: ignore[index]
            return connection.recv(1000).decode(), str(serial)


@pytest.fixture
def ca() -> TestCa:
    return TestCa()


@pytest.fixture
def server(ca: TestCa) -> Iterator[HttpsLike]:
    found = HttpsLike(ca.credentials(Role.GATEWAY), [Role.USER])
    yield found
    found.socket.close()


def refused(server: HttpsLike, ca: TestCa, material: TlsMaterial | None) -> Exception:
    before = len(server.outcomes)
    try:
        said, _ = server.ask(ca, material)
    except OSError:
        said = ""
    assert said == ""
    while len(server.outcomes) == before:
        threading.Event().wait(0.01)
    outcome = server.outcomes[-1]
    assert isinstance(outcome, Exception)
    return outcome


def test_a_user_is_known_by_its_spiffe_id(ca: TestCa, server: HttpsLike) -> None:
    assert server.ask(ca, ca.material(Role.USER))[0] == str(some_id(Role.USER))
    [caller] = server.outcomes
    assert isinstance(caller, Caller)
    assert caller.tls_version == "TLSv1.3"
    assert len(caller.certificate_sha256) == 32


def test_no_certificate_another_role_another_ca_and_an_expired_one_are_refused(ca: TestCa, server: HttpsLike) -> None:
    for material in (
        None,
        ca.material(Role.RANK),
        TestCa().material(Role.USER),
        ca.material(Role.USER, life=-timedelta(minutes=1)),
    ):
        assert isinstance(refused(server, ca, material), ssl.SSLError)


def test_two_uri_names_are_nobody(ca: TestCa, server: HttpsLike) -> None:
    user = str(some_id(Role.USER))
    error = refused(server, ca, ca.material(Role.USER, uris=[user, user + "2"]))
    assert isinstance(error, CloisterError)
    assert error.code is Code.CALLER_UNKNOWN


def test_a_revoked_certificate_and_one_of_a_revoked_ca_are_nobody(ca: TestCa, server: HttpsLike) -> None:
    user, other = ca.material(Role.USER), ca.material(Role.USER)
    leaf = read_leaf(user.chain_pem)
    for revoked in (
        Revoked(certificates=frozenset({leaf.sha256})),
        Revoked(authorities=frozenset({leaf.issuer_key_id})),
    ):
        server.credentials.replace(replace(ca.material(Role.GATEWAY), revoked=revoked))
        error = refused(server, ca, user)
        assert isinstance(error, CloisterError)
        assert error.code is Code.DENY_LISTED
    server.credentials.replace(
        replace(ca.material(Role.GATEWAY), revoked=Revoked(certificates=frozenset({leaf.sha256})))
    )
    assert server.ask(ca, other)[0] == str(some_id(Role.USER))


def test_a_new_certificate_and_a_new_ca_are_used_from_the_next_handshake_on(ca: TestCa, server: HttpsLike) -> None:
    _, first = server.ask(ca, ca.material(Role.USER))
    server.credentials.replace(ca.material(Role.GATEWAY))
    _, second = server.ask(ca, ca.material(Role.USER))
    assert first != second
    new = TestCa(epoch="two")
    server.credentials.replace(new.material(Role.GATEWAY))
    assert server.ask(new, new.material(Role.USER))[0] == str(some_id(Role.USER))
    old_user = ca.material(Role.USER)
    assert isinstance(refused(server, new, old_user), ssl.SSLError), "the dropped CA is trusted no more"


def test_the_private_key_is_never_a_file(ca: TestCa) -> None:
    before = set(os.listdir("/proc/self/fd"))
    server_ssl_context(ca.credentials(Role.GATEWAY), [Role.USER])
    assert set(os.listdir("/proc/self/fd")) == before, "the memory file is closed again"


def test_a_server_for_nobody_is_a_mistake(ca: TestCa) -> None:
    with pytest.raises(ValueError, match="nobody"):
        server_ssl_context(ca.credentials(Role.GATEWAY), [])
