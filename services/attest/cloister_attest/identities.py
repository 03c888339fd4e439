# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N802  (RPCs keep the names that the protocol gives them)
"""gRPC in and out: who somebody is, and who is not let in any more.

Operators deny whatever there is. Administrators do with users of their own tenant: register, list, remove, deny. An
operator registers within its own tenant, too, and nobody registers for another one: who may name a tenant's users may
act for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from datetime import datetime
from typing import Any, Final

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.guest.evidence import Checklist, EvidenceRefused, load_p256_spki
from cloister.identity import Role, SpiffeId
from cloister.runtime.caller import current_caller
from cloister.runtime.guard import CallerTable
from cloister.runtime.logging import get_logger
from cloister.runtime.server import Mounted
from cloister_attest.denylist import MAX_REASON, Denial, DenialKind, DenyList, Fact, facts_of, parse_value
from cloister_attest.enrolment import Enrolment
from cloister_attest.requests import read_request
from cloister_attest.revocation import Revocation
from cloister_attest.users import Standing, User, UserRegister

_SERVICE: Final = "cloister.api.attest.v1.IdentityService"
_METHODS: Final = ("Deny", "Readmit", "ListDenials", "IssueIdentity", "ListIdentities", "RemoveIdentity")
IDENTITY_CALLERS: Final[CallerTable] = {f"/{_SERVICE}/{method}": frozenset({Role.USER}) for method in _METHODS}
_KINDS: Final = {
    attest_pb2.DENIAL_KIND_IDENTITY: DenialKind.IDENTITY,
    attest_pb2.DENIAL_KIND_PLATFORM: DenialKind.PLATFORM,
    attest_pb2.DENIAL_KIND_MEASUREMENT: DenialKind.MEASUREMENT,
}
_WIRE: Final = {kind: number for number, kind in _KINDS.items()}
_STANDINGS: Final = {
    attest_pb2.STANDING_USER: Standing.USER,
    attest_pb2.STANDING_ADMINISTRATOR: Standing.ADMINISTRATOR,
    attest_pb2.STANDING_OPERATOR: Standing.OPERATOR,
}
_WIRE_STANDING: Final = {standing: number for number, standing in _STANDINGS.items()}


class Callers:
    """Which registered user calls, and may it."""

    def __init__(self, users: UserRegister, denials: DenyList) -> None:
        self._users = users
        self._denials = denials

    async def require(self, standing: Standing) -> User:
        """Return the caller, registered with this standing or more, and not denied; raise CALLER_NOT_ALLOWED."""
        caller = current_caller().spiffe_id
        user = self._users.by_id(caller)
        if (
            user is None
            or not user.standing.covers(standing)
            or await self._denials.first(facts_of(caller)) is not None
        ):
            raise CloisterError(
                Code.CALLER_NOT_ALLOWED,
                what=f"this is for {standing}s only",
                why=f"{caller} is none",
                todo="ask one; the first are named in attest's configuration",
            )
        return user


class IdentityServicer(attest_pb2_grpc.IdentityServiceServicer):
    """Users and denials."""

    def __init__(
        self,
        callers: Callers,
        users: UserRegister,
        denials: DenyList,
        enrolment: Enrolment,
        revocation: Revocation,
        *,
        own_facts: Callable[[], Collection[Fact]],
        clock: Callable[[], datetime],
    ) -> None:
        """`own_facts` are about attest itself."""
        self._callers = callers
        self._users = users
        self._denials = denials
        self._enrolment = enrolment
        self._revocation = revocation
        self._own_facts = own_facts
        self._clock = clock

    async def Deny(self, request: attest_pb2.DenyRequest, _context: Any) -> attest_pb2.DenyResponse:
        kind = _kind(request.kind)
        value = parse_value(kind, request.value)
        by = await self._may_deny(kind, value)
        if value == str(by.spiffe_id) or (kind, value) in self._own_facts():
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what="neither operators nor attest deny themselves",
                why="nobody might be left to undo it",
                todo="have another operator do it; to end attest, stop it",
            )
        if len(request.reason) > MAX_REASON or not request.reason.isprintable():
            raise CloisterError(
                Code.ARGUMENT_INVALID, what=f"a reason is printable text of at most {MAX_REASON} characters"
            )
        await self._denials.add(Denial(kind, value, request.reason, str(by.spiffe_id), self._clock()))
        count, complete = await self._revocation.tell()
        get_logger().warning(
            "denied", kind=str(kind), value=value, operator=str(by.spiffe_id), reason=request.reason, certificates=count
        )
        return attest_pb2.DenyResponse(certificates=count, complete=complete)

    async def Readmit(self, request: attest_pb2.ReadmitRequest, _context: Any) -> attest_pb2.ReadmitResponse:
        kind = _kind(request.kind)
        value = parse_value(kind, request.value)
        by = await self._may_deny(kind, value)
        await self._require_own_denial(by, kind, value)
        removed = await self._denials.remove(kind, value)
        if removed:
            await self._revocation.tell()
            get_logger().warning("readmitted", kind=str(kind), value=value, operator=str(by.spiffe_id))
        return attest_pb2.ReadmitResponse(was_denied=removed)

    async def ListDenials(
        self, _request: attest_pb2.ListDenialsRequest, _context: Any
    ) -> attest_pb2.ListDenialsResponse:
        await self._callers.require(Standing.OPERATOR)
        return attest_pb2.ListDenialsResponse(
            denials=[
                attest_pb2.Denial(
                    kind=_WIRE[found.kind],
                    value=found.value,
                    reason=found.reason,
                    operator=found.by,
                    time_unix_ms=int(found.time.timestamp() * 1000),
                )
                for found in await self._denials.all()
            ]
        )

    async def IssueIdentity(
        self, request: attest_pb2.IssueIdentityRequest, _context: Any
    ) -> attest_pb2.IssueIdentityResponse:
        by = await self._callers.require(Standing.ADMINISTRATOR)
        who, standing = _user_id(request.spiffe_id), _standing(request.standing)
        self._require_own(by, who)
        present = self._users.by_id(who)
        if not by.standing.covers(standing) or (present is not None and not by.standing.covers(present.standing)):
            raise _not_yours(f"{by.standing}s register no {standing if present is None else present.standing}")
        checklist, now = Checklist(), self._clock()
        try:
            requested = read_request(request.csr_der, checklist) if request.csr_der else None
        except EvidenceRefused as refusal:
            raise refusal.public("this certificate request is refused") from None
        spki = requested.spki_der if requested else request.spki_der
        if load_p256_spki(spki) is None or (requested and request.spki_der not in (b"", spki)):
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what="this is not the public key of a user",
                why="wanted a P-256 key (SubjectPublicKeyInfo, DER), or a request under one",
                todo="`cloister identity key` makes one on the user's machine",
            )
        user = User(who, hashlib.sha256(spki).digest(), standing, str(by.spiffe_id), now)
        await self._users.add(user, replace=request.replace)
        if present is not None:
            await self._revocation.strike(who)
        get_logger().warning(
            "identity registered", spiffe_id=str(who), standing=str(standing), operator=str(by.spiffe_id)
        )
        response = attest_pb2.IssueIdentityResponse(
            spki_sha256=user.spki_sha256, trust_bundle=self._enrolment.trust_bundle()
        )
        if requested is not None:
            try:
                issued = await self._enrolment.issue_to(user, requested, checklist=checklist, now=now)
            except EvidenceRefused as refusal:
                raise refusal.public("it is registered, and gets no certificate") from None
            response.certificate_chain_pem = issued.chain_pem
            response.certificate_not_after_unix_s = int(issued.not_after.timestamp())
        return response

    async def ListIdentities(
        self, _request: attest_pb2.ListIdentitiesRequest, _context: Any
    ) -> attest_pb2.ListIdentitiesResponse:
        by = await self._callers.require(Standing.ADMINISTRATOR)
        tenant = None if by.standing is Standing.OPERATOR else by.spiffe_id.tenant
        denied = {denial.value for denial in await self._denials.all() if denial.kind is DenialKind.IDENTITY}
        return attest_pb2.ListIdentitiesResponse(
            identities=[
                attest_pb2.RegisteredIdentity(
                    spiffe_id=str(user.spiffe_id),
                    standing=_WIRE_STANDING[user.standing],
                    spki_sha256=user.spki_sha256,
                    added_by=user.added_by,
                    added_unix_ms=int(user.added.timestamp() * 1000) if user.added else 0,
                    denied=str(user.spiffe_id) in denied,
                )
                for user in self._users.all(tenant=tenant)
            ]
        )

    async def RemoveIdentity(
        self, request: attest_pb2.RemoveIdentityRequest, _context: Any
    ) -> attest_pb2.RemoveIdentityResponse:
        by = await self._callers.require(Standing.ADMINISTRATOR)
        who = _user_id(request.spiffe_id)
        self._require_own(by, who)
        present = self._users.by_id(who)
        if present is not None and not by.standing.covers(present.standing):
            raise _not_yours(f"{by.standing}s remove no {present.standing}")
        await self._users.remove(who)
        count = await self._revocation.strike(who)
        get_logger().warning("identity removed", spiffe_id=str(who), operator=str(by.spiffe_id), certificates=count)
        return attest_pb2.RemoveIdentityResponse(certificates=count)

    async def _may_deny(self, kind: DenialKind, value: str) -> User:
        """Return the caller: an operator, or an administrator of the tenant whose user this is."""
        by = await self._callers.require(Standing.ADMINISTRATOR)
        if by.standing is Standing.OPERATOR:
            return by
        who = SpiffeId.parse(value) if kind is DenialKind.IDENTITY else None
        known = self._users.by_id(who) if who is not None else None
        if who is None or who.role is not Role.USER or (known is not None and not by.standing.covers(known.standing)):
            raise _not_yours("administrators deny users of their tenant, and no operators")
        self._require_own(by, who)
        return by

    async def _require_own_denial(self, by: User, kind: DenialKind, value: str) -> None:
        """Let administrators undo what administrators did, and nothing of an operator's."""
        denial = await self._denials.first(iter([(kind, value)]))
        if denial is None or by.standing is Standing.OPERATOR:
            return
        author = self._users.by_id(SpiffeId.parse(denial.by))
        if author is None or not by.standing.covers(author.standing):
            raise _not_yours(f"{denial.by} has denied it")

    def _require_own(self, by: User, who: SpiffeId) -> None:
        if (who.trust_domain, who.tenant) != (by.spiffe_id.trust_domain, by.spiffe_id.tenant):
            raise _not_yours(f"{by.spiffe_id} is of the tenant {by.spiffe_id.tenant}")


def identity_services(servicer: IdentityServicer) -> list[Mounted]:
    """Return what the mutual-TLS port serves administrators and operators; its callers are IDENTITY_CALLERS."""
    return [Mounted(_SERVICE, attest_pb2_grpc.add_IdentityServiceServicer_to_server, servicer)]


def _user_id(text: str) -> SpiffeId:
    try:
        who = SpiffeId.parse(text)
    except CloisterError:
        who = None
    if who is None or who.role is not Role.USER:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"{text[:200]!r} cannot be registered",
            why="users are; workloads are known by what they are",
            todo="wanted spiffe://<trust domain>/ns/<tenant>/user/<name>",
        )
    return who


def _standing(number: attest_pb2.Standing.ValueType) -> Standing:
    standing = _STANDINGS.get(number)
    if standing is None:
        raise _unknown("standing", [str(found) for found in Standing])
    return standing


def _kind(number: attest_pb2.DenialKind.ValueType) -> DenialKind:
    kind = _KINDS.get(number)
    if kind is None:
        raise _unknown("kind", [str(found) for found in DenialKind])
    return kind


def _unknown(field: str, allowed: Collection[str]) -> CloisterError:
    return CloisterError(
        Code.ARGUMENT_INVALID,
        what=f"{field} is not allowed",
        why=f"allowed: {', '.join(allowed)}",
        todo="name one of these",
    )


def _not_yours(why: str) -> CloisterError:
    return CloisterError(
        Code.CALLER_NOT_ALLOWED,
        what="this identity is not yours to change",
        why=why,
        todo="ask an administrator of its tenant, or an operator",
    )
