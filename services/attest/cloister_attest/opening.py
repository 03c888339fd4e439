# SPDX-License-Identifier: Apache-2.0
"""How the CA of a process comes to be: begun anew, opened with a key from a file, or recovered from shares.

In each case the trust bundle is known first, because it is measured before attest has keys, and only then the CA.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final

from cloister.atomicfile import write_atomically
from cloister.errors import CloisterError, Code
from cloister.holderkey import SealedShare, read_holder_public
from cloister.hpke import HpkeError, seal
from cloister.identity import Role, SpiffeId
from cloister.protocol import share_info
from cloister.recovery import ShareSet, SplitKey, new_recovery_key, split
from cloister.rootfile import read_root_file
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.logging import get_logger
from cloister.secret import SecretBytes
from cloister.tlv import sha384, tlv
from cloister_attest.castate import CaState, Context, SealedState, Vault, read_state
from cloister_attest.config import AttestConfig, CaSection, Kept
from cloister_attest.tableseal import TableSealer
from cloister_attest.users import UserRegister

STATE_NAME: Final = "ca.sealed"
SHARES_NAME: Final = "ca-shares"


@dataclass(frozen=True, slots=True)
class Opening:
    """A CA that is about to be: exactly one of `fresh` and `sealed`."""

    section: CaSection
    path: Path
    shares_dir: Path
    holders: tuple[bytes, ...]  # public keys
    fresh: CaState | None
    sealed: SealedState | None

    @classmethod
    def prepare(cls, config: AttestConfig, *, now: datetime) -> Opening:
        """Look at what is kept; raise CloisterError when that cannot be used. Nothing is begun over what is there."""
        section, domain = config.ca, config.service.trust_domain
        path = section.state_file or config.service.state_dir / STATE_NAME
        shares_dir = section.shares_dir or config.service.state_dir / SHARES_NAME
        holders = tuple(read_holder_public(holder) for holder in section.holders)
        sealed = None if section.kept is Kept.MEMORY else read_state(path)
        if sealed is None:
            return cls(section, path, shares_dir, holders, CaState.begin(domain, now=now), None)
        if (sealed.sealed.shares is None) != (section.kept is Kept.FILE):
            raise CloisterError(
                Code.CONFIG_INVALID,
                what=f"the sealed CA state {path} is not under the key that [ca] names",
                why="it was sealed under a key " + ("in a file" if sealed.sealed.shares is None else "in shares"),
                todo="correct [ca]; to begin a new CA, move the sealed state away",
            )
        if sealed.bundle.trust_domain != domain:
            raise CloisterError(
                Code.CONFIG_INVALID,
                what=f"the sealed CA state {path} is of another trust domain",
                why=f"it is of {sealed.bundle.trust_domain}, the configuration of {domain}",
                todo="correct service.trust_domain or ca.state_file",
            )
        return cls(section, path, shares_dir, holders, None, sealed)

    @property
    def bundle(self) -> TrustBundle:
        """The bundle to measure."""
        if self.fresh is not None:
            return self.fresh.epochs.bundle
        assert self.sealed is not None
        return self.sealed.bundle

    async def key(
        self, recover: Callable[[SealedState, ShareSet], Awaitable[SecretBytes]]
    ) -> tuple[SecretBytes, ShareSet | None] | None:
        """Return the recovery key and its shares, None when nothing is kept; raise CloisterError.

        From its file, from `recover`, which waits for shares, or drawn now: then each holder's share is written, sealed
        to the holder's key, before anything is sealed under it.
        """
        if self.section.root_key_file is not None:
            get_logger().warning(
                "the CA is sealed under a key in a file: whoever reads it has the CA",
                file=str(self.section.root_key_file),
            )
            return await asyncio.to_thread(read_root_file, self.section.root_key_file), None
        if not self.holders:
            return None
        if self.sealed is None:
            return await self._new_key()
        shares = self.sealed.sealed.shares
        assert shares is not None
        return await recover(self.sealed, shares), shares

    async def _new_key(self) -> tuple[SecretBytes, ShareSet]:
        key = new_recovery_key()
        made = split(key, threshold=self.section.threshold, count=len(self.holders))
        await asyncio.to_thread(self._write_shares, made)
        return key, made.public

    @property
    def _holders_digest(self) -> bytes:
        return sha384(tlv("cloister-ca-holders-v1", self.section.threshold, *self.holders))

    def _write_shares(self, made: SplitKey) -> None:
        me = str(SpiffeId.service(self.bundle.trust_domain, Role.ATTEST))
        threshold, count = self.section.threshold, len(self.holders)
        self.shares_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number, (share, holder) in enumerate(zip(made.mnemonics, self.holders, strict=True), 1):
            info = share_info(broker_id=me, number=number, count=count, threshold=threshold)
            try:
                sealed = SealedShare(me, number, count, threshold, seal(holder, share, info=info))
            except HpkeError as error:
                raise CloisterError(
                    Code.CONFIG_INVALID,
                    what=f"{self.section.holders[number - 1]} is no public key of a holder",
                    why=str(error),
                    todo="`cloister broker holder-key` makes one, on the holder's machine",
                ) from None
            write_atomically(self.shares_dir / f"share-{number}-of-{count}.json", sealed.to_bytes(), mode=0o644)
        get_logger().warning(
            "shares of the CA's recovery key were made: give each to its holder, and keep copies",
            directory=str(self.shares_dir),
            share_set=made.public.name,
            threshold=threshold,
            holders=count,
        )

    async def finish(
        self,
        key: tuple[SecretBytes, ShareSet | None] | None,
        sealer: TableSealer,
        users: UserRegister,
        *,
        config: bytes,
        now: datetime,
    ) -> tuple[CaState, Vault | None]:
        """Open or keep the state, with the registers that belong to it; raise CloisterError.

        `config` is the digest of the configuration that attest measured.

        A recovered CA goes on in another generation: what was told before is older than what it tells now. The seals
        of the registers are in the generation of the state, or one behind, wherever this is interrupted. Where the
        configuration names other holders, those who recovered it have accepted that: there is another key from now on.
        """
        context = Context(config, self._holders_digest)
        vault = None if key is None else Vault(self.path, *key, context)
        if self.sealed is None or vault is None:
            assert self.fresh is not None
            state = self.fresh
            await users.begin()
            await sealer.begin(state.register_key, state.epochs.generation)
            if vault is not None:  # last: without it, the next start begins anew
                await asyncio.to_thread(vault.save, state, now=now)
                get_logger().warning("a new CA has begun", bundle=state.epochs.bundle.digest.hex())
            return state, vault
        state = await asyncio.to_thread(self.sealed.open, vault.key)
        if self.holders and self.sealed.context.holders != context.holders:
            vault = Vault(self.path, *(await self._new_key()), context)
        await sealer.load(state.register_key, state.epochs.generation)
        await users.load()
        state = replace(state, epochs=state.epochs.next_generation())
        await asyncio.to_thread(vault.save, state, now=now)
        await sealer.reseal(state.epochs.generation)
        get_logger().warning(
            "the CA was recovered",
            generation=state.epochs.generation,
            issuing=state.epochs.issuing.epoch,
            sealed_at=self.sealed.sealed_at.isoformat(),
        )
        return state, vault
