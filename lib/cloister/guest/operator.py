# SPDX-License-Identifier: Apache-2.0
"""What an operator does from a machine of its own: the root key's shares, the store's backups, its back ends.

Shares and passphrases go to a broker whose evidence was verified here, sealed to the key in that evidence: nobody in
between can read them, and another program in the broker's place gets nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from cloister import hpke
from cloister.api.keybroker.v1 import keybroker_pb2 as pb
from cloister.api.keybroker.v1 import keybroker_pb2_grpc as rpc
from cloister.errors import CloisterError, Code
from cloister.guest.owner import VerifiedService, pinned_channel
from cloister.holderkey import SealedShare
from cloister.hpke import KEM_MLKEM768_X25519, HpkeKeyPair
from cloister.identity import Role, SpiffeId
from cloister.protocol import unseal_info
from cloister.runtime.channel import invoke, stream
from cloister.runtime.credentials import CredentialSource
from cloister.secret import SecretBytes

_CALL_TIMEOUT_S: Final = 30.0
_LONG_TIMEOUT_S: Final = 600.0  # every key of the store may be asked for at a back end


@dataclass(frozen=True, slots=True)
class Share:
    """A recovery share that was made for this machine."""

    number: int  # from 1
    words: SecretBytes


class OperatorClient:
    """Speaks to the verified broker, and to no other."""

    def __init__(self, credentials: CredentialSource, verified: VerifiedService) -> None:
        self._credentials = credentials
        self._verified = verified

    async def status(self) -> pb.GetSealStatusResponse:
        """Say whether the broker is sealed, and what it waits for."""
        status: pb.GetSealStatusResponse = await self._call(
            "GetSealStatus", pb.GetSealStatusRequest(), "ask whether the broker is sealed"
        )
        return status

    async def initialize(self, holders: Sequence[bytes], *, threshold: int) -> list[SealedShare]:
        """Make the store; return a share for each holder (HPKE public keys), in their order."""
        request = pb.InitializeStoreRequest(
            threshold=threshold, holder_public_keys=holders, hpke_kem_id=KEM_MLKEM768_X25519
        )
        answer: pb.InitializeStoreResponse = await self._call("InitializeStore", request, "make the store")
        return self._shares(answer.sealed_shares, holders, threshold)

    async def initialize_with_passphrase(self, passphrase: SecretBytes) -> None:
        """Make the store under a passphrase."""
        sealed = await self._sealed(passphrase, "initialize")
        await self._call("InitializeStore", pb.InitializeStoreRequest(sealed_passphrase=sealed), "make the store")

    async def hand_in(self, secret: SecretBytes | None) -> pb.GetSealStatusResponse:
        """Hand in a share or passphrase; None where the root key is a file. Return what the broker waits for then."""
        sealed = await self._sealed(secret, "unseal") if secret is not None else b""
        answer: pb.UnsealResponse = await self._call("Unseal", pb.UnsealRequest(sealed=sealed), "unseal the broker")
        return answer.status

    async def seal(self) -> None:
        """Have the broker forget its root key."""
        await self._call("Seal", pb.SealRequest(), "seal the broker")

    async def show(self, secret: SecretBytes, replacement: str) -> pb.GetSealStatusResponse:
        """Show the present root key (a share, the passphrase, the content of its file) for a replacement, by its name.

        Nothing is sent when another replacement waits.
        """
        sealed = await self._sealed(secret, "replace", replacement)
        answer: pb.UnsealResponse = await self._call(
            "Unseal", pb.UnsealRequest(sealed=sealed), "allow another root key"
        )
        return answer.status

    async def rekey(self, holders: Sequence[bytes], *, threshold: int) -> tuple[list[SealedShare], str]:
        """Make another root key; return its shares, and the name under which the present one is to be shown (`show`).

        It takes effect when the present one was shown and enough of these shares were handed in.
        """
        request = pb.RekeyRequest(threshold=threshold, holder_public_keys=holders, hpke_kem_id=KEM_MLKEM768_X25519)
        answer: pb.RekeyResponse = await self._call("Rekey", request, "make another root key")
        return self._shares(answer.sealed_shares, holders, threshold), replacement_name(answer.nonce)

    async def rekey_with_passphrase(self, passphrase: SecretBytes) -> str:
        """Make the root key of another passphrase; it takes effect as that of `rekey` does. Return its name."""
        request = pb.RekeyRequest(sealed_passphrase=await self._sealed(passphrase, "rekey"))
        answer: pb.RekeyResponse = await self._call("Rekey", request, "make another root key")
        return replacement_name(answer.nonce)

    async def rekey_file(self) -> None:
        """Have the broker replace the root key in its file."""
        await self._call("Rekey", pb.RekeyRequest(), "make another root key")

    async def backup(self) -> AsyncIterator[bytes]:
        """Yield a backup of the store."""
        async with self._channel() as channel:
            method = rpc.BrokerServiceStub(channel).Backup
            async for response in stream(method, pb.BackupRequest(), what="back the store up"):
                yield response.chunk

    async def migrate(self, *, limit: int = 0) -> pb.MigrateKeysResponse:
        """Bring key versions to the back end of the configuration."""
        answer: pb.MigrateKeysResponse = await self._call(
            "MigrateKeys", pb.MigrateKeysRequest(limit=limit), "move keys to another back end"
        )
        return answer

    async def backend_status(self) -> pb.GetBackendStatusResponse:
        """Say how the back ends are."""
        answer: pb.GetBackendStatusResponse = await self._call(
            "GetBackendStatus", pb.GetBackendStatusRequest(), "ask how the back ends are"
        )
        return answer

    async def _sealed(self, secret: SecretBytes, action: str, replacement: str = "") -> bytes:
        """Seal to the key in the evidence; what the broker says its key is has to be the same."""
        status, evidence = await self.status(), self._verified.evidence
        if status.hpke_public_key != evidence.hpke_public_key:
            raise CloisterError(
                Code.EVIDENCE_UNEXPECTED,
                what="the broker names another key than its evidence does",
                why="nothing was handed in",
                todo="try again; if it stays so, trust neither",
            )
        if replacement and replacement_name(status.nonce) != replacement:
            raise CloisterError(
                Code.UNSEAL_REFUSED,
                what=f"the broker waits for no root key named {replacement}",
                why="another replacement was begun after it, or it is over",
                todo="ask who began it; nothing was handed in",
            )
        info = unseal_info(action=action, broker_id=self._broker_id, nonce=status.nonce)
        return hpke.seal(evidence.hpke_public_key, secret, info=info)

    def _shares(self, sealed: Sequence[bytes], holders: Sequence[bytes], threshold: int) -> list[SealedShare]:
        if len(sealed) != len(holders):
            raise CloisterError(
                Code.EVIDENCE_UNEXPECTED,
                what="the broker did not answer with a share for each holder",
                why=f"{len(holders)} were wanted, {len(sealed)} came",
                todo="make the store again; nothing can be in this one",
            )
        return [
            SealedShare(self._broker_id, number, len(holders), threshold, share)
            for number, share in enumerate(sealed, start=1)
        ]

    @property
    def _broker_id(self) -> str:
        return str(SpiffeId.service(self._credentials.current().spiffe_id.trust_domain, Role.KEYBROKER))

    async def _call(self, method: str, request: Any, what: str) -> Any:
        timeout_s = _LONG_TIMEOUT_S if method in ("MigrateKeys", "Unseal", "Rekey") else _CALL_TIMEOUT_S
        async with self._channel() as channel:
            return await invoke(
                getattr(rpc.BrokerServiceStub(channel), method), request, timeout_s=timeout_s, what=what
            )

    @asynccontextmanager
    async def _channel(self) -> AsyncIterator[Any]:
        material = self._credentials.current()
        async with pinned_channel(
            self._verified.endpoint, Role.KEYBROKER, material, self._verified.leaf_pem
        ) as channel:
            yield channel


def replacement_name(nonce: bytes) -> str:
    """Return what people call a replacement of the root key: 16 hexadecimal digits of its nonce."""
    return nonce[:8].hex()


class OwnHolders:
    """Keys for shares that come to this machine and go no further than its screen."""

    def __init__(self, count: int) -> None:
        self._pairs = [HpkeKeyPair.generate() for _ in range(count)]

    @property
    def public_keys(self) -> list[bytes]:
        """What to seal the shares to."""
        return [pair.public_bytes for pair in self._pairs]

    def open(self, sealed: Sequence[SealedShare]) -> list[Share]:
        """Return the shares."""
        return [Share(share.number, share.open(pair)) for share, pair in zip(sealed, self._pairs, strict=True)]
