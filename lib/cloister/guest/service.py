# SPDX-License-Identifier: Apache-2.0
"""How a service becomes one: measure itself, seal, enrol."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Identity
from cloister.guest.guest import Guest
from cloister.guest.measure import digest_of_environment, digest_of_package, read_measured
from cloister.guest.workloadapi import WorkloadApi
from cloister.identity import Role
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.config import GuestSection, ServiceSection
from cloister.tdx.workload import WorkloadPlan
from cloister.tlv import sha384


class ServiceIdentity(Identity):
    """A service's identity; what serves it to other programs ends with it."""

    _workload_api: WorkloadApi | None = None

    async def serve_workload_api(self, path: Path) -> None:
        """Serve the SPIFFE Workload API on a socket; raise CloisterError when that cannot be had."""
        api = WorkloadApi(self, path)
        await api.start()
        self._workload_api = api

    async def aclose(self) -> None:
        """Stop serving and renewing, and end the TD's use of its platform."""
        api, self._workload_api = self._workload_api, None
        if api is not None:
            await api.stop()
        await super().aclose()


def measure_service(guest: Guest, *, bundle: TrustBundle, package: str, config_bytes: bytes, role: Role) -> None:
    """Measure a service into RTMR3 and seal it; blocks while it reads the package and the environment."""
    guest.run_as(
        WorkloadPlan(
            role=role,
            environment=digest_of_environment(),
            trust_bundle=bundle.digest,
            script=digest_of_package(package),
            config=sha384(config_bytes),
        )
    )


async def enrol_service(
    guest_section: GuestSection, service_section: ServiceSection, *, role: Role, package: str, config_bytes: bytes
) -> Identity:
    """Open the platform, measure, seal and enrol; the identity renews itself until `aclose`.

    Where the configuration names a socket for it, the Workload API is served until then, too.
    `package` is the service's own ("cloister_keybroker"), `config_bytes` its configuration file as read.
    Raises CloisterError: the platform's, the bundle's or attest's.
    """
    bundle = TrustBundle.parse(read_measured(guest_section.trust_bundle).data)
    if bundle.trust_domain != service_section.trust_domain:
        raise CloisterError(
            Code.CONFIG_INVALID,
            what="service.trust_domain is not that of the trust bundle",
            why=f"{service_section.trust_domain} is configured, the bundle is of {bundle.trust_domain}",
            todo="correct service.trust_domain or guest.trust_bundle",
        )
    guest = await asyncio.to_thread(Guest.open, guest_section.provider)
    try:
        await asyncio.to_thread(
            measure_service, guest, bundle=bundle, package=package, config_bytes=config_bytes, role=role
        )
        identity = await ServiceIdentity.enrol(guest, attest_endpoint=guest_section.attest_endpoint, bundle=bundle)
        if guest_section.workload_api is not None:
            await identity.serve_workload_api(guest_section.workload_api)
    except BaseException:
        guest.close()
        raise
    identity.start_renewal()
    return identity
