# SPDX-License-Identifier: Apache-2.0
"""What attest is configured with decides whom it accepts, itself first: it enrols by the same rules."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cloister.appraisal.references import parse_reference_set
from cloister.collateral.bundle import CollateralBundle
from cloister.identity import Role
from cloister.tlv import sha384
from cloister_sim.platform import SimulatedPlatform
from fakes.attest_harness import AttestProcess
from fakes.fake_pccs import FakePccs

POLICY = """\
apiVersion: cloister.dev/v1
kind: AppraisalPolicy
metadata: {name: test, version: 1}
spec:
  tcb: {status: [UpToDate]}
  measurements: {mr_td: {set: firmware}}
"""
SET = f"""\
apiVersion: cloister.dev/v1
kind: ReferenceSet
metadata: {{name: firmware, version: 1}}
spec: {{mr_td: ["{sha384(b"simulated virtual firmware").hex()}"]}}
"""
PIN = f"sha384:{parse_reference_set(SET.encode()).digest.hex()}"


@pytest.fixture
async def attest() -> AsyncIterator[AttestProcess]:
    """A platform that runs, and an attest that is configured and does not."""
    with tempfile.TemporaryDirectory(prefix="clo-") as directory:
        process = AttestProcess(Path(directory))
        try:
            await process.start_platform()
            process.write_config()
            yield process
        finally:
            await process.stop_all()


def configure(attest: AttestProcess, *, policy: str = POLICY, pin: str = PIN) -> None:
    (attest.directory / "policy.yaml").write_text(policy)
    (attest.directory / "firmware.yaml").write_text(SET)
    with attest.config_file.open("a") as file:
        file.write('[appraisal]\npolicy = "policy.yaml"\n')
        file.write(f'[[references]]\npath = "firmware.yaml"\ndigest = "{pin}"\n')


async def fails(attest: AttestProcess, *words: str) -> None:
    code, errors = await attest.run_to_end()
    assert code != 0
    for word in words:
        assert word in errors
    assert not attest.endpoints_file.exists()


async def test_a_policy_with_a_pinned_reference_set_is_in_force(attest: AttestProcess) -> None:
    configure(attest)
    await attest.start()
    await (await attest.service(Role.TRAINER)).aclose()


async def test_a_reference_set_other_than_the_pinned_one_stops_attest(attest: AttestProcess) -> None:
    configure(attest, pin=f"sha384:{'00' * 48}")
    await fails(attest, "CLO-", "not the one that is pinned", PIN)


async def test_attest_does_not_start_on_a_platform_that_its_own_policy_refuses(attest: AttestProcess) -> None:
    configure(attest, policy=POLICY + f"  platforms: {{piid: [{'66' * 16}]}}\n")
    await fails(attest, "platform.piid", "66" * 16)


async def test_attest_does_not_start_with_a_policy_that_names_an_unknown_set(attest: AttestProcess) -> None:
    configure(attest, policy=POLICY.replace("set: firmware", "set: software"))
    await fails(attest, "measurements.mr_td", "no such set here")


async def test_a_mistake_in_a_policy_is_named_with_file_and_line(attest: AttestProcess) -> None:
    configure(attest, policy=POLICY.replace("UpToDate", "Revoked"))
    await fails(attest, "CLO-1305", "policy.yaml: spec.tcb.status[0] (line 5)")


async def test_a_development_root_does_not_pass_for_intels(attest: AttestProcess) -> None:
    text = attest.config_file.read_text()
    attest.config_file.write_text(text.replace("simulated = true", "simulated = false"))
    await fails(attest, "CLO-", "is not Intel's production root")


async def test_without_a_configured_root_only_intels_counts(attest: AttestProcess) -> None:
    text = attest.config_file.read_text()
    attest.config_file.write_text(
        text.replace('[[trust_roots]]\npath = "platform/root.pem"\nsimulated = true\n', "").replace(
            "offline:platform/collateral", "offline:elsewhere"
        )
    )
    await fails(attest, "quote.P2")


async def test_attest_does_not_start_without_collateral(attest: AttestProcess) -> None:
    text = attest.config_file.read_text()
    attest.config_file.write_text(text.replace("offline:platform/collateral", "offline:elsewhere"))
    await fails(attest, "collateral.available", "cloister collateral")


@pytest.mark.parametrize("update", ["standard", "early"])
async def test_collateral_of_either_edition_comes_from_a_pccs(attest: AttestProcess, update: str) -> None:
    platform = SimulatedPlatform.create(attest.directory / "platform")
    bundles = platform.publish(attest.directory / "published", datetime.now(UTC))
    bundle = CollateralBundle.read(next(bundles.glob(f"*-{update}.json")))
    async with FakePccs() as pccs:
        source = f"pccs:{pccs.server.base_url}"
        text = attest.config_file.read_text().replace("offline:platform/collateral", source)
        more = f'[collateral]\nca_file = "{pccs.ca_file}"\nupdate = "{update}"\n'
        attest.config_file.write_text(text.replace("[collateral]\n", more))
        await fails(attest, "collateral.available")  # it has nothing yet
        pccs.serve(bundle.family, json.loads(bundle.collateral.to_json()))
        await attest.start()
        await (await attest.service(Role.TRAINER)).aclose()
        asked = len(pccs.requests)
        await (await attest.service(Role.TRAINER)).aclose()
        assert len(pccs.requests) == asked
