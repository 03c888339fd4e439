# SPDX-License-Identifier: Apache-2.0
"""SM2 of the development server reads what OpenSSL writes, and refuses everything else."""

from __future__ import annotations

import base64

import pytest

from cloister_sim.ehsm import sm2

# Made by `openssl pkeyutl` (3.0) with the key and the message below.
KEY = bytes.fromhex("43812de4058e5705c969e2d1df6c4d5050d2a72fbf61179b1d42011adb22e702")
MESSAGE = b"hello SM2 " * 10
SIGNATURE = base64.b64decode(
    "MEYCIQDK02b5Wm8z1+1Jvr6C4YhI4tm/hRjRUdmmnSbOffEtJgIhAOaHH639kDPaKtsR525r+l7fdGdYUyG0H3/IvKbHIpj1"
)
CIPHERTEXT = base64.b64decode(
    "MIHOAiEAu0Z6NmM/yllrG4H1C5W1PWqQxh2ojndsnc1z8kag0eUCIQDGsGBm8BOcfAu3bC8ek2DB2yQf/dt0JgDGZaqaorv6HwQgnO9RBBYiy9xA"
    "C7LkltyNd3fBqPdQ/Pr15V/r7nhyIqkEZIy4bols66FRjsICyzVKfBEk1uKRL092N8LIiOI0OU5JCvHXi0xw9FezxfV1s1mt2HGueM2/CZHc/Ezt"
    "KJfcE9gu9tOl1wtafCz40HWowVTkjNd66VAojEwluHdlv9km7Z9O8Ns="
)


def test_openssls_signature_and_ciphertext_are_read() -> None:
    assert sm2.verify(sm2.public_point(KEY), MESSAGE, SIGNATURE)
    assert sm2.decrypt(KEY, CIPHERTEXT) == MESSAGE


def test_what_is_made_here_is_read_here_and_by_no_other_key() -> None:
    other = sm2.generate()
    signature, sealed = sm2.sign(KEY, MESSAGE), sm2.encrypt(sm2.public_point(KEY), MESSAGE)
    assert sm2.verify(sm2.public_point(KEY), MESSAGE, signature)
    assert not sm2.verify(sm2.public_point(other), MESSAGE, signature)
    assert not sm2.verify(sm2.public_point(KEY), MESSAGE + b"x", signature)
    assert sm2.decrypt(KEY, sealed) == MESSAGE
    with pytest.raises(ValueError, match="digest"):
        sm2.decrypt(other, sealed)


@pytest.mark.parametrize("place", [0, 1, 3, 10, 40, 80, 120, 150, 206])
def test_a_changed_ciphertext_does_not_open(place: int) -> None:
    changed = bytearray(CIPHERTEXT)
    changed[place] ^= 1
    with pytest.raises(ValueError):
        sm2.decrypt(KEY, bytes(changed))


@pytest.mark.parametrize("signature", [b"", b"\x30\x00", SIGNATURE[:-1], bytes([0x30, 6, 2, 1, 0, 2, 1, 0])])
def test_what_is_no_signature_is_not_right(signature: bytes) -> None:
    assert not sm2.verify(sm2.public_point(KEY), MESSAGE, signature)
