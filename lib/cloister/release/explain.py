# SPDX-License-Identifier: Apache-2.0
"""What a policy makes of an attestation result, or would have made of a request that is in the log. Pure.

Both go through the very decision that releases keys. What a policy has no say in is not decided again: of a token
alone it is left out, of a logged request it stands as it was recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cloister.ear import Ear
from cloister.hpke import KEM_MLKEM768_X25519
from cloister.identity import SpiffeId
from cloister.keyuri import KeyUri
from cloister.release.blocks import Block, Decision
from cloister.release.cases import ExampleKey
from cloister.release.decide import Counters, Peer, Request, decide
from cloister.release.keys import ROLE_PURPOSES, KeyFacts, Purpose
from cloister.release.policy import ReleasePolicy

# What has nothing to do with the policy: the channel, the token as such, the nonce.
_CHANNEL: Final = frozenset(
    {"channel", "caller", "token", "token.subject", "token.certificate", "token.hpke_key", "nonce"}
)
_KEY: Final = frozenset({"key", "key.version", "key.state", "key.purposes"})
_AFTERWARDS: Final = frozenset({"data_key", "dataset.version"})  # looked at by the broker when the rest holds
_RECORDED: Final = _CHANNEL | _KEY | _AFTERWARDS
# A token alone was not sent over a channel and has no fixed age; nobody counts what it would get.
_NOT_OF_A_TOKEN: Final = _CHANNEL | {"channel.key_exchange", "policy", "evidence.max_age", "release.max_per_job"}


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """A request as the log has it, with what was counted then."""

    key: KeyUri
    key_version: int
    purpose: Purpose
    caller: SpiffeId
    channel: str  # "TLSv1.3, X25519MLKEM768"
    time: datetime
    renewal: bool
    blocks: tuple[Block, ...]
    released_to_job: int  # grants to this job before


def explain_token(
    policy: ReleasePolicy,
    ear: Ear,
    *,
    key: KeyFacts | None = None,
    purpose: Purpose | None = None,
    approvers: frozenset[str] = frozenset(),
) -> Decision:
    """Decide as if the bearer of a token asked now; without a key, one that has whatever the policy wants.

    The purpose is the usual one. A quote over a relying party's nonce counts as one over the broker's: which nonce it
    was, the token cannot tell.
    """
    subject = SpiffeId.parse(ear.spiffe_id)
    if purpose is None:
        purpose = usual_purpose(policy, subject)
    left_out = _NOT_OF_A_TOKEN if key is not None else _NOT_OF_A_TOKEN | {"key.version", "key.state"}
    key = key or ExampleKey.of(policy, newest=policy.min_key_version)
    request = Request(
        key=policy.key,
        key_version=key.newest,
        purpose=purpose,
        broker_nonce=bytes.fromhex(ear.nonces[1]) if len(ear.nonces) > 1 else b"",
        hpke_kem_id=KEM_MLKEM768_X25519,
        hpke_key_digest=ear.hpke_key_digest,
    )
    peer = Peer(subject, ear.certificate_sha256, "TLSv1.3", "")
    decision = decide(request, ear, peer, policy, key, Counters("", 0, approvers), ear.issued_at)
    return Decision(tuple(block for block in decision.blocks if block.name not in left_out), decision.lease)


def usual_purpose(policy: ReleasePolicy, caller: SpiffeId) -> Purpose:
    """Return the first purpose of a policy that a caller's role may have; else the policy's first."""
    mine = ROLE_PURPOSES.get(caller.role, frozenset())
    return next((purpose for purpose in policy.purposes if purpose in mine), policy.purposes[0])


def replay(policy: ReleasePolicy, logged: LoggedRequest, ear: Ear | None) -> Decision:
    """Decide a logged request again, at its time and as if this policy had been in force.

    `ear` is what its token said, None when the token was not authentic or is not kept: without it only what failed
    anyway can be told.
    """
    recorded = {block.name: block for block in logged.blocks if block.name in _RECORDED}
    if ear is None:
        refused = any(not block.ok for block in recorded.values())
        return Decision((*recorded.values(), *(() if refused else (_NOT_KEPT,))))
    nonce = recorded.get("nonce")
    request = Request(
        key=logged.key,
        key_version=logged.key_version,
        purpose=logged.purpose,
        broker_nonce=_nonce_of(nonce),
        hpke_kem_id=KEM_MLKEM768_X25519,
        hpke_key_digest=ear.hpke_key_digest,
        renewal=logged.renewal,
    )
    tls_version, _, group = logged.channel.partition(", ")
    peer = Peer(logged.caller, ear.certificate_sha256, tls_version, group)
    key = ExampleKey.of(policy, newest=logged.key_version)
    counters = Counters("" if nonce is None or nonce.ok else nonce.got, logged.released_to_job, _approvers(logged))
    decision = decide(request, ear, peer, policy, key, counters, logged.time)
    blocks = [recorded.get(block.name, block) for block in decision.blocks]
    after = (block for block in recorded.values() if block.name in _AFTERWARDS)
    return Decision((*blocks, *after), decision.lease)


_NOT_KEPT: Final = Block("token", False, "the attestation result of the request", "not kept")


def _nonce_of(block: Block | None) -> bytes:
    """Return the nonce that a request used up, as its block recorded it."""
    try:
        return bytes.fromhex(block.got) if block is not None and block.ok else b""
    except ValueError:
        return b""


def _approvers(logged: LoggedRequest) -> frozenset[str]:
    found = next((block.got for block in logged.blocks if block.name == "release.approvals"), "")
    return frozenset(name for name in found.split(", ") if name.startswith("did:key:"))
