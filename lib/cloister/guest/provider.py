# SPDX-License-Identifier: Apache-2.0
"""Where quotes come from: the platform under this TD, named by one URI.

    simulated:<socket path>                      a TD of a simulated platform (one connection is one TD)
    configfs:[?journal=<path>]                   a TDX TD, quotes through configfs-tsm (Linux 6.7)
    tdx-guest:[?qgs=<address>][&journal=<path>]  a TDX TD, /dev/tdx_guest and the host's quote generation service
                                                 at vsock:<cid>:<port> (default vsock:2:4050) or unix:<path>

Both real ones extend RTMRs through tsm-mr (Linux 6.16) and read the boot log from ACPI. `journal` is a file in a
tmpfs (docs/quote-providers.md) that lets a service start again in a running TD.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cloister.errors import CloisterError, Code
from cloister.guest.providers.base import QuoteProvider, QuoteSource
from cloister.guest.providers.bootlog import read_boot_log
from cloister.guest.providers.configfs import ConfigfsQuotes
from cloister.guest.providers.journal import Journal, read_boot_id
from cloister.guest.providers.kernel import Kernel
from cloister.guest.providers.options import parse_options
from cloister.guest.providers.qgs import HOST, QgsAddress, QgsClient
from cloister.guest.providers.registers import Registers
from cloister.guest.providers.simulated import SimulatedProvider
from cloister.guest.providers.td import TdProvider
from cloister.guest.providers.tdxguest import TdxGuestQuotes

SIMULATED: Final = "simulated"
CONFIGFS: Final = "configfs"
TDX_GUEST: Final = "tdx-guest"

__all__ = ["CONFIGFS", "SIMULATED", "TDX_GUEST", "QuoteProvider", "SimulatedProvider", "open_provider"]


def open_provider(uri: str, image_digest: bytes, *, kernel: Kernel | None = None) -> QuoteProvider:
    """Open the provider that `uri` names. `image_digest` (48 bytes) is what a simulated TD boots from.

    Raises CloisterError: CONFIG_INVALID for a URI that is none of the three, QUOTE_PROVIDER_FAILED when the platform
    is not there or is not as its own records say.
    """
    scheme, _, rest = uri.partition(":")
    kernel = kernel or Kernel()
    if scheme == SIMULATED and rest:
        return SimulatedProvider(rest, image_digest)
    if scheme == CONFIGFS:
        options = parse_options(uri, rest, ("journal",))
        return _open_td(kernel, ConfigfsQuotes(kernel.reports, kernel.files), options)
    if scheme == TDX_GUEST:
        options = parse_options(uri, rest, ("journal", "qgs"))
        qgs = QgsClient(QgsAddress.parse(options["qgs"]) if "qgs" in options else HOST)
        return _open_td(kernel, TdxGuestQuotes(kernel.device, kernel.ioctl, qgs), options)
    raise CloisterError(
        Code.CONFIG_INVALID,
        what=f"{uri[:200]!r} names no quote provider",
        why=f"allowed: {SIMULATED}:<path of the simulated platform's socket>, {CONFIGFS}:, {TDX_GUEST}:",
        todo="correct guest.provider in the configuration",
    )


def _open_td(kernel: Kernel, quotes: QuoteSource, options: dict[str, str]) -> TdProvider:
    registers = Registers(kernel.measurements, kernel.files)
    registers.read(3)  # first, because it says best what is missing where there is no TDX
    boot_log = read_boot_log(kernel.acpi, kernel.files)
    journal = None
    if "journal" in options:
        journal = Journal(Path(options["journal"]), read_boot_id(kernel.boot_id, kernel.files))
    try:
        return TdProvider(boot_log=boot_log, registers=registers, quotes=quotes, journal=journal)
    except BaseException:
        if journal is not None:
            journal.close()
        raise
