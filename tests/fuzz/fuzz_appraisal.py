# SPDX-License-Identifier: Apache-2.0
"""Fuzz appraisal policies, signed reference sets and verdict bundles: whatever comes in, one error of theirs comes out.

    python tests/fuzz/fuzz_appraisal.py policy -max_total_time=600
    python tests/fuzz/fuzz_appraisal.py events|references|verdict

Arguments after the target are libFuzzer's. Needs `atheris` (extra `dev`).
"""

from __future__ import annotations

import contextlib
import sys
from datetime import UTC, datetime

import atheris

with atheris.instrument_imports(include=["yaml", "cloister"]):
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from cloister.api.common.v1 import evidence_pb2
    from cloister.appraisal.events import check_events
    from cloister.appraisal.policy import parse_td_policy
    from cloister.appraisal.references import PAYLOAD_TYPE, open_reference_set
    from cloister.didkey import did_key
    from cloister.dsse import sign
    from cloister.ear import public_jwk
    from cloister.errors import CloisterError, Code
    from cloister.guest.verdictbundle import (
        RecordedCheck,
        RecordedEvidence,
        RecordedExpectation,
        RecordedRoot,
        VerdictBundle,
    )
    from cloister.guest.verdictsignature import VerdictSigner, verify_signature
    from cloister.tdx.bootevents import MAX_NAME, event_name, type_name
    from cloister.tdx.eventlog import Event, EventLog, EventLogRejected
    from cloister.tlv import sha384

# Whole documents to mutate: without them the fuzzer would spend its time on the first keys.
POLICY = b"""apiVersion: cloister.dev/v1
kind: AppraisalPolicy
metadata: {name: a, version: 1}
spec:
  tcb: {status: [UpToDate], min_date: 2026-02-11, min_evaluation: 3, advisories: {allow: []}}
  collateral: {max_age: 35d, on_stale: warn}
  td: {features: [PKS], migratable: deny, service_tds: []}
  platforms: {fmspc: [b0c06f000000], piid: ["%s"]}
  measurements: {mr_td: ["%s"], rtmr1: {set: firmware, min_version: 3}}
  event_log:
    required: [{register: rtmr1, type: EV_EFI_ACTION, name: a, digests: ["%s"]}, {register: rtmr3, type: "0x08000001"}]
    forbidden: [{register: rtmr2, type: EV_IPL, name: b}]
    order: as-listed
    closed: [rtmr1]
  workload: {environment: ["sha384:%s"], datasets: []}
""" % (b"05" * 16, b"0a" * 48, b"0b" * 48, b"0c" * 48)
SET = b'apiVersion: cloister.dev/v1\nkind: ReferenceSet\nmetadata: {name: a, version: 1}\nspec: {mr_td: ["%s"]}\n' % (
    b"0a" * 48
)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
SIGNED = sign(PAYLOAD_TYPE, SET, KEY).to_bytes()
TOKEN_KEY = ec.derive_private_key(7, ec.SECP256R1())
JWK = public_jwk(TOKEN_KEY.public_key())
VERDICT = (
    VerdictSigner(TOKEN_KEY, JWK["kid"], "spiffe://t/service/attest")
    .sign(
        VerdictBundle(
            verifier="cloister-attest/0",
            time=datetime(2026, 11, 1, tzinfo=UTC),
            root=RecordedRoot(certificate_der=b"r", simulated=True),
            expected=RecordedExpectation(nonce=b"n", audience="a", trust_domain="t"),
            evidence=RecordedEvidence.of(evidence_pb2.Evidence(role="rank", quote=b"q")),
            collateral=None,
            unavailable=None,
            policy="",
            references=(),
            before=(RecordedCheck(name="nonce", ok=True, wanted="w", got="g"),),
            checks=(),
            after=(),
            accepted=True,
            spiffe_id="spiffe://t/service/trainer",
        ),
        collateral=None,
        policy="",
        references=(),
    )
    .to_json()
)
_EVENTS = parse_td_policy(POLICY).events


def spoilt(seed: bytes, data: bytes) -> bytes:
    """Write bytes into a good document; short ones stand alone."""
    if len(data) <= 3:
        return data
    place, cut = int.from_bytes(data[:2], "big") % len(seed), data[2]
    return seed[:place] + data[3:] + seed[place + cut :]


def one_policy(data: bytes) -> None:
    for text in (data, spoilt(POLICY, data)):
        try:
            policy = parse_td_policy(text)
        except CloisterError as error:
            if error.code is not Code.POLICY_INVALID:
                raise
            continue
        if not policy.statuses or len(policy.digest) != 48:
            raise AssertionError("a policy that asks for nothing")


def one_event(data: bytes) -> None:
    """Name an event of any type and data, and look for it in a log."""
    if len(data) < 5:
        return
    kind, payload = int.from_bytes(data[:4], "little"), data[5:]
    with contextlib.suppress(EventLogRejected):
        event = Event(data[4] % 4, kind, "", payload, sha384(payload))
        name = event_name(event)
        if len(name) > MAX_NAME or (name and not (name.isascii() and name.isprintable())) or not type_name(kind):
            raise AssertionError(name)
        if _EVENTS is None or not all(
            check.wanted and check.got for check in check_events(EventLog((event,)), _EVENTS)
        ):
            raise AssertionError("a check that says nothing")


def one_set(data: bytes) -> None:
    for envelope in (data, spoilt(SIGNED, data), sign(PAYLOAD_TYPE, spoilt(SET, data), KEY).to_bytes()):
        try:
            found = open_reference_set(envelope, name="a", signers=[did_key(KEY)])
        except CloisterError as error:
            if error.code not in {
                Code.ENVELOPE_INVALID, Code.SIGNATURE_INVALID, Code.POLICY_INVALID, Code.REFERENCES_REJECTED,
            }:  # fmt: skip
                raise
            continue
        if found.name != "a" or not found.values:
            raise AssertionError("an empty set")


def one_verdict(data: bytes) -> None:
    for text in (data, spoilt(VERDICT, data)):
        try:
            VerdictBundle.parse(text)
            verify_signature(text, keys=[JWK])
        except CloisterError as error:
            if error.code is not Code.VERDICT_INVALID:
                raise
            continue
        if VerdictBundle.parse(text) != VerdictBundle.parse(VERDICT):
            raise AssertionError("a changed verdict under the signature of another")


TARGETS = {"policy": one_policy, "events": one_event, "references": one_set, "verdict": one_verdict}

if __name__ == "__main__":
    target = TARGETS[sys.argv.pop(1)]
    one_policy(b"")
    one_set(b"")
    one_verdict(VERDICT)
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
