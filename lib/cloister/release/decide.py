# SPDX-License-Identifier: Apache-2.0
"""Decide whether a workload gets a data key: a pure function of what was asked, proven, demanded and counted.

Every check becomes a `Block` with what was wanted and what was got, in this order; all of them must hold:

 1. channel: TLS 1.3                                     5. the policy in force, key, purpose and key exchange of it
 2. caller: a rank or a backend, by its one SPIFFE id    6. every block of `when`
 3. token: authentic, current, about this caller,        7. release: wrapping, how often, approvals
    this certificate and this HPKE key                   8. key: the version is there, the key is enabled,
 4. nonce: of this broker, unused, for this request         it has the purpose

A token is shown for several releases within its five minutes, so its `jti` is not single use: it is worth nothing
without the private key of the certificate in `cnf`. What is used once is the broker's own nonce (step 4).
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Final

from cloister.ear import AFFIRMING, WARNING, Ear, TokenRejected
from cloister.errors import CloisterError, Code
from cloister.hpke import KEM_MLKEM768_X25519
from cloister.identity import SpiffeId
from cloister.keyuri import KeyUri
from cloister.policyblocks import digest_text
from cloister.release.blocks import Block, Decision
from cloister.release.keys import ROLE_PURPOSES, KeyFacts, KeyState, Purpose
from cloister.release.policy import SEALED_EVENT, WRAPS, ReleasePolicy

_MAX_TEXT: Final = 400  # characters of wanted or got: a log entry stays readable and small
_MISSING: Final = "missing"
_CLOCK_SKEW: Final = timedelta(seconds=30)


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of the channel, as the TLS stack says."""

    spiffe_id: SpiffeId
    certificate_sha256: bytes  # 32 bytes, of the leaf (DER)
    tls_version: str  # "TLSv1.3"
    key_exchange_group: str  # "X25519MLKEM768"


@dataclass(frozen=True, slots=True)
class Request:
    """What a workload asks for."""

    key: KeyUri
    key_version: int
    purpose: Purpose
    broker_nonce: bytes
    hpke_kem_id: int
    hpke_key_digest: bytes  # SHA-384 of the public key that will be sealed to
    renewal: bool = False  # a longer lease on a data key that the workload holds: nothing more is handed out


@dataclass(frozen=True, slots=True)
class Counters:
    """What the broker remembers: the fate of the nonce, and past releases."""

    nonce_problem: str  # empty: given out for this very request, and taken now
    released_to_job: int  # grants of this key to this job under this policy
    approvers: frozenset[str] = frozenset()  # did:keys whose approval of this very release holds now


def decide(
    request: Request,
    ear: Ear | TokenRejected,
    caller: Peer,
    policy: ReleasePolicy | None,
    key: KeyFacts | None,
    counters: Counters,
    now: datetime,
) -> Decision:
    """Return the decision. `ear` is what `cloister.ear.verify` returned or raised."""
    blocks = [_text_block("channel", caller.tls_version == "TLSv1.3", "TLSv1.3", _channel(caller)), _role(caller)]
    problem = counters.nonce_problem
    # What was used up stands in the log: whoever decides again later (replay) has to know it.
    got = problem or request.broker_nonce.hex()
    nonce = _text_block("nonce", not problem, "a nonce of BeginRelease, for this request", got)
    if isinstance(ear, TokenRejected):
        return Decision((*blocks, _text_block("token", False, f"token.{ear.check}", ear.reason), nonce))
    blocks += [*_token(request, ear, caller, policy), nonce]
    if policy is None or key is None:
        got = "one that was withdrawn" if key is not None and key.policy_withdrawn else "none"
        return Decision((*blocks, _text_block("policy", False, "a release policy in force", got)))
    blocks += _policy(request, policy, key)
    if policy.key_exchange is not None:
        ok, group = caller.key_exchange_group in policy.key_exchange, caller.key_exchange_group or _MISSING
        blocks.append(_text_block("channel.key_exchange", ok, " or ".join(policy.key_exchange), group))
    blocks += _tee(ear, policy, now)
    blocks += _measured(ear, policy)
    blocks += _evidence(request, ear, policy, now)
    blocks += _release(request, policy, counters)
    blocks += _key(request, caller, key)
    return Decision(tuple(blocks), policy.lease)


def fresh_enough(ear: Ear, policy: ReleasePolicy, now: datetime) -> bool:
    """Say whether a token the caller already holds would satisfy the policy's `evidence` block."""
    return not policy.broker_nonce and now - ear.issued_at <= policy.max_age


def denial(request: Request, decision: Decision) -> CloisterError:
    """Return the error for a denied request: the first failed block, for the caller's own eyes."""
    block = decision.failed
    if block is None:
        raise ValueError("a granted request is no denial")
    code, todo = _ADVICE.get(block.name, (Code.RELEASE_DENIED, "ask the key's owner, or run what the policy allows"))
    return CloisterError(
        code,
        what=f"{request.key} is not released for {request.purpose.value}: block {block.name}",
        why=f"wanted {block.wanted}; got {block.got}",
        todo=todo,
        block=block.name,
    )


_RENEW: Final = (Code.TOKEN_INVALID, "get a new attestation result over this channel's certificate, then ask again")
_ADVICE: Final[dict[str, tuple[Code, str]]] = {
    "token": _RENEW,
    "token.certificate": _RENEW,
    "token.hpke_key": _RENEW,
    "token.subject": _RENEW,
    "nonce": (Code.NONCE_UNKNOWN, "call BeginRelease again and use its nonce once, within 60 s"),
    "channel.key_exchange": (Code.RELEASE_DENIED, "connect with a TLS library that has this key exchange"),
    "evidence.nonce": (Code.RELEASE_DENIED, "attest again with the nonce of BeginRelease as relying-party nonce"),
    "evidence.max_age": (Code.RELEASE_DENIED, "attest again and show the new attestation result"),
    "policy": (Code.RELEASE_DENIED, "the key's owner puts a release policy in force"),
    "release.approvals": (
        Code.APPROVALS_MISSING,
        "have approvers sign for this job with cloister policy approve, and submit what they signed",
    ),
    "key.state": (Code.KEY_DISABLED, "the key's owner enables it"),
    "dataset.version": (Code.RELEASE_DENIED, "run over the newest version of the data set that its owner published"),
    "data_key": (Code.WRAPPED_KEY_INVALID, "use the wrapped key from the header of an object sealed with this key"),
}


def _text_block(name: str, ok: bool, wanted: str, got: str) -> Block:
    return Block(name, ok, wanted[:_MAX_TEXT], got[:_MAX_TEXT])


def _one_of(name: str, got: bytes, allowed: Iterable[bytes], prefix: str = "") -> Block:
    """Say whether a digest is in the list; never more than a few digests in the text."""
    wanted = tuple(allowed)
    ok = any(hmac.compare_digest(got, digest) for digest in wanted)
    return _text_block(name, ok, " or ".join(prefix + digest.hex() for digest in wanted), prefix + got.hex())


def _channel(caller: Peer) -> str:
    return f"{caller.tls_version}, {caller.key_exchange_group}"


def _role(caller: Peer) -> Block:
    ok = caller.spiffe_id.role in ROLE_PURPOSES
    return _text_block("caller", ok, "a rank or a backend", str(caller.spiffe_id))


def _token(request: Request, ear: Ear, caller: Peer, policy: ReleasePolicy | None) -> Iterable[Block]:
    """Step 3: the token is about this caller, this channel and the key that will be sealed to."""
    yield _text_block("token", True, "an authentic, current token", ear.token_id)
    subject = str(caller.spiffe_id)
    yield _text_block("token.subject", ear.spiffe_id == subject, subject, ear.spiffe_id)
    same = hmac.compare_digest(ear.certificate_sha256, caller.certificate_sha256)
    # The wanted value is this channel's: whoever shows a stolen token sees only their own certificate and the theft.
    yield _text_block("token.certificate", same, caller.certificate_sha256.hex(), ear.certificate_sha256.hex())
    same = hmac.compare_digest(ear.hpke_key_digest, request.hpke_key_digest)
    yield _text_block("token.hpke_key", same, digest_text(ear.hpke_key_digest), digest_text(request.hpke_key_digest))
    # attest warns of a platform that is not up to date, and of collateral that is old. That passes where the policy
    # itself says which of both will do; its blocks below decide.
    explicit = policy is not None and policy.tee.tcb is not None and policy.tee.collateral_max_age is not None
    statuses = (AFFIRMING, WARNING) if explicit else (AFFIRMING,)
    yield _text_block("token.status", ear.status in statuses, " or ".join(statuses), ear.status)


def _policy(request: Request, policy: ReleasePolicy, key: KeyFacts) -> Iterable[Block]:
    """Step 5: the policy in force is the key record's, and speaks of this key, version and purpose."""
    same = hmac.compare_digest(policy.digest, key.policy_digest) and policy.owner == key.owner
    wanted = f"version {key.policy_version}, {digest_text(key.policy_digest)}, of {key.owner}"
    got = f"version {policy.version}, {digest_text(policy.digest)}, of {policy.owner}"
    yield _text_block("policy", same and policy.version == key.policy_version, wanted, got)
    same = policy.key == request.key == key.uri
    yield _text_block("policy.key.uri", same, str(policy.key), str(request.key))
    ok = request.key_version >= policy.min_key_version
    yield _text_block(
        "policy.key.versions", ok, f"version {policy.min_key_version} or newer", f"version {request.key_version}"
    )
    wanted = " or ".join(purpose.value for purpose in policy.purposes)
    yield _text_block("policy.key.purposes", request.purpose in policy.purposes, wanted, request.purpose.value)


def _tee(ear: Ear, policy: ReleasePolicy, now: datetime) -> Iterable[Block]:
    """Step 6, `tee`: attest issues tokens for TDX only, and the token's shape says so."""
    yield _text_block("tee.type", True, "tdx", "tdx")
    yield _text_block("tee.debug", not ear.tee.debug, "no debug TD", "debug TD" if ear.tee.debug else "no debug TD")
    wanted = "any" if policy.tee.simulated else "a hardware TD"
    got = "a simulated TD" if ear.tee.simulated else "a hardware TD"
    yield _text_block("tee.simulated", policy.tee.simulated or not ear.tee.simulated, wanted, got)
    if (tcb := policy.tee.tcb) is not None:
        status = ear.tee.tcb_status
        yield _text_block("tee.tcb.status", status in tcb.statuses, " or ".join(tcb.statuses), status or _MISSING)
        if tcb.min_date is not None:
            day = _day(ear.tee.tcb_date)
            ok = day is not None and day >= tcb.min_date
            yield _text_block(
                "tee.tcb.min_date", ok, f"{tcb.min_date.isoformat()} or later", ear.tee.tcb_date or _MISSING
            )
        if tcb.advisories is not None:
            # Without an evaluated TCB an empty list of advisories says nothing.
            ok = status is not None and set(ear.tee.advisories) <= set(tcb.advisories)
            got = ", ".join(ear.tee.advisories) or ("none" if status is not None else _MISSING)
            wanted = "no others than " + (", ".join(tcb.advisories) or "none")
            yield _text_block("tee.tcb.advisories", ok, wanted, got)
    if policy.tee.collateral_max_age is not None:
        issued = _moment(ear.tee.collateral_issued)
        age = None if issued is None else now - issued
        # Signed in the future is no age at all.
        ok = age is not None and -_CLOCK_SKEW <= age <= policy.tee.collateral_max_age
        wanted = f"signed at most {policy.tee.collateral_max_age} ago"
        got = ear.tee.collateral_issued or _MISSING if age is None else f"{age} ago"
        yield _text_block("tee.collateral.max_age", ok, wanted, got)
    if policy.tee.platforms is not None:
        yield _one_of("tee.platforms.piid", ear.tee.piid, policy.tee.platforms)


def _measured(ear: Ear, policy: ReleasePolicy) -> Iterable[Block]:
    """Step 6, `measurements`, `workload`, `identity`."""
    registers = dict(zip(("rtmr0", "rtmr1", "rtmr2", "rtmr3"), ear.tee.rtmrs, strict=True))
    registers |= {"mr_td": ear.tee.mr_td, "mr_seam": ear.tee.mr_seam}
    for name, allowed in policy.measurements.items():
        yield _one_of(f"measurements.{name}", registers[name], allowed)
    rule, workload = policy.workload, ear.workload
    yield _one_of("workload.script", workload.script, rule.script, "sha384:")
    if rule.environment is not None:
        yield _one_of("workload.environment", workload.environment, rule.environment, "sha384:")
    if rule.config is not None:
        yield _one_of("workload.config", workload.config, rule.config, "sha384:")
    if rule.datasets is not None:
        # Everything it reads must be named: a job over this data set and another one is another job.
        ok = bool(workload.datasets) and set(workload.datasets) <= set(rule.datasets)
        wanted = "only " + ", ".join(digest_text(digest) for digest in rule.datasets)
        got = ", ".join(digest_text(digest) for digest in workload.datasets) or _MISSING
        yield _text_block("workload.datasets", ok, wanted, got)
    if rule.sealed:
        # attest issues no token for an event log in which anything but received keys follows the seal.
        ok = ear.status in (AFFIRMING, WARNING)
        yield _text_block("workload.no_events_after", ok, SEALED_EVENT, SEALED_EVENT if ok else ear.status)
    if policy.identities is not None:
        ok = any(glob.matches(ear.spiffe_id) for glob in policy.identities)
        yield _text_block("identity.spiffe", ok, " or ".join(str(glob) for glob in policy.identities), ear.spiffe_id)


def _evidence(request: Request, ear: Ear, policy: ReleasePolicy, now: datetime) -> Iterable[Block]:
    """Step 6, `evidence`: how old, and over whose nonce."""
    age = now - ear.issued_at
    wanted = f"at most {policy.max_age.total_seconds():.0f} s"
    yield _text_block("evidence.max_age", -_CLOCK_SKEW <= age <= policy.max_age, wanted, f"{age.total_seconds():.0f} s")
    if policy.broker_nonce:
        ok = bool(request.broker_nonce) and request.broker_nonce.hex() in ear.nonces
        yield _text_block("evidence.nonce", ok, request.broker_nonce.hex(), ", ".join(ear.nonces) or _MISSING)


def _release(request: Request, policy: ReleasePolicy, counters: Counters) -> Iterable[Block]:
    """Step 7."""
    names = {kem: name for name, kem in WRAPS.items()}
    wanted = " or ".join(names[kem] for kem in policy.kem_ids)
    got = names.get(request.hpke_kem_id, f"KEM {request.hpke_kem_id:#06x}")
    ok = request.hpke_kem_id in policy.kem_ids and request.hpke_kem_id == KEM_MLKEM768_X25519
    yield _text_block("release.wrap", ok, wanted, got)
    if policy.max_per_job is not None and not request.renewal:
        ok = counters.released_to_job < policy.max_per_job
        yield _text_block(
            "release.max_per_job", ok, f"at most {policy.max_per_job}", f"{counters.released_to_job} before this one"
        )
    if policy.approvals is not None:
        rule, found = policy.approvals, [name for name in policy.approvals.of if name in counters.approvers]
        # Not cut: the names are few and of one length, and a replay counts them again.
        yield Block("release.approvals", len(found) >= rule.threshold, str(rule), ", ".join(found) or "none")


def _key(request: Request, caller: Peer, key: KeyFacts) -> Iterable[Block]:
    """Step 8."""
    ok = key.min_version <= request.key_version <= key.newest
    yield _text_block("key.version", ok, f"{key.min_version} to {key.newest}", str(request.key_version))
    yield _text_block("key.state", key.state is KeyState.ENABLED, KeyState.ENABLED.value, key.state.value)
    allowed = ROLE_PURPOSES.get(caller.spiffe_id.role, frozenset()) & key.purposes
    wanted = " or ".join(sorted(purpose.value for purpose in allowed)) or "none for this role"
    yield _text_block("key.purposes", request.purpose in allowed, wanted, request.purpose.value)


def _day(text: str | None) -> date | None:
    """Return the day of an ISO date or time, None for anything else."""
    try:
        return date.fromisoformat((text or "")[:10])
    except ValueError:
        return None


def _moment(text: str | None) -> datetime | None:
    """Return a time of ISO 8601 with its zone, None for anything else."""
    try:
        moment = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else None
