# SPDX-License-Identifier: Apache-2.0
"""What a workload will measure, from what it will be made of: for `cloister measure --role`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cloister.cli.options import existing_directory, existing_file
from cloister.cli.stackconfig import PACKAGES
from cloister.errors import CloisterError, Code
from cloister.identity import Role

if TYPE_CHECKING:
    from cloister.tdx.eventlog import EventLog
    from cloister.tdx.workload import BackendClaim, DatasetClaim, RankClaim, WorkloadPlan

_MAX_LOG_FILE: Final = 4 * 1024 * 1024  # bytes: the area of an ACPI log


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a user says about a workload. Empty is what was not given."""

    role: Role
    file: Path | None = None  # a rank's script
    trust_bundle: Path | None = None
    environment: str = ""
    config: Path | None = None  # a service's configuration
    archive: Path | None = None  # of a backend
    tenant: str = ""
    job: str = ""
    rank: int | None = None
    nodes: int | None = None
    seed: int = 1
    inputs: Mapping[str, Path] = field(default_factory=dict)
    output_key: str = ""
    model: str = ""
    backend: str = ""
    args: Sequence[str] = ()


# What each kind of workload is made of: required, and allowed.
_RANK: Final = (("tenant", "job", "rank", "nodes"), ("file", "seed", "inputs", "output_key", "args"))
_BACKEND: Final = (("tenant", "model", "backend", "archive"), ())
_SERVICE: Final = (("config",), ())


def plan_workload(parts: Parts) -> WorkloadPlan:
    """Return what such a workload measures; raise CloisterError when something is missing or too much."""
    from cloister.guest.measure import digest_of_environment, read_measured
    from cloister.policyblocks import parse_digest
    from cloister.runtime.bundle import TrustBundle
    from cloister.tdx.eventlog import EventLogRejected
    from cloister.tdx.workload import WorkloadPlan

    _require_fit(parts)
    if parts.trust_bundle is None:
        raise _missing(parts.role, "trust_bundle")
    bundle = TrustBundle.parse(read_measured(existing_file(parts.trust_bundle, what="the trust bundle")).data)
    environment = parse_digest(parts.environment) if parts.environment else digest_of_environment()
    if environment is None:
        raise _wrong("--environment", "it is not sha384: and 96 hexadecimal digits", "see `cloister measure`")
    contents = {Role.RANK: _rank, Role.BACKEND: _backend}.get(parts.role, _service)(parts)
    plan = WorkloadPlan(
        role=parts.role,
        environment=environment,
        trust_bundle=bundle.digest,
        script=contents.script,
        config=contents.config,
        rank=contents.rank,
        backend=contents.backend,
        datasets=contents.datasets,
    )
    try:
        _ = plan.events
    except EventLogRejected as error:
        raise _wrong("the workload", error.reason, "correct the names and numbers of its place") from None
    return plan


def read_boot_log(path: Path) -> EventLog:
    """Read an event log, JSON or an ACPI log's area (CCEL), for RTMR0 to RTMR2; raise CloisterError."""
    from cloister.tdx.ccel import CcelLog
    from cloister.tdx.eventlog import Event, EventLog, EventLogRejected

    with existing_file(path, what="the boot log").open("rb") as file:
        data = file.read(_MAX_LOG_FILE + 1)
    try:
        if data.lstrip()[:1] == b"[":
            events = EventLog.parse(data).events
        else:
            found = (event for event in CcelLog.parse(data).events if event.register)
            events = tuple(Event(e.register - 1, e.event_type, "", b"", e.digest) for e in found)
        return EventLog(tuple(event for event in events if event.imr < 3))
    except EventLogRejected as error:
        todo = "give the JSON event log of evidence, or /sys/firmware/acpi/tables/data/CCEL of a TD"
        raise _wrong(f"the boot log {path}", error.reason, todo) from None


@dataclass(frozen=True, slots=True)
class _Contents:
    script: bytes
    config: bytes
    rank: RankClaim | None = None
    backend: BackendClaim | None = None
    datasets: tuple[DatasetClaim, ...] = ()


def _rank(parts: Parts) -> _Contents:
    from cloister.cli.measure import job_script_path
    from cloister.guest.measure import read_measured
    from cloister.protocol import JobInput, job_config_digest
    from cloister.sealed.directory import SealedDirectory
    from cloister.tdx.workload import DatasetClaim, RankClaim

    script = existing_file(parts.file, what="the script") if parts.file else job_script_path()
    peeks = {
        name: SealedDirectory.peek(existing_directory(path, what=f"input {name}"))
        for name, path in parts.inputs.items()
    }
    nodes = parts.nodes or 0
    config = job_config_digest(
        args=parts.args,
        nodes=nodes,
        seed=parts.seed,
        inputs=[JobInput(name, peek.key_uri, peek.manifest_digest) for name, peek in peeks.items()],
        output_key_uri=parts.output_key,
    )
    datasets = tuple(DatasetClaim(name, peek.manifest_digest) for name, peek in peeks.items())
    claim = RankClaim(parts.tenant, parts.job, parts.rank or 0, nodes)
    return _Contents(read_measured(script).digest, config, rank=claim, datasets=datasets)


def _backend(parts: Parts) -> _Contents:
    import hashlib

    from cloister.data.archive import MODEL_DIRECTORY, read_archive, sealed_manifest
    from cloister.sealed.manifest import Manifest
    from cloister.tdx.workload import BackendClaim, DatasetClaim
    from cloister.tlv import sha384

    path = existing_file(_given(parts.archive), what="the archive")
    with path.open("rb") as file:
        archive = read_archive(file)
        manifest = Manifest.parse(sealed_manifest(file), name=str(path))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha384").digest()
    place = BackendClaim(parts.tenant, parts.model, parts.backend)
    datasets = (DatasetClaim(MODEL_DIRECTORY, manifest.digest),)
    return _Contents(sha384(archive.handler_source), digest, backend=place, datasets=datasets)


def _service(parts: Parts) -> _Contents:
    from cloister.guest.measure import digest_of_package, read_measured
    from cloister.tlv import sha384

    path = existing_file(_given(parts.config), what="the configuration")
    data = read_measured(path).data
    config = _attest_configuration(path, data) if parts.role is Role.ATTEST else data
    return _Contents(digest_of_package(PACKAGES[parts.role]), sha384(config))


def _attest_configuration(path: Path, data: bytes) -> bytes:
    """Return what attest measures for its file: with root, policy, reference sets and holders, as it reads them."""
    from cloister.appraisal.policy import STRICT
    from cloister.dsse import Envelope
    from cloister.guest.measure import attest_configuration, read_measured
    from cloister.holderkey import read_holder_public
    from cloister.tdx.intelroot import intel_root
    from cloister.tdx.trustroot import TrustRoot

    try:
        document: dict[str, Any] = tomllib.loads(data.decode())
        roots, policy = document.get("trust_roots", []), document.get("appraisal", {}).get("policy")
        sets = {entry["name"]: entry["path"] for entry in document.get("references", [])}
        root_path = roots[0]["path"] if roots else None
        holders = document.get("ca", {}).get("holders", [])
    except (ValueError, KeyError, AttributeError, TypeError):
        raise _wrong(f"the configuration {path}", "it is not one of attest", "name attest's own TOML file") from None

    def read(name: str) -> bytes:
        return read_measured(path.parent / name).data

    root = intel_root() if root_path is None else TrustRoot.from_pem(read(root_path), simulated=True)
    return attest_configuration(
        data,
        root.certificate_der,
        STRICT.source if policy is None else read(policy),
        [Envelope.parse(read(place)).payload for _, place in sorted(sets.items())],
        holders=[read_holder_public(path.parent / place) for place in holders],
    )


def _require_fit(parts: Parts) -> None:
    required, allowed = {Role.RANK: _RANK, Role.BACKEND: _BACKEND}.get(parts.role, _SERVICE)
    empty = Parts(role=parts.role)
    names = {name for one in (_RANK, _BACKEND, _SERVICE) for names in one for name in names}
    for name in sorted(names):
        given = getattr(parts, name) != getattr(empty, name)
        if name in required and not given:
            raise _missing(parts.role, name)
        if given and name not in (*required, *allowed):
            raise _wrong(_option(name), f"a workload of role {parts.role} has none", "leave it out")


def _given(path: Path | None) -> Path:
    assert path is not None
    return path


def _option(name: str) -> str:
    spelled = {"file": "FILE", "inputs": "--input", "args": "what stands behind --"}
    return spelled.get(name, f"--{name.replace('_', '-')}")


def _missing(role: Role, name: str) -> CloisterError:
    return _wrong(f"{_option(name)} is missing", f"a workload of role {role} measures it", f"give {_option(name)}")


def _wrong(what: str, why: str, todo: str) -> CloisterError:
    return CloisterError(Code.ARGUMENT_INVALID, what=what, why=why, todo=todo)
