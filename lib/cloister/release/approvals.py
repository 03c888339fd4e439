# SPDX-License-Identifier: Apache-2.0
"""Signatures of those whom a policy asks: for one job's data keys, and for the policy's successor. Pure.

An approval of a release names key, purpose, job, policy and an end, so that it is worth nothing for anything else. It
is made offline with `cloister policy approve`, and anybody may hand it in: the signature counts, not the messenger. A
change needs no statement of its own: approvers sign the successor itself, in the envelope its owner puts in force.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister import dsse, strictjson
from cloister.errors import CloisterError, Code
from cloister.identity import is_name
from cloister.keyuri import KeyUri
from cloister.release.blocks import Block
from cloister.release.keys import Purpose
from cloister.release.policy import ReleasePolicy
from cloister.strictjson import Members, StrictJsonError

LONGEST: Final = timedelta(days=30)  # what was approved longer ago than this is worth another look
_MAX_STATEMENT: Final = 4096  # bytes; ours have some 350
_JOB: Final = re.compile(r"([^/]+)/(job|model)/([^/]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseApproval:
    """Data keys of one key may go to one job, or to one model's backends, for one purpose under one policy."""

    key_uri: KeyUri
    purpose: Purpose
    job: str  # "<tenant>/job/<id>" or "<tenant>/model/<name>"
    policy_digest: bytes  # 48 bytes
    expires_ms: int  # Unix milliseconds

    def signed(self, *keys: Ed25519PrivateKey) -> bytes:
        """Return the statement in an envelope (JSON) signed by these keys."""
        statement = {
            "key_uri": str(self.key_uri),
            "purpose": self.purpose.value,
            "job": self.job,
            "policy_digest": self.policy_digest.hex(),
            "expires_ms": self.expires_ms,
        }
        return dsse.sign(dsse.RELEASE_APPROVAL, strictjson.dump(statement), *keys).to_bytes()


@dataclass(frozen=True, slots=True)
class SignedApproval:
    """An approval whose signatures hold, and the envelope it came in."""

    statement: ReleaseApproval
    approvers: frozenset[str]  # did:key of everyone who signed it
    envelope: bytes

    @classmethod
    def verified(cls, envelope: bytes) -> SignedApproval:
        """Verify every signature and read the statement; whose signatures are asked for is for the caller to say.

        Raises CloisterError: ENVELOPE_INVALID, SIGNATURE_INVALID.
        """
        opened = dsse.Envelope.parse(envelope)
        approvers = opened.signers(dsse.RELEASE_APPROVAL)
        try:
            return cls(_statement(opened.payload), approvers, envelope)
        except (StrictJsonError, ValueError) as error:
            raise CloisterError(
                Code.ENVELOPE_INVALID,
                what="the signed approval is malformed",
                why=str(error),
                todo="make it again with: cloister policy approve",
            ) from None


def check_approval(approval: SignedApproval, policy: ReleasePolicy | None, now: datetime) -> frozenset[str]:
    """Return those of the signers whom the policy in force asks; raise APPROVAL_INVALID when it is of no use to it."""
    statement, rule = approval.statement, policy.approvals if policy else None
    if policy is None or rule is None:
        raise _useless(statement, "the policy in force asks for no approvals", "nothing has to be approved")
    if statement.policy_digest != policy.digest:
        raise _useless(statement, "it is for another policy than the one in force", "read the policy, and approve anew")
    if statement.purpose not in policy.purposes:
        purposes = ", ".join(policy.purposes)
        raise _useless(statement, f"the policy releases nothing for {statement.purpose}", f"approve of {purposes}")
    approvers = approval.approvers.intersection(rule.of)
    if not approvers:
        raise _useless(statement, "nobody who signed it is an approver of the policy", f"it asks for {rule}")
    left = datetime.fromtimestamp(statement.expires_ms / 1000, now.tzinfo) - now
    if not timedelta() < left <= LONGEST:
        why = "it has expired" if left <= timedelta() else f"it is for longer than {LONGEST.days} days"
        raise _useless(statement, why, f"approve anew, for {LONGEST.days} days at most")
    return approvers


def change_block(in_force: ReleasePolicy | None, signers: frozenset[str], owner: str) -> Block | None:
    """Say whether a successor has the signatures that the policy in force asks for; None when it asks for none.

    `owner` is the did:key of the owner's own signing key: it has to sign anyway, and does not count here.
    """
    rule = in_force.change if in_force else None
    if rule is None:
        return None
    found = [name for name in rule.of if name in signers and name != owner]
    return Block("change.approvals", len(found) >= rule.threshold, str(rule), ", ".join(found) or "none")


def _statement(payload: bytes) -> ReleaseApproval:
    members = Members(strictjson.load(payload, max_size=_MAX_STATEMENT), "the approval")
    job = members.text("job", longest=256)
    statement = ReleaseApproval(
        key_uri=_uri(members),
        purpose=Purpose(members.text("purpose")),
        job=job,
        policy_digest=members.octets("policy_digest", sizes=(48,)),
        expires_ms=members.integer("expires_ms", highest=_LATEST_MS),
    )
    members.end()
    found = _JOB.fullmatch(job)
    if found is None or found[1] != statement.key_uri.tenant or not is_name(found[3]):
        raise ValueError("job is not one of the key's tenant: <tenant>/job/<id> or <tenant>/model/<name>")
    return statement


_LATEST_MS: Final = 253_402_300_799_000  # the end of the year 9999: what a date can say


def _uri(members: Members) -> KeyUri:
    try:
        return KeyUri.parse(members.text("key_uri"))
    except CloisterError as error:
        raise StrictJsonError(error.what) from None


def _useless(statement: ReleaseApproval, why: str, todo: str) -> CloisterError:
    return CloisterError(
        Code.APPROVAL_INVALID,
        what=f"the approval of {statement.job} for {statement.key_uri} counts for nothing",
        why=why,
        todo=todo,
    )
