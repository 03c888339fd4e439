# SPDX-License-Identifier: Apache-2.0
"""The state directory of a local stack: what lies where, and `stack.json`, which says how to reach what runs.

<state>/stack.json  stack.lock          the stack that runs now; the lock is held by its supervisor
<state>/bundle.json                     trust bundle that attest wrote
<state>/user/key.pem chain.pem          the user's key (made once, 0600) and present certificate
<state>/user/signing-key.pem            the owner's signing key (made once, 0600)
<state>/user/gateway-ca.pem             what `curl --cacert` takes
<state>/user/broker-log.json            the last checkpoint of the broker's log that was seen
<state>/platform/                       development root and simulated platform (made once)
<state>/ehsm/server client/             the EHSM development server, and a client enrolled with it
<state>/config/*.toml  logs/*.log  run/ configuration, logs and endpoint files of the services
<state>/attest keybroker trainer gateway/   what each service keeps
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

from cloister.errors import CloisterError, Code

SERVICES: Final = ("attest", "keybroker", "trainer", "gateway")
_MAX_STACK_FILE: Final = 1 << 20  # bytes
# `holder` has the lock for an instant to see whether anybody else has.
_LOCK_ATTEMPTS: Final = 5
_LOCK_PAUSE_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class StateDirectory:
    """Paths below one state directory."""

    root: Path

    @classmethod
    def resolve(cls, option: Path | None) -> StateDirectory:
        """Return the directory that `--state` names, or the user's own below XDG_STATE_HOME."""
        if option is not None:
            return cls(option.expanduser().absolute())
        base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
        return cls(Path(base) / "cloister")

    def create(self) -> StateDirectory:
        """Make the directories, readable by their owner only; raise CloisterError when others could get in."""
        try:
            for path in (self.root, self.user, self.platform, self.config, self.logs, self.run):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.refuse_strangers()
        except OSError as error:
            raise CloisterError(
                Code.IO_FAILED,
                what=f"the state directory {self.root} cannot be made",
                why=error.strerror or str(error),
                todo="choose another one with --state",
            ) from error
        return self

    def refuse_strangers(self) -> None:
        """Raise CloisterError when the directory is another user's, or open to group or others."""
        found = self.root.stat()
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"the state directory {self.root} is not private",
                why=f"its mode is {stat.S_IMODE(found.st_mode):o} and its owner {found.st_uid}; it holds private keys",
                todo=f"chmod 700 {self.root}, or choose another one with --state",
            )

    @property
    def user(self) -> Path:
        return self.root / "user"

    @property
    def user_key(self) -> Path:
        return self.user / "key.pem"

    @property
    def signing_key(self) -> Path:
        return self.user / "signing-key.pem"

    @property
    def user_chain(self) -> Path:
        return self.user / "chain.pem"

    @property
    def seen_log(self) -> Path:
        return self.user / "broker-log.json"

    @property
    def gateway_ca(self) -> Path:
        return self.user / "gateway-ca.pem"

    @property
    def platform(self) -> Path:
        return self.root / "platform"

    @property
    def ehsm(self) -> Path:
        return self.root / "ehsm"

    @property
    def config(self) -> Path:
        return self.root / "config"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def bundle(self) -> Path:
        return self.root / "bundle.json"

    @property
    def stack_file(self) -> Path:
        return self.root / "stack.json"

    def config_file(self, service: str) -> Path:
        return self.config / f"{service}.toml"

    def log_file(self, service: str) -> Path:
        return self.logs / f"{service}.log"

    def endpoints_file(self, service: str) -> Path:
        return self.run / f"{service}.json"

    def service_directory(self, service: str) -> Path:
        return self.root / service

    def lock(self) -> IO[bytes]:
        """Take the lock of the running stack; raise CloisterError(STACK_RUNNING) when another process holds it.

        The lock lasts as long as the returned file is open: a killed supervisor cannot leave it behind.
        """
        handle = (self.root / "stack.lock").open("ab")
        if not _taken(handle):
            handle.close()
            raise CloisterError(
                Code.STACK_RUNNING,
                what=f"a local stack already runs in {self.root}",
                why="one state directory holds one stack",
                todo=f"use it, stop it with `cloister --state {self.root} dev down`, or choose another --state",
            )
        handle.truncate(0)
        handle.write(f"{os.getpid()}\n".encode())
        handle.flush()
        return handle

    def holder(self) -> int | None:
        """Return the process id of the supervisor that holds the lock, or None when nobody does."""
        path = self.root / "stack.lock"
        try:
            with path.open("rb") as handle:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
        except FileNotFoundError:
            return None
        except BlockingIOError:
            text = path.read_bytes()
            return int(text) if text.strip().isdigit() else 0


def _taken(handle: IO[bytes]) -> bool:
    """Take an exclusive lock, if only somebody who just looks at it is in the way."""
    for attempt in range(_LOCK_ATTEMPTS):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE_S * (attempt + 1 < _LOCK_ATTEMPTS))
        else:
            return True
    return False


@dataclass(frozen=True, slots=True)
class Stack:
    """A running stack, as `stack.json` describes it."""

    supervisor_pid: int
    started_unix_s: float
    trust_domain: str
    tenant: str
    user: str  # SPIFFE id
    endpoints: Mapping[str, Mapping[str, str]]  # service -> {"grpc": "127.0.0.1:port", ...}
    process_ids: Mapping[str, int]
    root_certificate: str  # PEM file of the platform's root, below the state directory
    collateral: str  # directory of bundles under that root
    simulated: bool
    timings_s: Mapping[str, float]  # seconds from the start of `dev up` until the service was ready

    def endpoint(self, service: str, name: str = "grpc") -> str:
        """Return host:port; raise CloisterError(STACK_NOT_RUNNING) when the service does not offer it."""
        found = self.endpoints.get(service, {}).get(name)
        if not found:
            raise CloisterError(
                Code.STACK_NOT_RUNNING,
                what=f"{service} offers no {name} endpoint",
                why="the stack was started by another version of cloister",
                todo="cloister dev down, then cloister dev up",
            )
        return found

    def to_json(self) -> bytes:
        return (json.dumps({"version": 1, **asdict(self)}, indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes) -> Stack:
        """Parse stack.json; raise ValueError for anything else."""
        document: dict[str, Any] = json.loads(data)
        if document.pop("version", None) != 1:
            raise ValueError("not version 1")
        return cls(**document)


def read_stack(state: StateDirectory) -> Stack:
    """Return the stack that runs in a state directory; raise CloisterError(STACK_NOT_RUNNING) when none does."""
    not_running = CloisterError(
        Code.STACK_NOT_RUNNING,
        what=f"no local stack runs in {state.root}",
        why="there is no supervisor that holds its lock",
        todo="start one with `cloister dev up`, or name its directory with --state",
    )
    if state.holder() is None:
        raise not_running
    state.refuse_strangers()
    try:
        with state.stack_file.open("rb") as handle:
            return Stack.parse(handle.read(_MAX_STACK_FILE))
    except FileNotFoundError:
        raise CloisterError(
            Code.STACK_NOT_RUNNING,
            what=f"the local stack in {state.root} is not ready",
            why="it is starting or stopping",
            todo="wait for it: cloister dev status",
        ) from None
    except (ValueError, TypeError) as error:
        raise CloisterError(
            Code.CONFIG_INVALID,
            what=f"{state.stack_file} is damaged",
            why=str(error),
            todo="cloister dev down, then cloister dev up",
        ) from error
