# SPDX-License-Identifier: Apache-2.0
"""Killed with -9 at 200 random points of sealing and of re-wrapping: nothing lost, nothing half-valid.

One process forks the workers and kills them after random times, so that a round costs milliseconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.sealed_material import ROOT

ROUNDS = 200

DRIVER = """
import os, signal, sys, time
from dataclasses import replace
from pathlib import Path
from random import Random
from cloister.sealed.directory import SealedDirectory, seal_directory
from cloister.sealed.manifest import MANIFEST_NAME
from cloister.sealed.rewrap import rewrap_directory
from fakes.sealed_material import content, data_key

work, base, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
chance = Random(7)
source = base / "source"
source.mkdir()
for number in range(5):
    (source / str(number)).write_bytes(content(20_000, salt=str(number)))

def key(version):
    return replace(data_key(), key_version=version, wrapped=b"wrapped under %06d" % version * 3)

def killed(function, after_s):
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(0)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == signal.SIGKILL

def check(out, version=3):
    opened = SealedDirectory.open(out, data_key=key(version))
    for number in range(5):
        assert opened.read(str(number)) == content(20_000, salt=str(number))

def seal(out):
    return lambda: seal_directory(source, out, data_key=key(3), dataset="d")

began = time.monotonic()
seal(base / "first")()
took = time.monotonic() - began
hit = finished = resumed = 0
if work == "seal":
    out, number = base / "out0", 0
    while hit < rounds:
        hit += killed(seal(out), chance.random() * took * 1.1)
        if (out / MANIFEST_NAME).exists():
            check(out)
            finished += 1
            number += 1
            out = base / f"out{number}"
        elif out.exists() and any(out.glob("*.sealed")):
            try:
                SealedDirectory.open(out, data_key=key(3))
            except Exception as error:
                assert "CLO-1404" in str(error)
            resumed += 1
    seal(out)()
    check(out)
else:
    out, version = base / "first", 3
    began = time.monotonic()
    rewrap_directory(out, lambda _uri, old, _wrapped: (old + 1, key(old + 1).wrapped))
    took, version = time.monotonic() - began, 4
    while hit < rounds:
        hit += killed(
            lambda: rewrap_directory(out, lambda _uri, old, _wrapped: (old + 1, key(old + 1).wrapped)),
            chance.random() * took * 1.1,
        )
        check(out)  # whatever the headers name, the data key is the same
        resumed += 1
    version = rewrap_directory(out, lambda _uri, old, _wrapped: (old + 1, key(old + 1).wrapped)).key_version
    assert SealedDirectory.peek(out).key_version == version
    assert all(path.read_bytes().count(key(version).wrapped) == 1 for path in out.glob("*.sealed"))
    check(out, version)
for path in base.rglob("*"):
    if path.is_file() and source not in path.parents:
        assert content(20_000, salt="5")[100:116] not in path.read_bytes()
print(hit, finished, resumed)
"""


@pytest.mark.parametrize("work", ["seal", "rewrap"])
def test_whoever_is_killed_leaves_something_to_go_on_with(tmp_path: Path, work: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, work, str(tmp_path), str(ROUNDS)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    hit, _finished, resumed = map(int, done.stdout.split())
    assert hit == ROUNDS
    assert resumed > ROUNDS // 4
