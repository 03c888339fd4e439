# SPDX-License-Identifier: Apache-2.0
"""What attest is configured with decides whom it accepts, itself first: it enrols by the same rules."""

from __future__ import annotations

import asyncio
import base64
import json
import tempfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.appraisal.references import PAYLOAD_TYPE
from cloister.collateral.bundle import CollateralBundle
from cloister.didkey import did_key
from cloister.dsse import sign
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
OFFICE, STRANGER = (Ed25519PrivateKey.generate() for _ in range(2))


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


def configure(
    attest: AttestProcess, *, policy: str = POLICY, signers: str = did_key(OFFICE), threshold: int = 1
) -> None:
    (attest.directory / "policy.yaml").write_text(policy)
    publish(attest, 1)
    with attest.config_file.open("a") as file:
        file.write('[appraisal]\npolicy = "policy.yaml"\n')
        file.write(f'[[references]]\nname = "firmware"\npath = "firmware.dsse"\nsigners = ["{signers}"]\n')
        file.write(f"threshold = {threshold}\n")


def publish(attest: AttestProcess, version: int, *, key: Ed25519PrivateKey = OFFICE, remark: str = "") -> None:
    text = SET.replace("version: 1", f"version: {version}") + remark
    (attest.directory / "firmware.dsse").write_bytes(sign(PAYLOAD_TYPE, text.encode(), key).to_bytes())


async def fails(attest: AttestProcess, *words: str) -> None:
    attest.endpoints_file.unlink(missing_ok=True)
    code, errors = await attest.run_to_end()
    assert code != 0
    for word in words:
        assert word in errors
    assert not attest.endpoints_file.exists()


async def test_a_policy_with_a_signed_reference_set_is_in_force(attest: AttestProcess) -> None:
    configure(attest)
    await attest.start()
    await (await attest.service(Role.TRAINER)).aclose()


async def test_a_reference_set_by_another_signer_stops_attest(attest: AttestProcess) -> None:
    configure(attest)
    publish(attest, 1, key=STRANGER)
    await fails(attest, "CLO-1217", "firmware.dsse", did_key(STRANGER))


async def test_a_reference_set_that_was_edited_stops_attest(attest: AttestProcess) -> None:
    configure(attest)
    path = attest.directory / "firmware.dsse"
    envelope = json.loads(path.read_bytes())
    envelope["payload"] = base64.b64encode(SET.replace("version: 1", "version: 2").encode()).decode()
    path.write_text(json.dumps(envelope))
    await fails(attest, "CLO-1312", "firmware.dsse")
    path.write_text(SET)
    await fails(attest, "CLO-1311", "firmware.dsse")


async def test_reference_sets_do_not_go_back_across_restarts(attest: AttestProcess) -> None:
    configure(attest)
    publish(attest, 3)
    await attest.start()
    await attest.stop()
    publish(attest, 2)
    await fails(attest, "CLO-1217", "firmware version 2 is older than one seen here", "version 3")
    publish(attest, 3, remark="  # as it was\n")  # other bytes, the same contents
    await attest.start()
    await attest.stop(kill=True)
    text = SET.replace("version: 1", "version: 3").replace("spec: {", f'spec: {{mr_owner: ["{"00" * 48}"], ')
    (attest.directory / "firmware.dsse").write_bytes(sign(PAYLOAD_TYPE, text.encode(), OFFICE).to_bytes())
    await fails(attest, "CLO-1217", "firmware version 3 has changed")
    publish(attest, 4)
    await attest.start()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"signers": "did:key:z6Mk"}, "did:key"),
        ({"threshold": 2}, "2 signers are wanted and 1 are named"),
    ],
)
async def test_signers_that_cannot_be_are_a_mistake_of_the_configuration(
    attest: AttestProcess, change: dict[str, Any], named: str
) -> None:
    configure(attest, **change)
    await fails(attest, "CLO-1001", named)


async def test_an_older_bundle_of_collateral_is_refused_after_a_restart(attest: AttestProcess) -> None:
    directory = attest.directory / "platform" / "collateral"
    older = {path: path.read_bytes() for path in directory.glob("*.json")}
    signed_at = datetime.now(UTC).replace(microsecond=0)
    while datetime.now(UTC).replace(microsecond=0) == signed_at:  # what is signed has whole seconds
        await asyncio.sleep(0.05)
    SimulatedPlatform.create(attest.directory / "platform").publish(directory, datetime.now(UTC))
    newer = {path: path.read_bytes() for path in older}
    await attest.start()
    await attest.stop()
    for path, data in older.items():
        path.write_bytes(data)
    await fails(attest, "collateral.available", "is older than what is here")
    for path, data in newer.items():
        path.write_bytes(data)
    await attest.start()


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
