# SPDX-License-Identifier: Apache-2.0
"""A verdict follows from its bundle alone, at any later time; a bundle that was changed gives itself away."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.appraisal.references import parse_reference_set
from cloister.collateral.failures import expired
from cloister.collateral.family import Family
from cloister.ear.jws import sign_claims
from cloister.errors import CloisterError, Code
from cloister.guest.verdictbundle import VERIFIER_ID, VerdictBundle, replay
from cloister.guest.verdictsignature import TYPE, verify_signature
from cloister.identity import Role
from cloister_attest.verdicts import Verdicts
from cloister_sim.platform import SimulatedPlatform
from fakes.attest_harness import JOB, LocalAttest, local_attest
from fakes.sim_collateral import collateral_of

SET = f"""
apiVersion: cloister.dev/v1
kind: ReferenceSet
metadata: {{name: firmware, version: 1}}
spec: {{rtmr0: ["{"66" * 48}"]}}
""".encode()


@pytest.fixture
async def attest() -> AsyncIterator[LocalAttest]:
    with local_attest(references=[parse_reference_set(SET)]) as local:
        await local.registry.register_job(JOB)
        yield local


async def newest(attest: LocalAttest) -> dict[str, Any]:
    """Return the bundle of the newest verdict, as a document to spoil."""
    verdict = (await attest.verdicts.newest(limit=1))[0]
    assert verdict.has_grounds
    document: dict[str, Any] = json.loads(await attest.verdicts.bundle(verdict.number))
    return document


async def accepted(attest: LocalAttest, role: Role = Role.RANK) -> dict[str, Any]:
    await attest.enrolment.attest(await attest.request(attest.td(role)))
    return await newest(attest)


async def refused(attest: LocalAttest, **options: Any) -> dict[str, Any]:
    with pytest.raises(CloisterError):
        await attest.enrolment.attest(await attest.request(attest.td(Role.TRAINER, **options)))
    return await newest(attest)


def parse(document: dict[str, Any]) -> VerdictBundle:
    return VerdictBundle.parse(json.dumps(document).encode())


@pytest.mark.parametrize("role", [Role.RANK, Role.KEYBROKER, Role.TRAINER, Role.ATTEST])
async def test_an_accepted_verdict_is_the_same_again(attest: LocalAttest, role: Role) -> None:
    document = await accepted(attest, role)
    made = await replay(parse(document))
    assert made.differences == ()
    assert made.accepted
    assert made.evidence is not None
    assert made.evidence.role is role
    recorded = (await attest.verdicts.newest(limit=1))[0]
    assert made.checks == recorded.checks
    assert document["spiffe_id"] == recorded.spiffe_id


async def test_a_refused_verdict_is_the_same_again(attest: LocalAttest) -> None:
    attributes = (1 << 28 | 1).to_bytes(8, "little")
    for document in (
        await refused(attest, attributes=attributes),  # by the policy
        await refused(attest, script=b"\x66" * 48),  # by the registry
        await refused(attest, bundle=b"\x66" * 48),
    ):
        made = await replay(parse(document))
        assert made.same, made.differences
        assert not made.accepted
    attest.source.change(collateral_of(attest.platform, attest.clock(), revoked=True))
    made = await replay(parse(await refused(attest)))
    assert made.same
    assert [check.name for check in made.checks if not check.ok] == ["quote.R4"]


async def test_a_verdict_without_collateral_is_the_same_again(attest: LocalAttest) -> None:
    family = Family.of(attest.platform_fmspc.hex(), "platform", "tdx")
    attest.source.problem = expired(family, attest.clock() - timedelta(days=3), attest.clock())
    document = await refused(attest)
    assert document["collateral"] is None
    assert document["unavailable"]["code"] == "COLLATERAL_EXPIRED"
    made = await replay(parse(document))
    assert made.same
    # Somebody who leaves collateral out of an accepted verdict does not get that one again.
    attest.source.problem = None
    good = await accepted(attest)
    assert not (await replay(parse(good | {"collateral": None}))).same


LENIENT = """\
apiVersion: cloister.dev/v1
kind: AppraisalPolicy
metadata: {name: strict, version: 1}
spec: {tcb: {status: [UpToDate, OutOfDate]}}
"""


async def test_no_change_of_an_accepted_bundle_goes_unnoticed(attest: LocalAttest, tmp_path: Path) -> None:
    document = await accepted(attest)
    stranger = SimulatedPlatform.create(tmp_path / "stranger")
    other = json.loads(stranger.collateral(attest.clock()).to_json())
    behind = json.loads(collateral_of(attest.platform, attest.clock(), status="OutOfDate").to_json())
    evidence = document["evidence"]
    log = json.loads(unb64(evidence["event_log"]))
    changes: dict[str, Any] = {
        "quote": {"evidence": evidence | {"quote": flipped(evidence["quote"], 700)}},
        "event log": {"evidence": evidence | {"event_log": b64(json.dumps(log[:-1]).encode())}},
        "nonce": {"expected": document["expected"] | {"nonce": b64(b"\x66" * 32)}},
        "audience": {"expected": document["expected"] | {"audience": "spiffe://cloister.test/service/keybroker"}},
        "key": {"evidence": evidence | {"hpke_public_key": flipped(evidence["hpke_public_key"])}},
        "collateral of another": {"collateral": other},
        "collateral of another day": {"collateral": behind},
        "root": {"root": {"certificate_der": b64(der(stranger)), "simulated": True}},
        "later": {"time": f"{(attest.clock() + timedelta(days=60)).isoformat()}"},
        "policy": {"policy": LENIENT},
        "outcome": {"accepted": False},
        "a check": {"checks": [document["checks"][0] | {"ok": False}, *document["checks"][1:]]},
        "a check less": {"checks": document["checks"][:-1]},
        "what came before": {"before": [document["before"][0] | {"ok": False}, *document["before"][1:]]},
        "what came after": {"after": [document["after"][0] | {"ok": False}, *document["after"][1:]]},
    }  # fmt: skip
    assert (await replay(parse(document))).same
    for name, change in changes.items():
        made = await replay(parse(document | change))
        assert not made.same, name
        assert made.differences[0], name


async def test_a_refusal_does_not_become_an_acceptance(attest: LocalAttest) -> None:
    attest.source.change(collateral_of(attest.platform, attest.clock(), status="OutOfDate"))
    document = await refused(attest)
    assert not (await replay(parse(document | {"accepted": True}))).same
    assert not (await replay(parse(document | {"policy": LENIENT}))).same
    good = [check | {"ok": True} for check in document["checks"]]
    made = await replay(parse(document | {"checks": good, "accepted": True}))
    assert not made.same
    assert not made.accepted


async def test_of_another_version_outcome_and_reason_must_agree(attest: LocalAttest) -> None:
    document = await accepted(attest)
    reworded = [check | {"wanted": "in other words"} for check in document["checks"]]
    assert not (await replay(parse(document | {"checks": reworded}))).same
    assert (await replay(parse(document | {"checks": reworded, "verifier": "cloister-attest/0.0.1"}))).same
    assert document["verifier"] == VERIFIER_ID
    refusal = await refused(attest, attributes=bytes(8)) | {"verifier": "cloister-attest/0.0.1"}
    assert (await replay(parse(refusal))).same
    assert not (await replay(parse(refusal | {"policy": LENIENT, "accepted": True}))).same


# The signature.


def signed_by(document: dict[str, Any], keys: Sequence[Mapping[str, str]]) -> str:
    return verify_signature(json.dumps(document).encode(), keys=keys)


def not_signed(document: dict[str, Any], keys: Sequence[Mapping[str, str]]) -> str:
    with pytest.raises(CloisterError) as caught:
        signed_by(document, keys)
    assert caught.value.code is Code.VERDICT_INVALID
    return f"{caught.value.what}; {caught.value.why}"


async def test_verdicts_of_both_outcomes_are_signed_with_the_token_key(attest: LocalAttest) -> None:
    keys = attest.bundle.token_keys
    for document in (await accepted(attest), await refused(attest, script=b"\x66" * 48)):
        assert signed_by(document, keys) == keys[0]["kid"]
        # Not the form of the file is signed, but what it says.
        assert signed_by(dict(reversed(document.items())), keys) == keys[0]["kid"]
    attest.source.problem = expired(Family.of("00" * 6, "platform", "tdx"), attest.clock(), attest.clock())
    assert signed_by(await refused(attest), keys) == keys[0]["kid"]


async def test_no_word_of_a_signed_bundle_can_be_changed(attest: LocalAttest) -> None:
    keys, document = attest.bundle.token_keys, await accepted(attest)
    changes: dict[str, Any] = {
        "spiffe_id": "spiffe://cloister.test/ns/hospital-a/job/j-1/rank/1",
        "verifier": "cloister-attest/0.0.1",
        "accepted": False,
        "time": (attest.clock() + timedelta(microseconds=1)).isoformat(),
        "before": [document["before"][0] | {"got": "something else"}, *document["before"][1:]],
        "checks": document["checks"][:-1],
        "after": [],
        "collateral": None,
        "policy": LENIENT,
        "references": [],
        "expected": document["expected"] | {"audience": "x"},
        "evidence": document["evidence"] | {"receipt_spki_der": b64(b"x")},
        "root": document["root"] | {"simulated": False},
        "unavailable": {"code": "INTERNAL", "what": "", "why": "", "todo": ""},
    }
    assert changes.keys() == document.keys() - {"format", "signature"}
    for name, value in changes.items():
        assert "is not what attest signed" in not_signed(document | {name: value}, keys), name


async def test_what_attest_did_not_sign_is_not_signed(attest: LocalAttest, tmp_path: Path) -> None:
    keys, document = attest.bundle.token_keys, await accepted(attest)
    assert "is not signed" in not_signed(document | {"signature": ""}, keys)
    assert "is not what attest signed" in not_signed(
        document | {"signature": (await accepted(attest))["signature"]}, keys
    )
    head, body, mark = document["signature"].split(".")
    assert "signature" in not_signed(document | {"signature": f"{head}.{body}.{mark[:-4]}AAAA"}, keys)
    for garbage in ("x", "a.b.c", document["signature"] + "x"):
        not_signed(document | {"signature": garbage}, keys)
    with local_attest() as another:
        assert "not in the trust bundle" in not_signed(document, another.bundle.token_keys)
    assert "not in the trust bundle" in not_signed(document, [])


async def test_another_object_under_the_same_key_is_no_signature_of_a_verdict(attest: LocalAttest) -> None:
    """The same key signs attestation results: their type tells them apart."""
    keys, document = attest.bundle.token_keys, await accepted(attest)
    token = (await attest.enrolment.attest(await attest.request(attest.td(Role.TRAINER)))).attestation_result
    not_signed(document | {"signature": token}, keys)
    claims = json.loads(unb64(document["signature"].split(".")[1] + "==="))
    key, key_id = attest.ca.issuing.token_key, attest.ca.issuing.token_key_id

    def signed(kind: str = TYPE, **changes: Any) -> dict[str, Any]:
        return document | {"signature": sign_claims(claims | changes, kind=kind, key=key, key_id=key_id)}

    assert signed_by(signed(), keys)
    assert "typ" in not_signed(signed("eat+jwt"), keys)
    for wrong in (
        signed(iss="spiffe://cloister.test/service/keybroker"),
        signed(iat=claims["iat"] + 1),
        signed(more=1),
        signed(verdict="sha384:" + "00" * 48),
    ):
        not_signed(wrong, keys)


async def test_a_verdict_that_was_changed_on_the_disk_is_not_signed_anew(attest: LocalAttest) -> None:
    keys, document = attest.bundle.token_keys, await accepted(attest)
    number = (await attest.verdicts.newest(limit=1))[0].number
    stored = VerdictBundle.parse(json.dumps(document).encode()).model_copy(
        update={
            "spiffe_id": "spiffe://cloister.test/service/keybroker",
            "collateral": None,
            "policy": "",
            "references": (),
        }
    )
    content = zlib.compress(stored.model_dump_json().encode())
    await attest.database.write(
        lambda db: db.execute("UPDATE grounds SET bundle = ? WHERE number = ?", (content, number)).close()
    )
    changed = await newest(attest)
    assert changed["spiffe_id"] == "spiffe://cloister.test/service/keybroker"
    assert "is not what attest signed" in not_signed(changed, keys)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "cloister-verdict-2"},
        {"more": 1},
        {"time": "2026-11-01T12:00:00"},  # no zone
        {"evidence": {}},
        {"accepted": 1},
        {"references": ["x"] * 65},
        {"collateral": {"tcb_info": 1}},
    ],
)
async def test_what_is_no_bundle_is_refused(attest: LocalAttest, change: dict[str, Any]) -> None:
    document = await accepted(attest)
    for data in (json.dumps(document | change).encode(), b"", b"[]", b"\xff", json.dumps(document).encode()[:-1]):
        with pytest.raises(CloisterError) as caught:
            VerdictBundle.parse(data)
        assert caught.value.code is Code.VERDICT_INVALID


@pytest.mark.parametrize("change", [{"policy": "kind: Other"}, {"references": ["{}"]}])
async def test_a_bundle_with_another_kind_of_policy_is_an_error_not_a_verdict(
    attest: LocalAttest, change: dict[str, Any]
) -> None:
    with pytest.raises(CloisterError) as caught:
        await replay(parse(await accepted(attest) | change))
    assert caught.value.code is Code.POLICY_INVALID


async def test_nothing_is_kept_of_what_is_not_of_a_genuine_platform(attest: LocalAttest, tmp_path: Path) -> None:
    stranger = SimulatedPlatform.create(tmp_path / "stranger")
    with pytest.raises(CloisterError):
        await attest.enrolment.attest(await attest.request(attest.td(Role.TRAINER, platform=stranger)))
    verdict = (await attest.verdicts.newest(limit=1))[0]
    assert not verdict.has_grounds
    with pytest.raises(CloisterError) as caught:
        await attest.verdicts.bundle(verdict.number)
    assert caught.value.code is Code.VERDICT_NOT_FOUND


async def test_a_large_log_of_a_refusal_is_not_kept(attest: LocalAttest) -> None:
    request = await attest.request(attest.td(Role.TRAINER))
    request.evidence.event_log += b" " * 128 * 1024 + b"x"
    with pytest.raises(CloisterError):
        await attest.enrolment.attest(request)
    verdict = (await attest.verdicts.newest(limit=1))[0]
    assert (verdict.has_grounds, verdict.simulated) == (False, True)


async def test_bundles_are_bounded_apart_and_share_collateral() -> None:
    with local_attest(kept_bundles=2) as attest:
        for _ in range(3):
            await accepted(attest, Role.TRAINER)
        for _ in range(4):
            await refused(attest, script=b"\x66" * 48)
        found = await attest.verdicts.newest(limit=100)
        assert [verdict.has_grounds for verdict in found] == [True, True, False, False, True, True, False]
        stored = await attest.database.read(lambda db: db.execute("SELECT count(*) FROM inputs").fetchone())
        assert stored == (2,)  # one set of collateral, one policy
        attest.source.change(attest.platform.collateral(attest.clock() + timedelta(seconds=-5)))
        for _ in range(2):
            await accepted(attest, Role.TRAINER)
            await refused(attest, script=b"\x66" * 48)
        await attest.verdicts.sweep()
        stored = await attest.database.read(lambda db: db.execute("SELECT count(*) FROM inputs").fetchone())
        assert stored == (2,)
        assert (await replay(parse(await newest(attest)))).same


async def test_a_tenant_gets_its_own_bundles_and_those_of_services(attest: LocalAttest) -> None:
    async def number_of_newest() -> int:
        return (await attest.verdicts.newest(limit=1))[0].number

    await accepted(attest, Role.RANK)
    rank = await number_of_newest()
    await accepted(attest, Role.TRAINER)
    service = await number_of_newest()
    await refused(attest, script=b"\x66" * 48)
    refusal = await number_of_newest()
    verdicts: Verdicts = attest.verdicts
    for number, tenant in ((rank, JOB.tenant), (rank, None), (service, "hospital-b"), (refusal, None)):
        assert await verdicts.bundle(number, tenant=tenant)
    for number, tenant in ((rank, "hospital-b"), (refusal, JOB.tenant), (10_000, None)):
        with pytest.raises(CloisterError) as caught:
            await verdicts.bundle(number, tenant=tenant)
        assert caught.value.code is Code.VERDICT_NOT_FOUND


def unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text)


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode()


def flipped(text: str, index: int = 20) -> str:
    data = bytearray(unb64(text))
    data[index] ^= 1
    return b64(bytes(data))


def der(platform: SimulatedPlatform) -> bytes:
    return x509.load_pem_x509_certificate(platform.root_pem).public_bytes(Encoding.DER)
