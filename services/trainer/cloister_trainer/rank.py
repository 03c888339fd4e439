# SPDX-License-Identifier: Apache-2.0
"""One rank: `python -m cloister_trainer.rank --spec FILE --lifeline-fd N`, started by the coordinator.

  1. pin to the core, read script and trust bundle once
  2. measure: environment, trust bundle, script, configuration, rank, each input's manifest; seal; make keys
  3. enrol with attest: it compares the measurements with the registered job
  4. get a data key for each input, sealed to this TD; rank 0 also those for the output; open the inputs
  5. execute the script: the measured bytes, not the file; meanwhile the leases on the keys are renewed, and the rank
     ends when one of them does

Whatever fails is reported with code, reason and remedy: to the coordinator once there is an identity to speak with,
before that in a file. Tracebacks go to the rank's log without local variables.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Final, NoReturn

import cloister.train
from cloister.atomicfile import write_atomically
from cloister.data import guard_plaintext, keyring
from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Identity
from cloister.guest.guest import Guest
from cloister.guest.keys import KeyClient
from cloister.guest.measure import digest_of_environment, read_measured
from cloister.identity import Role
from cloister.protocol import JobInput, job_config_digest
from cloister.runtime import logging as cloister_logging
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.channel import open_channel
from cloister.runtime.process import harden, lifeline, pin_to_cores
from cloister.sealed.datakey import DataKey
from cloister.sealed.directory import Peek, SealedDirectory
from cloister.tdx.workload import DatasetClaim, RankClaim, WorkloadPlan
from cloister.train.job import Job
from cloister.train.output import Output
from cloister_trainer.rankkeyring import RankKeyring
from cloister_trainer.ranklink import LoopThread, RankLink
from cloister_trainer.rankspec import RankInput, RankSpec
from cloister_trainer.script import run_script

_PURPOSE: Final = "train"
_FAILED: Final = 70  # EX_SOFTWARE of sysexits.h


class Rank:
    """The rank of this process, step by step."""

    def __init__(self, spec: RankSpec, loop: LoopThread) -> None:
        self._spec = spec
        self._loop = loop
        self.link: RankLink | None = None

    def run(self) -> None:
        """Do the five steps; raise CloisterError for whatever stops them."""
        spec = self._spec
        pin_to_cores([spec.core])
        script = read_measured(Path(spec.script_file))
        bundle = TrustBundle.parse(read_measured(Path(spec.trust_bundle_file)).data)
        began = time.monotonic()
        peeks = {entry.name: _peek(entry) for entry in spec.inputs}
        guest = Guest.open(spec.provider)
        self._measure(guest, script.digest, bundle, peeks)
        measured_s = time.monotonic() - began
        began = time.monotonic()
        identity, link = self._loop.run(self._enrol(guest, bundle))
        self.link = link
        link.start()
        link.message("measured", f"script sha384:{script.digest.hex()[:16]}...", measured_s)
        link.message("enrolled", str(identity.spiffe_id), time.monotonic() - began)

        began = time.monotonic()
        keys = KeyClient(
            identity,
            spec.keybroker_endpoint,
            on_waiting=lambda error: link.message("waiting", f"for approvals: {error.why}", time.monotonic() - began),
        )
        self._loop.start(self._keep_leases(keys))
        inputs = {entry.name: self._open(entry, peeks[entry.name], keys) for entry in spec.inputs}
        output_keys = self._output_keys(keys)
        if inputs or output_keys:
            text = f"{len(inputs) + len(output_keys)} data keys, each sealed to this rank"
            link.message("key-released", text, time.monotonic() - began)
        self._execute(script.data, inputs, output_keys, keys, link)
        link.flush()

    def _measure(self, guest: Guest, script: bytes, bundle: TrustBundle, peeks: dict[str, Peek]) -> None:
        spec = self._spec
        config = job_config_digest(
            args=spec.args,
            nodes=spec.world_size,
            seed=spec.seed,
            inputs=[JobInput(i.name, i.key_uri, peeks[i.name].manifest_digest) for i in spec.inputs],
            output_key_uri=spec.output_key_uri,
        )
        guest.run_as(
            WorkloadPlan(
                role=Role.RANK,
                environment=digest_of_environment(),
                trust_bundle=bundle.digest,
                script=script,
                config=config,
                rank=RankClaim(spec.tenant, spec.job_id, spec.rank, spec.world_size),
                datasets=tuple(DatasetClaim(name, peek.manifest_digest) for name, peek in peeks.items()),
            )
        )

    async def _enrol(self, guest: Guest, bundle: TrustBundle) -> tuple[Identity, RankLink]:
        identity = await Identity.enrol(guest, attest_endpoint=self._spec.attest_endpoint, bundle=bundle)
        identity.start_renewal()
        channel = open_channel(self._spec.trainer_endpoint, role=Role.TRAINER, credentials=identity)
        return identity, RankLink(self._loop, channel)

    async def _keep_leases(self, keys: KeyClient) -> None:
        """End the rank, whatever its script is at, when a lease on what it holds ends."""
        try:
            await keys.keep_leases()
        except CloisterError as error:
            await asyncio.to_thread(_report, self, self._spec, error)
            sys.stdout.flush()
            os._exit(_FAILED)

    def _release(self, keys: KeyClient, key_uri: str, peek: Peek | None = None) -> DataKey:
        wrapped, version = (peek.wrapped, peek.key_version) if peek else (None, 0)
        return self._loop.run(keys.release(key_uri, _PURPOSE, wrapped=wrapped, key_version=version))

    def _open(self, entry: RankInput, peek: Peek, keys: KeyClient) -> SealedDirectory:
        data_key = self._release(keys, entry.key_uri, peek)
        # Once more by digest: what was measured is what is read, even if the directory was swapped meanwhile.
        return SealedDirectory.open(Path(entry.directory), data_key=data_key, manifest_digest=peek.manifest_digest)

    def _output_keys(self, keys: KeyClient) -> list[DataKey]:
        """Return a key for the model and one for checkpoints; only rank 0 writes, so only rank 0 gets them."""
        if self._spec.rank != 0 or not self._spec.output_directory:
            return []
        return [self._release(keys, self._spec.output_key_uri) for _ in ("model", "checkpoints")]

    def _execute(
        self,
        script: bytes,
        inputs: dict[str, SealedDirectory],
        output_keys: list[DataKey],
        keys: KeyClient,
        link: RankLink,
    ) -> None:
        spec = self._spec
        output = None
        if output_keys:
            model_key, checkpoint_key = output_keys
            output = Output(
                Path(spec.output_directory),
                name=spec.output_key_uri,
                model_key=model_key,
                checkpoint_key=checkpoint_key,
                open_key=lambda peek: self._release(keys, peek.key_uri, peek),
                announcer=link,
            )
            output.require_room_for_a_model()
        keyring.activate(RankKeyring(lambda uri, peek: self._release(keys, uri, peek), spec.output_key_uri))
        guard_plaintext()
        cloister.train.activate(
            Job(
                rank=spec.rank,
                world_size=spec.world_size,
                seed=spec.seed,
                args=spec.args,
                inputs=inputs,
                reporter=link,
                sealed_output=output,
                join=lambda: self._join(link),
            )
        )
        link.message("running", f"{spec.script_name} on core {spec.core}", 0.0)
        run_script(script, name=spec.script_name, args=spec.args)

    def _join(self, link: RankLink) -> None:
        # Torch takes seconds to import: only scripts that train pay for it, and nothing that is refused before.
        import torch

        from cloister.train.store import join_process_group

        torch.set_num_threads(1)
        timeout = timedelta(seconds=self._spec.collective_timeout_s)
        join_process_group(link, rank=self._spec.rank, world_size=self._spec.world_size, timeout=timeout)


def _peek(entry: RankInput) -> Peek:
    """Read what lies in an input's directory; refuse it when it is not what the job was submitted with."""
    peek = SealedDirectory.peek(Path(entry.directory))
    if peek.manifest_digest.hex() != entry.manifest_digest or peek.key_uri != entry.key_uri:
        raise CloisterError(
            Code.SEALED_DIRECTORY_MISMATCH,
            what=f"input {entry.name} is not what the job was submitted with",
            why=f"its manifest is sha384:{peek.manifest_digest.hex()[:16]}..., "
            f"the job names sha384:{entry.manifest_digest[:16]}...",
            todo="put the data back as it was sealed, or submit the job anew with what is there now",
        )
    return peek


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the rank and end the process; exit code 0 means that the script returned."""
    parser = argparse.ArgumentParser(prog="python -m cloister_trainer.rank")
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--lifeline-fd", type=int, required=True)
    arguments = parser.parse_args(argv)
    cloister_logging.configure("rank", "text")
    lifeline(arguments.lifeline_fd)
    harden()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    spec = RankSpec.read(arguments.spec)
    rank = Rank(spec, LoopThread())
    code = 0
    try:
        rank.run()
    except CloisterError as error:
        _report(rank, spec, error)
        code = _FAILED
    except Exception as error:  # noqa: BLE001 - the last place that can say why this rank ends
        traceback.print_exception(error)
        _report(rank, spec, CloisterError(Code.RANK_FAILED, what="met an unexpected error", why=type(error).__name__))
        code = _FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's end: neither a thread of the script nor torch's teardown may keep a rank alive.
    os._exit(code)


def _report(rank: Rank, spec: RankSpec, error: CloisterError) -> None:
    print(error, file=sys.stderr)  # noqa: T201 - the rank's log
    if rank.link is not None:
        rank.link.failure(error)
        return
    texts = {"code": error.code.text, "what": error.what, "why": error.why, "todo": error.todo}
    write_atomically(Path(spec.failure_file), json.dumps(texts).encode())


if __name__ == "__main__":
    main()
