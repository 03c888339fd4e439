# SPDX-License-Identifier: Apache-2.0
"""The owner's own look at the broker's log: what was seen before is remembered, and nothing may contradict it."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from cloister.cli.session import Session
    from cloister.cli.state import StateDirectory
    from cloister.guest.decisionlog import LogClient, Look
    from cloister.transparency.checkpoint import Checkpoint
    from cloister.transparency.entry import LoggedEntry
    from cloister.transparency.note import NoteKey

_NOTE: Final = "\n\n\N{EM DASH} ".encode()  # what parts a note's text from its signatures
_MAX_FILE: Final = 1024 * 1024  # bytes of anything but an exported log


async def look_at_log(session: Session) -> tuple[LogClient, Look]:
    """Verify the broker, then its log against what this user saw last; remember what is seen now.

    Raises CloisterError: EVIDENCE_UNEXPECTED, LOG_INVALID, LOG_CONTRADICTED.
    """
    from cloister.cli.trust import verify_services
    from cloister.guest.decisionlog import LogClient
    from cloister.transparency.seen import Seen

    verified = (await verify_services(session, ("keybroker",)))["keybroker"]
    client = LogClient(session.channel("keybroker"))
    found = await client.look(
        receipt_spki_der=verified.evidence.receipt_spki_der, seen=Seen.load(session.state.seen_log)
    )
    found.seen.save(session.state.seen_log)
    return client, found


async def export_log(session: Session, write: Any) -> dict[str, Any]:
    """Write the whole log as it is now to `write`; return what it adds up to. The caller verifies what was written."""
    from cloister.transparency.logfile import write_end, write_header, write_leaf

    client, look = await look_at_log(session)
    write_header(write, look.seen.log)
    async for found in client.export():
        if isinstance(found, bytes):
            write_end(write, found)
        else:
            write_leaf(write, found)
    return {"log": str(look.seen.log)}


async def save_receipts(session: Session, path: Path) -> None:
    """Keep the receipts of this session with everything that proves them, one on each line."""
    from cloister.atomicfile import write_atomically

    if not session.receipts:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what="there is no receipt to keep",
            why="nothing was asked of the broker that it gives a receipt for",
            todo="leave --receipt out",
        )
    client, look = await look_at_log(session)
    documents = [await client.receipt_document(receipt, look) for receipt in session.receipts]
    write_atomically(path, b"".join(document.to_bytes() for document in documents))


def known_key(state: StateDirectory, given: str) -> NoteKey:
    """Return the log's key: the given one, or the remembered one. Without either nothing can be verified."""
    from cloister.transparency.note import NoteInvalid, NoteKey
    from cloister.transparency.seen import Seen

    if given:
        try:
            return NoteKey.parse(given)
        except NoteInvalid as error:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what="--log-key is not the key of a log",
                why=str(error),
                todo="give it as `cloister audit checkpoint` shows it: name+id+key",
            ) from None
    seen = Seen.load(state.seen_log)
    if seen is None:
        raise CloisterError(
            Code.PREREQUISITE_MISSING,
            what="the log's key is not known here",
            why=f"nothing was seen of a broker's log yet ({state.seen_log} is not there)",
            todo="give --log-key as `cloister audit checkpoint` shows it to who has verified the broker",
        )
    return seen.log


class Evidence:
    """Files about a log, verified together and offline."""

    def __init__(self, key: NoteKey) -> None:
        self.key = key
        self.results: list[dict[str, Any]] = []
        self._checkpoints: list[tuple[str, Checkpoint]] = []
        self._proofs: list[tuple[bytes, ...]] = []
        self._logs: list[Path] = []

    def add(self, path: Path) -> None:
        """Verify one file by itself; raise CloisterError for one that does not verify, or is nothing of this kind."""
        from cloister.transparency.documents import GROWTH_FORMAT, RECEIPT_FORMAT, GrowthDocument, ReceiptDocument
        from cloister.transparency.documents import format_of as document_format
        from cloister.transparency.logfile import LOG_FORMAT
        from cloister.transparency.proofs import open_checkpoint

        with path.open("rb") as file:
            first = file.readline(_MAX_FILE)
            found = document_format(first)
            if found == LOG_FORMAT:
                file.seek(0)
                self._add_log(path, file)
                return
            data = first + file.read(_MAX_FILE)
        if found == RECEIPT_FORMAT:
            for line in data.splitlines(keepends=True):
                checked = ReceiptDocument.parse(line).check(self.key)
                self._found(path, "receipt", log_size=checked.checkpoint.size, **entry_document(checked.logged))
        elif found == GROWTH_FORMAT:
            document = GrowthDocument.parse(data)
            old, new = document.check(self.key)
            self._proofs.append(document.proof)
            self._found(path, "proof of growth", old_size=old.size, log_size=new.size)
        elif _NOTE in data:
            checkpoint = open_checkpoint(data, self.key)
            self._checkpoints.append((path.name, checkpoint))
            self._found(path, "checkpoint", log_size=checkpoint.size, root=checkpoint.root.hex())
        else:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"{path} is nothing that can be verified",
                why="it is no exported log, receipt, proof or checkpoint",
                todo="name files that `cloister audit` or --receipt wrote",
            )

    def compare(self) -> None:
        """Verify that every two checkpoints are of one log that only grew."""
        from cloister.transparency.proofs import check_continues

        ordered = sorted(self._checkpoints, key=lambda named: named[1].size)
        for (old_name, old), (new_name, new) in itertools.pairwise(ordered):
            if old.size == new.size:
                check_continues(old, new, ())
            else:
                self._grown(old_name, old, new_name, new)
            self.results.append({"file": f"{old_name}, {new_name}", "what": "one log that only grew"})

    def _grown(self, old_name: str, old: Checkpoint, new_name: str, new: Checkpoint) -> None:
        from cloister.transparency.logfile import LogFile
        from cloister.transparency.proofs import check_continues

        for path in self._logs:
            roots = {old.size: b"", new.size: b""}
            with path.open("rb") as file:
                LogFile(file).check(self.key, at=roots)
            if roots[new.size]:
                for name, one in ((old_name, old), (new_name, new)):
                    if roots[one.size] != one.root:
                        raise CloisterError(
                            Code.LOG_CONTRADICTED,
                            what=f"{name} is not of the log in {path.name}",
                            why=f"its root is not the one of the first {one.size} entries",
                            todo="one of the two was signed for a forked or rewritten log: keep both",
                        )
                return
        failed: CloisterError | None = None
        for proof in self._proofs:
            try:
                check_continues(old, new, proof)
            except CloisterError as error:
                failed = error
            else:
                return
        if failed is not None:
            raise failed
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"nothing here says how {old_name} became {new_name}",
            why=f"they are of {old.size} and {new.size} entries: it takes a proof between them",
            todo=f"add one: cloister audit prove {old_name} {new_name} -o FILE; or an exported log",
        )

    def _add_log(self, path: Path, file: BinaryIO) -> None:
        from cloister.transparency.logfile import LogFile

        checked = LogFile(file).check(self.key)
        self._logs.append(path)
        self._found(
            path, "log", log_size=checked.checkpoint.size, readable=checked.entries, broker_starts=len(checked.starts)
        )

    def _found(self, path: Path, what: str, **facts: object) -> None:
        self.results.append({"file": path.name, "what": what, **facts})


def entry_document(logged: LoggedEntry) -> dict[str, Any]:
    """Return an entry as JSON output shows it."""
    entry = logged.entry
    return {
        "index": logged.index,
        "time": datetime.fromtimestamp(logged.time_ms / 1000, UTC).isoformat(timespec="milliseconds"),
        "action": entry.action,
        "granted": entry.granted,
        "key_uri": entry.key_uri,
        "key_version": entry.key_version,
        "purpose": entry.purpose,
        "caller": entry.caller,
        "job": entry.job,
        "channel": entry.channel,
        "request_id": entry.request_id,
        "policy_digest": entry.policy_digest.hex(),
        "evidence_digest": entry.evidence_digest.hex(),
        "wrapped_digest": entry.wrapped_digest.hex(),
        "record_digest": entry.record_digest.hex(),
        "detail": entry.detail.hex(),
        "blocks": [{"name": b.name, "ok": b.ok, "wanted": b.wanted, "got": b.got} for b in entry.blocks],
    }


def decision_document(decision: Any) -> dict[str, Any]:
    """Return a decision of a list as JSON output shows it."""
    return {
        "index": decision.index,
        "time": datetime.fromtimestamp(decision.time_unix_ms / 1000, UTC).isoformat(timespec="milliseconds"),
        "action": decision.action,
        "granted": decision.granted,
        "key_uri": decision.key_uri,
        "caller": decision.caller,
        "failed": [block.name for block in decision.blocks if not block.ok],
        "blocks": [{"name": b.name, "ok": b.ok, "wanted": b.wanted, "got": b.got} for b in decision.blocks],
    }
