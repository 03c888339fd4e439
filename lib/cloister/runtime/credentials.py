# SPDX-License-Identifier: Apache-2.0
"""A process's own key, certificate chain and trust bundle, and where fresh ones come from."""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, Protocol

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from cloister.errors import CloisterError, Code
from cloister.identity import Role, SpiffeId
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.pem import Leaf, PemInvalid, is_leaf_of, read_leaf
from cloister.secret import SecretBytes

_MAX_FILE_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class Revoked:
    """What is not in force any more, although its time is not over."""

    certificates: frozenset[bytes] = frozenset()  # SHA-256 of leaves (DER), 32 bytes
    authorities: frozenset[bytes] = frozenset()  # key identifiers of CAs, 20 bytes

    def names(self, leaf: Leaf) -> bool:
        """Say whether this certificate is one of them."""
        return leaf.sha256 in self.certificates or leaf.issuer_key_id in self.authorities


NOTHING_REVOKED: Final = Revoked()


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """One generation of credentials. `chain_pem` is the leaf, then the CA of its role."""

    private_key_pem: SecretBytes
    chain_pem: bytes
    bundle: TrustBundle
    spiffe_id: SpiffeId
    not_after: datetime
    revoked: Revoked = NOTHING_REVOKED

    @property
    def is_trusted(self) -> bool:
        """Say whether those who trust the same would accept this certificate: its CA is there, nobody revoked it."""
        issuers = self.bundle.intermediates.get(self.spiffe_id.role, b"")
        leaf = read_leaf(self.chain_pem)
        return bool(issuers) and is_leaf_of(self.chain_pem, issuers) and not self.revoked.names(leaf)

    @classmethod
    def from_pem(cls, private_key_pem: SecretBytes, chain_pem: bytes, bundle: TrustBundle) -> TlsMaterial:
        """Read identity and expiry off the leaf; raise CloisterError when key, leaf and bundle do not fit together."""
        try:
            leaf = read_leaf(chain_pem)
            key = load_pem_private_key(private_key_pem.reveal(), password=None)
        except (PemInvalid, ValueError, TypeError):
            # The parser's own words could quote key material.
            raise _unusable("the key or the certificate chain is not PEM") from None
        if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP256R1):
            raise _unusable("the key is not ECDSA P-256, the only kind used here")
        if key.public_key() != leaf.certificate.public_key():
            raise _unusable("the key is not the certificate's")
        spiffe_id = spiffe_id_of(leaf)
        if spiffe_id.trust_domain != bundle.trust_domain:
            raise _unusable(f"the certificate is of {spiffe_id.trust_domain}, the bundle of {bundle.trust_domain}")
        if not is_leaf_of(chain_pem, bundle.intermediate(spiffe_id.role)):
            raise _unusable(f"the bundle's CA for the role {spiffe_id.role} did not issue the certificate")
        return cls(private_key_pem, chain_pem, bundle, spiffe_id, leaf.not_after)


class CredentialSource(Protocol):
    """Where a server or a channel takes its credentials from, again and again."""

    def current(self) -> TlsMaterial:
        """Return the newest generation; the same object until it changes. Cheap, and safe from any thread."""

    def on_change(self, callback: Callable[[], None]) -> None:
        """Have `callback` called, from any thread, after `current()` began to return something else."""


class StaticCredentials:
    """Credentials that change only when told to."""

    def __init__(self, material: TlsMaterial) -> None:
        self._material = material
        self._callbacks: list[Callable[[], None]] = []

    def current(self) -> TlsMaterial:
        return self._material

    def on_change(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def replace(self, material: TlsMaterial) -> None:
        """Make `material` current and tell everyone who asked."""
        self._material = material
        for callback in tuple(self._callbacks):
            callback()


class FileCredentials:
    """Credentials in three files, read again when one of them changes.

    While the files do not fit together (a writer is between two of them), the last good generation stays.
    """

    def __init__(self, key_path: Path, chain_path: Path, bundle_path: Path) -> None:
        self._paths = (key_path, chain_path, bundle_path)
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._material = self._read()

    def current(self) -> TlsMaterial:
        with self._lock:
            changed = self._reread()
            material = self._material
        if changed:
            for callback in tuple(self._callbacks):
                callback()
        return material

    def on_change(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def _reread(self) -> bool:
        try:
            stamp = self._stamp()
            if stamp == self._seen:
                return False
            material = self._read()
        except CloisterError:
            return False
        self._seen, self._material = stamp, material
        return True

    def _stamp(self) -> tuple[tuple[int, int, int], ...]:
        found = []
        for path in self._paths:
            try:
                status = path.stat()
            except OSError as error:
                raise _unreadable(path, error) from None
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(found)

    def _read(self) -> TlsMaterial:
        key, chain, bundle = (_read_bounded(path) for path in self._paths)
        return TlsMaterial.from_pem(SecretBytes(key), chain, TrustBundle.parse(bundle))


def spiffe_id_of(leaf: Leaf) -> SpiffeId:
    """Return the one SPIFFE id of a certificate; raise CloisterError(CALLER_UNKNOWN) for none or several URIs."""
    if len(leaf.uris) != 1:
        raise CloisterError(
            Code.CALLER_UNKNOWN,
            what=f"the certificate carries {len(leaf.uris)} URI names",
            why="an identity is exactly one SPIFFE id",
            todo="use a certificate that attest issued",
        )
    return SpiffeId.parse(leaf.uris[0])


def server_ssl_context(credentials: CredentialSource, roles: Iterable[Role]) -> ssl.SSLContext:
    """Return a TLS 1.3 context for an HTTPS server that admits certificates of `roles` only, and rotates by itself.

    The role's CA is what is checked here; the identity is `caller.caller_of_tls()`.
    """
    wanted = tuple(roles)
    if not wanted:
        raise ValueError("a server that admits no role serves nobody")
    generation = [_context(credentials.current(), wanted)]

    def refresh() -> None:
        generation[0] = _context(credentials.current(), wanted)

    def choose(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        credentials.current()  # lets a source that watches files notice a change
        connection.context = generation[0]

    # A context cannot unlearn a CA. So each handshake is handed the newest context (its key, chain and CAs), and
    # this outer one only carries the settings OpenSSL copies before that: TLS 1.3, client certificate required.
    outer = _context(credentials.current(), wanted)
    outer.sni_callback = choose
    credentials.on_change(refresh)
    return outer


def _context(material: TlsMaterial, roles: tuple[Role, ...]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    # A resumed session would be answered without looking at the certificate again.
    context.num_tickets = 0
    load_own_chain(context, material)
    for role in roles:
        context.load_verify_locations(cadata=material.bundle.intermediate(role).decode("ascii"))
    return context


def load_own_chain(context: ssl.SSLContext, material: TlsMaterial) -> None:
    """Give a context the key and chain: through a memfd, because `ssl` reads files only and keys never are one."""
    descriptor = os.memfd_create("cloister-tls", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as memory:
            memory.write(material.private_key_pem.reveal() + b"\n" + material.chain_pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _read_bounded(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(data) > _MAX_FILE_BYTES:
        raise _unusable(f"{path.name} is longer than {_MAX_FILE_BYTES} bytes")
    return data


def _unreadable(path: Path, error: OSError) -> CloisterError:
    return CloisterError(
        Code.FILE_NOT_FOUND if isinstance(error, FileNotFoundError) else Code.IO_FAILED,
        what=f"{path} cannot be read",
        why=error.strerror or "",
        todo="check the path, or have the certificate issued again",
    )


def _unusable(why: str) -> CloisterError:
    return CloisterError(
        Code.TLS_FAILED,
        what="these credentials cannot be used",
        why=why,
        todo="have the certificate issued again and fetch the trust bundle again",
    )
