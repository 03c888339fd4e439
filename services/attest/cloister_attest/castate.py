# SPDX-License-Identifier: Apache-2.0
"""What of the CA outlives the process: its state, sealed under a recovery key, in one file.

    memory   nothing: a restart begins a new CA
    file     the recovery key is a file (0600): for development, and said loudly
    shares   the recovery key is in nobody's hands: attest drew it, and gave each holder a share that only this holder
             can open; enough of them give it back, to an attest that they verified

The file's public part is the trust bundle, so that attest can measure what it is about to recover; it is authenticated
with the rest. Who has the file alone can neither read it nor make another one. It can be put back: `generation` and
time tell those who recover, and services that run refuse what is older than what they hold. It can be shown to an
attest of another configuration: the digest of the one it was sealed in tells that (docs/attestation.md).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cloister.atomicfile import write_atomically
from cloister.errors import CloisterError, Code
from cloister.recovery import SealedRoot, ShareSet, new_recovery_key
from cloister.runtime.bundle import TrustBundle
from cloister.secret import SecretBytes
from cloister.strictjson import Members, StrictJsonError, dump, load
from cloister_attest.epochs import Epochs

PURPOSE: Final = "workload-ca"
_FORMAT: Final = "cloister-ca-state-1"
_MAX_FILE: Final = 1024 * 1024  # bytes; an epoch has 7 KB


@dataclass(frozen=True, slots=True)
class Context:
    """Where a state was sealed: digests of attest's configuration and of those who hold shares (48 bytes each)."""

    config: bytes
    holders: bytes


@dataclass(frozen=True, slots=True)
class CaState:
    """All that attest must not forget while its CA lives."""

    epochs: Epochs
    register_key: SecretBytes  # 32 bytes: authenticates attest's register of identities (users.py)

    @classmethod
    def begin(cls, trust_domain: str, *, now: datetime) -> CaState:
        """Return the state of a new CA."""
        return cls(Epochs.begin(trust_domain, now=now), new_recovery_key())

    def seal(self, key: SecretBytes, *, shares: ShareSet | None, context: Context, now: datetime) -> bytes:
        """Return the sealed file."""
        public = dump(
            {
                "bundle": self.epochs.bundle.to_bytes().decode("ascii"),
                "config": context.config.hex(),
                "holders": context.holders.hex(),
                "generation": self.epochs.generation,
                "sealed_unix_s": int(now.timestamp()),
            }
        )
        values = {
            "format": _FORMAT,
            "epochs": self.epochs.to_secret(),
            "register_key": self.register_key.reveal().hex(),
        }
        secret = SecretBytes(json.dumps(values, sort_keys=True).encode("ascii"))
        return SealedRoot.seal(secret, key, purpose=PURPOSE, public=public, shares=shares).to_bytes()


@dataclass(frozen=True, slots=True)
class SealedState:
    """A sealed file, read but not opened. Nothing in it is authenticated before `open` succeeds."""

    sealed: SealedRoot
    bundle: TrustBundle
    context: Context
    generation: int
    sealed_at: datetime

    @classmethod
    def parse(cls, data: bytes) -> SealedState:
        """Parse the file; raise CloisterError(SEALED_ROOT_INVALID)."""
        sealed = SealedRoot.parse(data, purpose=PURPOSE)
        try:
            public = Members(load(sealed.public, max_size=_MAX_FILE), "the public part")
            bundle = TrustBundle.parse(public.text("bundle", longest=_MAX_FILE).encode("ascii"))
            context = Context(*(public.octets(name, sizes=(48,)) for name in ("config", "holders")))
            generation, sealed_at = public.integer("generation"), public.integer("sealed_unix_s", highest=2**33)
            public.end()
        except (StrictJsonError, ValueError, CloisterError):
            raise _invalid("its public part does not parse") from None
        return cls(sealed, bundle, context, generation, datetime.fromtimestamp(sealed_at, UTC))

    def open(self, key: SecretBytes) -> CaState:
        """Return the state; raise CloisterError(SEALED_ROOT_INVALID) under another key, or when it was edited."""
        secret = self.sealed.open(key)
        try:
            values = json.loads(secret.reveal())
            if values["format"] != _FORMAT:
                raise ValueError("format")
            epochs = Epochs.from_secret(values["epochs"])
            register_key = SecretBytes(bytes.fromhex(values["register_key"]))
        except (ValueError, KeyError, TypeError):
            # Authentic, so it was made by a release that this one cannot read. From None: values are secret.
            raise _invalid("it was sealed by another release") from None
        if epochs.bundle.digest != self.bundle.digest or epochs.generation != self.generation:
            raise _invalid("its public part is not about its secret part")
        return CaState(epochs, register_key)


def read_state(path: Path) -> SealedState | None:
    """Return the sealed state in a file, None when there is no file; raise CloisterError for any other file."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CloisterError(
            Code.IO_FAILED,
            what=f"the sealed CA state {path} cannot be read",
            why=error.strerror or "input/output error",
            todo="check the file and its permissions; attest does not begin a new CA in its place",
        ) from None
    return SealedState.parse(data)


@dataclass(frozen=True, slots=True)
class Vault:
    """Where the state of a running CA is kept: a file, and the key it is sealed under."""

    path: Path
    key: SecretBytes
    shares: ShareSet | None
    context: Context

    def save(self, state: CaState, *, now: datetime) -> None:
        """Seal and write the state; on any error raise CloisterError, and what was there before stays whole."""
        write_atomically(self.path, state.seal(self.key, shares=self.shares, context=self.context, now=now), mode=0o600)


def _invalid(why: str) -> CloisterError:
    return CloisterError(
        Code.SEALED_ROOT_INVALID,
        what="the sealed CA state cannot be used",
        why=why,
        todo="restore the file from your backup",
    )
