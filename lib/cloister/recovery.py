# SPDX-License-Identifier: Apache-2.0
"""Recovery keys: split among people, put together again, and what is sealed under them. Pure.

A recovery key is 32 random bytes. People hold shares of it (SLIP-39 mnemonics of 33 words): `threshold` of `count`
give it back, fewer say nothing about it. What it protects lies on a disk as a `SealedRoot`: readable by nobody who has
the file alone, and makeable by nobody who has no key, so that the operator of the disk can neither read nor invent it.

The `ShareSet` beside it is public: it knows each genuine share by its fingerprint, so a damaged, foreign, forged or
repeated share is named when it is given, and not when it is too late to say which one it was.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
from dataclasses import dataclass, field
from typing import Final, NoReturn

import shamir_mnemonic
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from shamir_mnemonic import MnemonicError, Share

from cloister.errors import CloisterError, Code
from cloister.secret import SecretBytes
from cloister.strictjson import Members, StrictJsonError, dump, load
from cloister.tlv import tlv

RECOVERY_KEY_SIZE: Final = 32
MIN_THRESHOLD: Final = 2  # with one share that suffices, a file is the honest form
MAX_SHARES: Final = 16  # SLIP-39
MAX_SEALED_BYTES: Final = 1024 * 1024  # of a whole sealed file
_MAX_MNEMONIC_BYTES: Final = 512  # 33 words of at most 8 letters, and generous spaces
_FORMAT: Final = "cloister-sealed-root-1"
_SALT_SIZE: Final = 32
_TAG_SIZE: Final = 16
_PURPOSE: Final = re.compile(r"[a-z0-9-]{1,64}")
_NONCE: Final = bytes(12)  # every sealing has a key of its own, made from its salt


def new_recovery_key() -> SecretBytes:
    """Draw a recovery key (32 bytes)."""
    return SecretBytes(secrets.token_bytes(RECOVERY_KEY_SIZE))


@dataclass(frozen=True, slots=True)
class ShareSet:
    """What may be known publicly about the shares of one key. Fingerprints are SHA-256, 32 bytes, in share order."""

    threshold: int
    fingerprints: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if not MIN_THRESHOLD <= self.threshold <= len(self.fingerprints) <= MAX_SHARES:
            raise ValueError(f"wanted {MIN_THRESHOLD} <= threshold <= count <= {MAX_SHARES}")
        if len(set(self.fingerprints)) != len(self.fingerprints) or any(len(one) != 32 for one in self.fingerprints):
            raise ValueError("fingerprints are 32 bytes each, and differ")

    def _members(self) -> dict[str, object]:
        return {"threshold": self.threshold, "fingerprints": [one.hex() for one in self.fingerprints]}

    @property
    def name(self) -> str:
        """A short name of this set, to be told with its shares (8 hexadecimal digits)."""
        return hashlib.sha256(b"".join(self.fingerprints)).hexdigest()[:8]

    def number(self, mnemonic: SecretBytes) -> int:
        """Return which share this is (1 to count); raise CloisterError(SHARE_INVALID) when it is none of this set.

        Case and spaces do not matter. The error says what is wrong and never quotes a word.
        """
        text = _canonical(mnemonic)
        try:
            return self.fingerprints.index(_fingerprint(text)) + 1
        except ValueError:
            _refuse_share(text, self)


@dataclass(frozen=True, slots=True)
class SplitKey:
    """A key that was split: the shares, each for one person, and what may be known about them."""

    mnemonics: tuple[SecretBytes, ...]  # 33 words each, ASCII
    public: ShareSet


def split(key: SecretBytes, *, threshold: int, count: int) -> SplitKey:
    """Split a recovery key; raise ValueError unless 2 <= threshold <= count <= 16 and the key has 32 bytes.

    Splitting a key again makes another set. Shares of the old set still give the same key: to end them, seal under a
    new key and destroy what was sealed under the old one.
    """
    if len(key) != RECOVERY_KEY_SIZE:
        raise ValueError(f"a recovery key has {RECOVERY_KEY_SIZE} bytes")
    if not MIN_THRESHOLD <= threshold <= count <= MAX_SHARES:
        raise ValueError(f"wanted {MIN_THRESHOLD} <= threshold <= count <= {MAX_SHARES}")
    # The key is uniformly random: stretching it with PBKDF2 would add nothing.
    (group,) = shamir_mnemonic.generate_mnemonics(1, [(threshold, count)], key.reveal(), iteration_exponent=0)
    shares = tuple(SecretBytes(text.encode("ascii")) for text in group)
    return SplitKey(shares, ShareSet(threshold, tuple(_fingerprint(share.reveal()) for share in shares)))


@dataclass(slots=True)
class ShareCollector:
    """Shares of one set as people give them, until there are enough."""

    public: ShareSet
    _given: dict[int, SecretBytes] = field(default_factory=dict)

    def add(self, mnemonic: SecretBytes) -> int:
        """Take a share and return its number; raise CloisterError(SHARE_INVALID) and keep the others when it is bad."""
        number = self.public.number(mnemonic)
        if number in self._given:
            raise CloisterError(
                Code.SHARE_INVALID,
                what=f"share {number} was given already",
                why="each share counts once",
                todo=f"give another one; {self.missing} are missing",
            )
        self._given[number] = SecretBytes(_canonical(mnemonic))
        return number

    @property
    def given(self) -> tuple[int, ...]:
        """The numbers of the shares that are here, ascending."""
        return tuple(sorted(self._given))

    @property
    def missing(self) -> int:
        """How many more are needed."""
        return max(0, self.public.threshold - len(self._given))

    def secret(self) -> SecretBytes:
        """Return the key; raise CloisterError(SHARES_MISSING) while there are too few."""
        if self.missing:
            raise CloisterError(
                Code.SHARES_MISSING,
                what=f"{self.missing} more shares are needed",
                why=f"{self.public.threshold} of {len(self.public.fingerprints)} open it, {len(self._given)} are here",
                todo="have more holders give theirs",
            )
        enough = [self._given[number] for number in self.given[: self.public.threshold]]
        try:
            return SecretBytes(shamir_mnemonic.combine_mnemonics([one.reveal().decode("ascii") for one in enough]))
        except (MnemonicError, ValueError):
            # The fingerprints were not made by `split`: shares of two sets, say. From None: words may be quoted.
            raise CloisterError(
                Code.SHARE_INVALID,
                what=f"the shares of set {self.public.name} do not fit together",
                why="its list of fingerprints is not one of shares of one key",
                todo="restore the sealed file from your backup",
            ) from None

    def clear(self) -> None:
        """Forget what was given."""
        self._given.clear()


@dataclass(frozen=True, slots=True)
class SealedRoot:
    """A secret under a recovery key, with public bytes that are authenticated with it.

    `purpose` keeps the uses of one key apart. AES-256-GCM under HKDF-SHA256(key, salt of 32 bytes, purpose): no key is
    used twice. `shares` is of the recovery key, or None where that is a file.
    """

    purpose: str
    shares: ShareSet | None
    public: bytes
    salt: bytes
    ciphertext: bytes

    @classmethod
    def seal(
        cls, secret: SecretBytes, key: SecretBytes, *, purpose: str, public: bytes = b"", shares: ShareSet | None = None
    ) -> SealedRoot:
        """Seal a secret under a recovery key."""
        if not _PURPOSE.fullmatch(purpose):
            raise ValueError("a purpose is a short name")
        empty = cls(purpose, shares, public, secrets.token_bytes(_SALT_SIZE), b"")
        ciphertext = empty._cipher(key).encrypt(_NONCE, secret.reveal(), empty._associated())
        return cls(purpose, shares, public, empty.salt, ciphertext)

    @classmethod
    def parse(cls, data: bytes, *, purpose: str) -> SealedRoot:
        """Parse the file's form; raise CloisterError(SEALED_ROOT_INVALID) for anything but one of this purpose."""
        try:
            fields = Members(load(data, max_size=MAX_SEALED_BYTES), "the file")
            if fields.text("format") != _FORMAT or fields.text("purpose") != purpose:
                _refuse_sealed(f"it was not sealed for {purpose}")
            shares = fields.items("shares", most=1)
            found = cls(
                purpose,
                _share_set(Members(shares[0], "shares")) if shares else None,
                *(_base64(fields.text(name, longest=MAX_SEALED_BYTES)) for name in ("public", "salt", "ciphertext")),
            )
            fields.end()
        except (StrictJsonError, ValueError):
            _refuse_sealed("it was cut or edited")
        if len(found.salt) != _SALT_SIZE or len(found.ciphertext) < _TAG_SIZE:
            _refuse_sealed("it was cut or edited")
        return found

    def to_bytes(self) -> bytes:
        """Return the file's form: JSON in one line of ASCII, without a line end."""
        shares = [] if self.shares is None else [self.shares]
        return dump(
            {
                "format": _FORMAT,
                "purpose": self.purpose,
                "shares": [one._members() for one in shares],
                "public": base64.b64encode(self.public).decode("ascii"),
                "salt": base64.b64encode(self.salt).decode("ascii"),
                "ciphertext": base64.b64encode(self.ciphertext).decode("ascii"),
            }
        )

    def open(self, key: SecretBytes) -> SecretBytes:
        """Return the secret; raise CloisterError(SEALED_ROOT_INVALID) under another key or after any edit."""
        try:
            return SecretBytes(self._cipher(key).decrypt(_NONCE, self.ciphertext, self._associated()))
        except InvalidTag:
            _refuse_sealed("it was edited, or sealed under another key")

    def _cipher(self, key: SecretBytes) -> AESGCM:
        if len(key) != RECOVERY_KEY_SIZE:
            raise ValueError(f"a recovery key has {RECOVERY_KEY_SIZE} bytes")
        info = tlv("cloister-sealed-root-key-v1", self.purpose)
        return AESGCM(HKDF(SHA256(), 32, salt=self.salt, info=info).derive(key.reveal()))

    def _associated(self) -> bytes:
        threshold, fingerprints = (self.shares.threshold, self.shares.fingerprints) if self.shares else (0, ())
        return tlv(_FORMAT, self.purpose, threshold, b"".join(fingerprints), self.public)


def _canonical(mnemonic: SecretBytes) -> bytes:
    raw = mnemonic.reveal()
    if len(raw) > _MAX_MNEMONIC_BYTES or not raw.isascii():
        _refuse("it is longer than a share, or not ASCII text")
    return b" ".join(raw.lower().split())


def _fingerprint(canonical: bytes) -> bytes:
    return hashlib.sha256(tlv("cloister-share-v1", canonical)).digest()


def _refuse_share(canonical: bytes, public: ShareSet) -> NoReturn:
    words = canonical.decode("ascii").split()
    for place, word in enumerate(words, 1):
        if word not in shamir_mnemonic.share.wordlist.WORD_INDEX_MAP:
            _refuse(f"its word {place} is on no word list of SLIP-39")
    try:
        share = Share.from_mnemonic(" ".join(words))
    except MnemonicError:
        _refuse(f"a word of it is wrong, missing or at another's place ({len(words)} words, a share has 33)")
    _refuse(f"it calls itself share {share.index + 1}, and is none of set {public.name}: of another set, or forged")


def _refuse(why: str) -> NoReturn:
    raise CloisterError(
        Code.SHARE_INVALID,
        what="this recovery share is refused",
        why=why,
        todo="compare it with what was written down; the shares that were given before it still count",
    ) from None


def _refuse_sealed(why: str) -> NoReturn:
    raise CloisterError(
        Code.SEALED_ROOT_INVALID,
        what="this sealed root cannot be used",
        why=why,
        todo="give the key it was sealed under, or restore the file from your backup",
    ) from None


def _share_set(fields: Members) -> ShareSet:
    threshold = fields.integer("threshold", highest=MAX_SHARES)
    fingerprints = fields.texts("fingerprints", most=MAX_SHARES, longest=64)
    fields.end()
    return ShareSet(threshold, tuple(bytes.fromhex(one) for one in fingerprints))


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text.encode("ascii"), validate=True)
    except binascii.Error:
        raise ValueError("base64") from None
