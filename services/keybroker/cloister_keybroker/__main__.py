# SPDX-License-Identifier: Apache-2.0
"""Start the key broker, or make a root key for a new one.

python -m cloister_keybroker --config FILE
python -m cloister_keybroker init --root-key-file FILE
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from cloister import hpke
from cloister.errors import EXIT_CODE, CloisterError, Code
from cloister.guest.evidence_service import EVIDENCE_CALLERS, mounted_evidence
from cloister.guest.service import enrol_service
from cloister.identity import Role
from cloister.runtime.config import load_measured_config
from cloister.runtime.health import HealthState
from cloister.runtime.host import serving
from cloister.runtime.logging import configure
from cloister.runtime.main import run_service
from cloister.runtime.metrics import RpcMetrics
from cloister.runtime.server import GrpcServer
from cloister_keybroker.answers import ReceiptSigner
from cloister_keybroker.backends.embedded import EmbeddedBackend
from cloister_keybroker.config import STORE_FILE, Config
from cloister_keybroker.owners import OwnerDesk
from cloister_keybroker.rootkey import create_root_key, read_root_key
from cloister_keybroker.service import CALLERS, mounted
from cloister_keybroker.store import KeyStore
from cloister_keybroker.workloads import ReleaseDesk


async def serve(config_path: Path, stop: asyncio.Event) -> None:
    """Verify the store, enrol, serve until `stop`. What is wrong with the store shows before anybody is enrolled."""
    config, config_bytes = load_measured_config(config_path, Config)
    configure("keybroker", config.service.log_format)
    try:
        hpke.self_test()
    except hpke.HpkeError as error:
        raise CloisterError(
            Code.PREREQUISITE_MISSING,
            what="the broker does not start",
            why=str(error),
            todo="reinstall the `cryptography` package",
        ) from None
    root_key = read_root_key(config.keybroker.root_key_file)
    store = await KeyStore.open(config.service.state_dir / STORE_FILE, root_key)
    try:
        backend = EmbeddedBackend(root_key)
        await backend.check()
        identity = await enrol_service(
            config.guest,
            config.service,
            role=Role.KEYBROKER,
            package="cloister_keybroker",
            config_bytes=config_bytes,
        )
        try:
            signer = ReceiptSigner(identity.guest.keys.receipt)
            owners = OwnerDesk(
                store=store, backend=backend, signer=signer, broker_id=str(identity.spiffe_id), clock=_now
            )
            releases = ReleaseDesk(
                store=store,
                backend=backend,
                signer=signer,
                credentials=identity,
                broker_id=identity.spiffe_id,
                clock=_now,
            )
            health, metrics = HealthState(), RpcMetrics()
            server = GrpcServer(
                section=config.service,
                credentials=identity,
                services=[*mounted(owners, releases, store), mounted_evidence(identity)],
                callers={**CALLERS, **EVIDENCE_CALLERS},
                health=health,
                metrics=metrics,
            )
            async with serving(config.service, {"grpc": server}, health=health, metrics=metrics):
                await stop.wait()
        finally:
            await identity.aclose()
    finally:
        store.close()


def init(argv: Sequence[str]) -> int:
    """Create a root key file; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cloister_keybroker init", description="Create a root key file.")
    parser.add_argument("--root-key-file", type=Path, required=True, help="file to create (0600); never overwritten")
    path = parser.parse_args(argv).root_key_file
    try:
        create_root_key(path)
    except CloisterError as error:
        print(error, file=sys.stderr)  # noqa: T201 - a command's answer
        return EXIT_CODE[error.kind]
    print(f"created {path}: keep a copy where the store's backups are not")  # noqa: T201 - a command's answer
    return 0


def main(argv: Sequence[str]) -> NoReturn:
    """Dispatch on the first argument."""
    if argv[:1] == ["init"]:
        sys.exit(init(argv[1:]))
    run_service(serve, "keybroker", argv)


def _now() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    main(sys.argv[1:])
