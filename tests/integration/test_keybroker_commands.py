# SPDX-License-Identifier: Apache-2.0
"""`cloister broker`, as operators type it: from holders' keys to a restored backup."""

from __future__ import annotations

import asyncio
import io
import os
import stat
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cloister.atomicfile import write_atomically
from cloister.cli.state import Stack, StateDirectory
from fakes.attest_harness import TRUST_DOMAIN
from fakes.cli_runner import Ran, run
from fakes.keybroker_process import BrokerProcess, a_stack


class Commands:
    """The command line of the one operator, on the stack that runs."""

    def __init__(self, broker: BrokerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broker = broker
        self.monkeypatch = monkeypatch
        self.state = StateDirectory(broker.directory / "operator").create()
        pem = broker.attest.user_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_atomically(self.state.user_key, pem, mode=0o600)
        write_atomically(self.state.bundle, broker.attest.bundle_file.read_bytes())
        self.lock = self.state.lock()  # as the supervisor of a stack holds it

    def connect(self) -> None:
        """Tell the state directory where everything is now."""
        attest = self.broker.attest
        stack = Stack(
            supervisor_pid=os.getpid(),
            started_unix_s=0.0,
            trust_domain=TRUST_DOMAIN,
            tenant="hospital-a",
            user=str(attest.user_id),
            endpoints={"attest": attest.endpoints, "keybroker": {"grpc": self.broker.endpoint}},
            process_ids={},
            root_certificate=str(attest.directory / "platform" / "root.pem"),
            collateral=str(attest.directory / "platform" / "collateral"),
            simulated=True,
            timings_s={},
        )
        write_atomically(self.state.stack_file, stack.to_json(), mode=0o600)

    async def __call__(self, *arguments: object, stdin: str = "") -> Ran:
        """Run `cloister broker ARGUMENTS --json`; `stdin` is no terminal."""
        self.monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        return await asyncio.to_thread(run, "--state", self.state.root, "broker", *arguments, "--json")


@pytest.mark.timeout(180)
async def test_an_operators_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_stack("shares") as (_, broker):
        await broker.start()
        broker_command = Commands(broker, monkeypatch)
        broker_command.connect()
        status = await broker_command("status")
        assert status.document == {"state": "uninitialized", "source": "shares", "have": 0, "need": 0}, status.err

        for name in ("ada", "grace", "edsger"):
            made = await broker_command("holder-key", tmp_path / name)
            assert made.document["public"] == str(tmp_path / f"{name}.pub")
        holders = [word for name in ("ada", "grace", "edsger") for word in ("--holder", tmp_path / f"{name}.pub")]
        made = await broker_command("init", "--threshold", 2, *holders, "-o", tmp_path / "shares")
        files = [Path(share["file"]) for share in made.document["shares"]]
        assert [file.name for file in files] == [f"share-{n}-of-3.json" for n in (1, 2, 3)]
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}

        wrong = await broker_command("unseal", "--share", files[0], "--holder-key", tmp_path / "grace")
        assert (wrong.code, wrong.document["error"]["code"]) == (3, "CLO-1240")
        first = await broker_command("unseal", "--share", files[0], "--holder-key", tmp_path / "ada")
        assert first.document == {"state": "sealed", "source": "shares", "have": 1, "need": 2}
        second = await broker_command("unseal", "--share", files[2], "--holder-key", tmp_path / "edsger")
        assert second.document["state"] == "unsealed"
        status = await broker_command("status")
        assert (status.document["backend"], status.document["healthy"]) == ("embedded", True)
        assert (await broker_command("migrate")).document == {"migrated": 0, "left": 0}
        again = await broker_command("init", "--threshold", 2, "--shares", 2)
        assert (again.code, again.document["error"]["code"]) == (6, "CLO-1361")

        saved = await broker_command("backup", "-o", tmp_path / "backup")
        assert saved.document == {"file": str(tmp_path / "backup"), "bytes": (tmp_path / "backup").stat().st_size}
        assert stat.S_IMODE((tmp_path / "backup").stat().st_mode) == 0o600

        new = await broker_command("rekey", "--threshold", 2, "--shares", 3)
        words = [share["words"] for share in new.document["shares"]]
        assert all(len(text.split()) == 33 for text in words)
        assert (await broker_command("status")).document["need"] == 2
        early = await broker_command("unseal", stdin=f"{words[0]}\n")
        assert (early.code, early.document["error"]["code"]) == (3, "CLO-1362"), early.err
        other = await broker_command(
            "unseal", "--rekey", "0" * 16, "--share", files[0], "--holder-key", tmp_path / "ada"
        )
        assert other.document["error"]["what"] == "the broker waits for no root key named 0000000000000000"
        for number, name in ((0, "ada"), (2, "edsger")):
            holder = ("--share", files[number], "--holder-key", tmp_path / name)
            shown = await broker_command("unseal", "--rekey", new.document["rekey"], *holder)
        assert (shown.document["have"], shown.document["need"]) == (0, 2)
        for text in words[:2]:
            handed = await broker_command("unseal", stdin=f"{text}\n")
        assert handed.document["state"] == "unsealed"
        assert (await broker_command("seal")).document["state"] == "sealed"
        old = await broker_command("unseal", "--share", files[0], "--holder-key", tmp_path / "ada")
        assert (old.code, old.document["error"]["code"]) == (3, "CLO-1240")
        nothing = await broker_command("unseal", stdin="\n")
        assert (nothing.code, nothing.document["error"]["code"]) == (2, "CLO-1002")
        refused = await broker_command("backup", "-o", tmp_path / "other")
        assert (refused.code, refused.document["error"]["code"]) == (4, "CLO-1360")
        assert not (tmp_path / "other").exists()
        await broker.stop()

        there = await broker_command("restore", tmp_path / "backup", "--state-dir", broker.store.parent)
        assert (there.code, there.document["error"]["code"]) == (6, "CLO-1004")
        for file in broker.store.parent.glob("keybroker.sqlite*"):
            file.unlink()
        restored = await broker_command("restore", tmp_path / "backup", "--state-dir", broker.store.parent)
        assert restored.document["verified"] == "when the broker is unsealed"
        await broker.start()
        broker_command.connect()
        for file, name in ((files[0], "ada"), (files[1], "grace")):
            handed = await broker_command("unseal", "--share", file, "--holder-key", tmp_path / name)
        assert handed.document["state"] == "unsealed", handed.err
        broker_command.lock.close()


@pytest.mark.parametrize(
    "arguments",
    [
        ["init"],
        ["init", "--shares", "3"],
        ["init", "--threshold", "2"],
        ["init", "--threshold", "2", "--shares", "3", "--passphrase"],
        ["init", "--threshold", "2", "--holder", "nobody.pub"],
        ["init", "--threshold", "2", "--shares", "3", "-o", "shares"],
        ["rekey", "--file", "--shares", "2"],
        ["rekey"],
        ["unseal", "--share", "share.json"],
        ["unseal", "--root-key-file", "root.key"],
        ["unseal", "--holder-key", "ada"],
    ],
)
def test_what_is_not_clear_is_asked_for_before_anything_is_done(tmp_path: Path, arguments: list[str]) -> None:
    found = run("--state", tmp_path, "broker", *arguments, "--json")
    assert (found.code, found.document["error"]["code"]) == (2, "CLO-1002")
