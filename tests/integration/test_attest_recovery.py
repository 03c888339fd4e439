# SPDX-License-Identifier: Apache-2.0
"""A CA that is kept: attest restarts, and what was issued before is still in force."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cloister.api.attest.v1 import attest_pb2
from cloister.api.common.v1 import evidence_pb2, evidence_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Identity
from cloister.guest.evidence_service import EVIDENCE_CALLERS, mounted_evidence
from cloister.guest.measure import digest_of_package
from cloister.guest.recoverca import Given, Wanted, give_share
from cloister.holderkey import SealedShare, create_holder_key, read_holder_key
from cloister.identity import Role
from cloister.rootfile import create_root_file
from cloister.runtime.channel import invoke, open_channel
from cloister.runtime.server import GrpcServer
from cloister.secret import SecretBytes
from fakes.attest_harness import TRUST_DOMAIN, AttestProcess, attest_process, csr, spki
from fakes.cli_runner import Ran, run

FILE = 'kept = "file"\nroot_key_file = "root.key"'
HOLDERS = ("ann", "ben", "cas")
SHARES = 'kept = "shares"\nthreshold = 2\nholders = ["ann.pub", "ben.pub", "cas.pub"]'


def make_root_file(attest: AttestProcess) -> None:
    create_root_file(attest.directory / "root.key")


def make_holders(attest: AttestProcess) -> None:
    for name in HOLDERS:
        create_holder_key(attest.directory / name)


def share_of(attest: AttestProcess, number: int, directory: Path | None = None) -> SecretBytes:
    """Open a holder's share, as its holder does."""
    path = (directory or attest.directory / "state/ca-shares") / f"share-{number}-of-3.json"
    key = read_holder_key(attest.directory / HOLDERS[number - 1])
    return SealedShare.parse(path.read_bytes()).open(key)


def wanted(**changes: object) -> Wanted:
    digest_of_package.cache_clear()
    fields = {"trust_domain": TRUST_DOMAIN, "scripts": [digest_of_package("cloister_attest")]} | changes
    return Wanted(**fields)  # type: ignore[arg-type]


async def give(attest: AttestProcess, endpoint: str, share: SecretBytes, **changes: object) -> Given:
    return await give_share(endpoint, share, wanted(**changes), verifier=attest.verifier, now=datetime.now(UTC))


async def refused(attest: AttestProcess, endpoint: str, share: SecretBytes, **changes: object) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        await give(attest, endpoint, share, **changes)
    return caught.value


@contextlib.asynccontextmanager
async def serving(broker: Identity) -> AsyncIterator[str]:
    server = GrpcServer(
        section="127.0.0.1:0", credentials=broker, services=[mounted_evidence(broker)], callers=EVIDENCE_CALLERS
    )
    await server.start()
    try:
        yield server.endpoint
    finally:
        await server.drain(0)


async def ask(endpoint: str, who: Identity) -> None:
    async with open_channel(endpoint, role=Role.KEYBROKER, credentials=who) as channel:
        request = evidence_pb2.GetEvidenceRequest(nonce=secrets.token_bytes(32), audience=str(who.spiffe_id))
        method = evidence_pb2_grpc.EvidenceServiceStub(channel).GetEvidence
        await invoke(method, request, timeout_s=5, what="get evidence")


async def identities(attest: AttestProcess) -> list[str]:
    answer = await attest.call("IdentityService", "ListIdentities", attest_pb2.ListIdentitiesRequest())
    return [found.spiffe_id for found in answer.identities]


async def test_after_a_restart_with_its_ca_everything_goes_on_that_was_issued_before() -> None:
    async with attest_process(ca=FILE, fixed_ports=True, prepare=make_root_file) as attest:
        bundle = attest.bundle
        broker, trainer = await attest.service(Role.KEYBROKER), await attest.service(Role.TRAINER)
        bob = ec.generate_private_key(ec.SECP256R1())
        name = f"spiffe://{TRUST_DOMAIN}/ns/hospital-a/user/bob"
        issue = attest_pb2.IssueIdentityRequest(spiffe_id=name, standing=attest_pb2.STANDING_USER, csr_der=csr(bob))
        await attest.call("IdentityService", "IssueIdentity", issue)
        async with serving(broker) as endpoint:
            await ask(endpoint, trainer)
            await attest.stop(kill=True)
            await ask(endpoint, trainer)  # attest is not asked about every call
            await attest.start()

            assert attest.bundle.to_bytes() == bundle.to_bytes()
            await ask(endpoint, trainer)
            late = await attest.service(Role.GATEWAY)
            await ask(endpoint, late)
            for identity in (broker, trainer):
                await identity.refresh()
            await ask(endpoint, trainer)
        assert name in await identities(attest)
        await attest.user(bob)
        assert "whoever reads it has the CA" in attest.log()
        for identity in (broker, trainer, late):
            await identity.aclose()


async def test_without_a_kept_ca_a_restart_begins_another_one_and_registers_nobody() -> None:
    async with attest_process(fixed_ports=True) as attest:
        trainer = await attest.service(Role.TRAINER)
        bob = ec.generate_private_key(ec.SECP256R1())
        name = f"spiffe://{TRUST_DOMAIN}/ns/hospital-a/user/bob"
        issue = attest_pb2.IssueIdentityRequest(spiffe_id=name, standing=attest_pb2.STANDING_USER, spki_der=spki(bob))
        await attest.call("IdentityService", "IssueIdentity", issue)
        assert len(await identities(attest)) == 2
        await attest.stop()
        await attest.start()
        assert await identities(attest) == [str(attest.user_id)]
        with pytest.raises(CloisterError) as caught:
            await attest.user(bob)
        assert caught.value.code is Code.USER_NOT_REGISTERED
        # The TD of before is told what became of its CA: nobody it trusts has signed for the new one.
        with pytest.raises(CloisterError) as caught:
            await trainer.refresh()
        assert caught.value.code is Code.BUNDLE_INVALID
        await trainer.aclose()


async def test_enough_shares_bring_the_ca_back_and_one_too_few_does_not() -> None:
    async with attest_process(ca=SHARES, fixed_ports=True, prepare=make_holders) as attest:
        bundle = attest.bundle
        trainer = await attest.service(Role.TRAINER)
        await attest.stop(kill=True)
        endpoint = await attest.start_sealed()
        first = await give(attest, endpoint, share_of(attest, 2))
        assert (first.number, first.missing, first.waiting.given) == (2, 1, ())
        assert first.waiting.bundle.to_bytes() == bundle.to_bytes()
        assert (first.waiting.threshold, first.waiting.count) == (2, 3)
        assert not attest.endpoints_file.exists()

        again = await refused(attest, endpoint, share_of(attest, 2))
        assert (again.code, again.what) == (Code.SHARE_INVALID, "share 2 was given already")
        words = share_of(attest, 3).reveal().split()
        damaged = await refused(attest, endpoint, SecretBytes(b" ".join([*words[:8], words[9], words[8], *words[10:]])))
        assert damaged.code is Code.SHARE_INVALID
        assert "wrong, missing" in damaged.why

        last = await give(attest, endpoint, share_of(attest, 3))
        assert (last.number, last.missing, last.waiting.given) == (3, 0, (2,))
        await attest.ready()
        assert attest.bundle.to_bytes() == bundle.to_bytes()
        await trainer.refresh()
        await trainer.aclose()
        with pytest.raises(CloisterError):  # the port of before the CA is gone
            await give(attest, endpoint, share_of(attest, 1))
        for text in (share_of(attest, number).reveal().decode() for number in (1, 2, 3)):
            assert text.split()[10] + " " + text.split()[11] not in attest.log()


async def test_a_holder_gives_nothing_to_an_attest_that_is_not_as_it_should_be() -> None:
    async with attest_process(ca=SHARES, fixed_ports=True, prepare=make_holders) as attest:
        await attest.stop()
        sealed = json.loads((attest.directory / "state/ca.sealed").read_bytes())
        # The same code, in a configuration that admits somebody else.
        attest.users = (
            f'[[users]]\nspiffe_id = "spiffe://{TRUST_DOMAIN}/ns/x/user/mallory"\nspki_sha256 = "{"1" * 64}"\n'
        )
        attest.write_config()
        endpoint = await attest.start_sealed()
        share, present = share_of(attest, 1), attest.measured_configuration(sorted(attest.directory.glob("*.pub")))
        changed = await refused(attest, endpoint, share)
        assert changed.code is Code.EVIDENCE_UNEXPECTED
        assert "recovery.configuration" in changed.why
        for wrong, check in (
            ({"scripts": [b"\x01" * 48]}, "service.script"),
            ({"scripts": []}, "service.script"),
            ({"generation": 99, "config": present}, "recovery.generation"),
            ({"config": b"\x01" * 48}, "recovery.configuration"),
            ({"trust_domain": "other.test"}, "evidence.trust-domain"),
        ):
            error = await refused(attest, endpoint, share, **wrong)
            assert error.code in (Code.EVIDENCE_UNEXPECTED, Code.UNREACHABLE)
            assert check in error.why or error.code is Code.UNREACHABLE
        assert json.loads((attest.directory / "state/ca.sealed").read_bytes()) == sealed


async def test_a_change_of_configuration_can_be_recovered_into_by_name() -> None:
    async with attest_process(ca=SHARES, fixed_ports=True, prepare=make_holders) as attest:
        await attest.stop()
        attest.users = f'[[users]]\nspiffe_id = "spiffe://{TRUST_DOMAIN}/ns/b/user/bea"\nspki_sha256 = "{"1" * 64}"\n'
        attest.write_config()
        endpoint = await attest.start_sealed()
        config = attest.measured_configuration([attest.directory / f"{name}.pub" for name in HOLDERS])
        for number in (1, 3):
            await give(attest, endpoint, share_of(attest, number), config=config)
        await attest.ready()
        assert f"spiffe://{TRUST_DOMAIN}/ns/b/user/bea" in await identities(attest)
        # From now on that is the configuration it was sealed in.
        await attest.stop()
        endpoint = await attest.start_sealed()
        await give(attest, endpoint, share_of(attest, 2))


async def test_other_holders_get_shares_when_those_of_before_agree(tmp_path: Path) -> None:
    async with attest_process(ca=SHARES, fixed_ports=True, prepare=make_holders) as attest:
        bundle = attest.bundle
        await attest.stop()
        old = [share_of(attest, number) for number in (1, 2, 3)]
        shutil.copytree(attest.directory / "state/ca-shares", tmp_path / "before")
        create_holder_key(attest.directory / "dan")
        attest.ca = SHARES.replace("cas", "dan")
        attest.write_config()
        endpoint = await attest.start_sealed()
        assert (await refused(attest, endpoint, old[0])).code is Code.EVIDENCE_UNEXPECTED
        config = attest.measured_configuration([attest.directory / f"{name}.pub" for name in ("ann", "ben", "dan")])
        for share in old[:2]:
            await give(attest, endpoint, share, config=config)
        await attest.ready()
        assert attest.bundle.to_bytes() == bundle.to_bytes()

        await attest.stop()
        endpoint = await attest.start_sealed()
        assert "is none of set" in (await refused(attest, endpoint, old[2])).why
        dan = SealedShare.parse((attest.directory / "state/ca-shares/share-3-of-3.json").read_bytes())
        await give(attest, endpoint, dan.open(read_holder_key(attest.directory / "dan")))
        await give(attest, endpoint, share_of(attest, 1))
        await attest.ready()
        assert attest.bundle.to_bytes() == bundle.to_bytes()


async def test_killed_in_the_middle_of_changes_attest_finds_a_whole_state_and_its_services_go_on() -> None:
    ca = FILE + "\nlead_s = 1\noverlap_s = 3600"
    async with attest_process(ca=ca, fixed_ports=True, prepare=make_root_file) as attest:
        trainer = await attest.service(Role.TRAINER)
        sequence = trainer.trust.sequence
        for delay_s in (0.0, 0.002, 0.005, 0.01, 0.02, 0.05):
            operator = await attest.user()
            change = asyncio.create_task(
                attest.call(
                    "OperatorService", "RetireEpoch", attest_pb2.RetireEpochRequest(epoch=attest.bundle.epoch), operator
                )
            )
            await asyncio.sleep(0.03 + delay_s)
            await attest.stop(kill=True)
            await asyncio.gather(change, return_exceptions=True)
            await attest.start()
            await trainer.refresh()
            assert trainer.bundle.to_bytes() == attest.bundle.to_bytes()
            assert trainer.trust.sequence > sequence
            sequence = trainer.trust.sequence
            leftovers = [path.name for path in (attest.directory / "state").glob(".cloister-*")]
            assert len(leftovers) <= 1
        await trainer.aclose()


async def test_holders_bring_the_ca_back_with_the_command_line(tmp_path: Path) -> None:
    async with attest_process(ca=SHARES, fixed_ports=True, prepare=make_holders) as attest:
        bundle = attest.bundle
        await attest.stop()
        endpoint = await attest.start_sealed()
        platform = attest.directory / "platform"

        async def recover(number: int, holder: str, *more: object) -> Ran:
            digest_of_package.cache_clear()
            share = attest.directory / f"state/ca-shares/share-{number}-of-3.json"
            where = ("--endpoint", endpoint, "--root", platform / "root.pem", "--directory", platform / "collateral")
            arguments = ("--share", share, "--holder-key", attest.directory / holder, *where, *more)
            return await asyncio.to_thread(run, "--state", tmp_path, "attest", "recover", "--json", *arguments)

        assert "CLO-1240" in (await recover(1, "ben")).err  # another's key
        assert "recovery.generation" in (await recover(1, "ann", "--generation", "99")).err
        assert "CLO-1002" in (await recover(1, "ann", "--config", "abc")).err
        first = await recover(1, "ann")
        assert first.code == 0, first.err
        assert (first.document["number"], first.document["missing"], first.document["simulated"]) == (1, 1, True)
        assert first.document["epoch"] == bundle.epoch
        assert (
            first.document["configuration"]
            == attest.measured_configuration([attest.directory / f"{name}.pub" for name in HOLDERS]).hex()
        )
        assert "given already" in (await recover(1, "ann")).err
        assert (await recover(2, "ben")).document["missing"] == 0
        await attest.ready()
        assert attest.bundle.to_bytes() == bundle.to_bytes()
