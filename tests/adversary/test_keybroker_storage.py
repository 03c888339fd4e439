# SPDX-License-Identifier: Apache-2.0
"""A disk that fills up, becomes read-only or rots: a clear error, nothing lost that was there, nothing made anew."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.secret import SecretBytes
from cloister_keybroker.unsealing import NewRoot
from fakes import keybroker_disk
from fakes.keybroker_vault import a_vault, opens, put_key

PAGE = 4096


def on_a_small_disk(scenario: str, directory: Path) -> dict[str, Any]:
    """Run a scenario on a file system of its own; skip where nobody may mount one."""
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here: a full or read-only disk cannot be tried")
    tests = Path(keybroker_disk.__file__).parent.parent
    done = subprocess.run(
        [*namespace, sys.executable, keybroker_disk.__file__, scenario, str(directory)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tests)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_on_a_full_disk_nothing_is_lost_and_nothing_is_half_made(tmp_path: Path) -> None:
    found = on_a_small_disk("full", tmp_path)
    assert found.pop("made") > 10
    assert found == {
        "said": "CLO-1005",
        "kept": True,
        "half_made": False,
        "sealing": "",
        "sealed": True,
        "restarted": "CLO-1005",
        "all_there": True,
    }


def test_on_a_read_only_disk_the_broker_says_so_and_changes_nothing(tmp_path: Path) -> None:
    assert on_a_small_disk("read-only", tmp_path) == {"said": "CLO-1006", "unchanged": True, "size": 32}


async def test_a_rotten_page_gives_an_error_or_the_truth(tmp_path: Path) -> None:
    """Every page of a store in turn, zeroed, torn, and with one bit changed: never another key, never a new store."""
    good = tmp_path / "good"
    good.mkdir()
    wrapped: dict[KeyUri, bytes] = {}
    secrets: dict[KeyUri, SecretBytes] = {}
    async with a_vault(good) as vault:
        new = await vault.initialized()
        await vault.hand_in(*new.shares[:2])
        for number in range(6):
            uri = KeyUri.parse(f"cloister-key://hospital-a/made/{number}")
            wrapped[uri] = await put_key(vault.vault.opened.store, vault.vault.opened.backends, uri)
            secrets[uri] = await opens(vault.vault.opened.store, vault.vault.opened.backends, wrapped[uri], uri)
    data = (good / "store.sqlite").read_bytes()
    assert len(data) > 20 * PAGE
    refused = 0
    for number in range(len(data) // PAGE):
        page = data[number * PAGE : (number + 1) * PAGE]
        middle = PAGE // 2
        for rotten in (
            bytes(PAGE),
            page[:middle] + os.urandom(middle),
            page[: middle - 1] + bytes([page[middle - 1] ^ 1]) + page[middle:],
        ):
            if rotten == page:
                continue
            directory = tmp_path / "rotten"
            directory.mkdir()
            store = directory / "store.sqlite"
            store.write_bytes(data[: number * PAGE] + rotten + data[(number + 1) * PAGE :])
            refused += await look_at(directory, new, wrapped, secrets)
            assert store.stat().st_size > 0
            shutil.rmtree(directory)
    assert refused > len(data) // PAGE


async def look_at(
    directory: Path, new: NewRoot, wrapped: dict[KeyUri, bytes], secrets: dict[KeyUri, SecretBytes]
) -> bool:
    """Return whether the store was refused as a whole; what it gives is right, or an error of ours."""
    before = (directory / "store.sqlite").read_bytes()
    try:
        async with a_vault(directory) as vault:
            await vault.hand_in(*new.shares[:2])
            opened = vault.vault.opened
            for uri, data in wrapped.items():
                with suppress(CloisterError):
                    assert await opens(opened.store, opened.backends, data, uri) == secrets[uri]
    except CloisterError as refused:
        found = refused
    else:
        return False
    assert found.code in (Code.STORE_DAMAGED, Code.IO_FAILED, Code.CONFIG_INVALID, Code.SHARE_INVALID), str(found)
    assert (directory / "store.sqlite").read_bytes() == before
    return True
