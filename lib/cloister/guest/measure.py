# SPDX-License-Identifier: Apache-2.0
"""Digests of what runs: packages, the environment, files read once. All SHA-384, 48 bytes.

A measurement in a TD says what code was there when the TD started; it is worth as much as the image under it, which
the platform measures (MRTD, RTMR0..2). A simulated platform measures nothing, so there these digests are only claims.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.errors import CloisterError, Code
from cloister.tlv import sha384, tlv

_MAX_FILE_BYTES: Final = 16 * 1024 * 1024  # a script or a configuration; data is never measured this way
# Every process of ours runs code of several of these: a rank the trainer's, a backend's agent the gateway's. Names, not
# imports: the library knows no service.
_OWN_PACKAGES: Final = ("cloister", "cloister_attest", "cloister_keybroker", "cloister_serving", "cloister_trainer")


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes of a file that was read once: execute these, not the file, which may have changed since."""

    data: bytes
    digest: bytes


def read_measured(path: Path) -> Measured:
    """Read a file of at most 16 MiB once; raise CloisterError when it is not there or too large."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise CloisterError(
            Code.FILE_NOT_FOUND,
            what=f"{path} cannot be read",
            why=error.strerror or str(error),
            todo="check the path",
        ) from None
    if len(data) > _MAX_FILE_BYTES:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"{path} is too large to be measured",
            why=f"a script or configuration has at most {_MAX_FILE_BYTES} bytes",
            todo="give a script, not data",
        )
    return Measured(data, sha384(data))


@functools.cache
def digest_of_package(name: str) -> bytes:
    """Return the digest of a package's code and of this library, on which it stands.

    Names and contents of *.py files count, wherever they are installed. Packages are found, not imported. Raises
    CloisterError(PREREQUISITE_MISSING) when one is not installed.
    """
    return sha384(tlv("cloister-package-v1", name, digest_of_sources(name), digest_of_sources("cloister")))


def digest_of_sources(name: str) -> bytes:
    """Return the digest over names and contents of one package's *.py files; errors as for `digest_of_package`."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise CloisterError(
            Code.PREREQUISITE_MISSING,
            what=f"the package {name} is not installed",
            why="what is not there cannot be measured",
            todo="install cloister with the extras of this service",
        )
    fields: list[bytes | str] = []
    for location in sorted(spec.submodule_search_locations):
        root = Path(location)
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
            fields += [path.relative_to(root).as_posix(), path.read_bytes()]
    return sha384(tlv("cloister-sources-v1", name, *fields))


def attest_configuration(
    config_bytes: bytes, root_der: bytes, policy: bytes, references: Sequence[bytes], *, holders: Sequence[bytes] = ()
) -> bytes:
    """Return what attest measures as its configuration.

    Its file only names root, policy, reference sets (texts, by name) and the public keys of those who hold shares of
    the CA (1,216 bytes each); who may vouch for quotes, what must hold of them, and who can bring back the CA, is part
    of what an attest is.
    """
    return tlv("cloister-attest-config-v3", config_bytes, root_der, policy, tlv("holders", *holders), *references)


@functools.cache
def digest_of_environment() -> bytes:
    """Return the digest of interpreter, installed distributions and all code of ours that is installed.

    A distribution counts with name, version and its RECORD, which lists a digest of every file it installed. RECORD
    is believed, not recomputed: that would read gigabytes, and the image's own measurement covers the files.
    """
    distributions: set[tuple[str, str, bytes]] = set()
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        record = distribution.read_text("RECORD") or ""
        distributions.add((name, distribution.version, sha384(record.encode())))
    fields = [field for distribution in sorted(distributions) for field in distribution]
    return sha384(tlv("cloister-environment-v1", sys.version, *fields, *_own_sources()))


@functools.cache
def image_digest() -> bytes:
    """Return what a simulated TD boots from: where there is no image, the installed code stands for it."""
    return sha384(tlv("cloister-simulated-image-v1", *_own_sources()))


def _own_sources() -> list[bytes]:
    return [digest_of_sources(name) for name in _OWN_PACKAGES if importlib.util.find_spec(name) is not None]
