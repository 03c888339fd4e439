# SPDX-License-Identifier: Apache-2.0
"""A broker that works without end and prints each acknowledged operation, for a parent that kills it.

`python keybroker_crasher.py keys DIRECTORY` makes, uses, rotates, disables and destroys keys;
`python keybroker_crasher.py rekey DIRECTORY` replaces the root key again and again.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
from datetime import timedelta
from pathlib import Path

from cloister.errors import CloisterError
from cloister.keyuri import KeyUri
from cloister.release.keys import KeyState, Purpose
from cloister.secret import SecretBytes
from cloister.tlv import sha384
from cloister_keybroker.sealrecord import Source
from fakes.certs import TestCa
from fakes.keybroker_harness import TENANT, Broker, owner, policy_document
from fakes.keybroker_vault import a_vault, opens, operator, put_key


async def keys(directory: Path) -> None:
    """Do with keys what owners and workloads do."""
    broker = await Broker.open(directory / "store.sqlite", directory / "root.key", TestCa())
    print(json.dumps({"ready": True}), flush=True)
    for number in range(1_000_000):
        uri = KeyUri.parse(f"cloister-key://{TENANT}/made/{secrets.token_hex(8)}")
        await broker.create_key(policy_document(uri), uri)
        acknowledge("create", uri)
        wrapped = await generate(broker, uri, 1)
        td = broker.td()
        released = await td.release(key=uri, wrapped=wrapped)
        acknowledge("release", uri, index=released.data_key.receipt.place.index)
        try:
            await td.release(key=uri, purpose=Purpose.EXPORT)
        except CloisterError:
            acknowledge("denied", uri)
        await broker.owners.rotate(owner(), uri)
        acknowledge("rotate", uri)
        await generate(broker, uri, 2)
        if number % 3 == 0:
            await broker.owners.set_state(owner(), uri, KeyState.DISABLED)
            acknowledge("disable", uri)
        elif number % 3 == 1:
            await broker.destruction.schedule(owner(), uri, timedelta(days=1))
            acknowledge("schedule", uri)
            broker.clock.advance(days=2)
            await broker.destruction.carry_out()
            acknowledge("destroy", uri)
            broker.clock.advance(days=-2)


async def generate(broker: Broker, uri: KeyUri, version: int) -> bytes:
    """Make a data key; tell which, without telling it."""
    answer, secret = await broker.generate(uri)
    facts = {"version": version, "wrapped": answer.wrapped.hex(), "secret": digest(secret)}
    acknowledge("generate", uri, index=answer.receipt.place.index, **facts)
    return answer.wrapped


async def rekey(directory: Path) -> None:
    """Replace the root key, which is a file here, and see that a key still opens."""
    async with a_vault(directory, Source.FILE) as vault:
        print(json.dumps({"ready": True}), flush=True)
        while True:
            opened = vault.vault.opened
            uri = KeyUri.parse(f"cloister-key://{TENANT}/made/{secrets.token_hex(8)}")
            wrapped = await put_key(opened.store, opened.backends, uri)
            secret = await opens(opened.store, opened.backends, wrapped, uri)
            acknowledge("generate", uri, wrapped=wrapped.hex(), secret=digest(secret))
            await vault.vault.rekey_file(operator())
            acknowledge("rekey", uri, file=digest(SecretBytes((directory / "root.key").read_bytes())))


def acknowledge(what: str, uri: KeyUri, **facts: object) -> None:
    """Print one line at once."""
    print(json.dumps({"what": what, "uri": str(uri), **facts}), flush=True)


def digest(secret: SecretBytes) -> str:
    """Name a secret without telling it."""
    return sha384(secret.reveal()).hex()


if __name__ == "__main__":
    asyncio.run({"keys": keys, "rekey": rekey}[sys.argv[1]](Path(sys.argv[2])))
