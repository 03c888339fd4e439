# SPDX-License-Identifier: Apache-2.0
"""Every denial tells its caller the block that failed, by name and with a code; both are stable, and on the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.cli.output import error_document
from cloister.didkey import did_key
from cloister.errors import CloisterError, Code
from cloister.hpke import KEM_MLKEM768_X25519
from cloister.release.blocks import Block, Decision
from cloister.release.cases import outcome_of
from cloister.release.claims import Case
from cloister.release.decide import Request, denial
from cloister.release.keys import Purpose
from cloister.release.policy import parse_policy
from cloister.runtime.status import from_rpc_error, to_status
from fakes.ear_sample import NOW
from fakes.keybroker_harness import KEY, as_yaml, policy_document

PAGE = (Path(__file__).parents[2] / "docs" / "release-policy.md").read_text()
REQUEST = Request(KEY, 1, Purpose.TRAIN, bytes(32), KEM_MLKEM768_X25519, bytes(48))
# What clients and dashboards match on: a name or a code that changes here breaks them.
CODES: dict[str, Code] = {
    "channel": Code.RELEASE_DENIED,
    "caller": Code.RELEASE_DENIED,
    "token": Code.TOKEN_INVALID,
    "token.subject": Code.TOKEN_INVALID,
    "token.certificate": Code.TOKEN_INVALID,
    "token.hpke_key": Code.TOKEN_INVALID,
    "token.status": Code.RELEASE_DENIED,
    "nonce": Code.NONCE_UNKNOWN,
    "policy": Code.RELEASE_DENIED,
    "policy.key.uri": Code.RELEASE_DENIED,
    "policy.key.versions": Code.RELEASE_DENIED,
    "policy.key.purposes": Code.RELEASE_DENIED,
    "channel.key_exchange": Code.RELEASE_DENIED,
    "tee.type": Code.RELEASE_DENIED,
    "tee.debug": Code.RELEASE_DENIED,
    "tee.simulated": Code.RELEASE_DENIED,
    "tee.tcb.status": Code.RELEASE_DENIED,
    "tee.tcb.min_date": Code.RELEASE_DENIED,
    "tee.tcb.advisories": Code.RELEASE_DENIED,
    "tee.collateral.max_age": Code.RELEASE_DENIED,
    "tee.platforms.piid": Code.RELEASE_DENIED,
    "measurements.mr_td": Code.RELEASE_DENIED,
    "measurements.mr_seam": Code.RELEASE_DENIED,
    "measurements.rtmr0": Code.RELEASE_DENIED,
    "measurements.rtmr1": Code.RELEASE_DENIED,
    "measurements.rtmr2": Code.RELEASE_DENIED,
    "workload.script": Code.RELEASE_DENIED,
    "workload.environment": Code.RELEASE_DENIED,
    "workload.config": Code.RELEASE_DENIED,
    "workload.datasets": Code.RELEASE_DENIED,
    "workload.no_events_after": Code.RELEASE_DENIED,
    "identity.spiffe": Code.RELEASE_DENIED,
    "evidence.max_age": Code.RELEASE_DENIED,
    "evidence.nonce": Code.RELEASE_DENIED,
    "release.wrap": Code.RELEASE_DENIED,
    "release.max_per_job": Code.RELEASE_DENIED,
    "release.approvals": Code.APPROVALS_MISSING,
    "key.version": Code.RELEASE_DENIED,
    "key.state": Code.KEY_DISABLED,
    "key.purposes": Code.RELEASE_DENIED,
}
# Looked at by the broker when all of these hold.
AFTERWARDS = {"data_key": Code.WRAPPED_KEY_INVALID, "dataset.version": Code.RELEASE_DENIED}


def everything() -> Any:
    """Return a policy that has every block there is."""
    digest = ["sha384:" + "23" * 48]
    document = policy_document(
        tee={
            "type": "tdx",
            "tcb": {"status": ["UpToDate"], "min_date": "2026-01-01", "advisories": {"allow": []}},
            "collateral": {"max_age": "35d"},
            "platforms": {"piid": ["05" * 16]},
        },
        measurements={name: ["01" * 48] for name in ("mr_td", "mr_seam", "rtmr0", "rtmr1", "rtmr2")},
        workload={
            "script": digest,
            "environment": digest,
            "config": digest,
            "datasets": digest,
            "no_events_after": "cloister.workload.sealed",
        },
        channel={"key_exchange": ["X25519MLKEM768", "X25519"]},
    )
    approver = did_key(Ed25519PrivateKey.generate())
    document["spec"]["release"] |= {"max_per_job": "1", "approvals": {"threshold": "1", "of": [approver]}}
    return parse_policy(as_yaml(document))


def denied_by(name: str) -> Any:
    return denial(REQUEST, Decision((Block("channel", True, "", ""), Block(name, False, "this", "that"))))


def test_the_list_is_what_a_decision_has_and_its_order_the_protocols() -> None:
    decision = outcome_of(everything(), Case("", {}, ""), NOW)
    assert [block.name for block in decision.blocks] == list(CODES)


@pytest.mark.parametrize("name", [*CODES, *AFTERWARDS])
def test_a_denial_has_the_code_and_the_block_that_the_page_says(name: str) -> None:
    error = denied_by(name)
    assert (error.code, error.block) == ((CODES | AFTERWARDS)[name], name)
    assert f"block {name}" in error.what
    assert error.why == "wanted this; got that"
    assert error.todo
    table = re.search(r"\| code \| blocks \|\n\|---\|---\|\n(.*?)\n\n", PAGE, re.DOTALL)
    assert table is not None
    rows = [row for row in table[1].splitlines() if f"`{name}`" in row]
    if error.code is Code.RELEASE_DENIED and not rows:
        assert f"`{name}`" in PAGE or name.rpartition(".")[2] in PAGE
    else:
        assert [row.split("`")[1] for row in rows] == [error.code.text]


@pytest.mark.parametrize("name", ["tee.simulated", "release.approvals", "key.state"])
def test_block_and_code_reach_the_caller_as_fields(name: str) -> None:
    status = to_status(denied_by(name), "request-1")
    sent = grpc.aio.AioRpcError(
        status.code, grpc.aio.Metadata(), grpc.aio.Metadata(*status.trailing_metadata), status.details
    )
    error = from_rpc_error(sent, what="get the key")
    assert (error.code, error.block) == (CODES[name], name)
    assert error_document(error)["block"] == name


def test_an_error_that_no_block_refused_names_none() -> None:
    assert set(error_document(denied_by("tee.debug"))) == {"code", "kind", "what", "why", "todo", "block"}
    plain = CloisterError(Code.KEY_NOT_FOUND, what="there is no such key")
    assert set(error_document(plain)) == {"code", "kind", "what", "why", "todo"}
