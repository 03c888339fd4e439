# SPDX-License-Identifier: Apache-2.0
"""Bytes that are almost collateral: every mutation ends in the one error of its form, and never in another."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from cloister.collateral.bundle import CollateralBundle
from cloister.collateral.commands import import_
from cloister.collateral.decode import Answer
from cloister.collateral.documents import verify_document
from cloister.collateral.failures import FetchFailed
from cloister.collateral.pccsfile import read_platform_collateral
from cloister.collateral.resources import CollateralServer, Resource
from cloister.errors import CloisterError, Code
from cloister.tdx.collateral import Collateral
from fakes.collateral_authority import NOW, TDX_FAMILY, CollateralAuthority

ROUNDS = 1500
TOKENS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"null",
    b"1e999",
    b"NaN",
    b"\xff",
    b"\x00",
    b"\\ud800",
    b"%",
    b"-1",
]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with a few cuts, repetitions, flips and foreign tokens."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, end = sorted(rng.randrange(len(changed) + 1) for _ in range(2))
        end = min(end, at + rng.choice([1, 2, 40, 4000]))
        match rng.randrange(4):
            case 0:
                del changed[at:end]
            case 1:
                changed[at:at] = changed[at:end]
            case 2:
                changed[at:end] = rng.choice(TOKENS)
            case _ if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


@pytest.fixture(scope="module")
def authority() -> CollateralAuthority:
    return CollateralAuthority()


def test_mutated_answers_are_refused(authority: CollateralAuthority) -> None:
    nine = authority.collateral(TDX_FAMILY)
    server, root = CollateralServer.intel(), authority.trust_root
    tcb_info = f'{{"tcbInfo":{nine["tcb_info"]},"signature":"{nine["tcb_info_signature"]}"}}'.encode()
    answers: list[tuple[Resource, bytes, str | None]] = [
        (server.tcb_info(TDX_FAMILY), tcb_info, nine["tcb_info_issuer_chain"]),
        (server.pck_crl(TDX_FAMILY), bytes.fromhex(nine["pck_crl"]), nine["pck_crl_issuer_chain"]),
        (server.root_crl(), nine["root_ca_crl"].encode(), None),
    ]
    rng = random.Random(3)
    for resource, body, chain in answers:
        good = verify_document(resource, Answer(body, chain and quote(chain)), root=root)
        for round_number in range(ROUNDS):
            if chain is None or round_number % 2:
                answer = Answer(mutated(body, rng), chain and quote(chain))
            else:
                answer = Answer(body, mutated(quote(chain).encode(), rng).decode("utf-8", "surrogateescape"))
            try:
                found = verify_document(resource, answer, root=root)
            except FetchFailed:
                continue
            # White space around, upper case for lower: another form of the same signed text.
            assert (found.signed.text, found.number) == (good.signed.text, good.number)


@pytest.mark.parametrize("form", ["bundle", "platformcollateral"])
def test_mutated_files_are_refused(form: str, tmp_path: Path, authority: CollateralAuthority) -> None:
    nine = authority.collateral(TDX_FAMILY)
    parse: Callable[[bytes], object]
    if form == "bundle":
        data = CollateralBundle(TDX_FAMILY, NOW, Collateral.of(nine)).to_json()
        parse = CollateralBundle.parse
    else:
        info, identity = json.loads(nine["tcb_info"]), json.loads(nine["qe_identity"])
        parts = {
            "tcbinfos": [
                {
                    "fmspc": TDX_FAMILY.fmspc.hex(),
                    "tdx_tcbinfo": {"tcbInfo": info, "signature": nine["tcb_info_signature"]},
                }
            ],
            "pckcacrl": {"platformCrl": nine["pck_crl"]},
            "tdqeidentity": {"enclaveIdentity": identity, "signature": nine["qe_identity_signature"]},
            "certificates": {
                "SGX-PCK-Certificate-Issuer-Chain": {"PLATFORM": quote(nine["pck_crl_issuer_chain"])},
                "TCB-Info-Issuer-Chain": quote(nine["tcb_info_issuer_chain"]),
                "SGX-Enclave-Identity-Issuer-Chain": quote(nine["qe_identity_issuer_chain"]),
            },
            "rootcacrl": nine["root_ca_crl"],
        }
        data = json.dumps({"collaterals": parts}).encode()

        def parse(data: bytes) -> object:
            return read_platform_collateral(data, fetched_at=NOW)

    path = tmp_path / "file.json"
    path.write_bytes(data)
    assert len(import_(path, tmp_path / "out", root=authority.trust_root, now=NOW).taken) == 1
    rng = random.Random(4)
    for round_number in range(ROUNDS):
        changed = mutated(data, rng)
        assert code_of(lambda: parse(changed)) in {None, Code.COLLATERAL_INVALID}  # noqa: B023
        if round_number % 10 == 0:
            path.write_bytes(changed)
            code = code_of(lambda: import_(path, tmp_path / "out", root=authority.trust_root, now=NOW))
            assert code in {None, Code.COLLATERAL_INVALID}


def code_of(attempt: Callable[[], object]) -> Code | None:
    try:
        attempt()
    except CloisterError as error:
        return error.code
    return None
