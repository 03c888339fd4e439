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

from cloister.errors import CloisterError, Code
from cloister.guest.measure import read_measured
from cloister.recovery import ShareSet
from cloister.rootfile import read_root_file
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.logging import get_logger
from cloister.secret import SecretBytes
from cloister_attest.castate import CaState, SealedState, Vault, read_state
from cloister_attest.config import AttestConfig, CaSection, Kept
from cloister_attest.tableseal import TableSealer
from cloister_attest.users import UserRegister

STATE_NAME: Final = "ca.sealed"


@dataclass(frozen=True, slots=True)
class Opening:
    """A CA that is about to be: exactly one of `fresh` and `sealed`."""

    section: CaSection
    path: Path
    shares: ShareSet | None
    fresh: CaState | None
    sealed: SealedState | None

    @classmethod
    def prepare(cls, config: AttestConfig, *, now: datetime) -> Opening:
        """Look at what is kept; raise CloisterError when that cannot be used. Nothing is begun over what is there."""
        section, domain = config.ca, config.service.trust_domain
        path = section.state_file or config.service.state_dir / STATE_NAME
        shares = ShareSet.parse(read_measured(section.share_set).data) if section.share_set else None
        sealed = None if section.kept is Kept.MEMORY else read_state(path)
        if sealed is None:
            return cls(section, path, shares, CaState.begin(domain, now=now), None)
        if sealed.sealed.shares != shares:
            raise CloisterError(
                Code.CONFIG_INVALID,
                what=f"the sealed CA state {path} is not under the key that [ca] names",
                why="it was sealed under shares of another set" if shares else "it was sealed under shares, not a file",
                todo="correct [ca]; to begin a new CA, move the sealed state away",
            )
        if sealed.bundle.trust_domain != domain:
            raise CloisterError(
                Code.CONFIG_INVALID,
                what=f"the sealed CA state {path} is of another trust domain",
                why=f"it is of {sealed.bundle.trust_domain}, the configuration of {domain}",
                todo="correct service.trust_domain or ca.state_file",
            )
        return cls(section, path, shares, None, sealed)

    @property
    def bundle(self) -> TrustBundle:
        """The bundle to measure."""
        if self.fresh is not None:
            return self.fresh.epochs.bundle
        assert self.sealed is not None
        return self.sealed.bundle

    @property
    def measured(self) -> bytes:
        """What of the recovery key belongs to what this attest is: who can give it back."""
        return self.shares.to_bytes() if self.shares else b""

    async def key(self, recover: Callable[[ShareSet], Awaitable[SecretBytes]]) -> SecretBytes | None:
        """Return the recovery key: from its file, or from `recover`, which waits for shares. None: nothing is kept."""
        if self.section.root_key_file is not None:
            get_logger().warning(
                "the CA is sealed under a key in a file: whoever reads it has the CA",
                file=str(self.section.root_key_file),
            )
            return await asyncio.to_thread(read_root_file, self.section.root_key_file)
        return None if self.shares is None else await recover(self.shares)

    async def finish(
        self, key: SecretBytes | None, sealer: TableSealer, users: UserRegister, *, now: datetime
    ) -> tuple[CaState, Vault | None]:
        """Open or keep the state, with the registers that belong to it; raise CloisterError.

        A recovered CA goes on in another generation: what was told before is older than what it tells now. The seals
        of the registers are in the generation of the state, or one behind, wherever this is interrupted.
        """
        vault = None if key is None else Vault(self.path, key, self.shares)
        if self.sealed is None or key is None:
            assert self.fresh is not None
            state = self.fresh
            if vault is not None:
                await asyncio.to_thread(vault.save, state, now=now)
                get_logger().warning("a new CA has begun", bundle=state.epochs.bundle.digest.hex())
            await users.begin()
            await sealer.begin(state.register_key, state.epochs.generation)
            return state, vault
        state = await asyncio.to_thread(self.sealed.open, key)
        await sealer.load(state.register_key, state.epochs.generation)
        await users.load()
        state = replace(state, epochs=state.epochs.next_generation())
        assert vault is not None
        await asyncio.to_thread(vault.save, state, now=now)
        await sealer.reseal(state.epochs.generation)
        get_logger().warning(
            "the CA was recovered",
            generation=state.epochs.generation,
            issuing=state.epochs.issuing.epoch,
            sealed_at=self.sealed.sealed_at.isoformat(),
        )
        return state, vault
