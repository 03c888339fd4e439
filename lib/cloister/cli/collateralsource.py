# SPDX-License-Identifier: Apache-2.0
"""Where collateral comes from on this machine: options that commands share, kept bundles, and a server behind them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister.cli.options import existing_file, run_async, state_directory
from cloister.collateral.family import Edition, Family
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from cloister.collateral.resources import CollateralServer
    from cloister.tdx.collateral import Collateral
    from cloister.tdx.trustroot import TrustRoot

Root = Annotated[
    Path | None, typer.Option("--root", metavar="PEM", help="A development root, in the place of Intel's.")
]
Directory = Annotated[
    Path | None, typer.Option("--directory", help="Where bundles are kept (default: in the state directory).")
]
Pccs = Annotated[str | None, typer.Option("--pccs", metavar="URL", help="A PCCS to ask, in the place of Intel.")]
PccsCa = Annotated[
    Path | None, typer.Option("--pccs-ca", metavar="PEM", help="The one certificate or CA that the PCCS may have.")
]
EditionOption = Annotated[Edition, typer.Option("--edition", help="When a new TCB evaluation begins to count.")]

# What fetching may put right; a clock that is wrong or a directory of another root is not among it.
_FETCHABLE = frozenset({Code.COLLATERAL_NOT_FOUND, Code.COLLATERAL_EXPIRED, Code.COLLATERAL_INVALID})


@dataclass(frozen=True, slots=True)
class Place:
    """One root, the directory with its bundles, and the server that is asked for more (None: there is none)."""

    root: TrustRoot
    directory: Path
    server: CollateralServer | None
    home: Path | None  # the state directory, when the bundles lie in it

    def create(self) -> None:
        """Make the state directory, readable by its owner only, before anything is put into it."""
        from cloister.atomicfile import file_error

        if self.home is None:
            return
        try:
            self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise file_error(error, what=f"cannot make {self.home}") from error

    def require_server(self) -> CollateralServer:
        """Return the server; raise CloisterError(ARGUMENT_INVALID) when nobody serves collateral of this root."""
        if self.server is None:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what="there is no server for collateral of this root",
                why="Intel serves collateral under its own root only",
                todo="name a PCCS with --pccs, or import a bundle with `cloister collateral import`",
            )
        return self.server


def choose_place(
    *, root: Path | None, directory: Path | None, pccs: str | None, pccs_ca: Path | None, state: Path | None
) -> Place:
    """Return what these options say; raise CloisterError for a root, a URL or a file that is none."""
    from cloister.collateral.resources import CollateralServer

    trusted = choose_root(root)
    server = None if trusted.simulated else CollateralServer.intel()
    if pccs is not None:
        ca_file = None if pccs_ca is None else existing_file(pccs_ca, what="the PCCS's certificate")
        server = CollateralServer.pccs(pccs, ca_file=ca_file)
    elif pccs_ca is not None:
        raise CloisterError(
            Code.ARGUMENT_INVALID, what="--pccs-ca is for a PCCS", why="none is named", todo="add --pccs URL"
        )
    if directory is not None:
        return Place(trusted, directory.expanduser().absolute(), server, None)
    home = state_directory(state).root
    # Collateral of two roots is never kept together.
    name = f"collateral-{trusted.fingerprint.hex()[:8]}" if trusted.simulated else "collateral"
    return Place(trusted, home / name, server, home)


def choose_root(pem: Path | None) -> TrustRoot:
    """Return Intel's root, or the one in a file: a development root, unless it is Intel's after all."""
    from cloister.tdx.intelroot import intel_root
    from cloister.tdx.trustroot import TrustRoot

    intel = intel_root()
    if pem is None:
        return intel
    chosen = TrustRoot.from_pem(existing_file(pem, what="the root").read_bytes(), simulated=True)
    return intel if chosen.fingerprint == intel.fingerprint else chosen


def family_named(name: str) -> Family:
    """Read a family's name as `cloister collateral show` prints it; raise CloisterError(ARGUMENT_INVALID)."""
    parts = name.removesuffix(".json").split("-")
    if len(parts) != 4:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"{name[:80]!r} names no platform family",
            why="a name is <tee>-<fmspc>-<ca>-<edition>, such as tdx-b0c06f000000-platform-standard",
            todo="`cloister collateral show` lists the families that are here",
        )
    tee, fmspc, ca, edition = parts
    return Family.of(fmspc, ca, tee, edition)


def kept_families(directory: Path) -> list[Family]:
    """Return the families that a directory has bundles of, by the names of its files."""
    found = []
    for path in sorted(directory.glob("*.json")):
        try:
            found.append(family_named(path.name))
        except CloisterError:  # somebody else's file
            continue
    return found


def from_file(path: Path, family: Family) -> Collateral:
    """Return a family's collateral from a bundle, a PCCS administrator's file, or one object of nine strings.

    Nothing is verified. Raises CloisterError (COLLATERAL_*, FILE_NOT_FOUND).
    """
    from cloister.collateral.bundle import CollateralBundle, read_bounded
    from cloister.collateral.pccsfile import is_platform_collateral, read_platform_collateral

    data = read_bounded(existing_file(path, what="the collateral"))
    if is_platform_collateral(data):
        bundles = read_platform_collateral(data, fetched_at=datetime.fromtimestamp(0).astimezone())
    elif _is_bundle(data):
        bundles = [CollateralBundle.parse(data)]
    else:
        return _nine_strings(data, path)
    same = [bundle for bundle in bundles if _same_platforms(bundle.family, family)]
    if not same:
        raise CloisterError(
            Code.COLLATERAL_NOT_FOUND,
            what=f"{path.name} holds no collateral for {family}",
            why=f"it is for {', '.join(bundle.family.name for bundle in bundles[:3])}; the quote is of {family.name}",
            todo="run `cloister collateral fetch --quote FILE` with this quote",
        )
    return next((bundle for bundle in same if bundle.family == family), same[0]).collateral


def look_up(
    family: Family, place: Place, *, now: datetime, fixed: bool, note: Callable[[str], None]
) -> tuple[Collateral, str]:
    """Return a family's collateral and where it is from: what is kept here, or else what the server gives.

    With `fixed`, `now` is a time that somebody chose, and nothing is fetched: a server has the collateral of today.
    """
    from cloister.collateral.bundle import CollateralBundle
    from cloister.collateral.commands import fetch

    try:
        return _kept(family, place, now, fixed=fixed)
    except CloisterError as error:
        if fixed or error.code not in _FETCHABLE or place.server is None:
            raise
        problem = error
    note(f"fetching collateral for {family} from {place.server.base_url}")
    place.create()
    try:
        (outcome,) = run_async(fetch([family], place.directory, server=place.server, root=place.root))
    except CloisterError as failed:
        if problem.code is not Code.COLLATERAL_EXPIRED:
            problem = failed
        raise CloisterError(
            problem.code,
            what=problem.what,
            why=failed.why or failed.what,
            todo="where there is a network, run `cloister collateral fetch --quote FILE`; here, name the bundle that "
            "it writes with --collateral, or import it with `cloister collateral import`",
        ) from failed
    return CollateralBundle.read(outcome.path).collateral, place.server.base_url


def require_of_time(family: Family, start: datetime, end: datetime, now: datetime, *, fixed: bool) -> None:
    """Raise CloisterError unless collateral that is valid from `start` to `end` is of `now` (chosen, when `fixed`)."""
    from cloister.collateral.failures import expired, not_yet_valid

    if start <= now <= end:
        return
    if fixed:
        raise CloisterError(
            Code.COLLATERAL_EXPIRED if now > end else Code.COLLATERAL_NOT_YET_VALID,
            what=f"the collateral for {family} is not of {now:%Y-%m-%dT%H:%M:%SZ}",
            why=f"it is valid from {start:%Y-%m-%dT%H:%M:%SZ} to {end:%Y-%m-%dT%H:%M:%SZ}",
            todo="name collateral of that time with --collateral",
        )
    raise expired(family, end, now) if now > end else not_yet_valid(f"collateral for {family}", start, now)


def _kept(family: Family, place: Place, now: datetime, *, fixed: bool) -> tuple[Collateral, str]:
    from cloister.collateral.bundle import CollateralBundle, bundle_path, require_root
    from cloister.collateral.failures import FETCH_HINT

    path = bundle_path(place.directory, family)
    if not path.is_file():
        raise CloisterError(
            Code.COLLATERAL_NOT_FOUND,
            what=f"no collateral for {family}",
            why=f"{path} is not there",
            todo="name it with --collateral" if fixed or place.server is None else FETCH_HINT,
        )
    require_root(place.directory, place.root)
    bundle = CollateralBundle.read(path)
    if bundle.family != family:
        raise CloisterError(
            Code.COLLATERAL_INVALID,
            what=f"{path} is not for {family}",
            why=f"it says {bundle.family.name}",
            todo=FETCH_HINT,
        )
    verified = bundle.verify(place.root)
    require_of_time(family, verified.valid_from, verified.expires, now, fixed=fixed)
    return bundle.collateral, str(path)


def _is_bundle(data: bytes) -> bool:
    try:
        members = json.loads(data.decode())
    except (ValueError, RecursionError):
        return False
    return isinstance(members, dict) and "format" in members


def _nine_strings(data: bytes, path: Path) -> Collateral:
    from cloister.tdx.collateral import Collateral
    from cloister.tdx.quote import QuoteRejected

    try:
        collateral = Collateral.parse(data)
        if not (collateral.tcb_info or collateral.qe_identity or collateral.pck_crl or collateral.root_ca_crl):
            raise QuoteRejected("X2", "none of the nine parts is in it")
    except QuoteRejected as rejected:
        raise CloisterError(
            Code.COLLATERAL_INVALID,
            what=f"{path.name} is not collateral",
            why=rejected.reason,
            todo="make a bundle with `cloister collateral fetch` and `export`",
        ) from None
    return collateral


def _same_platforms(one: Family, other: Family) -> bool:
    """Say whether two families differ in their edition at most."""
    return (one.fmspc, one.ca, one.tee) == (other.fmspc, other.ca, other.tee)
