# SPDX-License-Identifier: Apache-2.0
"""`cloister quote` on real quotes of Intel's platforms, under the root that is pinned.

What they are, and where they are found: fakes.real_vectors.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fakes.cli_runner import Ran, run
from fakes.real_vectors import DIRECTORY, MANIFEST, needs_vectors

VECTORS: list[dict[str, Any]] = MANIFEST["vectors"]
CASES = [
    pytest.param(vector, verification, id=f"{vector['name']}-{number}")
    for vector in VECTORS
    for number, verification in enumerate(vector["verifications"])
]
each_case = pytest.mark.parametrize(
    ("vector", "verification"), CASES or [pytest.param({}, {}, marks=needs_vectors, id="none")]
)
each_quote = pytest.mark.parametrize(
    "vector", [pytest.param(v, id=v["name"]) for v in VECTORS] or [pytest.param({}, marks=needs_vectors, id="none")]
)


def verify(vector: dict[str, Any], verification: dict[str, Any], *options: object) -> Ran:
    return run(
        "quote", "verify", DIRECTORY / vector["quote_file"], "--collateral",
        DIRECTORY / verification["collateral_file"], "--at", verification["verification_time"], "--json", *options,
    )  # fmt: skip


@needs_vectors
def test_ci_has_the_real_quotes() -> None:
    assert (len(VECTORS), len(CASES)) >= (43, 74)


@each_quote
def test_every_field_of_a_real_quote_is_shown(vector: dict[str, Any]) -> None:
    ran = run("quote", "show", DIRECTORY / vector["quote_file"], "--json")
    assert ran.code == 0
    assert ran.document["header"]["version"] == str(vector["quote_version"])
    body = ran.document["TD" if vector["tee"] == "TDX" else "enclave"]
    for name, wanted in vector["expected_fields"].items():
        # An enclave's ISVEXTPRODID and the like are not printed.
        if name in body:
            assert body[name].split(" ")[0] == str(wanted)


@each_case
def test_a_real_quote_gets_its_verdict_and_exit_code(vector: dict[str, Any], verification: dict[str, Any]) -> None:
    expected = verification["expected"]
    ran = verify(vector, verification, "--policy", "verify")
    assert ran.document["verdict"] == expected["verify"]
    assert ran.code == (0 if expected["verify"] == "accept" else 3)
    if expected["verify"] == "accept":
        assert ran.document["status"] == expected["status"]
        assert ran.document["fmspc"] == vector["pck"]["fmspc"]
        assert not ran.document["simulated"]
    strict = verify(vector, verification)
    # "policy decides on status" is a refusal here: the default policy wants UpToDate.
    accepted = expected["verify"] == "accept" and expected["default_policy"] == "accept"
    assert (strict.document["verdict"], strict.code) == (("accept", 0) if accepted else ("reject", 3))


@needs_vectors
def test_a_real_quote_alone_offline_says_what_to_do(tmp_path: Path) -> None:
    quote = DIRECTORY / next(v["quote_file"] for v in VECTORS if v["tee"] == "TDX")
    # A server that is not there, so that the test asks nobody; Intel's would be asked the same way.
    ran = run("quote", "verify", quote, "--state", tmp_path / "s", "--pccs", "https://127.0.0.1:9", "--json")
    assert ran.code == 4
    assert ran.document["error"]["code"] == "CLO-1223"
    assert "cloister collateral fetch --quote" in ran.document["error"]["todo"]
    assert "verdict" not in ran.document


@needs_vectors
def test_a_real_quote_with_collateral_of_long_ago_says_since_when(tmp_path: Path) -> None:
    vector = next(v for v in VECTORS if v["tee"] == "TDX")
    ran = run(
        "quote", "verify", DIRECTORY / vector["quote_file"], "--collateral",
        DIRECTORY / vector["verifications"][0]["collateral_file"], "--state", tmp_path / "s",
    )  # fmt: skip
    assert ran.code == 6
    assert f"collateral for FMSPC {vector['pck']['fmspc']} expired" in ran.err
    assert "run `cloister collateral fetch`" in ran.err


@needs_vectors
def test_a_suite_of_real_cases_is_answered_through_a_pipe() -> None:
    root = base64.b64encode((DIRECTORY / "root_ca.der").read_bytes()).decode()
    lines, wanted = [], []
    for vector in VECTORS[:12]:
        for verification in vector["verifications"]:
            case = {
                "id": f"{vector['name']}@{verification['verification_time']}",
                "quote_hex": (DIRECTORY / vector["quote_file"]).read_bytes().hex(),
                "collateral": json.loads((DIRECTORY / verification["collateral_file"]).read_text()),
                "root_der_b64": root,
                "now": verification["verification_time"],
                "policy": "verify",
            }
            lines.append(json.dumps(case))
            wanted.append((case["id"], verification["expected"]["verify"]))
    done = subprocess.run(
        [sys.executable, "-m", "cloister.cli.main", "quote", "conformance"], input="\n".join(lines),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [(a["id"], a["verdict"]) for a in map(json.loads, done.stdout.splitlines())] == wanted
