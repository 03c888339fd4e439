# SPDX-License-Identifier: Apache-2.0
"""Sealed distributed checkpoints: whole or not there, bound to their step, never overwritten, missed when lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cloister.data.checkpoints import Checkpoints
from cloister.errors import CloisterError, Code
from cloister.sealed.manifest import MANIFEST_NAME
from fakes.sealed_material import ROOT, data_key


def state(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {"w": torch.randn(64, 32, generator=generator), "b": torch.randn(32, generator=generator)},
        "step": torch.tensor(seed),
        "note": f"step {seed}",
    }


def empty() -> dict[str, Any]:
    return {"model": {"w": torch.zeros(64, 32), "b": torch.zeros(32)}, "step": torch.tensor(-1), "note": ""}


def store(tmp_path: Path, *, key: str = "one", name: str = "run", keep: int = 2) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", name=name, data_key=data_key(key), keep=keep)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (
        torch.equal(one["model"]["w"], other["model"]["w"])
        and torch.equal(one["model"]["b"], other["model"]["b"])
        and torch.equal(one["step"], other["step"])
        and one["note"] == other["note"]
    )


def refused(action: Any) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        action()
    return caught.value


def test_a_state_comes_back_and_nothing_of_it_is_on_the_disk(tmp_path: Path) -> None:
    place = store(tmp_path).save(state(7), 7)
    loaded = empty()
    assert store(tmp_path).load(loaded) == 7
    assert same(loaded, state(7))
    needle = state(7)["model"]["w"].numpy().tobytes()[:32]
    for path in place.iterdir():
        assert needle not in path.read_bytes()
        assert path.name == MANIFEST_NAME or b"model" not in path.read_bytes()  # names of parameters neither
    assert {path.suffix for path in place.iterdir()} == {".json", ".sealed"}


def test_the_newest_whole_checkpoint_is_found_and_old_ones_go(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    assert checkpoints.latest() is None
    for step in (1, 5, 12):
        checkpoints.save(state(step), step)
    assert checkpoints.steps() == [5, 12]
    assert sorted(path.name for path in checkpoints.root.iterdir()) == ["000000000005", "000000000012"]
    loaded = empty()
    assert checkpoints.load(loaded, 5) == 5
    assert same(loaded, state(5))


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(state(1), 1)
    assert refused(lambda: checkpoints.save(state(2), 1)).code is Code.FILE_EXISTS
    loaded = empty()
    checkpoints.load(loaded)
    assert same(loaded, state(1))


def test_what_was_not_written_to_its_end_is_none_and_can_be_written_again(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    place = checkpoints.save(state(1), 1)
    (place / MANIFEST_NAME).unlink()
    (place / "left.sealed").write_bytes(b"half")
    assert checkpoints.latest() is None
    assert refused(lambda: checkpoints.load(empty(), 1)).code is Code.FILE_NOT_FOUND
    checkpoints.save(state(1), 1)
    assert checkpoints.latest() == 1


@pytest.mark.parametrize("what", ["flip", "remove", "add", "swap", "rename", "metadata of another"])
def test_a_checkpoint_that_storage_changed_is_refused(tmp_path: Path, what: str) -> None:
    checkpoints = store(tmp_path)
    place, other = checkpoints.save(state(1), 1), checkpoints.save(state(2), 2)
    data = next(path for path in place.iterdir() if path.name.endswith(".distcp.sealed"))
    match what:
        case "flip":
            changed = bytearray(data.read_bytes())
            changed[-100] ^= 1
            data.write_bytes(changed)
        case "remove":
            data.unlink()
        case "add":
            (place / "more.sealed").write_bytes(data.read_bytes())
        case "swap":
            data.write_bytes((other / data.name).read_bytes())
        case "rename":
            shutil.rmtree(place)
            other.rename(place)
        case "metadata of another":
            (place / ".metadata.sealed").write_bytes((other / ".metadata.sealed").read_bytes())
    error = refused(lambda: checkpoints.load(empty(), 1))
    assert error.code in {Code.SEALED_FILE_INVALID, Code.SEALED_DIRECTORY_MISMATCH}


def test_another_key_or_another_run_does_not_load_it(tmp_path: Path) -> None:
    store(tmp_path).save(state(1), 1)
    assert refused(lambda: store(tmp_path, name="other").load(empty())).code is Code.SEALED_DIRECTORY_MISMATCH
    other = data_key("two")
    stranger = Checkpoints(tmp_path / "checkpoints", name="run", data_key=other)
    assert refused(lambda: stranger.load(empty())).code is Code.KEYRING_MISSING


def test_a_rolled_back_directory_is_found_by_whoever_knows_more(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(state(1), 1)
    digest = checkpoints.digest(1)
    old = tmp_path / "old"
    shutil.copytree(checkpoints.root, old)
    checkpoints.save(state(2), 2)
    assert checkpoints.latest(newest_known=2) == 2
    shutil.rmtree(checkpoints.root)
    old.rename(checkpoints.root)
    assert refused(lambda: checkpoints.latest(newest_known=2)).code is Code.CHECKPOINT_ROLLED_BACK
    assert checkpoints.load(empty(), 1, manifest_digest=digest) == 1
    error = refused(lambda: checkpoints.load(empty(), 1, manifest_digest=bytes(48)))
    assert error.code is Code.SEALED_DIRECTORY_MISMATCH


def test_a_full_disk_is_named_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=66m", "tmpfs", str(disk)]).returncode:
        pytest.skip("this user cannot mount a file system")
    try:
        checkpoints = Checkpoints(disk, name="run", data_key=data_key())
        checkpoints.save(state(1), 1)
        error = refused(lambda: checkpoints.save({"w": torch.zeros(1 << 20)}, 2))
        assert error.code is Code.DISK_FULL
        assert "fit" in error.what
        assert checkpoints.latest() == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_write_that_fails_in_the_middle_is_reported_as_what_it_is(tmp_path: Path) -> None:
    """Torch would say that a position in the file is not the expected one."""
    import resource

    checkpoints = store(tmp_path)
    checkpoints.save(state(1), 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        error = refused(lambda: checkpoints.save({"w": torch.zeros(1 << 20)}, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.code is Code.DISK_FULL
    assert checkpoints.latest() == 1
    checkpoints.save(state(2), 2)


TWO_RANKS = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from cloister.data.checkpoints import Checkpoints
from cloister.errors import CloisterError
from fakes.sealed_material import data_key

rank, base = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{base}/rendezvous", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
whole = torch.arange(4096.0).reshape(64, 64)
checkpoints = Checkpoints(base / "checkpoints", name="run", data_key=data_key())
state = {"w": distribute_tensor(whole, mesh, [Shard(0)]), "rank0": torch.ones(3)}
checkpoints.save(state, 1)
checkpoints.save_async(state, 2).result()
state["w"] = distribute_tensor(torch.zeros(64, 64), mesh, [Shard(1)])  # sharded another way
assert checkpoints.load(state) == 2
assert torch.equal(state["w"].full_tensor(), whole)
try:
    checkpoints.save(state, 2)
except CloisterError as error:
    print("refused", error.code.text)
dist.destroy_process_group()
"""


def test_two_ranks_save_and_load_shards_and_one_reads_the_whole(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], results
    assert all(out == "refused CLO-1005\n" or out.startswith("refused") for out, _ in results)
    alone = {"w": torch.zeros(64, 64), "rank0": torch.zeros(3)}
    assert store(tmp_path).load(alone) == 2
    assert torch.equal(alone["w"], torch.arange(4096.0).reshape(64, 64))
