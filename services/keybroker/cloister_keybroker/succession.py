# SPDX-License-Identifier: Apache-2.0
"""May this policy be put in force for that key, after the one before it? Pure.

policy.signer     the key's owner has signed it, whoever else has
policy.version    it follows the newest one by version and digest: no gap, no way back, no fork
change.approvals  those whom the newest one asks have signed it as well; withdrawing a policy does not end its rule
"""

from __future__ import annotations

from cloister.errors import CloisterError, Code
from cloister.policyblocks import digest_text
from cloister.provisioning import SignedPolicy
from cloister.release.approvals import change_block
from cloister.release.blocks import Block
from cloister.release.policy import ReleasePolicy
from cloister_keybroker.keys import KeyRecord


class PolicyRefused(CloisterError):
    """A policy that may not follow; `grounds` is what the log remembers of the attempt."""

    def __init__(self, code: Code, grounds: Block, *, what: str, todo: str) -> None:
        why = f"wanted {grounds.wanted}; got {grounds.got}"
        super().__init__(code, what=what, why=why, todo=todo, block=grounds.name)
        self.grounds = grounds


def check_subject(record: KeyRecord, policy: ReleasePolicy) -> None:
    """Raise POLICY_INVALID unless a policy is about this key, of its owner, and can be changed again."""
    for place, wanted, got in (
        ("spec.key.uri", str(record.uri), str(policy.key)),
        ("metadata.owner", record.owner, policy.owner),
    ):
        if wanted != got:
            raise CloisterError(
                Code.POLICY_INVALID,
                what=f"{place}: {got} is not allowed",
                why=f"wanted {wanted}",
                todo=f"write {wanted}",
            )
    rule = policy.change
    if rule is not None and len(set(rule.of) - {record.signer}) < rule.threshold:
        raise CloisterError(
            Code.POLICY_INVALID,
            what="spec.change.approvals.threshold: nobody could ever change this policy",
            why="the owner signs every policy anyway, and does not count as one of its approvers",
            todo="name more approvers than the owner, or a lower threshold",
        )


def check_signer(record: KeyRecord, signed: SignedPolicy) -> None:
    """Raise SIGNATURE_INVALID unless the signer of the key has signed."""
    if record.signer not in signed.signers:
        raise PolicyRefused(
            Code.SIGNATURE_INVALID,
            Block("policy.signer", False, record.signer, ", ".join(sorted(signed.signers))),
            what=f"the policy is not signed by the owner of {record.uri}",
            todo="sign it with the key that signed when the key was created",
        )


def check_successor(record: KeyRecord, newest: ReleasePolicy | None, signed: SignedPolicy) -> None:
    """Raise POLICY_VERSION or APPROVALS_MISSING unless the policy may follow the newest one, in force or withdrawn."""
    policy = signed.policy
    if (policy.version, policy.previous) != (record.policy_version + 1, record.policy_digest):
        wanted = _named(record.policy_version + 1, record.policy_digest)
        raise PolicyRefused(
            Code.POLICY_VERSION,
            Block("policy.version", False, wanted, _named(policy.version, policy.previous)),
            what=f"the policy does not follow the newest one of {record.uri}",
            todo="read the newest policy, and write its successor",
        )
    grounds = change_block(newest, signed.signers, record.signer)
    if grounds is not None and not grounds.ok:
        raise PolicyRefused(
            Code.APPROVALS_MISSING,
            grounds,
            what=f"the policy of {record.uri} is not changed by its owner alone",
            todo="have approvers add their signatures with cloister policy sign, and put the envelope then",
        )


def _named(version: int, previous: bytes) -> str:
    return f"version {version}" + (f", previous {digest_text(previous)}" if previous else "")
