# SPDX-License-Identifier: Apache-2.0
"""What a coordinator tells a rank, as a JSON file. No secrets: a rank gets keys for what it is, not for its word."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self, get_type_hints

from cloister.errors import CloisterError, Code


@dataclass(frozen=True, slots=True)
class RankInput:
    """A sealed directory to read."""

    name: str
    directory: str
    key_uri: str
    manifest_digest: str  # hex of 48 bytes


@dataclass(frozen=True, slots=True)
class RankSpec:
    """Everything a rank is told. It measures what it uses of this, and attest compares that with the registered job."""

    job_id: str
    tenant: str
    rank: int
    world_size: int
    script_file: str
    script_name: str  # for tracebacks and argv[0]
    args: tuple[str, ...]
    seed: int
    inputs: tuple[RankInput, ...]
    output_directory: str  # empty: the job has no output
    output_key_uri: str
    core: int
    collective_timeout_s: float
    trainer_endpoint: str
    attest_endpoint: str  # for enrolment
    keybroker_endpoint: str
    provider: str
    trust_bundle_file: str
    failure_file: str  # where to say why, when that happens before there is an identity to say it with

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=2).encode()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `to_json` wrote; raise CloisterError(CONFIG_INVALID) for anything else."""
        try:
            document = json.loads(path.read_bytes())
            inputs = tuple(_exact(RankInput, entry) for entry in document.pop("inputs"))
            args = tuple(str(arg) for arg in document.pop("args"))
            spec: Self = _exact(cls, {**document, "inputs": inputs, "args": args})
            return spec
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CloisterError(
                Code.CONFIG_INVALID,
                what=f"{path} is not a rank's description",
                why=str(error),
                todo="use trainer and rank of the same release",
            ) from None


def _exact(kind: type[Any], values: Any) -> Any:
    hints = get_type_hints(kind)
    names = {field.name for field in fields(kind)}
    if values.keys() != names:
        raise ValueError(f"other fields than {', '.join(sorted(names))}")
    for name, value in values.items():
        if hints[name] in (str, int, float) and type(value) is not hints[name]:
            raise ValueError(f"{name} is not of type {hints[name].__name__}")
    return kind(**values)
