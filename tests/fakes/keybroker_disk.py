# SPDX-License-Identifier: Apache-2.0
"""A broker's store on a small disk of its own that fills up or becomes read-only, in a mount namespace of its own.

`python keybroker_disk.py full|read-only DIRECTORY` prints what was seen, for a test that runs it under `unshare`.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

from cloister.errors import CloisterError
from cloister.keyuri import KeyUri
from cloister.secret import SecretBytes
from cloister_keybroker.vault import State
from fakes.keybroker_vault import a_vault, opens, operator, put_key


async def full(directory: Path) -> dict[str, object]:
    """Make keys until the disk is full; see what is left of them, then make room and go on."""
    async with a_vault(directory) as vault:
        new = await vault.initialized()
        await vault.hand_in(*new.shares[:2])
        opened = vault.vault.opened
        wrapped: dict[KeyUri, bytes] = {}
        secrets: dict[KeyUri, SecretBytes] = {}
        filler = directory / "filler"
        filler.write_bytes(bytes(_free(directory) - 600_000))
        said = ""
        while not said:
            uri = KeyUri.parse(f"cloister-key://hospital-a/made/{len(wrapped)}")
            try:
                wrapped[uri] = await put_key(opened.store, opened.backends, uri)
                secrets[uri] = await opens(opened.store, opened.backends, wrapped[uri], uri)
            except CloisterError as error:
                wrapped.pop(uri, None)
                said = error.code.text
        kept = [await opens(opened.store, opened.backends, wrapped[uri], uri) == secrets[uri] for uri in wrapped]
        half_made = await opened.store.read(lambda transaction: transaction.key(uri))
        sealing = await _code(vault.vault.seal(operator()))
        sealed = vault.state is State.SEALED
    restarted = ""
    async with a_vault(directory) as vault:
        await vault.hand_in(new.shares[0])
        restarted = await _code(vault.hand_in(new.shares[1]))
        filler.unlink()
        for share in new.shares[:2]:
            await vault.hand_in(share)
        opened = vault.vault.opened
        again = await put_key(opened.store, opened.backends, uri)
        all_there = [await opens(opened.store, opened.backends, wrapped[one], one) == secrets[one] for one in wrapped]
        await opens(opened.store, opened.backends, again, uri)
    return {
        "said": said,
        "made": len(kept),
        "kept": all(kept),
        "half_made": half_made is not None,
        "sealing": sealing,
        "sealed": sealed,
        "restarted": restarted,
        "all_there": all(all_there),
    }


async def read_only(directory: Path) -> dict[str, object]:
    """Use a store, make the disk read-only, and use it again afterwards."""
    async with a_vault(directory) as vault:
        new = await vault.initialized()
        await vault.hand_in(*new.shares[:2])
        wrapped = await put_key(vault.vault.opened.store, vault.vault.opened.backends)
    before = _content(directory)
    subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)
    said = await _code(_open(directory))
    unchanged = _content(directory) == before
    subprocess.run(["mount", "-o", "remount,rw", str(directory)], check=True)
    async with a_vault(directory) as vault:
        await vault.hand_in(*new.shares[:2])
        size = len(await opens(vault.vault.opened.store, vault.vault.opened.backends, wrapped))
    return {"said": said, "unchanged": unchanged, "size": size}


async def _open(directory: Path) -> None:
    async with a_vault(directory):
        pass


async def _code(work: object) -> str:
    try:
        await work  # type: ignore[misc]
    except CloisterError as error:
        return error.code.text
    return ""


def _free(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def _content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


if __name__ == "__main__":
    scenario = {"full": full, "read-only": read_only}[sys.argv[1]]
    place = Path(sys.argv[2])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], check=True)
    print(json.dumps(asyncio.run(scenario(place))), flush=True)
