# SPDX-License-Identifier: Apache-2.0
"""A client in another language, with another TLS library, gets along with our servers."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from cloister.identity import Role, dns_name
from cloister.runtime.credentials import TlsMaterial
from fakes.certs import TestCa
from fakes.evidence_server import SERVICE, evidence_server

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = ROOT / "tests" / "foreign"


@pytest.fixture(scope="module")
def node() -> str:
    found = shutil.which("node")
    if found and (FOREIGN / "node_modules").is_dir():
        return found
    reason = "node is not installed" if not found else "the npm packages are not installed: make node"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


async def run_client(node: str, directory: Path, endpoint: str, material: TlsMaterial | None, **more: Any) -> Any:
    ca = more.pop("ca")
    settings: dict[str, Any] = {
        "endpoint": endpoint,
        "target_name": dns_name(Role.KEYBROKER, ca.trust_domain),
        "protos": str(ROOT / "protos"),
        **more,
    }
    # Node's OpenSSL wants the chain up to a root.
    (directory / "ca.pem").write_bytes(ca.bundle.root_pem)
    settings["ca"] = str(directory / "ca.pem")
    if material:
        (directory / "key.pem").write_bytes(material.private_key_pem.reveal())
        (directory / "chain.pem").write_bytes(material.chain_pem)
        settings |= {"key": str(directory / "key.pem"), "chain": str(directory / "chain.pem")}
    (directory / "settings.json").write_text(json.dumps(settings))
    process = await asyncio.create_subprocess_exec(
        node,
        str(FOREIGN / "client.mjs"),
        str(directory / "settings.json"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, errors.decode()
    return json.loads(out)


async def test_a_node_client_calls_health_reflection_and_an_rpc_over_mtls(node: str, tmp_path: Path) -> None:
    ca = TestCa()
    async with evidence_server(ca.credentials(Role.KEYBROKER)) as server:
        found = await run_client(node, tmp_path, server.endpoint, ca.material(Role.USER), ca=ca)
    assert found["health"] == {"status": "SERVING"}
    assert found["answer"]["evidence"]["role"] == "spiffe://cloister.test/ns/hospital-a/user/alice"
    assert found["answer"]["evidence"]["trust_domain"] == "TLSv1.3"
    assert SERVICE in found["reflection_v1"]
    assert found["reflection_v1"] == found["reflection_v1alpha"]
    assert found["methods"] == ["GetEvidence"]


async def test_a_node_client_of_the_wrong_role_gets_permission_denied_with_details(node: str, tmp_path: Path) -> None:
    ca = TestCa()
    async with evidence_server(ca.credentials(Role.KEYBROKER)) as server:
        found = await run_client(node, tmp_path, server.endpoint, ca.material(Role.RANK), ca=ca)
    assert found["answer"]["code"] == 7
    assert found["answer"]["details"].startswith("CLO-1104")
    assert found["answer"]["rich"] == 1


async def test_a_node_client_without_a_certificate_gets_nowhere(node: str, tmp_path: Path) -> None:
    ca = TestCa()
    async with evidence_server(ca.credentials(Role.KEYBROKER)) as server:
        found = await run_client(node, tmp_path, server.endpoint, None, ca=ca)
    assert {found[part]["code"] for part in ("health", "answer", "reflection_v1")} == {14}
