# SPDX-License-Identifier: Apache-2.0
"""`cloister references`: signed sets of measurements that appraisal policies name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cloister.cli.options import Json, State, existing_file, state_directory
from cloister.cli.output import Output
from cloister.errors import CloisterError

app = typer.Typer(help="Signed sets of measurements that appraisal policies name.", no_args_is_help=True)


@app.command()
def sign(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Reference set (YAML), or its signed envelope.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Envelope to write; FILE itself may be named.")],
    signing_key: Annotated[
        Path | None, typer.Option("--signing-key", metavar="PEM", help="Ed25519 key; default: yours (key signer).")
    ] = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Sign a reference set, or add your signature to one that others signed.

    Attest takes a set only under a version that is not lower than before: raise `metadata.version` with every change.
    """
    from cloister.appraisal.references import PAYLOAD_TYPE, parse_reference_set
    from cloister.atomicfile import write_atomically
    from cloister.cli import signer
    from cloister.dsse import Envelope

    data = existing_file(file, what="the reference set").read_bytes()
    envelope = _envelope(data) or Envelope(PAYLOAD_TYPE, data, ())
    parse_reference_set(envelope.payload)
    if envelope.signatures:
        envelope.signers(PAYLOAD_TYPE)  # what does not verify is not made better by one more signature
    key = (
        signer.signing_key(state_directory(state).create())
        if signing_key is None
        else signer.read_signing_key(signing_key)
    )
    signed = envelope.signed_also_by(key)
    write_atomically(out.resolve(), signed.to_bytes(), mode=0o644)
    Output(as_json=json).item(_described(signed.payload) | {"signers": sorted(signed.signers(PAYLOAD_TYPE))})


@app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Signed reference set.")],
    signers: Annotated[
        list[str] | None, typer.Option("--signer", metavar="DID", help="Whose signatures count; may be repeated.")
    ] = None,
    threshold: Annotated[int, typer.Option("--threshold", min=1, help="So many of them.")] = 1,
    json: Json = False,
) -> None:
    """Verify a signed reference set and show what it holds; with --signer, accept it as attest would."""
    from cloister.appraisal.references import PAYLOAD_TYPE, open_reference_set, parse_reference_set
    from cloister.dsse import Envelope

    data = existing_file(file, what="the reference set").read_bytes()
    envelope = Envelope.parse(data)
    signed = envelope.signers(PAYLOAD_TYPE)
    if signers:
        name = parse_reference_set(envelope.payload).name
        open_reference_set(data, name=name, signers=signers, threshold=threshold)
    Output(as_json=json).item(_described(envelope.payload) | {"signers": sorted(signed)})


def _envelope(data: bytes) -> Any:
    """Return the envelope that these bytes are, None when they are none: then they are to be a set."""
    from cloister.dsse import Envelope

    try:
        return Envelope.parse(data)
    except CloisterError:
        return None


def _described(payload: bytes) -> dict[str, Any]:
    from cloister.appraisal.references import parse_reference_set
    from cloister.policyblocks import digest_text

    found = parse_reference_set(payload)
    values = {register: [value.hex() for value in values] for register, values in found.values.items()}
    return {"name": found.name, "version": found.version, "digest": digest_text(found.digest), **values}
