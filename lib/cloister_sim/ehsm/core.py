# SPDX-License-Identifier: Apache-2.0
"""What EHSM's enclave does: make key material, and encrypt, sign and wrap with it. Pure: no storage, no clock."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, padding, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric import padding as rsa_padding
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister_sim.ehsm import sm2
from cloister_sim.ehsm.fields import ENCRYPT_DECRYPT, SIGN_VERIFY
from cloister_sim.ehsm.wire import Refused, bad_request

_GCM_IV: Final = 12
_GCM_TAG: Final = 16
_SM4_BLOCK: Final = 16
_DATA_KEY_LIMIT: Final = 1024

_CURVES: Final[dict[str, Callable[[], ec.EllipticCurve]]] = {
    "EH_EC_P224": ec.SECP224R1,
    "EH_EC_P256": ec.SECP256R1,
    "EH_EC_P256K": ec.SECP256K1,
    "EH_EC_P384": ec.SECP384R1,
    "EH_EC_P521": ec.SECP521R1,
}
_RSA_BITS: Final = {"EH_RSA_2048": 2048, "EH_RSA_3072": 3072, "EH_RSA_4096": 4096}
_SYMMETRIC_BYTES: Final = {
    "EH_AES_GCM_128": 16,
    "EH_AES_GCM_192": 24,
    "EH_AES_GCM_256": 32,
    "EH_SM4_CTR": 16,
    "EH_SM4_CBC": 16,
}
_HASHES: Final[dict[str, Callable[[], hashes.HashAlgorithm]]] = {
    "EH_SHA_224": hashes.SHA224,
    "EH_SHA_256": hashes.SHA256,
    "EH_SHA_384": hashes.SHA384,
    "EH_SHA_512": hashes.SHA512,
    "EH_SM3": hashes.SM3,
}
_SM2: Final = "EH_SM2"


@dataclass(frozen=True, slots=True)
class Material:
    """An opened key: raw bytes of a symmetric one, PKCS#8 in DER of an RSA or EC one, 32 bytes of an SM2 one."""

    keyspec: str
    keyusage: str
    secret: bytes

    def __repr__(self) -> str:
        return f"<material of a {self.keyspec} key>"


def server_exception() -> Refused:
    """EHSM's one word for whatever the enclave does not do."""
    return Refused(500, "Server exception.", by_core=True)


def symmetric_size(keyspec: str) -> int:
    """Return the bytes of a symmetric key; raise Refused for another kind."""
    size = _SYMMETRIC_BYTES.get(keyspec)
    if size is None:
        raise server_exception()
    return size


def require_usage(keyspec: str, keyusage: str | None) -> str:
    """Return the usage that a key is made with; raise Refused for one that it cannot have.

    Version 0.3.2 knew no usage and its clients send none: a symmetric key can have one only.
    """
    if keyspec in _SYMMETRIC_BYTES and keyusage in (None, ENCRYPT_DECRYPT):
        return ENCRYPT_DECRYPT
    asymmetric = keyspec in _RSA_BITS or keyspec in _CURVES or keyspec == _SM2
    if asymmetric and keyusage in (ENCRYPT_DECRYPT, SIGN_VERIFY):
        return keyusage
    raise server_exception()


def generate(keyspec: str) -> bytes:
    """Return the material of a new key."""
    if keyspec in _SYMMETRIC_BYTES:
        return os.urandom(_SYMMETRIC_BYTES[keyspec])
    if keyspec == _SM2:
        return sm2.generate()
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
    if keyspec in _RSA_BITS:
        key = rsa.generate_private_key(65537, _RSA_BITS[keyspec])
    else:
        key = ec.generate_private_key(_CURVES[keyspec]())
    return key.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def encrypt(key: Material, plaintext: bytes, aad: bytes) -> bytes:
    """Return ciphertext, IV and, for AES-GCM, tag, in this order; SM4 does not authenticate the AAD, as at EHSM."""
    symmetric_size(key.keyspec)
    if key.keyspec == "EH_SM4_CTR":
        iv = os.urandom(_SM4_BLOCK)
        encryptor = Cipher(algorithms.SM4(key.secret), modes.CTR(iv)).encryptor()
        return encryptor.update(plaintext) + encryptor.finalize() + iv
    if key.keyspec == "EH_SM4_CBC":
        iv = os.urandom(_SM4_BLOCK)
        padder = padding.PKCS7(8 * _SM4_BLOCK).padder()
        encryptor = Cipher(algorithms.SM4(key.secret), modes.CBC(iv)).encryptor()
        return encryptor.update(padder.update(plaintext) + padder.finalize()) + encryptor.finalize() + iv
    iv = os.urandom(_GCM_IV)
    sealed = AESGCM(key.secret).encrypt(iv, plaintext, aad)
    return sealed[:-_GCM_TAG] + iv + sealed[-_GCM_TAG:]


def decrypt(key: Material, ciphertext: bytes, aad: bytes) -> bytes:
    """Open what `encrypt` made; raise Refused."""
    if key.keyspec not in _SYMMETRIC_BYTES:
        raise Refused(500, "Server exception", by_core=True)
    try:
        if key.keyspec.startswith("EH_SM4"):
            return _decrypt_sm4(key, ciphertext)
        if len(ciphertext) <= _GCM_IV + _GCM_TAG:
            raise server_exception()
        body, iv, tag = ciphertext[: -_GCM_IV - _GCM_TAG], ciphertext[-28:-16], ciphertext[-_GCM_TAG:]
        return AESGCM(key.secret).decrypt(iv, body + tag, aad)
    except (InvalidTag, ValueError):
        raise bad_request("Decryption failed, Please confirm that your parameters are correct.") from None


def data_key(key: Material, size: int, aad: bytes) -> tuple[bytes, bytes]:
    """Return a new data key and its wrapped form."""
    secret = os.urandom(min(size, _DATA_KEY_LIMIT))
    return secret, encrypt(key, secret, aad)


def asymmetric_encrypt(key: Material, plaintext: bytes, padding_mode: str) -> bytes:
    if key.keyusage != ENCRYPT_DECRYPT:
        raise server_exception()
    if key.keyspec == _SM2:
        return sm2.encrypt(sm2.public_point(key.secret), plaintext)
    try:
        return _rsa(key).public_key().encrypt(plaintext, _encryption_padding(padding_mode))
    except ValueError:  # longer than the modulus allows
        raise server_exception() from None


def asymmetric_decrypt(key: Material, ciphertext: bytes, padding_mode: str) -> bytes:
    if key.keyusage != ENCRYPT_DECRYPT:
        raise server_exception()
    try:
        if key.keyspec == _SM2:
            return sm2.decrypt(key.secret, ciphertext)
        return _rsa(key).decrypt(ciphertext, _encryption_padding(padding_mode))
    except ValueError:
        raise server_exception() from None


def sign(key: Material, message: bytes, *, digest_mode: str, padding_mode: str, prehashed: bool) -> bytes:
    """Return a signature: PKCS#1 or PSS (salt as long as the digest) of RSA, DER of EC and SM2."""
    _require_signing(key)
    try:
        if key.keyspec == _SM2:
            _require_sm3(digest_mode)
            return sm2.sign(key.secret, message, prehashed=prehashed)
        algorithm = _HASHES[digest_mode]()
        chosen = Prehashed(algorithm) if prehashed else algorithm
        if key.keyspec in _CURVES:
            return _ec(key).sign(message, ec.ECDSA(chosen))
        return _rsa(key).sign(message, _signature_padding(padding_mode, algorithm), chosen)
    except (ValueError, UnsupportedAlgorithm):  # a digest of another size, or one that RSA has no name for
        raise server_exception() from None


def verify(
    key: Material, message: bytes, signature: bytes, *, digest_mode: str, padding_mode: str, prehashed: bool
) -> bool:
    """Say whether the signature is right; raise Refused for what cannot be one."""
    _require_signing(key)
    try:
        if key.keyspec == _SM2:
            _require_sm3(digest_mode)
            return sm2.verify(sm2.public_point(key.secret), message, signature, prehashed=prehashed)
        algorithm = _HASHES[digest_mode]()
        chosen = Prehashed(algorithm) if prehashed else algorithm
        if key.keyspec in _CURVES:
            _ec(key).public_key().verify(signature, message, ec.ECDSA(chosen))
            return True
        private = _rsa(key)
        if len(signature) * 8 != private.key_size:
            raise server_exception()
        private.public_key().verify(signature, message, _signature_padding(padding_mode, algorithm), chosen)
        return True
    except InvalidSignature:
        return False
    except (ValueError, UnsupportedAlgorithm):
        raise server_exception() from None


def public_key(key: Material) -> str:
    """Return PEM: PKCS#1 of RSA, SubjectPublicKeyInfo of EC and SM2."""
    if key.keyspec == _SM2:
        return sm2.public_pem(key.secret)
    if key.keyspec in _CURVES:
        return (
            _ec(key)
            .public_key()
            .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
            .decode()
        )
    return _rsa(key).public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.PKCS1).decode()


def _decrypt_sm4(key: Material, ciphertext: bytes) -> bytes:
    body, iv = ciphertext[:-_SM4_BLOCK], ciphertext[-_SM4_BLOCK:]
    if key.keyspec == "EH_SM4_CTR":
        decryptor = Cipher(algorithms.SM4(key.secret), modes.CTR(iv)).decryptor()
        return decryptor.update(body) + decryptor.finalize()
    decryptor = Cipher(algorithms.SM4(key.secret), modes.CBC(iv)).decryptor()
    unpadder = padding.PKCS7(8 * _SM4_BLOCK).unpadder()
    return unpadder.update(decryptor.update(body) + decryptor.finalize()) + unpadder.finalize()


def _encryption_padding(mode: str) -> rsa_padding.AsymmetricPadding:
    if mode == "EH_RSA_PKCS1":
        return rsa_padding.PKCS1v15()
    if mode == "EH_RSA_PKCS1_OAEP":
        return rsa_padding.OAEP(rsa_padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
    raise server_exception()


def _signature_padding(mode: str, algorithm: hashes.HashAlgorithm) -> rsa_padding.AsymmetricPadding:
    if mode == "EH_RSA_PKCS1":
        return rsa_padding.PKCS1v15()
    if mode == "EH_RSA_PKCS1_PSS":
        return rsa_padding.PSS(rsa_padding.MGF1(algorithm), algorithm.digest_size)
    raise server_exception()


def _require_signing(key: Material) -> None:
    if key.keyusage != SIGN_VERIFY:
        raise server_exception()


def _require_sm3(digest_mode: str) -> None:
    if digest_mode != "EH_SM3":
        raise server_exception()


def _rsa(key: Material) -> rsa.RSAPrivateKey:
    loaded = _load(key) if key.keyspec in _RSA_BITS else None
    if not isinstance(loaded, rsa.RSAPrivateKey):
        raise server_exception()
    return loaded


def _ec(key: Material) -> ec.EllipticCurvePrivateKey:
    loaded = _load(key)
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise server_exception()
    return loaded


def _load(key: Material) -> object:
    return serialization.load_der_private_key(key.secret, password=None)
