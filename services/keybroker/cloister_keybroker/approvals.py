# SPDX-License-Identifier: Apache-2.0
"""Approvals that were handed in, and how many of them hold.

The store keeps envelopes, not verdicts: each signature is verified again when it is counted, so that a row that
somebody wrote into the file is worth nothing. Expired ones are removed when others come.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Final

import apsw

from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.release.approvals import ReleaseApproval, SignedApproval
from cloister.release.keys import Purpose

MAX_APPROVALS: Final = 10_000  # of one key: some 10 MB

SCHEMA: Final = """
CREATE TABLE approvals (
  uri TEXT NOT NULL,
  policy_digest BLOB NOT NULL,
  job TEXT NOT NULL,
  purpose TEXT NOT NULL,
  approver TEXT NOT NULL,
  expires_ms INTEGER NOT NULL,
  envelope BLOB NOT NULL,
  PRIMARY KEY (uri, policy_digest, job, purpose, approver)
) STRICT, WITHOUT ROWID;
CREATE INDEX approvals_by_end ON approvals (expires_ms);
"""


@dataclass(frozen=True, slots=True)
class StoredApproval:
    """One approver's signature on one statement."""

    approver: str  # did:key
    statement: ReleaseApproval
    envelope: bytes


class ApprovalBook:
    """The approvals in the store, while a transaction is open."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection

    def put(self, approval: SignedApproval, approvers: frozenset[str], *, now_ms: int) -> None:
        """Keep an approval for each of these approvers, in place of their earlier one; raise KEY_QUOTA when full."""
        self._connection.execute("DELETE FROM approvals WHERE expires_ms <= ?", (now_ms,))
        statement = approval.statement
        (kept,) = self._row("SELECT count(*) FROM approvals WHERE uri = ?", (str(statement.key_uri),))
        if kept + len(approvers) > MAX_APPROVALS:
            raise CloisterError(
                Code.KEY_QUOTA,
                what=f"{statement.key_uri} has as many approvals as a key can have",
                why=f"{kept} have not expired, and {MAX_APPROVALS} is the limit",
                todo="wait until some expire; approve for shorter times",
            )
        for approver in approvers:
            self._connection.execute(
                "INSERT OR REPLACE INTO approvals VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    str(statement.key_uri),
                    statement.policy_digest,
                    statement.job,
                    statement.purpose.value,
                    approver,
                    statement.expires_ms,
                    approval.envelope,
                ),
            )

    def approvers(
        self, uri: KeyUri, *, policy_digest: bytes, job: str, purpose: Purpose, now: datetime
    ) -> frozenset[str]:
        """Return who approves, now, of this very release."""
        rows = self._connection.execute(
            "SELECT approver, envelope FROM approvals WHERE uri = ? AND policy_digest = ? AND job = ? AND purpose = ?",
            (str(uri), policy_digest, job, purpose.value),
        )
        found = (_verified(approver, envelope) for approver, envelope in rows)
        now_ms = int(now.timestamp() * 1000)
        return frozenset(
            approval.approver
            for approval in found
            if approval is not None
            and approval.statement.expires_ms > now_ms
            and (approval.statement.key_uri, approval.statement.policy_digest) == (uri, policy_digest)
            and (approval.statement.job, approval.statement.purpose) == (job, purpose)
        )

    def of_key(self, uri: KeyUri, *, now_ms: int, limit: int) -> list[StoredApproval]:
        """Return a key's approvals that have not expired, those that end first first."""
        rows = self._connection.execute(
            "SELECT approver, envelope FROM approvals WHERE uri = ? AND expires_ms > ? ORDER BY expires_ms LIMIT ?",
            (str(uri), now_ms, limit),
        )
        found = (_verified(approver, envelope) for approver, envelope in rows)
        return [approval for approval in found if approval is not None and approval.statement.key_uri == uri]

    def _row(self, query: str, values: tuple[object, ...]) -> tuple[int, ...]:
        row: tuple[int, ...] | None = self._connection.execute(query, values).fetchone()
        return row or (0,)


@lru_cache(maxsize=1024)  # a renewal counts the same approvals again; the bytes are the key, so none can be stale
def _verified(approver: str, envelope: bytes) -> StoredApproval | None:
    """Return the approval of an approver; None for an envelope that is not signed by them."""
    try:
        approval = SignedApproval.verified(envelope)
    except CloisterError:
        return None
    return StoredApproval(approver, approval.statement, envelope) if approver in approval.approvers else None
