# SPDX-License-Identifier: Apache-2.0
"""A simulated platform's keys and certificates on disk: made once, whole or not at all.

    DIR/platform.json   keys and certificates (0600)
    DIR/root.pem        the development root, to be configured as a trust root
    DIR/collateral/     bundles that quotes of this platform are verified with
    DIR/lock            held while the platform is made or loaded

Keys lie here in the clear, which is the point at which a simulation differs from hardware: whoever reads this
directory can make quotes under this root. Evidence under it says `simulated`.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from cloister.errors import CloisterError, Code
from cloister_sim import pki

_VERSION: Final = 1
_FILE: Final = "platform.json"
_KEYS: Final = ("root_key", "ca_key", "pck_key", "attestation_key")
_CERTIFICATES: Final = ("root", "ca", "pck")


@dataclass(frozen=True, slots=True)
class PlatformKeys:
    """Everything that a platform is made of."""

    # The root and its CA keep their keys: they also sign what a verifier asks about the platform later.
    root_key: ec.EllipticCurvePrivateKey
    ca_key: ec.EllipticCurvePrivateKey
    pck_key: ec.EllipticCurvePrivateKey
    attestation_key: ec.EllipticCurvePrivateKey
    root: x509.Certificate
    ca: x509.Certificate
    pck: x509.Certificate

    @classmethod
    def generate(cls, now: datetime) -> PlatformKeys:
        root_key, ca_key, pck_key, attestation_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(4))
        root = pki.make_root(root_key, now)
        ca = pki.make_ca(ca_key, root, root_key, now)
        pck = pki.make_pck(pck_key, ca, ca_key, now, pki.PlatformIdentity.generate())
        return cls(root_key, ca_key, pck_key, attestation_key, root, ca, pck)

    def to_json(self) -> bytes:
        members: dict[str, Any] = {"version": _VERSION}
        for name in _KEYS:
            key: ec.EllipticCurvePrivateKey = getattr(self, name)
            members[name] = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        for name in _CERTIFICATES:
            members[name] = pki.to_pem(getattr(self, name)).decode()
        return json.dumps(members, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> PlatformKeys:
        """Read what `to_json` made; raise ValueError for anything else."""
        members = json.loads(data)
        if not isinstance(members, dict) or members.get("version") != _VERSION:
            raise ValueError(f"not a simulated platform of version {_VERSION}")
        try:
            keys = [load_pem_private_key(members[name].encode(), password=None) for name in _KEYS]
            certificates = [x509.load_pem_x509_certificate(members[name].encode()) for name in _CERTIFICATES]
        except (KeyError, AttributeError) as error:
            raise ValueError(f"member {error} is missing or not text") from None
        root_key, ca_key, pck_key, attestation_key = (_p256(key) for key in keys)
        return cls(root_key, ca_key, pck_key, attestation_key, *certificates)


def load_or_create(directory: Path, now: datetime) -> PlatformKeys:
    """Return the directory's platform, made now if there is none; raise CloisterError when neither works."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(directory / "lock"):
            path = directory / _FILE
            if not path.exists():
                _publish(path, PlatformKeys.generate(now).to_json())
            keys = PlatformKeys.from_json(path.read_bytes())
            # Also when a process was killed between the two files.
            root_pem, root_path = pki.to_pem(keys.root), directory / "root.pem"
            if not root_path.exists() or root_path.read_bytes() != root_pem:
                _publish(root_path, root_pem)
            return keys
    except OSError as error:
        raise CloisterError(
            Code.IO_FAILED,
            what=f"the simulated platform's directory {directory} cannot be used",
            why=error.strerror or str(error),
            todo="name a directory that this user can write",
        ) from error
    except ValueError:
        raise CloisterError(
            Code.CONFIG_INVALID,
            what=f"the simulated platform in {directory} is damaged",
            why=f"{_FILE} does not hold its keys and certificates",
            todo="remove the directory: a new platform, with another root, is made at the next start",
        ) from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; it goes with the process, however that ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _publish(path: Path, data: bytes) -> None:
    """Write the file whole under another name, then rename; a leftover of a killed process is overwritten."""
    new = path.with_name(path.name + ".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.rename(path)


def _p256(key: object) -> ec.EllipticCurvePrivateKey:
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("not a P-256 key")
    return key
