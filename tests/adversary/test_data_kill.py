# SPDX-License-Identifier: Apache-2.0
"""Killed with -9 at 200 random points of checkpointing: earlier checkpoints are whole, later ones whole or not there.

One process imports torch and forks the workers, so that a round costs milliseconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fakes.sealed_material import ROOT

ROUNDS = 200

DRIVER = """
import os, signal, sys, time
from pathlib import Path
from random import Random
import torch
from torch.distributed import checkpoint
from cloister.data import load, save
from cloister.data.checkpoints import Checkpoints
from cloister.errors import CloisterError, Code
from fakes.sealed_material import data_key

torch.set_num_threads(1)
base, rounds = Path(sys.argv[1]), int(sys.argv[2])
chance, key = Random(11), data_key()
store = Checkpoints(base / "checkpoints", name="run", data_key=key, keep=2)
single = base / "best.pt"

def state(step):
    return {"w": torch.full((300, 300), float(step)), "step": torch.tensor(step), "note": f"confidential {step}"}

def work(step):
    store.save(state(step), step)
    save(state(step), single, data_key=key)

def killed(step, after_s):
    child = os.fork()
    if child == 0:
        try:
            work(step)
        finally:
            os._exit(0)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == signal.SIGKILL

def check(before):
    newest = store.latest()
    assert newest is not None and newest >= before, (newest, before)
    for step in store.steps():
        found = {"w": torch.zeros(300, 300), "step": torch.tensor(-1), "note": ""}
        assert store.load(found, step) == step
        assert torch.equal(found["w"], state(step)["w"]) and found["note"] == f"confidential {step}"
    loaded = load(single, data_key=key)
    assert torch.equal(loaded["w"], state(int(loaded["step"]))["w"])
    assert int(loaded["step"]) <= newest
    return newest

work(0)
began = time.monotonic()
work(1)
took = time.monotonic() - began
hit = unfinished = 0
newest = 1
while hit < rounds:
    step = newest + 1
    hit += killed(step, chance.random() * took * 1.2)
    unfinished += (store.root / f"{step:012d}").exists() and store.latest() < step
    newest = check(newest)
work(newest + 1)  # whatever the last one left is written anew
assert check(newest + 1) == newest + 1
for path in base.rglob("*"):
    assert not path.is_file() or b"confidential" not in path.read_bytes()
for path in store.root.iterdir():
    store.digest(int(path.name))  # nothing half-removed or half-written is left beside the whole ones
print(hit, unfinished)
"""


def test_a_killed_trainer_loses_no_checkpoint_and_leaves_no_half_of_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER, str(tmp_path), str(ROUNDS)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=115,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    hit, unfinished = map(int, done.stdout.split())
    assert hit == ROUNDS
    assert unfinished > ROUNDS // 10
