# SPDX-License-Identifier: Apache-2.0
"""Start the key broker, make the store of a new one, or restore a backup.

python -m cloister_keybroker --config FILE
python -m cloister_keybroker init --root-key-file FILE --state-dir DIRECTORY
python -m cloister_keybroker restore BACKUP --state-dir DIRECTORY
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

from cloister import hpke
from cloister.errors import EXIT_CODE, CloisterError, Code
from cloister.guest.evidence_service import EVIDENCE_CALLERS, mounted_evidence
from cloister.guest.service import enrol_service
from cloister.identity import Role
from cloister.runtime.config import load_measured_config
from cloister.runtime.health import HealthState
from cloister.runtime.host import serving
from cloister.runtime.limits import Limits
from cloister.runtime.logging import configure
from cloister.runtime.main import run_service
from cloister.runtime.metrics import RpcMetrics
from cloister.runtime.quota import IdentityQuota
from cloister.runtime.server import GrpcServer
from cloister_keybroker.assembly import Watching, assembled, opened_backends
from cloister_keybroker.backends.watch import backend_gauge
from cloister_keybroker.brokerservice import CALLERS as OPERATOR_CALLERS
from cloister_keybroker.brokerservice import mounted_operations
from cloister_keybroker.config import STORE_FILE, Config, KeybrokerSection
from cloister_keybroker.gate import BROKER_SERVICE, Gate
from cloister_keybroker.logservice import CALLERS as LOG_CALLERS
from cloister_keybroker.restore import restore
from cloister_keybroker.rootkey import RootKey, create_root_key, read_root_key
from cloister_keybroker.sealrecord import SealRecord
from cloister_keybroker.service import CALLERS, RELEASE_SERVICE
from cloister_keybroker.store import KeyStore
from cloister_keybroker.vault import State, Vault

# A policy in its envelope has 128 KiB at most, a token 16 KiB; nothing that anybody sends here is longer than both.
LIMITS: Final = Limits(max_request_bytes=256 * 1024)


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
    path = config.service.state_dir / STORE_FILE
    vault = await Vault.open(path, config.keybroker.root_key, partial(opened_backends, config=config))
    try:
        identity = await enrol_service(
            config.guest,
            config.service,
            role=Role.KEYBROKER,
            package="cloister_keybroker",
            config_bytes=config_bytes,
        )
        try:
            gate, health, metrics = Gate(), HealthState(always={BROKER_SERVICE}), RpcMetrics()
            operations = mounted_operations(vault, identity=identity, operators=config.keybroker.operators)
            server = GrpcServer(
                section=config.service,
                credentials=identity,
                services=[*gate.mounted(), operations, mounted_evidence(identity)],
                callers={**CALLERS, **LOG_CALLERS, **OPERATOR_CALLERS, **EVIDENCE_CALLERS},
                limits=LIMITS,
                quota=_quota(config.keybroker),
                health=health,
                metrics=metrics,
            )
            watching = Watching(partial(health.set_able, RELEASE_SERVICE), backend_gauge(metrics.registry))
            await vault.attach(gate, partial(assembled, identity=identity, watching=watching), health.set_serving)
            ready = vault.status().state is State.UNSEALED
            async with serving(config.service, {"grpc": server}, health=health, metrics=metrics, ready=ready):
                await stop.wait()
        finally:
            await vault.aclose()
            await identity.aclose()
    finally:
        await vault.aclose()


def _quota(section: KeybrokerSection) -> IdentityQuota:
    return IdentityQuota(per_s=section.calls_per_s, burst=section.calls_burst, at_once=section.calls_at_once)


def init(argv: Sequence[str]) -> int:
    """Create a store under a root key file, and that file unless it is there; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cloister_keybroker init", description="Create an empty key store.")
    parser.add_argument("--root-key-file", type=Path, required=True, help="made (0600) unless it is there")
    parser.add_argument("--state-dir", type=Path, required=True, help="service.state_dir of the configuration")
    arguments = parser.parse_args(argv)
    path, store = arguments.root_key_file, arguments.state_dir / STORE_FILE
    try:
        arguments.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = not path.exists() and not store.exists()
        if made:
            create_root_key(path)
        asyncio.run(_create_store(store, read_root_key(path)))
    except CloisterError as error:
        print(error, file=sys.stderr)  # noqa: T201 - a command's answer
        return EXIT_CODE[error.kind]
    if made:
        print(f"created {path}: keep a copy where the store's backups are not")  # noqa: T201 - a command's answer
    print(f"created {store}")  # noqa: T201 - a command's answer
    return 0


async def _create_store(path: Path, root_key: RootKey) -> None:
    (await KeyStore.create(path, root_key, SealRecord())).close()


def restore_backup(argv: Sequence[str]) -> int:
    """Put a backup in a store's place; return the exit code."""
    description = "Put a backup in a store's place, while the broker does not run."
    parser = argparse.ArgumentParser(prog="python -m cloister_keybroker restore", description=description)
    parser.add_argument("backup", type=Path, help="made by `cloister broker backup`")
    parser.add_argument("--state-dir", type=Path, required=True, help="service.state_dir of the configuration")
    parser.add_argument("--root-key-file", type=Path, help="verify everything now, where the root key is a file")
    arguments = parser.parse_args(argv)
    store = arguments.state_dir / STORE_FILE
    try:
        root_key = read_root_key(arguments.root_key_file) if arguments.root_key_file else None
        trailer = asyncio.run(restore(arguments.backup, store, root_key))
    except CloisterError as error:
        print(error, file=sys.stderr)  # noqa: T201 - a command's answer
        return EXIT_CODE[error.kind]
    made = datetime.fromtimestamp(trailer.created_ms / 1000, UTC)
    print(f"store: {store}\nmade: {made:%Y-%m-%dT%H:%M:%SZ}\nbroker: {trailer.broker_id}")  # noqa: T201
    print(f"log_size: {trailer.log_size}\nlog_root: {trailer.log_root.hex()}")  # noqa: T201 - a command's answer
    print(f"verified: {'yes' if root_key else 'when the broker is unsealed'}")  # noqa: T201 - a command's answer
    return 0


def main(argv: Sequence[str]) -> NoReturn:
    """Dispatch on the first argument."""
    if argv[:1] == ["init"]:
        sys.exit(init(argv[1:]))
    if argv[:1] == ["restore"]:
        sys.exit(restore_backup(argv[1:]))
    run_service(serve, "keybroker", argv)


if __name__ == "__main__":
    main(sys.argv[1:])
