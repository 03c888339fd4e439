# SPDX-License-Identifier: Apache-2.0
"""Who keeps the broker: users that its measured configuration names. They hold no keys and see no data."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cloister.errors import CloisterError, Code
from cloister.identity import SpiffeId
from cloister.release.blocks import Block
from cloister.runtime.caller import current_caller, current_request_id
from cloister.tlv import sha384
from cloister.transparency.entry import Entry


@dataclass(frozen=True, slots=True)
class Operator:
    """The authenticated operator behind a call."""

    spiffe_id: SpiffeId
    certificate_der: bytes
    channel: str
    request_id: str = ""

    def entry(self, action: str, blocks: Sequence[Block] = (), *, detail: bytes = b"") -> Entry:
        """Return what the decision log is to remember of something this operator did."""
        return Entry(
            action=action,
            tenant=self.spiffe_id.tenant,
            key_uri="",
            caller=str(self.spiffe_id),
            granted=True,
            blocks=tuple(blocks),
            channel=self.channel,
            evidence_digest=sha384(self.certificate_der),
            request_id=self.request_id,
            detail=detail,
        )


def current_operator(operators: Collection[str]) -> Operator:
    """Return the operator behind the present call; raise CALLER_NOT_ALLOWED for anybody who is none."""
    caller = current_caller()
    if str(caller.spiffe_id) not in operators:
        raise CloisterError(
            Code.CALLER_NOT_ALLOWED,
            what="this is for operators of the broker",
            why=f"keybroker.operators does not name {caller.spiffe_id}",
            todo="ask an operator, or have your identity added to the broker's configuration",
        )
    channel = f"{caller.tls_version}, {caller.key_exchange_group}"
    return Operator(caller.spiffe_id, caller.certificate_der, channel, current_request_id())
