# SPDX-License-Identifier: Apache-2.0
"""`cloister broker`: the key broker's root key, its store and its back ends; for its operators."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cloister.cli.options import Json, State, existing_file, in_session
from cloister.cli.output import Output
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from rich.console import Console

    from cloister.api.keybroker.v1 import keybroker_pb2 as pb
    from cloister.cli.session import Session
    from cloister.guest.operator import OperatorClient, Share
    from cloister.holderkey import SealedShare
    from cloister.secret import SecretBytes

app = typer.Typer(help="The key broker's root key, store and back ends; for operators.", no_args_is_help=True)

_MAX_LINE: Final = 4096
_UNSEAL: Final = "cloister broker unseal"
_STATES: Final = {1: "uninitialized", 2: "sealed", 3: "unsealed"}

ThresholdOption = Annotated[int, typer.Option("--threshold", min=0, max=16, help="So many shares unseal.")]
SharesOption = Annotated[int, typer.Option("--shares", min=0, max=16, help="Print so many shares on this machine.")]
HolderOption = Annotated[
    list[Path] | None,
    typer.Option("--holder", help="Public key of a holder (FILE.pub), once for each; the shares are sealed to them."),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="Directory for the holders' sealed shares; made if it is not there.")
]
PassphraseOption = Annotated[bool, typer.Option("--passphrase", help="A passphrase instead of shares; asked for.")]


@app.command()
def status(state: State = None, json: Json = False) -> None:
    """Show whether the broker is sealed, what it waits for, and how its back ends are."""

    async def work(session: Session) -> dict[str, Any]:
        client = await _client(session)
        document = _document(await client.status())
        if document["state"] == "unsealed":
            found = await client.backend_status()
            document |= {
                "backend": found.name,
                "healthy": found.healthy,
                "problem": found.problem,
                "capabilities": list(found.capabilities),
                "versions": list(found.versions),
            }
        return document

    Output(as_json=json).item(in_session(state, work))


@app.command(name="holder-key")
def holder_key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Private key to make; the public one is FILE.pub.")],
    json: Json = False,
) -> None:
    """Make a key to receive a recovery share with; give FILE.pub to whoever makes the store, FILE to nobody."""
    from cloister.holderkey import create_holder_key

    public = create_holder_key(file.resolve())
    Output(as_json=json).item({"private": str(file.resolve()), "public": str(public)})


@app.command()
def init(
    threshold: ThresholdOption = 0,
    shares: SharesOption = 0,
    holder: HolderOption = None,
    out: OutOption = None,
    passphrase: PassphraseOption = False,
    state: State = None,
    json: Json = False,
) -> None:
    """Make the store of a broker that has none. It is sealed: unseal it with the shares that this gives.

    Where the root key is a file, the store is made on the broker's machine: python -m cloister_keybroker init.
    """
    wanted = _Wanted.of(threshold, shares, holder, out, passphrase=passphrase)

    async def work(session: Session) -> list[SealedShare]:
        client = await _client(session)
        if wanted.passphrase is not None:
            await client.initialize_with_passphrase(wanted.passphrase)
            return []
        return await client.initialize(wanted.public_keys, threshold=wanted.threshold)

    wanted.give(in_session(state, work), Output(as_json=json), then=_UNSEAL)


@app.command()
def unseal(
    share: Annotated[Path | None, typer.Option("--share", help="Sealed share of `init` or `rekey`.")] = None,
    key: Annotated[Path | None, typer.Option("--holder-key", help="Private key that opens it.")] = None,
    replacement: Annotated[
        str, typer.Option("--rekey", metavar="NAME", help="Show the present root key, for the `rekey` of this name.")
    ] = "",
    root_key_file: Annotated[
        Path | None, typer.Option("--root-key-file", help="With --rekey, where the present root key is a file.")
    ] = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Hand in one share or the passphrase: from files, from stdin, or asked for without showing it.

    It is sealed to the broker, whose evidence is verified on this machine first. With --rekey it is the present share
    or passphrase, which lets another root key take its place; `cloister broker rekey` gave the name.
    """
    from cloister.holderkey import SealedShare, read_holder_key
    from cloister.rootfile import read_root_file

    if (share is None) != (key is None):
        raise _usage("--share and --holder-key belong together", "a sealed share opens with its holder's key only")
    if root_key_file is not None and (share is not None or not replacement):
        raise _usage("--root-key-file goes with --rekey only, and without a share", "otherwise the broker reads it")
    given: SecretBytes | None = read_root_file(root_key_file) if root_key_file is not None else None
    if share is not None and key is not None:
        sealed = SealedShare.parse(existing_file(share, what="the share").read_bytes())
        given = sealed.open(read_holder_key(existing_file(key, what="the key")))

    async def work(session: Session) -> dict[str, Any]:
        client = await _client(session)
        before = await client.status()
        if before.source == "file" and given is None:
            if replacement:
                raise _usage("--root-key-file is missing", "the present root key is in a file")
            return _document(await client.hand_in(None))
        asked = "Passphrase: " if before.source == "passphrase" else "Share (33 words): "
        secret = given if given is not None else await asyncio.to_thread(_secret, asked)
        return _document(await (client.show(secret, replacement) if replacement else client.hand_in(secret)))

    Output(as_json=json).item(in_session(state, work))


@app.command()
def seal(state: State = None, json: Json = False) -> None:
    """Have the broker forget its root key at once: nothing is released until it is unsealed."""

    async def work(session: Session) -> dict[str, Any]:
        client = await _client(session)
        await client.seal()
        return _document(await client.status())

    Output(as_json=json).item(in_session(state, work))


@app.command()
def rekey(
    threshold: ThresholdOption = 0,
    shares: SharesOption = 0,
    holder: HolderOption = None,
    out: OutOption = None,
    passphrase: PassphraseOption = False,
    file: Annotated[bool, typer.Option("--file", help="Another root key in the configured file.")] = False,
    state: State = None,
    json: Json = False,
) -> None:
    """Put the store under another root key, when enough present shares were shown and enough new ones handed in.

    `unseal --rekey NAME` shows a present share, `unseal` hands a new one in. Old shares, or the old passphrase, open
    nothing from then on but backups that were made before.
    """
    output = Output(as_json=json)
    if file:
        if threshold or shares or holder or passphrase:
            raise _usage("--file goes with no other choice", "a store has one root key")

        async def replace(session: Session) -> dict[str, Any]:
            client = await _client(session)
            await client.rekey_file()
            return _document(await client.status())

        output.item(in_session(state, replace))
        return
    wanted = _Wanted.of(threshold, shares, holder, out, passphrase=passphrase)

    async def work(session: Session) -> tuple[list[SealedShare], str]:
        client = await _client(session)
        if wanted.passphrase is not None:
            return [], await client.rekey_with_passphrase(wanted.passphrase)
        return await client.rekey(wanted.public_keys, threshold=wanted.threshold)

    sealed, name = in_session(state, work)
    then = f"show the present root key: cloister broker unseal --rekey {name}; then hand the new one in: {_UNSEAL}"
    wanted.give(sealed, output, then=then, rekey=name)


@app.command()
def backup(
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write; replaced when it is there.")],
    state: State = None,
    json: Json = False,
) -> None:
    """Save the whole store as it is now. Key material in it stays wrapped: keep the shares elsewhere."""
    from cloister.atomicfile import AtomicFile

    target = out.resolve()

    async def work(session: Session) -> int:
        client, size = await _client(session), 0
        with AtomicFile(target) as file:
            async for chunk in client.backup():
                size += file.write(chunk)
        return size

    size = in_session(state, work)
    Output(as_json=json).item({"file": str(target), "bytes": size})


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Made by `cloister broker backup`.")],
    state_dir: Annotated[Path, typer.Option("--state-dir", help="service.state_dir of the broker; without a store.")],
    root_key_file: Annotated[
        Path | None, typer.Option("--root-key-file", help="Where the root key is a file: verify everything now.")
    ] = None,
    json: Json = False,
) -> None:
    """Put a backup in place on the broker's machine, while the broker does not run."""
    import subprocess

    command = [sys.executable, "-m", "cloister_keybroker", "restore", str(existing_file(file, what="the backup"))]
    command += ["--state-dir", str(state_dir.resolve())]
    command += ["--root-key-file", str(root_key_file.resolve())] if root_key_file else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise _from_text(done.stderr)
    Output(as_json=json).item(dict(line.split(": ", 1) for line in done.stdout.splitlines()))


@app.command()
def migrate(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Key versions of one call to the broker.")] = 100,
    state: State = None,
    json: Json = False,
) -> None:
    """Bring every key version to the back end of the broker's configuration. Sealed data stays as it is."""
    output = Output(as_json=json)

    async def work(session: Session) -> dict[str, Any]:
        client, migrated = await _client(session), 0
        while True:
            answer = await client.migrate(limit=limit)
            migrated += answer.migrated
            if not answer.left or not answer.migrated:
                return {"migrated": migrated, "left": answer.left}
            output.note(f"{migrated} moved, {answer.left} left")

    output.item(in_session(state, work))


class _Wanted:
    """What the new root key is to come from."""

    def __init__(
        self, threshold: int, holders: list[Path], count: int, out: Path | None, passphrase: SecretBytes | None
    ) -> None:
        from cloister.guest.operator import OwnHolders
        from cloister.holderkey import read_holder_public

        self.threshold = threshold
        self.passphrase = passphrase
        self._out = out
        self._own = None if holders else OwnHolders(count)
        self.public_keys = [read_holder_public(path) for path in holders] if holders else self._public_keys()

    @classmethod
    def of(
        cls, threshold: int, shares: int, holders: list[Path] | None, out: Path | None, *, passphrase: bool
    ) -> _Wanted:
        """Check that it is one thing, and ask for the passphrase if it is that."""
        if sum((bool(shares), bool(holders), passphrase)) != 1:
            raise _usage(
                "it is not clear what the root key is to come from",
                "give --shares N, --holder FILE.pub, or --passphrase",
            )
        if passphrase:
            if threshold:
                raise _usage("a passphrase has no threshold", "--threshold is for shares")
            return cls(0, [], 0, None, _new_passphrase())
        if bool(holders) != (out is not None):
            raise _usage("--holder and --out belong together", "sealed shares go into files, others on the screen")
        if not threshold:
            raise _usage("--threshold is missing", "it says how many of the shares unseal")
        return cls(threshold, holders or [], shares, out, None)

    def give(self, sealed: list[SealedShare], output: Output, *, then: str, **more: str) -> None:
        """Write sealed shares into their files, or show those that were made for this machine."""
        if self.passphrase is not None:
            output.item({"source": "passphrase", **more})
        elif self._out is not None:
            self._write(sealed, self._out, output, more)
        elif self._own is not None:
            _show(self._own.open(sealed), self.threshold, output, more)
        output.note(f"next: {then}")

    def _public_keys(self) -> list[bytes]:
        return self._own.public_keys if self._own else []

    def _write(self, sealed: list[SealedShare], directory: Path, output: Output, more: dict[str, str]) -> None:
        from cloister.atomicfile import write_atomically

        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        files = []
        for share in sealed:
            file = directory.resolve() / f"share-{share.number}-of-{share.count}.json"
            write_atomically(file, share.to_bytes())
            files.append({"number": share.number, "file": str(file)})
        output.rows("shares", files, ("number", "file"), empty="no shares", **more)


def _show(shares: list[Share], threshold: int, output: Output, more: dict[str, str]) -> None:
    """Print shares: here and nowhere else, once."""
    rows = [{"number": share.number, "words": share.words.reveal().decode("ascii")} for share in shares]
    output.note(f"{threshold} of these {len(rows)} unseal the broker. They are shown once: give each to another person")

    def render(console: Console) -> None:
        for row in rows:
            console.print(f"share {row['number']}: {row['words']}", markup=False, soft_wrap=True)

    output.result({"threshold": threshold, "shares": rows, **more}, render)


def _new_passphrase() -> SecretBytes:
    first = _secret("New passphrase: ")
    if sys.stdin.isatty() and _secret("Again: ") != first:
        raise _usage("the passphrases differ", "nothing was changed")
    return first


def _secret(prompt: str) -> SecretBytes:
    """Read one line without showing it, or from stdin where that is no terminal."""
    import getpass

    from cloister.secret import SecretBytes

    line = getpass.getpass(prompt) if sys.stdin.isatty() else sys.stdin.readline(_MAX_LINE)
    text = line.strip()
    if not text:
        raise _usage("nothing was handed in", "the line is empty")
    return SecretBytes(text.encode())


async def _client(session: Session) -> OperatorClient:
    from cloister.cli.trust import verify_services
    from cloister.guest.operator import OperatorClient

    verified = (await verify_services(session, ("keybroker",)))["keybroker"]
    return OperatorClient(session.credentials, verified)


def _document(status: pb.GetSealStatusResponse) -> dict[str, Any]:
    return {
        "state": _STATES.get(status.state, "unknown"),
        "source": status.source,
        "have": status.have,
        "need": status.need,
    }


def _from_text(text: str) -> CloisterError:
    """Return the error that another program of ours printed in three lines."""
    from cloister.errors import code_from_text

    first, *rest = [line for line in text.splitlines() if line] or ["", ""]
    code, _, what = first.partition(": ")
    why, todo = [*rest, "", ""][:2]
    return CloisterError(code_from_text(code) or Code.IO_FAILED, what=what or first, why=why, todo=todo)


def _usage(what: str, why: str) -> CloisterError:
    return CloisterError(Code.ARGUMENT_INVALID, what=what, why=why, todo="see: cloister broker --help")
