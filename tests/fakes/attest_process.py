# SPDX-License-Identifier: Apache-2.0
"""Attest and a simulated platform as the processes that users run."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.appraisal.policy import STRICT
from cloister.collateral.offline import OfflineCollateral
from cloister.errors import CloisterError
from cloister.guest.enrol import Identity
from cloister.guest.evidence import EvidenceVerifier
from cloister.guest.guest import Guest
from cloister.guest.measure import attest_configuration, digest_of_package
from cloister.holderkey import read_holder_public
from cloister.identity import Role, SpiffeId
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.channel import invoke, open_channel, open_enrolment_channel
from cloister.runtime.credentials import CredentialSource, StaticCredentials
from cloister.runtime.endpoints import read_endpoints
from cloister.tdx.trustroot import TrustRoot
from cloister.tlv import sha384
from fakes.attest_local import (
    SCRIPT,
    TRUST_DOMAIN,
    csr,
    measure,
    spki,
    user_material,
)


class AttestProcess:
    """`python -m cloister_attest` on a `python -m cloister_sim`, as `cloister dev up` starts them."""

    def __init__(self, directory: Path, *, ca: str = "", fixed_ports: bool = False, **attest_options: int) -> None:
        """`ca` is the text of the section [ca]; `attest_options` are lines of [attest]. Ports last over restarts."""
        self.directory = directory
        self.ca = ca
        self.users = ""
        self.listen, self.enrolment_listen = (f"127.0.0.1:{free_port() if fixed_ports else 0}" for _ in range(2))
        self.socket = directory / "platform.sock"
        self.bundle_file = directory / "bundle.json"
        self.endpoints_file = directory / "attest.endpoints.json"
        self.config_file = directory / "attest.toml"
        self.log_file = directory / "attest.log"
        self.user_key = ec.generate_private_key(ec.SECP256R1())
        self.user_id = SpiffeId.of_user(TRUST_DOMAIN, tenant="hospital-a", user="alice")
        self._options = attest_options
        self._processes: dict[str, asyncio.subprocess.Process] = {}

    @property
    def endpoints(self) -> dict[str, str]:
        return read_endpoints(self.endpoints_file)

    @property
    def bundle(self) -> TrustBundle:
        return TrustBundle.parse(self.bundle_file.read_bytes())

    @property
    def root(self) -> TrustRoot:
        return TrustRoot.from_pem((self.directory / "platform" / "root.pem").read_bytes(), simulated=True)

    @property
    def verifier(self) -> EvidenceVerifier:
        """An owner's own verifier, with the platform's collateral."""
        return EvidenceVerifier(self.root, OfflineCollateral(self.directory / "platform/collateral", root=self.root))

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def write_config(self, **scripts: str) -> None:
        """Write the configuration; `scripts` names other digests ("trainer" -> hex) than those installed here."""
        digest_of_package.cache_clear()  # a test run is long, and code may change in it
        digests = {"attest": digest_of_package("cloister_attest").hex()}
        digests |= {role: SCRIPT.hex() for role in ("keybroker", "trainer", "gateway")} | scripts
        options = "".join(f"{name} = {value}\n" for name, value in self._options.items())
        services = "".join(
            f'[[services]]\nrole = "{role}"\nscript = ["sha384:{digest}"]\n' for role, digest in digests.items()
        )
        fingerprint = hashlib.sha256(spki(self.user_key)).hexdigest()
        self.config_file.write_text(
            f'[service]\ntrust_domain = "{TRUST_DOMAIN}"\nstate_dir = "state"\n'
            f'endpoints_file = "{self.endpoints_file.name}"\nlisten = "{self.listen}"\n'
            f'[guest]\nprovider = "simulated:{self.socket}"\n'
            f'[attest]\nbundle_file = "{self.bundle_file.name}"\n'
            f'enrolment_listen = "{self.enrolment_listen}"\n{options}'
            f"[ca]\n{self.ca}\n"
            '[collateral]\nsource = "offline:platform/collateral"\n'
            f'[[trust_roots]]\npath = "platform/root.pem"\nsimulated = true\n{services}'
            f'[[users]]\nspiffe_id = "{self.user_id}"\nspki_sha256 = "{fingerprint}"\noperator = true\n{self.users}'
        )

    def measured_configuration(self, holders: Sequence[Path] = ()) -> bytes:
        """Return the digest of the configuration as attest measures it."""
        keys = [read_holder_public(path) for path in holders]
        config = self.config_file.read_bytes()
        return sha384(attest_configuration(config, self.root.certificate_der, STRICT.source, [], holders=keys))

    async def start_platform(self) -> None:
        await self._start("cloister_sim", "--directory", self.directory / "platform", "--socket", self.socket)
        await self._until(self.socket.exists, "cloister_sim")

    async def start(self) -> None:
        """Start attest and wait until it is ready."""
        self.endpoints_file.unlink(missing_ok=True)
        await self._start("cloister_attest", "--config", self.config_file)
        await self._until(self.endpoints_file.exists, "cloister_attest")

    async def start_sealed(self) -> str:
        """Start attest and wait until it waits for shares; return where."""
        place = self.directory / "state/recovery.json"
        self.endpoints_file.unlink(missing_ok=True)
        await self._start("cloister_attest", "--config", self.config_file)
        await self._until(place.exists, "cloister_attest")
        return read_endpoints(place)["recovery"]

    async def ready(self) -> None:
        """Wait until an attest that was started is ready."""
        await self._until(self.endpoints_file.exists, "cloister_attest")

    async def stop(self, name: str = "cloister_attest", *, kill: bool = False) -> int:
        process = self._processes.pop(name)
        if process.returncode is None:
            process.kill() if kill else process.terminate()
        return await process.wait()

    async def stop_all(self) -> None:
        for name in ("cloister_attest", "cloister_sim"):
            if name in self._processes:
                await self.stop(name)

    async def run_to_end(self) -> tuple[int, str]:
        """Run attest until it ends by itself; return exit code and standard error."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "cloister_attest", "--config", str(self.config_file), stderr=asyncio.subprocess.PIPE
        )
        _, errors = await asyncio.wait_for(process.communicate(), 30)
        return process.returncode or 0, errors.decode()

    async def user(self, key: ec.EllipticCurvePrivateKey | None = None) -> StaticCredentials:
        """Fetch a certificate for the user of the configuration, who is an operator, or for another key."""
        key = key or self.user_key
        async with open_enrolment_channel(self.endpoints["enrolment"], bundle=self.bundle) as channel:
            method = attest_pb2_grpc.EnrolmentServiceStub(channel).IssueUserCertificate
            request = attest_pb2.IssueUserCertificateRequest(csr_der=csr(key))
            response = await invoke(method, request, timeout_s=10, what="get a certificate")
        return StaticCredentials(user_material(key, response.certificate_chain_pem, self.bundle))

    async def call(self, service: str, method: str, request: object, who: CredentialSource | None = None) -> Any:
        """Call attest over mutual TLS, as its operator unless told otherwise."""
        credentials = who or await self.user()
        async with open_channel(self.endpoints["grpc"], role=Role.ATTEST, credentials=credentials) as channel:
            stub = getattr(attest_pb2_grpc, f"{service}Stub")(channel)
            return await invoke(getattr(stub, method), request, timeout_s=10, what=method)

    async def retire_epoch(self, epoch: str = "") -> str:
        """End an epoch, the newest unless told otherwise, and wait until attest has a certificate of the next one."""
        request = attest_pb2.RetireEpochRequest(epoch=epoch or self.bundle.epoch)
        issuing = str((await self.call("OperatorService", "RetireEpoch", request)).issuing.epoch)
        deadline = time.monotonic() + 10
        while True:
            try:
                await self.user()
            except CloisterError:
                assert time.monotonic() < deadline, self.log()[-4000:]
                await asyncio.sleep(0.05)
            else:
                return issuing

    def launch(self) -> Guest:
        return Guest.open(f"simulated:{self.socket}")

    async def service(self, role: Role) -> Identity:
        """Enrol a service with the code that the configuration expects."""
        guest = await asyncio.to_thread(self.launch)
        measure(guest, role, bundle=self.bundle.digest)
        return await Identity.enrol(guest, attest_endpoint=self.endpoints["enrolment"], bundle=self.bundle)

    async def _start(self, module: str, *arguments: object) -> None:
        with self.log_file.open("ab") as log:
            self._processes[module] = await asyncio.create_subprocess_exec(
                sys.executable, "-m", module, *map(str, arguments), stdout=log, stderr=log, env=dict(os.environ)
            )

    async def _until(self, ready: object, module: str) -> None:
        deadline = time.monotonic() + 30
        while not ready():  # type: ignore[operator]
            if self._processes[module].returncode is not None or time.monotonic() > deadline:
                raise AssertionError(f"{module} did not become ready:\n{self.log()[-4000:]}")
            await asyncio.sleep(0.02)


@asynccontextmanager
async def attest_process(
    *,
    ca: str = "",
    fixed_ports: bool = False,
    prepare: Callable[[AttestProcess], None] | None = None,
    **attest_options: int,
) -> AsyncIterator[AttestProcess]:
    """Run platform and attest for a test. In a directory of its own: a socket's path must be short."""
    with tempfile.TemporaryDirectory(prefix="clo-") as directory:
        attest = AttestProcess(Path(directory), ca=ca, fixed_ports=fixed_ports, **attest_options)
        try:
            if prepare is not None:
                prepare(attest)
            await attest.start_platform()
            attest.write_config()
            await attest.start()
            yield attest
        finally:
            await attest.stop_all()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
