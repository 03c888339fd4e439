# SPDX-License-Identifier: Apache-2.0
"""Signing keys of owners, the same in every run; and what they sign."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.didkey import did_key
from cloister.dsse import RELEASE_POLICY, sign
from cloister.keyuri import KeyUri
from cloister.provisioning import Provisioning
from cloister.release.keys import Purpose
from cloister.release.policy import parse_policy


def signing_key(name: str) -> Ed25519PrivateKey:
    """Return the signing key of somebody."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"signing key of {name}".encode()).digest())


OWNER_KEY = signing_key("owner")
OWNER_SIGNER = did_key(OWNER_KEY)


def signed_policy(yaml: bytes, *keys: Ed25519PrivateKey) -> bytes:
    """Return any bytes in an envelope of a policy, signed by these keys (default: OWNER_KEY)."""
    return sign(RELEASE_POLICY, yaml, *(keys or (OWNER_KEY,))).to_bytes()


def provisioned(
    uri: KeyUri,
    owner: object,
    purposes: Iterable[Purpose],
    policy_yaml: bytes = b"",
    *,
    key: Ed25519PrivateKey = OWNER_KEY,
    sealed_digest: bytes = b"",
    nonce: bytes = b"",
) -> bytes:
    """Return the signed statement of a new key."""
    return Provisioning(
        uri=uri,
        owner=str(owner),
        signer=did_key(key),
        purposes=frozenset(purposes),
        policy_digest=parse_policy(policy_yaml).digest if policy_yaml else b"",
        sealed_digest=sealed_digest,
        nonce=nonce,
    ).signed(key)
