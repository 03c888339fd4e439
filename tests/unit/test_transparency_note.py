# SPDX-License-Identifier: Apache-2.0
"""Notes and checkpoints are those of the C2SP specifications: a known note verifies, and nothing near it does."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from cloister.transparency.checkpoint import Checkpoint
from cloister.transparency.note import MAX_NOTE, NoteInvalid, NoteKey, open_note, sign_note

# The example of the Go implementation's documentation (golang.org/x/mod/sumdb/note).
GO_KEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_PRIVATE = Ed25519PrivateKey.from_private_bytes(base64.b64decode("AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz")[1:])
GO_TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
GO_SIGNATURE = (
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)
GO_NOTE = (GO_TEXT + "\n" + GO_SIGNATURE).encode()

PRIVATE = Ed25519PrivateKey.from_private_bytes(b"\x07" * 32)
KEY = NoteKey.of("cloister.test/keybroker/1", PRIVATE)
CHECKPOINT = Checkpoint(KEY.name, 20_852_163, bytes(range(32)))


def test_the_known_note_verifies_and_is_what_we_would_sign() -> None:
    key = NoteKey.parse(GO_KEY)
    assert str(key) == GO_KEY
    assert open_note(GO_NOTE, key) == GO_TEXT
    assert sign_note(GO_TEXT, name="PeterNeumann", private=GO_PRIVATE) == GO_NOTE


@pytest.mark.parametrize(
    "bad",
    [
        GO_NOTE.replace(b"cryptography", b"Cryptography"),
        GO_NOTE.replace(b"x08go", b"x08gp"),
        GO_NOTE.replace(b"JnAM=", b"JnAN="),
        GO_NOTE.replace("—".encode(), b"--"),
        GO_NOTE.replace(b"PeterNeumann ", b"PeterNeuman "),
        GO_NOTE.removesuffix(b"\n"),
        GO_NOTE + b"\n",
        GO_NOTE.replace(b"\n\n", b"\n"),
        GO_NOTE.replace(b"If you", b"If\tyou"),
        GO_NOTE.replace(b"If you", b"If\r\nyou"),
        b"\xff" + GO_NOTE,
        GO_TEXT.encode(),
        b"",
        b"\n",
        GO_TEXT.encode() + b"\n" + GO_SIGNATURE.encode() * 101,
        b"x" * MAX_NOTE + GO_NOTE,
    ],
)
def test_anything_near_the_known_note_does_not_verify(bad: bytes) -> None:
    with pytest.raises(NoteInvalid):
        open_note(bad, NoteKey.parse(GO_KEY))


def test_signatures_of_others_are_passed_over_but_ours_must_verify() -> None:
    note = CHECKPOINT.sign(PRIVATE)
    other = sign_note(CHECKPOINT.to_text(), name="witness.test/1", private=GO_PRIVATE).rpartition(b"\n\n")[2]
    assert Checkpoint.open(note + other, KEY) == CHECKPOINT
    assert open_note(note + other, NoteKey.of("witness.test/1", GO_PRIVATE)) == CHECKPOINT.to_text()
    forged = note.rpartition(b" ")[0] + b" " + base64.b64encode(KEY.id + bytes(64)) + b"\n"
    with pytest.raises(NoteInvalid, match="does not verify"):
        Checkpoint.open(note + forged.rpartition(b"\n\n")[2], KEY)
    with pytest.raises(NoteInvalid, match="not signed by"):
        Checkpoint.open(note, NoteKey.parse(GO_KEY))


@pytest.mark.parametrize(
    "text",
    [
        GO_KEY.replace("c74f20a3", "c74f20a4"),
        GO_KEY.replace("+AR", "+AQ"),
        GO_KEY.replace("+ARpc", "+Arpc"),
        GO_KEY + "A",
        GO_KEY.rpartition("+")[0],
        "Peter Neumann" + GO_KEY.removeprefix("PeterNeumann"),
        "",
        "+" + GO_KEY,
        "\ud800+00000000+AAAA",
    ],
)
def test_a_key_with_a_slip_in_it_is_refused(text: str) -> None:
    with pytest.raises(NoteInvalid):
        NoteKey.parse(text)


def test_a_checkpoint_is_three_lines() -> None:
    note = CHECKPOINT.sign(PRIVATE)
    assert note.decode().split("\n")[:3] == [KEY.name, "20852163", base64.b64encode(CHECKPOINT.root).decode()]
    assert Checkpoint.open(note, KEY) == CHECKPOINT


@pytest.mark.parametrize(
    "text",
    [
        "cloister.test/keybroker/1\n020\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n",
        "cloister.test/keybroker/1\n-1\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n",
        "cloister.test/keybroker/1\n9999999999999999999\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n",
        "cloister.test/keybroker/1\n1\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8\n",
        "cloister.test/keybroker/1\n1\nAAECAw==\n",
        "cloister.test/keybroker/1\n1\n",
        "cloister.test/keybroker/1\n1\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\nmore\n",
        "cloister.test/keybroker/2\n1\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n",
        "\n1\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n",
    ],
)
def test_a_signed_text_that_is_no_checkpoint_of_this_log_is_refused(text: str) -> None:
    with pytest.raises(NoteInvalid):
        Checkpoint.open(sign_note(text, name=KEY.name, private=PRIVATE), KEY)


@given(st.binary(max_size=300))
def test_any_bytes_end_in_one_error(data: bytes) -> None:
    with pytest.raises(NoteInvalid):
        open_note(data, KEY)
    with pytest.raises(NoteInvalid):
        NoteKey.parse(data.decode("latin-1"))


@given(st.integers(0, 2**63 - 1), st.binary(min_size=32, max_size=32))
def test_every_checkpoint_reads_back(size: int, root: bytes) -> None:
    checkpoint = Checkpoint(KEY.name, size, root)
    assert Checkpoint.parse(checkpoint.to_text()) == checkpoint
