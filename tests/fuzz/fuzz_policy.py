# SPDX-License-Identifier: Apache-2.0
"""Fuzz the release policy parser: any bytes give a policy or POLICY_INVALID. Run: python tests/fuzz/fuzz_policy.py"""

from __future__ import annotations

import sys
from datetime import UTC, datetime

import atheris

with atheris.instrument_imports(include=["yaml", "cloister.strictyaml", "cloister.policyblocks", "cloister.release"]):
    from cloister.errors import CloisterError, Code
    from cloister.release.cases import run_cases
    from cloister.release.policy import parse_policy

_NOW = datetime(2026, 11, 1, tzinfo=UTC)
_APPROVER = b"did:key:z6MktwupdmLXVVqTzCw4i46r4uGyosGXRnR3XjN4Zq7oMMsw"
# A whole policy to mutate: without it the fuzzer would spend its time on the first four keys.
_SEED = b"""apiVersion: cloister.dev/v1
kind: ReleasePolicy
metadata: {name: a, version: 1, owner: spiffe://t/ns/a/user/u}
spec:
  key: {uri: cloister-key://a/x, versions: {min: 3}, purposes: [train]}
  when:
    tee: {type: tdx, simulated: deny, tcb: {status: [UpToDate], min_date: 2026-02-11, advisories: {allow: []}}}
    workload: {script: ["sha384:%s"], no_events_after: cloister.workload.sealed}
    identity: {spiffe: ["spiffe://t/ns/a/job/*/rank/*"]}
    evidence: {max_age: 5m, nonce: broker}
  release: {wrap: [hpke-x25519-mlkem768], max_per_job: 8, lease: 1h, approvals: {threshold: 1, of: [%s]}}
  change: {approvals: {threshold: 1, of: [%s]}}
  cases:
    - {name: a, expect: allow}
    - {name: b, set: {tee.tcb.status: Revoked, evidence.age: 6m, purpose: serve}, expect: deny, block: tee.tcb.status}
""" % (b"00" * 48, _APPROVER, _APPROVER)


def one_input(data: bytes) -> None:
    """Parse bytes as they are, and bytes written into a good policy."""
    parse(data)
    if len(data) > 3:
        place, cut = int.from_bytes(data[:2], "big") % len(_SEED), data[2]
        parse(_SEED[:place] + data[3:] + _SEED[place + cut :])


def parse(data: bytes) -> None:
    """Raise for anything but a policy or the one error."""
    try:
        policy = parse_policy(data)
        list(run_cases(policy, _NOW))
    except CloisterError as error:
        if error.code is not Code.POLICY_INVALID:
            raise
        return
    if not (policy.workload.script and policy.purposes and len(policy.digest) == 48):
        raise AssertionError("a policy that protects nothing")


if __name__ == "__main__":
    parse(_SEED)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
