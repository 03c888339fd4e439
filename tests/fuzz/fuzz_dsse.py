# SPDX-License-Identifier: Apache-2.0
"""Fuzz envelopes, statements and did:key: bytes end in one of two errors, or verify to what was signed.

Run: python tests/fuzz/fuzz_dsse.py
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["cloister"]):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from cloister.didkey import did_key, is_did_key, parse_did_key
    from cloister.dsse import OPEN_REQUEST, PROVISIONING, RELEASE_POLICY, Envelope, sign
    from cloister.errors import CloisterError, Code
    from cloister.keyuri import KeyUri
    from cloister.provisioning import OpenRequest, Provisioning
    from cloister.release.keys import Purpose

_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
_SEED = sign(RELEASE_POLICY, b"kind: ReleasePolicy", _KEY).to_bytes()
_STATEMENT = Envelope.parse(
    Provisioning(
        uri=KeyUri("a", "b"), owner="spiffe://t/ns/a/user/u", signer=did_key(_KEY), purposes=frozenset(Purpose)
    ).signed(_KEY)
).payload
_EXPECTED = {Code.ENVELOPE_INVALID, Code.SIGNATURE_INVALID}


def one_input(data: bytes) -> None:
    """Try bytes as they are, as a name, and written into a good envelope."""
    parse(data)
    name = data.decode("utf-8", errors="replace")
    if is_did_key(name) and did_key(parse_did_key(name)) != name:
        raise AssertionError("a second name of one key")
    if len(data) > 3:
        place, cut = int.from_bytes(data[:2], "big") % len(_SEED), data[2]
        if parse(_SEED[:place] + data[3:] + _SEED[place + cut :]) not in (None, b"kind: ReleasePolicy"):
            raise AssertionError("a payload that nobody signed")
        place = place % len(_STATEMENT)
        statements(_STATEMENT[:place] + data[3:] + _STATEMENT[place + cut :])


def statements(payload: bytes) -> None:
    """Read a signed payload as each kind of statement: what is read says the same when it is signed again."""
    for kind, statement in ((PROVISIONING, Provisioning), (OPEN_REQUEST, OpenRequest)):
        try:
            found = statement.verified(sign(kind, payload, _KEY).to_bytes())
        except CloisterError as error:
            if error.code not in _EXPECTED:
                raise
        else:
            if statement.verified(found.signed(_KEY)) != found:
                raise AssertionError("a statement that does not read back")


def parse(data: bytes) -> bytes | None:
    """Return the payload of a verified envelope; raise for anything but the two errors."""
    try:
        envelope = Envelope.parse(data)
        if Envelope.parse(envelope.to_bytes()) != envelope:
            raise AssertionError("an envelope that does not parse back")
        envelope.signers(RELEASE_POLICY)
    except CloisterError as error:
        if error.code not in _EXPECTED:
            raise
        return None
    return envelope.payload


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
