# SPDX-License-Identifier: Apache-2.0
"""Seal small secrets to one public key: HPKE (RFC 9180), base mode, X25519 with ML-KEM-768.

Suite: KEM 0x647a (X-Wing), HKDF-SHA256, AES-256-GCM. `cryptography` gives single-shot sealing without AAD,
so everything that must be bound goes into `info`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from cloister.secret import SecretBytes

KEM_MLKEM768_X25519: Final = 0x647A
PUBLIC_KEY_SIZE: Final = 1184 + 32  # ek || x25519

_SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


class HpkeError(Exception):
    """A public key or a sealed value that cannot be used."""


@dataclass(frozen=True, slots=True)
class HpkeKeyPair:
    """A recipient: private key in memory only."""

    _private: hpke.MLKEM768X25519PrivateKey
    public_bytes: bytes  # 1,216 bytes

    @classmethod
    def generate(cls) -> HpkeKeyPair:
        """Make a key pair from the system's randomness."""
        return cls.of(MLKEM768PrivateKey.generate(), X25519PrivateKey.generate())

    @classmethod
    def of(cls, mlkem: MLKEM768PrivateKey, x25519: X25519PrivateKey) -> HpkeKeyPair:
        """Make the pair of two private keys."""
        public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
        return cls(hpke.MLKEM768X25519PrivateKey(mlkem, x25519), public)

    def open(self, sealed: bytes, *, info: bytes) -> SecretBytes:
        """Return what was sealed to this key with the same info; raise HpkeError for anything else."""
        try:
            return SecretBytes(_SUITE.decrypt(sealed, self._private, info))
        except (InvalidTag, ValueError):
            raise HpkeError("the sealed value does not open with this key and info") from None


def seal(public_bytes: bytes, secret: SecretBytes, *, info: bytes) -> bytes:
    """Return `enc || ciphertext`; raise HpkeError when the public key is not one of this KEM."""
    if len(public_bytes) != PUBLIC_KEY_SIZE:
        raise HpkeError(f"an HPKE public key of this KEM has {PUBLIC_KEY_SIZE} bytes, not {len(public_bytes)}")
    try:
        public = hpke.MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(public_bytes[:1184]),
            X25519PublicKey.from_public_bytes(public_bytes[1184:]),
        )
        return _SUITE.encrypt(secret.reveal(), public, info)
    except ValueError:
        raise HpkeError("not a usable public key of this KEM") from None


def self_test() -> None:
    """Refuse to go on when sealing and opening do not do what they should (FIPS 140-3 style start-up test).

    The fixed ciphertext pins the wire format: KEM id, key order and suite cannot change unnoticed.
    """
    pair = _fixed_pair()
    if pair.open(_KAT_SEALED, info=b"cloister-kat") != SecretBytes(b"known answer"):
        raise HpkeError("HPKE self-test: the known answer does not open")
    fresh = HpkeKeyPair.generate()
    sealed = seal(fresh.public_bytes, SecretBytes(b"x"), info=b"a")
    if fresh.open(sealed, info=b"a") != SecretBytes(b"x"):
        raise HpkeError("HPKE self-test: a sealed value does not open")
    try:
        fresh.open(sealed, info=b"b")
    except HpkeError:
        return
    raise HpkeError("HPKE self-test: info is not bound")


def _fixed_pair() -> HpkeKeyPair:
    """Return the key pair of the known answer (seeds 00..3f and 40..5f)."""
    mlkem = MLKEM768PrivateKey.from_seed_bytes(bytes(range(64)))
    return HpkeKeyPair.of(mlkem, X25519PrivateKey.from_private_bytes(bytes(range(64, 96))))


_KAT_SEALED = bytes.fromhex(
    "01393d801c931eb2bea324b69d109cbbe0cc60b417ded35b064f0386a1d981dc8ba5dde1515d194b7c4e6bb0f14d8d194a434e87c42891fc"
    "88fabc7835b69be818fd3e9491ae48b60508dab3bf5c34ecb492f593c7628907d705588eaa3fcf255e96484a0f2cf46aca36d3369ef862aa"
    "0b9cfa4a34ffa897b78b21a4c7bb9a392cea4c36615fce7bb13b43d8ae8fd0ef5dd440da1b07e9687efebfe6d4d4a4a0175dab9a84cf45f3"
    "4d2a1f3e749d74fd9c14163aa4b1b2b2bcea348177018bbea632c4bc0930d18757180497464c8fe6f77567f96c0e2d11522098b999d46642"
    "11c899134c67f114b6a400a69569dfa37ff083b73296f5e356053280579df92c7737cf629d3305df3145f29193fedc45391681a549319c19"
    "12066775d42971a07b80185856388ea33a03829f1e4fed42e87adaa89a4446cb4786dc1aac8b1f704e0e73dca621737c91e0c7c2a1ff4f10"
    "0b8487dcd189b42432cd98d89eddc634b809a034d004c5ac46a71fd637041ee86a2b936c0f5e68ca980fe002c096cf0e4ee789eeb9dfabc9"
    "03e06357ab59f249c0692afcc95c984a1e6b225c50a6a735217b709254f8712b6c2e683f54f10ccf5517391610002adab104dc058e3fa549"
    "5b237893de8ef6723e72b38fd06683c82df3a41aab98abb429ad9e7fc4f33e7ec25751de430e6c8bac1100943bb6438536553b765d749702"
    "24f0cecbecd03710474ebdd4e11a17faa568b19595b74d2038d746a19b65217f54d5f070e801544f1a6b66ce354cfc79a2d12116514970e7"
    "1e763283ee52df571903994f8c8d805e414b56cc2643522bd82b7d0bd23f97e72bba42735788d72a818de3f783226cd14940dc575f12688f"
    "f36bfdea32af1f247b749c1d20cefc6e87872ade2184251b719e5be2b178ce131b138dbf58379a2c61c6b3b6ec4cfb7ee9a58e96f51d05c8"
    "2a555184d613cf23345f3f8280adec66cd23f39ac1e96e0db9eb1e2b4339fa9d5b1c13dee018a2af9396d1533b171014581ce48af83d8409"
    "3f9a7c814ad212a76696a53897524c18357f2efc9af3840629cdf3be9f07c4e8a26c0f1bd491c56064a0a2c24ec57b6316fb0ea65df23d26"
    "81a4a4aa9a19e597f1afaf3f0a80c9bf058cb709f983c64bde1bb73d6b385c46ca10ea50badbea955b2dad9e38274f8f0c0f4111b4de1588"
    "d18eb6136a51b27cd1adcc35ddc14e30ce5731a7f894a85686a4b15b82fcc9658f73eacec664c57c7d1af251805c42ff6ec5ae2d45fc460a"
    "c8c959a18d405a50818967e5951c4e3c69c4a4e211f90db4e6924cb689c81ad7990a9b6cdd4a1385a45403a639e7318bdf4180f50f328fc2"
    "281e721581095de9d8c7faa546706ce3b66e3ff4e4f9941e3609eb0af107c6718bff6f520677c3e47d123e734db33d0b958096c905af1dac"
    "49847c7e8cf47da62df8ad147793d688c04800f812ed8b4d278ffa82ca2d2f2425fb8224859521a66751cc723f6a214cca6270c659fd7460"
    "fd9fb88f7aa57d96ed99d08d011a612e3e77d4268bf85e466449075ea5c3213ecb206f5d3adaabf87f65806b4cef2a0eef0a38e09536c979"
    "632a9b3f78d9e3f97816b2c7f613a35294f1db7c774c2a4a1f00f37c"
)
