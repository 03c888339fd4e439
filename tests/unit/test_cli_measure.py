# SPDX-License-Identifier: Apache-2.0
"""What `cloister measure` refuses, and what it makes of a boot log and a model archive."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.appraisal.policy import STRICT
from cloister.appraisal.references import PAYLOAD_TYPE
from cloister.cli.expected import Parts, plan_workload, read_boot_log
from cloister.dsse import sign
from cloister.errors import CloisterError, Code
from cloister.guest.measure import attest_configuration
from cloister.holderkey import create_holder_key, read_holder_public
from cloister.identity import Role
from cloister.sealed.directory import SealedDirectory, seal_directory
from cloister.tdx.intelroot import intel_root
from cloister.tdx.workload import BackendClaim
from cloister.tlv import sha384
from cloister_attest.epochs import Epochs
from fakes.real_vectors import DIRECTORY, MANIFEST, needs_vectors
from fakes.serving_archives import data_key, good_entries, packed

ENVIRONMENT = f"sha384:{'12' * 48}"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "bundle.json"
    path.write_bytes(Epochs.begin("cloister.test", now=datetime.now(UTC)).bundle.to_bytes())
    return path


def refused(parts: Parts) -> str:
    with pytest.raises(CloisterError) as caught:
        plan_workload(parts)
    assert caught.value.code in {Code.ARGUMENT_INVALID, Code.FILE_NOT_FOUND}
    assert caught.value.todo
    return caught.value.what


def test_a_backend_measures_its_handler_its_archive_and_its_model(tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "weights").write_bytes(b"weights")
    sealed, archive = tmp_path / "sealed", tmp_path / "model.mar"
    seal_directory(tmp_path / "plain", sealed, data_key=data_key(), dataset="model")
    entries = {name: data for name, data in good_entries().items() if not name.startswith("model/")}
    entries |= {f"model/{path.name}": path.read_bytes() for path in sealed.iterdir()}
    archive.write_bytes(packed(entries).getvalue())
    plan = plan_workload(
        Parts(
            role=Role.BACKEND, trust_bundle=bundle, environment=ENVIRONMENT, archive=archive,
            tenant="hospital-a", model="reviews", backend="b-0",
        )
    )  # fmt: skip
    handler = next(data for name, data in entries.items() if name.endswith(".py"))
    assert plan.script == sha384(handler)
    assert plan.config == hashlib.sha384(archive.read_bytes()).digest()
    assert [(claim.name, claim.manifest_digest) for claim in plan.datasets] == [
        ("model", SealedDirectory.peek(sealed).manifest_digest)
    ]
    assert plan.backend == BackendClaim("hospital-a", "reviews", "b-0")


def test_attest_measures_root_policy_and_reference_sets_with_its_file(tmp_path: Path, bundle: Path) -> None:
    policy = b"kind: AppraisalPolicy\n"
    (tmp_path / "policy.yaml").write_bytes(policy)
    for name in ("b", "a"):
        (tmp_path / f"{name}.dsse").write_bytes(
            sign(PAYLOAD_TYPE, name.encode(), Ed25519PrivateKey.generate()).to_bytes()
        )
    config = tmp_path / "attest.toml"
    config.write_text(
        '[appraisal]\npolicy = "policy.yaml"\n'
        + "".join(f'[[references]]\nname = "{name}"\npath = "{name}.dsse"\n' for name in ("b", "a"))
    )
    plan = plan_workload(Parts(role=Role.ATTEST, trust_bundle=bundle, environment=ENVIRONMENT, config=config))
    wanted = attest_configuration(config.read_bytes(), intel_root().certificate_der, policy, [b"a", b"b"])
    assert plan.config == sha384(wanted)


def test_attest_measures_who_can_bring_back_its_ca(tmp_path: Path, bundle: Path) -> None:
    config = tmp_path / "attest.toml"
    holders = [create_holder_key(tmp_path / name) for name in ("ann", "ben")]
    config.write_text('[ca]\nkept = "shares"\nthreshold = 2\nholders = ["ann.pub", "ben.pub"]\n')
    plan = plan_workload(Parts(role=Role.ATTEST, trust_bundle=bundle, environment=ENVIRONMENT, config=config))
    root, keys = intel_root().certificate_der, [read_holder_public(path) for path in holders]
    assert plan.config == sha384(attest_configuration(config.read_bytes(), root, STRICT.source, [], holders=keys))
    assert plan.config != sha384(attest_configuration(config.read_bytes(), root, STRICT.source, [], holders=keys[:1]))


def test_what_is_missing_or_does_not_belong_is_named(tmp_path: Path, bundle: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("")
    service = Parts(role=Role.TRAINER, trust_bundle=bundle, environment=ENVIRONMENT, config=config)
    assert plan_workload(service).role is Role.TRAINER
    assert refused(Parts(role=Role.TRAINER, config=config)) == "--trust-bundle is missing"
    assert refused(Parts(role=Role.TRAINER, trust_bundle=bundle)) == "--config is missing"
    assert refused(Parts(role=Role.TRAINER, trust_bundle=bundle, config=config, job="j")) == "--job"
    assert refused(Parts(role=Role.TRAINER, trust_bundle=bundle, config=config, file=config)) == "FILE"
    assert refused(Parts(role=Role.TRAINER, trust_bundle=bundle, config=config, args=("x",))) == "what stands behind --"
    assert refused(Parts(role=Role.TRAINER, trust_bundle=bundle, config=config, environment="x")) == "--environment"
    assert "--job is missing" in refused(Parts(role=Role.RANK, trust_bundle=bundle, tenant="a", rank=0, nodes=1))
    assert "--archive is missing" in refused(Parts(role=Role.BACKEND, tenant="a", model="m", backend="b"))


@pytest.mark.parametrize(
    "wrong",
    [{"rank": 2}, {"tenant": "Not A Name"}, {"job": "-"}, {"inputs": {"x": Path("nowhere")}}, {"nodes": 70_000}],
)
def test_a_place_that_cannot_be_has_no_register(bundle: Path, tmp_path: Path, wrong: dict[str, object]) -> None:
    script = tmp_path / "script.py"
    script.write_text("pass")
    good: dict[str, object] = {"tenant": "a", "job": "j", "rank": 1, "nodes": 2, "file": script}
    parts = {"role": Role.RANK, "trust_bundle": bundle, "environment": ENVIRONMENT, **good}
    assert len(plan_workload(Parts(**parts)).rtmr3) == 48  # type: ignore[arg-type]
    refused(Parts(**{**parts, **wrong}))  # type: ignore[arg-type]


def test_what_is_no_boot_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for data in (b"", b"[1]", b"{}", bytes(100)):
        path.write_bytes(data)
        with pytest.raises(CloisterError) as caught:
            read_boot_log(path)
        assert caught.value.code is Code.ARGUMENT_INVALID


@needs_vectors
def test_a_real_boot_log_gives_the_registers_of_the_quote_that_came_with_it() -> None:
    logs = [log for log in MANIFEST["eventlogs"] if log["format"].startswith("TCG2")]
    assert len(logs) >= 4
    for log in logs:
        replayed = read_boot_log(DIRECTORY / log["file"]).replay()[:3]
        wanted = log.get("quote_rtmrs", log["replayed_rtmrs"])[:3]
        assert [register.hex() for register in replayed] == wanted
