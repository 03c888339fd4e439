# SPDX-License-Identifier: Apache-2.0
"""The log's own key: made once, kept in the store under the root key, and so the same in every life of the broker.

It signs checkpoints. Receipts are signed by a key of the broker's present life, which its evidence names; the entry
that each life begins with binds the two (cloister.transparency.start).
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Final

import apsw
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.errors import CloisterError, Code
from cloister.identity import SpiffeId
from cloister.tlv import tlv
from cloister.transparency.checkpoint import Checkpoint
from cloister.transparency.note import NoteInvalid, NoteKey
from cloister.transparency.start import log_id_of
from cloister_keybroker.logcheck import damaged
from cloister_keybroker.rootkey import RootKey

SCHEMA: Final = """
CREATE TABLE log_key (
  only INTEGER PRIMARY KEY CHECK (only = 1),
  name TEXT NOT NULL,
  sealed BLOB NOT NULL
) STRICT;
"""
_NONCE_SIZE: Final = 12


@dataclass(frozen=True, slots=True)
class LogKey:
    """The log's name and its signing key."""

    note_key: NoteKey
    private: Ed25519PrivateKey
    start_index: int = 0  # of the entry that the broker's present life began with

    @property
    def log_id(self) -> bytes:
        """How receipts name the log (48 bytes)."""
        return log_id_of(self.note_key)

    def checkpoint(self, *, size: int, root: bytes) -> bytes:
        """Sign the log's size and root; only ever for what the head proves."""
        return Checkpoint(self.note_key.name, size, root).sign(self.private)


def load_or_create(connection: apsw.Connection, root_key: RootKey, broker_id: SpiffeId) -> LogKey:
    """Return the log's key, made at the first call.

    Raises STORE_DAMAGED for an edited one, CONFIG_INVALID when the log is another trust domain's.
    """
    found = load(connection, root_key)
    if found is not None:
        domain = found.note_key.name.partition("/")[0]
        if domain != broker_id.trust_domain:
            raise CloisterError(
                Code.CONFIG_INVALID,
                what="the key store belongs to another trust domain",
                why=f"its log is of {domain}, the broker is of {broker_id.trust_domain}",
                todo="configure the store's own trust domain, or another store",
            )
        return found
    private = Ed25519PrivateKey.generate()
    public = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    name = f"{broker_id.trust_domain}/keybroker/{hashlib.sha256(public).hexdigest()[:16]}"
    _write(connection, root_key, LogKey(NoteKey(name, public), private))
    return LogKey(NoteKey(name, public), private)


def load(connection: apsw.Connection, root_key: RootKey) -> LogKey | None:
    """Return the log's key, or None while the broker has had no life; raise STORE_DAMAGED for an edited one."""
    row = connection.execute("SELECT name, sealed FROM log_key WHERE only = 1").fetchone()
    if row is None:
        return None
    name, sealed = row
    try:
        nonce, ciphertext = sealed[:_NONCE_SIZE], sealed[_NONCE_SIZE:]
        seed = AESGCM(root_key.kek_wrap.reveal()).decrypt(nonce, ciphertext, _aad(name))
        private = Ed25519PrivateKey.from_private_bytes(seed)
        return LogKey(NoteKey.of(name, private), private)
    except (InvalidTag, ValueError, NoteInvalid):
        raise damaged("its key was edited") from None


def rekey(connection: apsw.Connection, old: RootKey, new: RootKey) -> None:
    """Keep the log's key under another root key."""
    found = load(connection, old)
    if found is not None:
        connection.execute("DELETE FROM log_key")
        _write(connection, new, found)


def _write(connection: apsw.Connection, root_key: RootKey, key: LogKey) -> None:
    nonce = os.urandom(_NONCE_SIZE)
    seed = key.private.private_bytes_raw()
    sealed = nonce + AESGCM(root_key.kek_wrap.reveal()).encrypt(nonce, seed, _aad(key.note_key.name))
    connection.execute("INSERT INTO log_key VALUES (1, ?, ?)", (key.note_key.name, sealed))


def _aad(name: str) -> bytes:
    return tlv("cloister-log-key-v1", name)
