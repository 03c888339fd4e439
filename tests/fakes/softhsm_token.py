# SPDX-License-Identifier: Apache-2.0
"""Tokens of SoftHSM2, which is a PKCS#11 module like any other: made, pulled out, and put back."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

_MODULES = (
    Path("/usr/lib/softhsm/libsofthsm2.so"),
    Path("/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so"),
    Path("/usr/lib64/pkcs11/libsofthsm2.so"),
)
PIN = "246813"


def softhsm_module() -> Path:
    """Return SoftHSM2's module; skip the test where it is not installed, fail it in CI."""
    found = next((path for path in _MODULES if path.is_file()), None)
    if found is None or shutil.which("softhsm2-util") is None:
        message = "SoftHSM2 is not installed: make softhsm, or apt-get install softhsm2"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return found


class SoftToken:
    """One token in a directory of its own. The module reads where from the environment, when it is initialized."""

    def __init__(self) -> None:
        self.module = softhsm_module()
        self._directory = tempfile.TemporaryDirectory(prefix="softhsm-")
        self.directory = Path(self._directory.name)
        self.tokens = self.directory / "tokens"
        self.tokens.mkdir()
        configuration = self.directory / "softhsm2.conf"
        configuration.write_text(
            f"directories.tokendir = {self.tokens}\nobjectstore.backend = file\nlog.level = ERROR\n"
        )
        self._before = os.environ.get("SOFTHSM2_CONF")
        os.environ["SOFTHSM2_CONF"] = str(configuration)
        self.label = f"cloister-{secrets.token_hex(4)}"
        self.pin_file = self.directory / "pin"
        self.write_pin(PIN)
        self.initialize()

    def initialize(self) -> None:
        """Make the token."""
        subprocess.run(
            ["softhsm2-util", "--init-token", "--free", "--label", self.label, "--pin", PIN, "--so-pin", "135724"],
            check=True,
            capture_output=True,
        )

    @property
    def uri(self) -> str:
        """What the broker's configuration says."""
        return f"pkcs11:token={self.label}?module-path={self.module}&pin-source=file:{self.pin_file}"

    def write_pin(self, pin: str) -> None:
        self.pin_file.write_text(f"{pin}\n")
        self.pin_file.chmod(0o600)

    def pull_out(self) -> None:
        self.tokens.rename(self.directory / "pulled-out")
        self.tokens.mkdir()

    def put_back(self) -> None:
        shutil.rmtree(self.tokens)
        (self.directory / "pulled-out").rename(self.tokens)

    def close(self) -> None:
        if self._before is None:
            os.environ.pop("SOFTHSM2_CONF", None)
        else:
            os.environ["SOFTHSM2_CONF"] = self._before
        self._directory.cleanup()
