# SPDX-License-Identifier: Apache-2.0
"""How a TD gets a data key (release protocol, C).

1. Begin: the broker's nonce, policy, and whether the evidence at hand is fresh enough
2. if not: evidence over that nonce, a new attestation result, and with it a new certificate
3. Release, over a channel that shows exactly the certificate the result is bound to
4. check every echoed field, the receipt and its key; open the key
5. record the key in RTMR3, so that later quotes prove which keys this TD ever held
6. while it is held: 1 to 4 again at half of each lease, without a key (`keep_leases`)
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

from cloister.api.keybroker.v1 import keybroker_pb2, keybroker_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Attested, Identity
from cloister.guest.leases import Held, Lease, Leases
from cloister.guest.receipt import check_answer, fetch_receipt_key, open_answer, refuse
from cloister.hpke import KEM_MLKEM768_X25519
from cloister.identity import Role, SpiffeId
from cloister.keyuri import KeyUri
from cloister.protocol import NONCE_SIZE, LeaseTerms, ReleaseBinding
from cloister.runtime.channel import SwappingChannel, invoke, open_channel
from cloister.runtime.credentials import StaticCredentials
from cloister.sealed.datakey import DataKey
from cloister.tlv import sha384

_CALL_TIMEOUT_S: Final = 20.0
_APPROVAL_PAUSE_S: Final = 5.0  # before the first new look whether approvals have come; then twice as long each time
_LONGEST_PAUSE_S: Final = 60.0
_APPROVAL_WAIT_S: Final = 15 * 60.0  # people have to be found; the job holds its cores meanwhile
PURPOSES: Final = {
    "train": keybroker_pb2.PURPOSE_TRAIN,
    "serve": keybroker_pb2.PURPOSE_SERVE,
    "evaluate": keybroker_pb2.PURPOSE_EVALUATE,
}


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked for: the data key in `wrapped`, a new one (None), or a longer lease."""

    held: Held
    wrapped: bytes | None
    renewal: bool = False


@dataclass(frozen=True, slots=True)
class _Answer:
    """The broker's answer with what it has to fit."""

    response: keybroker_pb2.ReleaseResponse
    binding: ReleaseBinding
    terms: LeaseTerms
    receipt_spki_der: bytes
    lease: Lease


class KeyClient:
    """Data keys for one TD. Several releases may run at once."""

    def __init__(
        self,
        identity: Identity,
        keybroker_endpoint: str,
        *,
        expected_receipt_spki: bytes | None = None,
        on_waiting: Callable[[CloisterError], None] | None = None,
        approval_pause_s: float = _APPROVAL_PAUSE_S,
    ) -> None:
        """Pin the broker's receipt key when it is known beforehand; otherwise the broker's evidence names it.

        `on_waiting` is told once when a release begins to wait for approvals; without it none is waited for.
        """
        self._identity = identity
        self._endpoint = keybroker_endpoint
        self._pinned = expected_receipt_spki is not None
        self._receipt_spki = expected_receipt_spki
        self._on_waiting = on_waiting
        self._approval_pause_s = approval_pause_s
        self._leases = Leases(self._renew)

    async def release(self, key_uri: str, purpose: str, *, wrapped: bytes | None, key_version: int = 0) -> DataKey:
        """Return the data key that `wrapped` holds, or, with None, a new one; purposes are those of PURPOSES.

        `key_version` is that of the header of the sealed object; 0, for a new data key only, is the newest.
        Raises CloisterError: the broker's refusal, or RECEIPT_INVALID when its answer does not hold.
        """
        uri = str(KeyUri.parse(key_uri))
        if purpose not in PURPOSES or (wrapped is not None and not (wrapped and key_version > 0)):
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"no key can be asked for like this (purpose {purpose!r}, version {key_version})",
                why=f"purposes are {', '.join(PURPOSES)}; a wrapped data key comes with its key version",
                todo="take wrapped key and version from the header of the sealed object",
            )
        answer = await self._approved(_Question(Held(uri, purpose, key_version), wrapped))
        received = open_answer(
            answer.response.data_key,
            answer.response.receipt,
            binding=answer.binding,
            recipient=self._identity.guest.keys.hpke,
            receipt_spki_der=answer.receipt_spki_der,
            terms=answer.terms,
        )
        version = answer.binding.key_version
        # Before the key is used: a TD that cannot record it must not have it.
        await asyncio.to_thread(self._identity.guest.record_key, uri, version, received.receipt_digest)
        self._leases.begin(Held(uri, purpose, version), answer.lease)
        return received.data_key

    async def keep_leases(self) -> NoReturn:
        """Renew the leases on all that was and will be released; raise CloisterError(LEASE_ENDED) when one ends.

        Whoever holds a data key ends with it.
        """
        await self._leases.keep()

    async def _renew(self, held: Held) -> Lease:
        answer = await self._ask(_Question(held, b"", renewal=True))
        check_answer(
            answer.response.data_key,
            answer.response.receipt,
            binding=answer.binding,
            receipt_spki_der=answer.receipt_spki_der,
            terms=answer.terms,
        )
        return answer.lease

    async def _approved(self, question: _Question) -> _Answer:
        """Ask, and while only approvals are missing, ask again."""
        waited, pause = 0.0, self._approval_pause_s
        while True:
            try:
                return await self._ask(question)
            except CloisterError as error:
                if error.code is not Code.APPROVALS_MISSING or self._on_waiting is None or waited > _APPROVAL_WAIT_S:
                    raise
                if not waited:
                    self._on_waiting(error)
            await asyncio.sleep(pause)
            waited, pause = waited + pause, min(2 * pause, _LONGEST_PAUSE_S)

    async def _ask(self, question: _Question) -> _Answer:
        attested = await self._identity.attested()
        async with self._channel_of(attested) as channel:
            begin = await self._begin(channel, question, attested)
            if begin.fresh_enough:
                return await self._release(channel, attested, begin, question)
        attested = await self._identity.attested(begin.nonce)
        async with self._channel_of(attested) as channel:
            return await self._release(channel, attested, begin, question)

    def _channel_of(self, attested: Attested) -> SwappingChannel:
        """Open a channel of its own for one enrolment: a renewal meanwhile cannot change its certificate."""
        return open_channel(self._endpoint, role=Role.KEYBROKER, credentials=StaticCredentials(attested.material))

    async def _begin(
        self, channel: SwappingChannel, question: _Question, attested: Attested
    ) -> keybroker_pb2.BeginReleaseResponse:
        held = question.held
        request = keybroker_pb2.BeginReleaseRequest(
            key_uri=held.key_uri, purpose=PURPOSES[held.purpose], attestation_result=attested.attestation_result
        )
        method = keybroker_pb2_grpc.KeyReleaseServiceStub(channel).BeginRelease
        begin: keybroker_pb2.BeginReleaseResponse = await invoke(
            method, request, timeout_s=_CALL_TIMEOUT_S, what=f"ask for the key {held.key_uri}"
        )
        if len(begin.nonce) != NONCE_SIZE or KEM_MLKEM768_X25519 not in begin.hpke_kem_ids:
            refuse("it offers no nonce, or no way of sealing that this TD can open")
        return begin

    async def _release(
        self,
        channel: SwappingChannel,
        attested: Attested,
        begin: keybroker_pb2.BeginReleaseResponse,
        question: _Question,
    ) -> _Answer:
        held, asked_at = question.held, asyncio.get_running_loop().time()
        client_nonce = secrets.token_bytes(NONCE_SIZE)
        request = keybroker_pb2.ReleaseRequest(
            attestation_result=attested.attestation_result,
            key_uri=held.key_uri,
            key_version=held.key_version,
            purpose=PURPOSES[held.purpose],
            client_nonce=client_nonce,
            broker_nonce=begin.nonce,
            hpke_kem_id=KEM_MLKEM768_X25519,
            hpke_public_key=self._identity.guest.keys.hpke.public_bytes,
        )
        if question.renewal:
            request.renew.SetInParent()
        elif question.wrapped is None:
            request.generate.SetInParent()
        else:
            request.wrapped = question.wrapped
        method = keybroker_pb2_grpc.KeyReleaseServiceStub(channel).Release
        response: keybroker_pb2.ReleaseResponse = await invoke(
            method, request, timeout_s=_CALL_TIMEOUT_S, what=f"get the key {held.key_uri}"
        )
        if (response.policy_version, response.policy_digest) != (begin.policy_version, begin.policy_digest):
            refuse("the policy changed between question and answer")
        answer = response.data_key
        if held.key_version and answer.key_version != held.key_version:
            refuse("the answer is under another version of the key than the one asked for")
        terms = LeaseTerms(begin.policy_version, response.decided_unix_ms, response.lease_until_unix_ms)
        if terms.lease_until_ms <= terms.decided_ms:
            refuse("the lease ends before it begins")
        binding = ReleaseBinding(
            key_uri=held.key_uri,
            key_version=answer.key_version,
            purpose=held.purpose,
            policy_digest=begin.policy_digest,
            evidence_digest=sha384(attested.attestation_result.encode("ascii")),
            client_nonce=client_nonce,
            broker_nonce=begin.nonce,
            broker_id=str(SpiffeId.service(attested.material.spiffe_id.trust_domain, Role.KEYBROKER)),
            wrapped_digest=sha384(answer.wrapped if question.wrapped is None else question.wrapped),
        )
        receipt_spki_der = await self._receipt_key(channel, attested, response.receipt.receipt_spki_der)
        lease = Lease(asked_at, (terms.lease_until_ms - terms.decided_ms) / 1000)
        return _Answer(response, binding, terms, receipt_spki_der, lease)

    async def _receipt_key(self, channel: SwappingChannel, attested: Attested, claimed: bytes) -> bytes:
        """Return the broker's receipt key; ask again when the broker claims another (it has one per process life)."""
        known = self._receipt_spki
        if known is not None and (self._pinned or known == claimed):
            return known
        self._receipt_spki = await fetch_receipt_key(channel, caller=attested.material.spiffe_id)
        return self._receipt_spki
