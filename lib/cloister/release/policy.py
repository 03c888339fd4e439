# SPDX-License-Identifier: Apache-2.0
"""Release policies: closed, typed YAML -> a frozen `ReleasePolicy`. Pure.

A policy is an AND of blocks. An unknown key, a value that is not allowed and an empty list are load errors with path,
line and what is allowed; a claim that a block asks for and a token lacks is a denial (decide.py). What is left out
is never a hole: simulated evidence, debug TDs and old evidence stay refused, and the blocks without which a policy
would protect nothing (`tee`, `workload.script`) are required. docs/release-policy.md is the reference for owners.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Final

from cloister.didkey import is_did_key
from cloister.errors import CloisterError
from cloister.hpke import KEM_MLKEM768_X25519
from cloister.identity import Role, SpiffeId, is_name
from cloister.keyuri import KeyUri
from cloister.policyblocks import (
    API_VERSION,
    TCB_STATUSES,
    BlockReader,
    digest_of,
    parse_advisory,
    parse_digest,
    parse_hex,
    read_document,
    refuse,
)
from cloister.release.claims import Case, read_cases
from cloister.release.keys import KEY_EXCHANGES, Purpose
from cloister.strictyaml import Document

KIND: Final = "ReleasePolicy"
WRAPS: Final[Mapping[str, int]] = {"hpke-x25519-mlkem768": KEM_MLKEM768_X25519}
# RTMR3 is not here: it grows with every key a TD receives; `workload` says what went into it.
MEASUREMENTS: Final = ("mr_td", "mr_seam", "rtmr0", "rtmr1", "rtmr2")
SEALED_EVENT: Final = "cloister.workload.sealed"

_MAX_AGE_DEFAULT: Final = timedelta(minutes=5)
_LEASE_DEFAULT: Final = timedelta(hours=1)
_LEASE_SHORTEST: Final = timedelta(seconds=5)  # half of it is enough to attest and to ask again
_MAX_VERSION: Final = 2**31 - 1
MAX_APPROVERS: Final = 16  # their names still fit into one line of a decision


@dataclass(frozen=True, slots=True)
class TcbRule:
    """What the platform's TCB must be."""

    statuses: tuple[str, ...]
    min_date: date | None
    advisories: tuple[str, ...] | None  # None: any; otherwise all that a platform may have open


@dataclass(frozen=True, slots=True)
class TeeRule:
    """What the platform must be; a debug TD is refused by every policy."""

    simulated: bool  # True: evidence of a simulated TD passes
    tcb: TcbRule | None
    collateral_max_age: timedelta | None
    platforms: tuple[bytes, ...] | None  # PIIDs, 16 bytes each


@dataclass(frozen=True, slots=True)
class WorkloadRule:
    """What the workload must have measured; digests are 48 bytes."""

    script: tuple[bytes, ...]
    environment: tuple[bytes, ...] | None  # installed distributions: what the script runs on
    config: tuple[bytes, ...] | None
    datasets: tuple[bytes, ...] | None
    sealed: bool  # nothing measured after the workload was sealed


@dataclass(frozen=True, slots=True)
class ApprovalRule:
    """How many of whom have to have signed."""

    threshold: int
    of: tuple[str, ...]  # did:key

    def __str__(self) -> str:
        return f"{self.threshold} of {', '.join(self.of)}"


@dataclass(frozen=True, slots=True)
class SpiffeGlob:
    """A SPIFFE id in which `*` stands for one whole segment."""

    segments: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> SpiffeGlob | None:
        """Parse a pattern of ranks or backends; None when no rank or backend could ever match it."""
        glob = cls(tuple(text.split("/")))
        try:
            role = glob.example().role
        except CloisterError:
            return None
        # A pattern such as spiffe://*/... would let the trust domain vary, and "0" is a domain.
        return glob if role in (Role.RANK, Role.BACKEND) and glob.segments[2] != "*" else None

    def matches(self, spiffe_id: str) -> bool:
        segments = spiffe_id.split("/")
        return len(segments) == len(self.segments) and all(
            pattern in ("*", segment) for pattern, segment in zip(self.segments, segments, strict=True)
        )

    def example(self) -> SpiffeId:
        """Return an id that matches; raise CloisterError(CALLER_UNKNOWN) when there is none."""
        return SpiffeId.parse("/".join("0" if segment == "*" else segment for segment in self.segments))

    def __str__(self) -> str:
        return "/".join(self.segments)


@dataclass(frozen=True, slots=True)
class ReleasePolicy:
    """A policy as it was put in force."""

    name: str
    version: int
    previous: bytes  # digest of the policy before, 48 bytes; empty for version 1
    owner: str  # SPIFFE id
    key: KeyUri
    min_key_version: int
    purposes: tuple[Purpose, ...]
    tee: TeeRule
    measurements: Mapping[str, tuple[bytes, ...]]
    workload: WorkloadRule
    identities: tuple[SpiffeGlob, ...] | None
    key_exchange: tuple[str, ...] | None  # groups of the TLS channel
    max_age: timedelta
    broker_nonce: bool  # False: the verifier's nonce is fresh enough
    kem_ids: tuple[int, ...]
    max_per_job: int | None
    lease: timedelta
    approvals: ApprovalRule | None  # for a release
    change: ApprovalRule | None  # for the successor of this policy, besides its owner's signature
    cases: tuple[Case, ...]
    digest: bytes  # 48 bytes


def parse_policy(data: bytes) -> ReleasePolicy:
    """Parse a release policy (YAML, at most 64 KiB); raise CloisterError(POLICY_INVALID) for anything else."""
    return _policy(read_document(data, what="release policy", manual="docs/release-policy.md"))


def _policy(document: Document) -> ReleasePolicy:
    top = BlockReader(document, (), document.root)
    top.choice("apiVersion", (API_VERSION,))
    top.choice("kind", (KIND,))
    metadata, spec = top.block("metadata"), top.block("spec")
    top.end()
    name = metadata.parsed("name", lambda text: text if is_name(text) else None, "a name of [a-z0-9-], 1 to 63 long")
    version = metadata.number("version", 1, _MAX_VERSION)
    owner = metadata.parsed("owner", _user, "the SPIFFE id of the user who owns the key")
    previous = metadata.parsed("previous", parse_digest, _DIGEST) if metadata.has("previous") else b""
    metadata.end()
    if (version == 1) != (previous == b""):
        todo = "leave it out of version 1; from version 2 on it is the digest of the policy before"
        metadata.refuse("previous", f"does not fit version {version}", todo)
    key, when, release = spec.block("key"), spec.block("when"), spec.optional("release")
    change, cases = spec.optional("change"), read_cases(spec)
    spec.end()
    uri = key.parsed("uri", _uri, "a key URI such as cloister-key://hospital-a/datasets/reviews")
    if SpiffeId.parse(owner).tenant != uri.tenant:
        refuse(document, ("metadata", "owner"), "is of another tenant than the key", f"name a user of {uri.tenant}")
    versions = key.optional("versions")
    min_key_version = versions.number("min", 1, _MAX_VERSION) if versions else 1
    if versions:
        versions.end()
    purposes = key.choices("purposes", ("train", "serve", "evaluate"))
    key.end()
    tee, measurements = _tee(when.block("tee")), _measurements(when.optional("measurements"))
    workload = _workload(when.block("workload"))
    identities = _identities(when.optional("identity"))
    key_exchange = _channel(when.optional("channel"))
    max_age, broker_nonce = _evidence(when.optional("evidence"))
    when.end()
    kem_ids, max_per_job, lease, approvals = _release(release)
    return ReleasePolicy(
        name=name,
        version=version,
        previous=previous,
        owner=owner,
        key=uri,
        min_key_version=min_key_version,
        purposes=tuple(Purpose(purpose) for purpose in purposes),
        tee=tee,
        measurements=measurements,
        workload=workload,
        identities=identities,
        key_exchange=key_exchange,
        max_age=max_age,
        broker_nonce=broker_nonce,
        kem_ids=kem_ids,
        max_per_job=max_per_job,
        lease=lease,
        approvals=approvals,
        change=_change(change) if change else None,
        cases=cases,
        digest=digest_of(document.root),
    )


_DIGEST: Final = "sha384: and 96 hexadecimal digits in lower case"
_REGISTER: Final = "96 hexadecimal digits in lower case"


def _tee(block: BlockReader) -> TeeRule:
    block.choice("type", ("tdx",))
    block.choice("debug", ("deny",), default="deny")
    simulated = block.choice("simulated", ("deny", "allow"), default="deny")
    tcb = block.optional("tcb")
    collateral, max_age = block.optional("collateral"), None
    if collateral:
        max_age = collateral.duration("max_age", timedelta(hours=1), timedelta(days=365))
        collateral.choice("on_stale", ("deny",), default="deny")
        collateral.end()
    platforms, piids = block.optional("platforms"), None
    if platforms:
        piids = platforms.each("piid", lambda text: parse_hex(text, 16), "32 hexadecimal digits in lower case")
        platforms.end()
    block.end()
    return TeeRule(simulated == "allow", _tcb(tcb) if tcb else None, max_age, piids)


def _tcb(block: BlockReader) -> TcbRule:
    statuses = block.choices("status", TCB_STATUSES)
    min_date = block.day("min_date") if block.has("min_date") else None
    advisories, allowed = block.optional("advisories"), None
    if advisories:
        allowed = advisories.each("allow", parse_advisory, "an advisory such as INTEL-SA-00837", may_be_empty=True)
        advisories.end()
    block.end()
    return TcbRule(statuses, min_date, allowed)


def _measurements(block: BlockReader | None) -> Mapping[str, tuple[bytes, ...]]:
    if block is None:
        return {}
    rules = {
        name: block.each(name, lambda text: parse_hex(text, 48), _REGISTER) for name in MEASUREMENTS if block.has(name)
    }
    block.end()
    if not rules:
        block.refuse("mr_td", "the block is empty", f"name at least one of: {', '.join(MEASUREMENTS)}")
    return rules


def _workload(block: BlockReader) -> WorkloadRule:
    script = block.each("script", parse_digest, _DIGEST)
    environment, config, datasets = (
        block.each(name, parse_digest, _DIGEST) if block.has(name) else None
        for name in ("environment", "config", "datasets")
    )
    sealed = block.choice("no_events_after", (SEALED_EVENT,), default="")
    block.end()
    return WorkloadRule(script, environment, config, datasets, sealed != "")


def _identities(block: BlockReader | None) -> tuple[SpiffeGlob, ...] | None:
    if block is None:
        return None
    wanted = "the SPIFFE id of ranks or backends; * stands for one whole segment after the trust domain"
    globs = block.each("spiffe", SpiffeGlob.parse, wanted)
    block.end()
    return globs


def _channel(block: BlockReader | None) -> tuple[str, ...] | None:
    if block is None:
        return None
    groups = block.choices("key_exchange", KEY_EXCHANGES)
    block.end()
    return groups


def _evidence(block: BlockReader | None) -> tuple[timedelta, bool]:
    if block is None:
        return _MAX_AGE_DEFAULT, True
    max_age = _MAX_AGE_DEFAULT
    if block.has("max_age"):
        max_age = block.duration("max_age", timedelta(seconds=1), timedelta(days=1))
    nonce = block.choice("nonce", ("broker", "verifier"), default="broker")
    block.end()
    return max_age, nonce == "broker"


def _release(block: BlockReader | None) -> tuple[tuple[int, ...], int | None, timedelta, ApprovalRule | None]:
    if block is None:
        return tuple(WRAPS.values()), None, _LEASE_DEFAULT, None
    wrap = block.choices("wrap", tuple(WRAPS)) if block.has("wrap") else tuple(WRAPS)
    max_per_job = block.number("max_per_job", 1, 1_000_000) if block.has("max_per_job") else None
    lease = _LEASE_DEFAULT
    if block.has("lease"):
        lease = block.duration("lease", _LEASE_SHORTEST, timedelta(days=365))
    approvals = block.optional("approvals")
    block.end()
    return tuple(WRAPS[name] for name in wrap), max_per_job, lease, _approvals(approvals) if approvals else None


def _change(block: BlockReader) -> ApprovalRule:
    approvals = block.block("approvals")
    block.end()
    return _approvals(approvals)


def _approvals(block: BlockReader) -> ApprovalRule:
    wanted = "the did:key of an approver's Ed25519 key"
    of = block.each("of", lambda text: text if is_did_key(text) else None, wanted)
    if len(of) > MAX_APPROVERS:
        block.refuse("of", f"more than {MAX_APPROVERS} approvers", "shorten the list")
    threshold = block.number("threshold", 1, len(of))
    block.end()
    return ApprovalRule(threshold, of)


def _uri(text: str) -> KeyUri | None:
    try:
        return KeyUri.parse(text)
    except CloisterError:
        return None


def _user(text: str) -> str | None:
    try:
        return text if SpiffeId.parse(text).role is Role.USER else None
    except CloisterError:
        return None
