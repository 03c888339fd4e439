# SPDX-License-Identifier: Apache-2.0
"""Job descriptions: from the wire into values that need no further checks. Pure; nothing is opened or looked up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, TypeVar
from urllib.parse import unquote, urlsplit

from cloister.api.trainer.v1 import trainer_pb2
from cloister.errors import CloisterError, Code
from cloister.identity import is_name
from cloister.keyuri import KeyUri
from cloister.protocol import JobInput, job_config_digest
from cloister.tlv import sha384

MAX_SCRIPT_BYTES: Final = 1024 * 1024  # every rank reads it, and the coordinator stores it
MAX_NODES: Final = 64
MAX_ARGS: Final = 256
MAX_ARGS_BYTES: Final = 64 * 1024  # a command line; data goes into inputs
MAX_INPUTS: Final = 32  # each costs every rank one key release
MAX_REQUEST_ID: Final = 64
_MAX_URI: Final = 4096
_DIGEST_SIZE: Final = 48
_MAX_CORE: Final = 65_535
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class InputSpec:
    """A sealed directory that every rank reads."""

    name: str
    directory: Path
    key_uri: str
    manifest_digest: bytes  # 48 bytes


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """Where rank 0 writes sealed directories."""

    directory: Path
    key_uri: str


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What to run, on what, how often."""

    name: str
    script: bytes
    args: tuple[str, ...]
    nodes: int
    inputs: tuple[InputSpec, ...]
    output: OutputSpec | None
    seed: int
    cores: tuple[int, ...]  # one a rank, or empty: the coordinator chooses

    @property
    def script_digest(self) -> bytes:
        """SHA-384 of the script, 48 bytes."""
        return sha384(self.script)

    @property
    def config_digest(self) -> bytes:
        """SHA-384 of everything else that decides what the job does, 48 bytes."""
        return job_config_digest(
            args=self.args,
            nodes=self.nodes,
            seed=self.seed,
            inputs=[JobInput(i.name, i.key_uri, i.manifest_digest) for i in self.inputs],
            output_key_uri=self.output.key_uri if self.output else "",
        )


def parse_spec(message: trainer_pb2.JobSpec) -> JobSpec:
    """Parse a job description; raise CloisterError(JOB_SPEC_INVALID) that names the field."""
    name = message.name or "job"
    if not is_name(name):
        _refuse("name", f"{name[:80]!r} is not 1 to 63 of a-z, 0-9 and hyphen", "give the job a name like reviews-1")
    if not 0 < len(message.script) <= MAX_SCRIPT_BYTES:
        _refuse(
            "script",
            f"it has {len(message.script):,} bytes; a script has 1 to {MAX_SCRIPT_BYTES:,}",
            "send the script itself, and data as a sealed input",
        )
    if not 1 <= message.nodes <= MAX_NODES:
        _refuse("nodes", f"{message.nodes} is not 1 to {MAX_NODES}", "ask for at least one rank")
    args = _args(message)
    if len(message.inputs) > MAX_INPUTS:
        _refuse(
            "inputs", f"{len(message.inputs)} are more than {MAX_INPUTS}", "put files into fewer sealed directories"
        )
    inputs = tuple(_input(i, entry) for i, entry in enumerate(message.inputs))
    names = [entry.name for entry in inputs]
    if len(set(names)) != len(names):
        _refuse("inputs", "two of them have the same name", "give each input its own name")
    return JobSpec(
        name=name,
        script=message.script,
        args=args,
        nodes=message.nodes,
        inputs=inputs,
        output=_output(message) if message.HasField("output") else None,
        seed=message.seed,
        cores=_cores(message),
    )


def parse_request_id(text: str) -> str:
    """Check a client's request id; raise CloisterError(JOB_SPEC_INVALID) when it is too long or not printable."""
    if len(text) > MAX_REQUEST_ID or not text.isprintable():
        _refuse("client_request_id", f"it has at most {MAX_REQUEST_ID} printable characters", "use a short random id")
    return text


def _args(message: trainer_pb2.JobSpec) -> tuple[str, ...]:
    args = tuple(message.args)
    if len(args) > MAX_ARGS or sum(len(arg.encode()) for arg in args) > MAX_ARGS_BYTES:
        _refuse(
            "args",
            f"{len(args)} arguments; at most {MAX_ARGS} of {MAX_ARGS_BYTES:,} bytes in all",
            "put long lists into a sealed input",
        )
    if any("\0" in arg for arg in args):
        _refuse("args", "one holds a NUL character", "remove it")
    return args


def _input(index: int, entry: trainer_pb2.SealedInput) -> InputSpec:
    field = f"inputs[{index}]"
    if not is_name(entry.name):
        _refuse(f"{field}.name", f"{entry.name[:80]!r} is not 1 to 63 of a-z, 0-9 and hyphen", "name it like reviews")
    if len(entry.manifest_digest) != _DIGEST_SIZE:
        _refuse(
            f"{field}.manifest_digest",
            f"it has {len(entry.manifest_digest)} bytes, a SHA-384 digest has {_DIGEST_SIZE}",
            "take the digest that `cloister seal` printed",
        )
    return InputSpec(
        name=entry.name,
        directory=_directory(f"{field}.uri", entry.uri),
        key_uri=_key(f"{field}.key_uri", entry.key_uri),
        manifest_digest=entry.manifest_digest,
    )


def _output(message: trainer_pb2.JobSpec) -> OutputSpec:
    output = OutputSpec(_directory("output.uri", message.output.uri), _key("output.key_uri", message.output.key_uri))
    for entry in message.inputs:
        source = _directory("inputs.uri", entry.uri)
        if output.directory == source or source in output.directory.parents:
            _refuse("output.uri", f"it lies in the input {entry.name}", "choose a directory of its own for the output")
    return output


def _directory(field: str, uri: str) -> Path:
    """Return the directory of file:///absolute/path."""
    parts = urlsplit(uri) if len(uri) <= _MAX_URI else None
    path = Path(unquote(parts.path)) if parts else Path()
    plain = parts and parts.scheme == "file" and not (parts.netloc or parts.query or parts.fragment)
    if not plain or not path.is_absolute() or ".." in path.parts or "\0" in str(path):
        _refuse(field, f"{uri[:200]!r} is not file:///an/absolute/path", "give the absolute path of a directory")
    return path


def _key(field: str, text: str) -> str:
    return str(_translated(field, lambda: KeyUri.parse(text)))


def _cores(message: trainer_pb2.JobSpec) -> tuple[int, ...]:
    cores = tuple(message.cores)
    if cores and len(cores) != message.nodes:
        _refuse("cores", f"{len(cores)} cores for {message.nodes} ranks", "name one core a rank, or none")
    if len(set(cores)) != len(cores):
        _refuse("cores", "two ranks would share a core", "name a different core for each rank")
    if any(core > _MAX_CORE for core in cores):
        _refuse("cores", f"core numbers end at {_MAX_CORE}", "name cores of this machine")
    return cores


def _translated(field: str, parse: Callable[[], _T]) -> _T:
    try:
        return parse()
    except CloisterError as error:
        raise _refusal(field, error.why or error.what, error.todo) from None


def _refuse(field: str, why: str, todo: str) -> NoReturn:
    raise _refusal(field, why, todo)


def _refusal(field: str, why: str, todo: str) -> CloisterError:
    return CloisterError(
        Code.JOB_SPEC_INVALID, what=f"the job cannot be run: {field} is not allowed", why=why, todo=todo
    )
