# SPDX-License-Identifier: Apache-2.0
"""From shares or a passphrase to a root key, step by step. Nothing here knows a store or a network."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from cloister.errors import CloisterError, Code
from cloister.recovery import ShareCollector, ShareSet, new_recovery_key, split
from cloister.secret import SecretBytes
from cloister_keybroker.rootkey import ROOT_KEY_SIZE, RootKey
from cloister_keybroker.sealrecord import SALT_SIZE, SealRecord, Stretching

MIN_PASSPHRASE: Final = 16  # bytes; guessing happens offline, on a copy of the store
MAX_PASSPHRASE: Final = 1024
SHARE_LIFE_S: Final = 3600.0  # shares that did not become a key are forgotten
_FIRST_WAIT_S: Final = 1.0  # after a wrong passphrase; doubled by each further one
_LAST_WAIT_S: Final = 300.0
_MAX_REMEMBERED: Final = 32  # refused tries that are told of in the log


@dataclass(frozen=True, slots=True)
class Refused:
    """A try that did not open anything."""

    operator: str  # SPIFFE id
    why: str


@dataclass(frozen=True, slots=True)
class NewRoot:
    """A root key that was just made, how it can be had again, and its shares (33 words each) if it has any."""

    root_key: RootKey
    record: SealRecord
    shares: tuple[SecretBytes, ...] = ()


def new_root_from_shares(*, threshold: int, count: int) -> NewRoot:
    """Make a root key and split it; raise CloisterError(ARGUMENT_INVALID) for a threshold that is none."""
    key = new_recovery_key()
    try:
        made = split(key, threshold=threshold, count=count)
    except ValueError as error:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"{threshold} of {count} shares is not possible",
            why=str(error),
            todo="choose a threshold of at least 2 and at most 16 holders",
        ) from None
    return NewRoot(RootKey(key), SealRecord(shares=made.public), made.mnemonics)


def new_root_from_passphrase(passphrase: SecretBytes) -> NewRoot:
    """Make the root key of a passphrase under a new salt; takes most of a second."""
    if not MIN_PASSPHRASE <= len(passphrase) <= MAX_PASSPHRASE:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what="this passphrase is not allowed",
            why=f"it has {len(passphrase)} bytes; {MIN_PASSPHRASE} to {MAX_PASSPHRASE} are wanted",
            todo="take six or more random words: whoever copies the store can guess as fast as he can pay for",
        )
    stretching = Stretching(secrets.token_bytes(SALT_SIZE))
    return NewRoot(stretched(passphrase, stretching), SealRecord(stretching=stretching))


def stretched(passphrase: SecretBytes, stretching: Stretching) -> RootKey:
    """Return the root key of a passphrase (Argon2id, RFC 9106); blocks for most of a second."""
    try:
        function = Argon2id(
            salt=stretching.salt,
            length=ROOT_KEY_SIZE,
            iterations=stretching.iterations,
            lanes=stretching.lanes,
            memory_cost=stretching.memory_kib,
        )
        return RootKey(SecretBytes(function.derive(passphrase.reveal())))
    except UnsupportedAlgorithm:
        raise CloisterError(
            Code.PREREQUISITE_MISSING,
            what="a passphrase cannot be used here",
            why="the OpenSSL of the `cryptography` package has no Argon2id",
            todo="install the package's own wheel, or use shares",
        ) from None
    except MemoryError:
        raise CloisterError(
            Code.UNSEAL_REFUSED,
            what="the passphrase could not be stretched",
            why=f"it takes {stretching.memory_kib // 1024} MiB of memory",
            todo="give the broker more memory",
        ) from None


@dataclass(slots=True)
class Unsealing:
    """What operators handed in for one root key so far. `canary` is that of the root key that is looked for."""

    record: SealRecord
    canary: bytes
    clock_s: Callable[[], float]  # monotonic seconds
    refused: list[Refused] = field(default_factory=list)
    _collector: ShareCollector | None = None
    _givers: dict[int, str] = field(default_factory=dict)
    _last_share_s: float = 0.0
    _tries: int = 0
    _not_before_s: float = 0.0

    @property
    def have(self) -> int:
        """Shares that are here."""
        self._forget_old()
        return len(self._givers)

    @property
    def need(self) -> int:
        """Shares that are needed; 1 for a passphrase."""
        return self.record.shares.threshold if self.record.shares else 1

    @property
    def givers(self) -> tuple[tuple[int, str], ...]:
        """Which share came from which operator."""
        return tuple(sorted(self._givers.items()))

    def hand_in(self, secret: SecretBytes, operator: str) -> RootKey | None:
        """Take a share or passphrase; return the root key when that is enough.

        Blocks for most of a second with a passphrase. Raises CloisterError: SHARE_INVALID, which names the share;
        UNSEAL_REFUSED for a wrong passphrase; RATE_LIMITED while one has to wait after that.
        """
        try:
            if self.record.shares is not None:
                return self._share(self.record.shares, secret, operator)
            if self.record.stretching is not None:
                return self._passphrase(self.record.stretching, secret)
            return self._file(secret)
        except CloisterError as error:
            if error.code in (Code.SHARE_INVALID, Code.UNSEAL_REFUSED) and len(self.refused) < _MAX_REMEMBERED:
                self.refused.append(Refused(operator, error.why))
            raise

    def clear(self) -> None:
        """Forget shares; what was refused and how long to wait stays."""
        if self._collector is not None:
            self._collector.clear()
        self._collector = None
        self._givers.clear()

    def _share(self, shares: ShareSet, share: SecretBytes, operator: str) -> RootKey | None:
        self._forget_old()
        collector = self._collector = self._collector or ShareCollector(shares)
        number = collector.add(share)
        self._givers[number], self._last_share_s = operator, self.clock_s()
        if collector.missing:
            return None
        try:
            root_key = RootKey(collector.secret())
        finally:
            collector.clear()
            self._collector = None
        if not hmac.compare_digest(root_key.canary(), self.canary):
            self._givers.clear()
            raise CloisterError(
                Code.STORE_DAMAGED,
                what="the shares are genuine, and the store is not under their root key",
                why="the store's mark was edited, or comes from another backup",
                todo="restore the store from a backup made under this root key",
            )
        return root_key

    def _passphrase(self, stretching: Stretching, passphrase: SecretBytes) -> RootKey:
        now = self.clock_s()
        if now < self._not_before_s:
            raise CloisterError(
                Code.RATE_LIMITED,
                what="too many wrong passphrases",
                why=f"the next one is looked at in {self._not_before_s - now:.0f} seconds",
                todo="wait, and try again",
            )
        root_key = stretched(passphrase, stretching)
        if hmac.compare_digest(root_key.canary(), self.canary):
            return root_key
        wait_s = min(_LAST_WAIT_S, _FIRST_WAIT_S * 2.0 ** min(self._tries, 16))
        self._tries += 1
        self._not_before_s = self.clock_s() + wait_s
        raise CloisterError(
            Code.UNSEAL_REFUSED,
            what="the passphrase is wrong",
            why=f"try {self._tries}; the next one is looked at in {wait_s:.0f} seconds",
            todo="try again",
        )

    def _file(self, content: SecretBytes) -> RootKey:
        if len(content) == ROOT_KEY_SIZE:
            root_key = RootKey(content)
            if hmac.compare_digest(root_key.canary(), self.canary):
                return root_key
        raise CloisterError(
            Code.UNSEAL_REFUSED,
            what="this is not the root key that the store is under",
            why="the store's root key is in a file, and its content was not handed in",
            todo="name that file: --root-key-file",
        )

    def _forget_old(self) -> None:
        if self._givers and self.clock_s() - self._last_share_s > SHARE_LIFE_S:
            self.clear()


@dataclass(slots=True)
class Replacement:
    """A root key that is to replace the present one: the present one is shown first, then the next is handed back.

    Without the first step any operator could make a root key of his own, and open a copy of the store with it.
    """

    new: NewRoot
    present: Unsealing
    following: Unsealing
    allowed: bool = False  # the present root key was shown
    given: tuple[tuple[int, str], ...] = ()  # which of the present shares came from which operator

    @property
    def waits_for(self) -> Unsealing:
        """What is to be handed in now."""
        return self.following if self.allowed else self.present

    def hand_in(self, secret: SecretBytes, operator: str) -> bool:
        """Take a share, a passphrase or the content of a root key file; say whether the next root key takes effect."""
        if self.allowed:
            return self.following.hand_in(secret, operator) is not None
        if self.present.hand_in(secret, operator) is not None:
            self.allowed, self.given = True, self.present.givers
            self.present.clear()
        return False
