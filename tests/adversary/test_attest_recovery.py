# SPDX-License-Identifier: Apache-2.0
"""Who has the disk has the sealed CA: it opens for nobody but enough holders, and putting an old one back shows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.holderkey import SealedShare, create_holder_key, read_holder_key
from cloister.hpke import seal
from cloister.identity import Role
from cloister.protocol import recovery_share_info
from cloister.recovery import ShareCollector, split
from cloister.rootfile import create_root_file, read_root_file
from cloister.runtime.channel import invoke, open_public_channel
from cloister.secret import SecretBytes
from cloister_attest.castate import SealedState
from fakes.attest_harness import TRUST_DOMAIN, AttestProcess, attest_process

FILE = 'kept = "file"\nroot_key_file = "root.key"\nlead_s = 1'
SHARES = 'kept = "shares"\nthreshold = 2\nholders = ["ann.pub", "ben.pub"]'


def make_root_file(attest: AttestProcess) -> None:
    create_root_file(attest.directory / "root.key")


def make_holders(attest: AttestProcess) -> None:
    for name in ("ann", "ben"):
        create_holder_key(attest.directory / name)


def share_of(attest: AttestProcess, number: int) -> SecretBytes:
    path = attest.directory / f"state/ca-shares/share-{number}-of-2.json"
    return SealedShare.parse(path.read_bytes()).open(read_holder_key(attest.directory / ("ann", "ben")[number - 1]))


@contextmanager
def saved(state: Path, to: Path) -> Iterator[None]:
    shutil.copytree(state, to)
    yield
    shutil.rmtree(state)
    shutil.copytree(to, state)


async def test_a_stolen_state_without_enough_shares_is_nothing() -> None:
    async with attest_process(ca=SHARES, prepare=make_holders) as attest:
        stolen = SealedState.parse((attest.directory / "state/ca.sealed").read_bytes())
        shares = stolen.sealed.shares
        assert shares is not None
        collector = ShareCollector(shares)
        collector.add(share_of(attest, 1))
        with pytest.raises(CloisterError) as caught:
            collector.secret()
        assert caught.value.code is Code.SHARES_MISSING
        # The sealed shares beside it open for their holders only.
        sealed = SealedShare.parse((attest.directory / "state/ca-shares/share-2-of-2.json").read_bytes())
        with pytest.raises(CloisterError) as caught:
            sealed.open(read_holder_key(attest.directory / "ann"))
        assert caught.value.code is Code.SHARE_INVALID
        # Nothing of it is anywhere on the disk, nor of the words that would open it.
        words = [share_of(attest, number).reveal() for number in (1, 2)]
        for path in (attest.directory / "state").rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert b"PRIVATE KEY" not in content
                assert not any(each in content for each in words)


async def test_a_share_of_another_ca_and_one_that_was_sealed_to_another_process_are_named() -> None:
    async with attest_process(ca=SHARES, fixed_ports=True, prepare=make_holders) as attest:
        await attest.stop()
        endpoint = await attest.start_sealed()
        async with await open_public_channel(endpoint, trust_domain=TRUST_DOMAIN) as channel:
            stub = attest_pb2_grpc.RecoveryServiceStub(channel)
            found = await invoke(
                stub.GetRecovery, attest_pb2.GetRecoveryRequest(nonce=bytes(32)), timeout_s=5, what="look"
            )
            info = recovery_share_info(found.share_set, attest.bundle.digest)
            key = found.evidence.hpke_public_key

            async def given(share: SecretBytes, *, info: bytes = info, key: bytes = key) -> CloisterError:
                request = attest_pb2.GiveShareRequest(sealed_share=seal(key, share, info=info))
                with pytest.raises(CloisterError) as caught:
                    await invoke(stub.GiveShare, request, timeout_s=5, what="give")
                assert caught.value.code is Code.SHARE_INVALID
                return caught.value

            foreign = split(SecretBytes(bytes(32)), threshold=2, count=2).mnemonics[0]
            assert "is none of set" in (await given(foreign)).why
            mine = share_of(attest, 1)
            await given(mine, info=recovery_share_info(found.share_set, b"\x01" * 48))
            await given(mine, info=recovery_share_info("00000000", attest.bundle.digest))
            # What was sealed to the process before this one does not open here: a recorded share is worth nothing.
            good = seal(key, mine, info=info)
            await attest.stop()
        endpoint = await attest.start_sealed()
        async with await open_public_channel(endpoint, trust_domain=TRUST_DOMAIN) as channel:
            stub = attest_pb2_grpc.RecoveryServiceStub(channel)
            with pytest.raises(CloisterError) as caught:
                await invoke(stub.GiveShare, attest_pb2.GiveShareRequest(sealed_share=good), timeout_s=5, what="give")
            assert caught.value.code is Code.SHARE_INVALID
            for nonce in (b"", bytes(31)):
                request = attest_pb2.GetRecoveryRequest(nonce=nonce)
                with pytest.raises(CloisterError) as caught:
                    await invoke(stub.GetRecovery, request, timeout_s=5, what="look")
                assert caught.value.code is Code.ARGUMENT_INVALID
        assert not attest.endpoints_file.exists()


async def test_attest_does_not_start_on_a_state_that_was_swapped_cut_or_of_another_key() -> None:
    async with attest_process(ca=FILE, prepare=make_root_file) as attest:
        await attest.stop()
        place = attest.directory / "state/ca.sealed"
        good = place.read_bytes()
        fields = json.loads(good)
        for bad, code in (
            (good[:-20], "CLO-1242"),
            (b"", "CLO-1242"),
            (json.dumps({**fields, "ciphertext": fields["ciphertext"][:-8] + "AAAAAAA="}).encode(), "CLO-1242"),
            (json.dumps({**fields, "purpose": "another"}).encode(), "CLO-1242"),
        ):
            place.write_bytes(bad)
            exit_code, errors = await attest.run_to_end()
            assert (exit_code, code in errors) == (3, True), errors
            assert place.read_bytes() == bad  # nothing was begun in its place
        place.write_bytes(good)
        key = (attest.directory / "root.key").read_bytes()
        (attest.directory / "root.key").write_bytes(b"0" * 64)
        assert "CLO-1242" in (await attest.run_to_end())[1]
        (attest.directory / "root.key").chmod(0o644)
        assert "others may read it" in (await attest.run_to_end())[1]
        (attest.directory / "root.key").write_bytes(key)
        (attest.directory / "root.key").chmod(0o600)
        await attest.start()


async def test_a_database_that_does_not_belong_to_the_state_is_refused(tmp_path: Path) -> None:
    async with attest_process(ca=FILE, prepare=make_root_file) as attest:
        await attest.stop()
        state = attest.directory / "state"
        shutil.copy(state / "attest.sqlite", tmp_path / "old")
        for _ in range(2):  # two generations later
            await attest.start()
            await attest.stop()
        for leftover in state.glob("attest.sqlite-*"):
            leftover.unlink()
        shutil.copy(tmp_path / "old", state / "attest.sqlite")
        _, errors = await attest.run_to_end()
        assert "CLO-1245" in errors
        assert "put back" in errors
        (state / "attest.sqlite").unlink()
        assert "CLO-1245" in (await attest.run_to_end())[1]


async def test_whoever_holds_a_newer_bundle_does_not_go_back_with_a_state_that_was_put_back(tmp_path: Path) -> None:
    """State and database together are an older, whole copy: attest cannot know. Those who run can."""
    async with attest_process(ca=FILE, fixed_ports=True, prepare=make_root_file) as attest:
        trainer = await attest.service(Role.TRAINER)
        before = attest.bundle
        await attest.stop()
        with saved(attest.directory / "state", tmp_path / "copy"):
            await attest.start()
            await attest.retire_epoch()
            await trainer.refresh()
            assert trainer.bundle.sequence > before.sequence
            await attest.stop()
        await attest.start()
        assert attest.bundle.digest == before.digest  # the retired epoch is back
        with pytest.raises(CloisterError) as caught:
            await trainer.refresh()
        assert caught.value.code is Code.BUNDLE_INVALID
        assert trainer.bundle.digest != before.digest
        await trainer.aclose()


async def test_the_state_is_sealed_anew_with_every_change_and_told_by_its_generation() -> None:
    async with attest_process(ca=FILE, prepare=make_root_file) as attest:
        place, key = attest.directory / "state/ca.sealed", read_root_file(attest.directory / "root.key")
        seen = [SealedState.parse(place.read_bytes()).generation]
        await attest.retire_epoch()
        state = SealedState.parse(place.read_bytes())
        seen.append(state.generation)
        assert state.bundle.digest == attest.bundle.digest
        assert state.open(key).epochs.bundle.digest == state.bundle.digest
        told = await attest.call("OperatorService", "ListEpochs", attest_pb2.ListEpochsRequest())
        assert (told.generation, told.kept) == (state.generation, "file")
        assert seen == sorted(set(seen))
