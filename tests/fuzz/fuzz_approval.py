# SPDX-License-Identifier: Apache-2.0
"""Fuzz approvals: any envelope, and any signed payload, is an approval or one of two errors.

Run: python tests/fuzz/fuzz_approval.py
"""

from __future__ import annotations

import sys

import atheris
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

with atheris.instrument_imports(include=["cloister.dsse", "cloister.strictjson", "cloister.release.approvals"]):
    from cloister import dsse
    from cloister.errors import CloisterError, Code
    from cloister.keyuri import KeyUri
    from cloister.release.approvals import ReleaseApproval, SignedApproval
    from cloister.release.keys import Purpose

_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
_SEED = ReleaseApproval(
    key_uri=KeyUri.parse("cloister-key://a/x"),
    purpose=Purpose.TRAIN,
    job="a/job/j-1",
    policy_digest=bytes(48),
    expires_ms=1,
).signed(_KEY)
_PAYLOAD = dsse.Envelope.parse(_SEED).payload


def one_input(data: bytes) -> None:
    """Read bytes as they are, written into a good envelope, and written into a payload that is then signed."""
    read(data)
    if len(data) > 3:
        place, cut = int.from_bytes(data[:2], "big"), data[2]
        at = place % len(_SEED)
        read(_SEED[:at] + data[3:] + _SEED[at + cut :])
        at = place % len(_PAYLOAD)
        payload = _PAYLOAD[:at] + data[3:] + _PAYLOAD[at + cut :]
        read(dsse.sign(dsse.RELEASE_APPROVAL, payload, _KEY).to_bytes())


def read(data: bytes) -> None:
    """Raise for anything but an approval or its errors."""
    try:
        approval = SignedApproval.verified(data)
    except CloisterError as error:
        if error.code not in (Code.ENVELOPE_INVALID, Code.SIGNATURE_INVALID):
            raise
        return
    if not approval.approvers or len(approval.statement.policy_digest) != 48:
        raise AssertionError("an approval by nobody, or of nothing")


if __name__ == "__main__":
    read(_SEED)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
