# SPDX-License-Identifier: Apache-2.0
"""A rank's keyring asks the broker once for each key, and names the job's output when nothing else is named."""

from __future__ import annotations

import pytest

from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey
from cloister.sealed.directory import Peek
from cloister_trainer.rankkeyring import RankKeyring
from fakes.sealed_material import data_key

OUTPUT = "cloister-key://hospital-a/models/m"


class Broker:
    """Gives every key, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes]] = []

    def release(self, key_uri: str, peek: Peek | None) -> DataKey:
        self.asked.append((key_uri, peek.wrapped if peek else b""))
        return data_key(f"{len(self.asked)}")


def test_a_key_is_asked_for_once() -> None:
    broker = Broker()
    ring = RankKeyring(broker.release, OUTPUT)
    first = ring.open("cloister-key://hospital-a/d", key_version=2, wrapped=b"w")
    assert ring.open("cloister-key://hospital-a/d", key_version=2, wrapped=b"w") is first
    made = ring.new()
    assert ring.open(made.key_uri, key_version=made.key_version, wrapped=made.wrapped) is made
    ring.new("cloister-key://hospital-a/other")
    assert broker.asked == [
        ("cloister-key://hospital-a/d", b"w"),
        (OUTPUT, b""),
        ("cloister-key://hospital-a/other", b""),
    ]


def test_without_an_output_there_is_no_key_to_seal_with() -> None:
    with pytest.raises(CloisterError, match="--output-key") as caught:
        RankKeyring(Broker().release, "").new()
    assert caught.value.code is Code.ARGUMENT_INVALID
