# SPDX-License-Identifier: Apache-2.0
"""`cloister key`: keys of the broker and the policies that say which attested workload may have them."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cloister.cli.options import Json, Receipt, State, existing_file, in_session, state_directory
from cloister.cli.output import Output
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from cloister.cli.session import Session
    from cloister.guest.ownerkeys import OwnerKeyClient

app = typer.Typer(help="Keys of the broker and their release policies.", no_args_is_help=True)


class PurposeName(enum.StrEnum):
    """What a key may be released for."""

    TRAIN = "train"
    SERVE = "serve"
    EVALUATE = "evaluate"
    EXPORT = "export"


KeyArgument = Annotated[str, typer.Argument(metavar="URI", help="cloister-key://<tenant>/<path>")]
COLUMNS: Final = ("uri", "version", "state", "purposes", "policy_version", "backend", "owner")
_POLICY_HELP: Final = "Release policy, YAML or a signed envelope; none releases nothing."


@app.command()
def create(
    uri: KeyArgument,
    purpose: Annotated[
        list[PurposeName] | None, typer.Option("--purpose", help="May be repeated; default: the policy's purposes.")
    ] = None,
    policy: Annotated[Path | None, typer.Option("--policy", help=_POLICY_HELP)] = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Create a key, and sign what it is with your signing key, which is bound to it for good.

    The broker's evidence is verified on this machine first: its quote, its keys, and the code it runs.
    """
    content = existing_file(policy, what="the policy").read_bytes() if policy else b""
    purposes = [p.value for p in purpose or []] or purposes_of(content)
    output = Output(as_json=json)

    async def work(session: Session) -> dict[str, Any]:
        key = await create_key(session, uri, purposes=purposes, policy=content)
        _note_verified(session, output)
        return key

    output.item(in_session(state, work))


@app.command(name="import")
def import_(
    uri: KeyArgument,
    material: Annotated[
        Path, typer.Option("--from", help="File (0600) with 32 bytes of key material, or 64 hexadecimal digits.")
    ],
    purpose: Annotated[
        list[PurposeName] | None, typer.Option("--purpose", help="May be repeated; default: the policy's purposes.")
    ] = None,
    policy: Annotated[Path | None, typer.Option("--policy", help=_POLICY_HELP)] = None,
    receipt: Receipt = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Create a key from your own material: sealed here to the broker that was verified, and to no other."""
    from cloister.cli.material import read_key_material

    secret = read_key_material(material)
    content = existing_file(policy, what="the policy").read_bytes() if policy else b""
    purposes = [p.value for p in purpose or []] or purposes_of(content)
    output = Output(as_json=json)

    async def work(session: Session) -> dict[str, Any]:
        from cloister.cli.trust import owner_keys

        client = await owner_keys(session)
        key = await client.import_key(uri, secret, purposes=purposes, policy=content)
        _note_verified(session, output)
        return key_document(key)

    output.item(in_session(state, work, receipts=receipt))


@app.command(name="list")
def list_(state: State = None, json: Json = False) -> None:
    """List your keys."""

    async def work(session: Session) -> list[dict[str, Any]]:
        return await list_keys(session)

    found = in_session(state, work)
    Output(as_json=json).rows("keys", found, COLUMNS, empty="no keys yet: cloister key create URI --purpose train")


@app.command()
def show(uri: KeyArgument, state: State = None, json: Json = False) -> None:
    """Show one key."""
    _one(state, json, lambda client: client.show(uri))


@app.command()
def signer(state: State = None, json: Json = False) -> None:
    """Print the name (did:key) of your signing key, which this makes when there is none yet.

    Back the file up: without it no policy of your keys changes any more, and data opens on your own machine no more.
    """
    from cloister.cli.signer import signing_key
    from cloister.didkey import did_key

    directory = state_directory(state).create()
    name = did_key(signing_key(directory))
    Output(as_json=json).stream({"signer": name, "file": str(directory.signing_key)}, name)


@app.command()
def enable(uri: KeyArgument, state: State = None, json: Json = False) -> None:
    """Let a disabled key be released again."""
    _one(state, json, lambda client: client.enable(uri))


@app.command()
def disable(uri: KeyArgument, state: State = None, json: Json = False) -> None:
    """Release a key to nobody until it is enabled again. What already holds it keeps it until its lease ends."""
    _one(state, json, lambda client: client.disable(uri))


@app.command()
def rotate(uri: KeyArgument, state: State = None, json: Json = False) -> None:
    """Make a new version of a key; what older versions sealed still opens."""
    _one(state, json, lambda client: client.rotate(uri))


@app.command()
def retire(
    uri: KeyArgument,
    before: Annotated[int, typer.Option("--before", min=2, help="Oldest version that shall still open data.")],
    state: State = None,
    json: Json = False,
) -> None:
    """Let old versions of a key open nothing any more, for good; re-wrap what they sealed first."""
    _one(state, json, lambda client: client.retire(uri, before))


@app.command()
def destroy(
    uri: KeyArgument,
    days: Annotated[int, typer.Option(min=1, max=365, help="Waiting period, within which it can be called off.")] = 30,
    state: State = None,
    json: Json = False,
) -> None:
    """Release a key to nobody from now on, and destroy it when the waiting period is over.

    What it sealed cannot be opened by anybody after that. `cloister key restore` calls it off until then.
    """
    _one(state, json, lambda client: client.schedule_destruction(uri, waiting_period_s=days * 86_400))


@app.command()
def restore(uri: KeyArgument, state: State = None, json: Json = False) -> None:
    """Call the destruction of a key off; it is disabled then, `cloister key enable` puts it to use again."""
    _one(state, json, lambda client: client.cancel_destruction(uri))


@app.command()
def policy(
    uri: KeyArgument,
    put: Annotated[
        Path | None, typer.Option("--put", help="Sign this policy (YAML or an envelope) and put it in force.")
    ] = None,
    withdraw: Annotated[
        bool, typer.Option("--withdraw", help="Release nothing until a signed successor is put in force.")
    ] = False,
    state: State = None,
    json: Json = False,
) -> None:
    """Show a key's newest release policy, put another one in force, or withdraw it."""
    if put and withdraw:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what="--put and --withdraw do not go together",
            why="the one puts a policy in force, the other takes it out of force",
            todo="give one of them",
        )
    new = existing_file(put, what="the policy").read_bytes() if put else None

    async def work(session: Session) -> dict[str, Any]:
        from cloister.cli.trust import owner_keys

        client = await owner_keys(session)
        if new is not None:
            return key_document(await client.put_policy(uri, new))
        if withdraw:
            return key_document(await client.withdraw_policy(uri))
        answer = await client.policy(uri)
        digest = f"sha384:{answer.digest.hex()}" if answer.version else ""
        return {"version": answer.version, "digest": digest, "policy": answer.policy_yaml.decode(errors="replace")}

    document = in_session(state, work)
    output = Output(as_json=json)
    if "policy" in document and not json:
        output.note(f"version {document['version']}, {document['digest']}")
        output.stream(document, document["policy"].rstrip("\n"))
    else:
        output.item(document)


@app.command(name="draft-policy")
def draft_policy(
    uri: KeyArgument,
    purpose: Annotated[list[PurposeName], typer.Option("--purpose", help="May be given several times.")],
    script: Annotated[
        list[Path] | None, typer.Option("--script", help="Scripts that may hold the key; default: the built-in job.")
    ] = None,
    simulated: Annotated[bool, typer.Option("--simulated", help="Let evidence of simulated TDs pass.")] = False,
    state: State = None,
    json: Json = False,
) -> None:
    """Print a strict policy for your own jobs and models to start from; needs no running broker."""
    from cloister.cli.measure import digest_of_file, environment_digest, handler_path, job_script_path
    from cloister.cli.policyfile import PolicyDraft
    from cloister.cli.state import read_stack
    from cloister.keyuri import KeyUri

    key = KeyUri.parse(uri)
    stack = read_stack(state_directory(state))
    domain, purposes = stack.trust_domain, [p.value for p in purpose]
    serves = PurposeName.SERVE in purpose
    scripts = [existing_file(path, what="the script") for path in script or []] or [job_script_path()]
    globs = [f"spiffe://{domain}/ns/{key.tenant}/job/*/rank/*"] if PurposeName.TRAIN in purpose else []
    draft = PolicyDraft(
        name=re.sub(r"[^a-z0-9]+", "-", key.path.rpartition("/")[2].lower()).strip("-") or "key",
        owner=stack.user,
        key_uri=uri,
        purposes=purposes,
        scripts=[digest_of_file(path) for path in (*scripts, *([handler_path()] if serves else []))],
        identities=globs + ([f"spiffe://{domain}/ns/{key.tenant}/model/*/backend/*"] if serves else []),
        environments=[environment_digest()],
        simulated=simulated,
    )
    text = draft.to_yaml()
    Output(as_json=json).stream({"uri": uri, "policy": text}, text.rstrip("\n"))


@app.command()
def decisions(
    uri: Annotated[str, typer.Option("--key", help="Only decisions about this key.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many, newest first.")] = 20,
    state: State = None,
    json: Json = False,
) -> None:
    """List what the broker decided about your keys, newest first: every release, granted or not, and why."""

    async def work(session: Session) -> list[dict[str, Any]]:
        return await list_decisions(session, limit=limit, key_uri=uri)

    columns = ("index", "time", "action", "granted", "key_uri", "caller", "failed")
    Output(as_json=json).rows("decisions", in_session(state, work), columns, empty="no decisions yet")


async def create_key(session: Session, uri: str, *, purposes: list[str], policy: bytes) -> dict[str, Any]:
    """Create a key at a broker whose evidence has been verified here; return its document."""
    from cloister.cli.trust import owner_keys
    from cloister.keyuri import KeyUri

    KeyUri.parse(uri)
    client = await owner_keys(session)
    return key_document(await client.create_key(uri, purposes=purposes, policy=policy))


def purposes_of(policy: bytes) -> list[str]:
    """Return the purposes that a policy (YAML or envelope) names; raise CloisterError when there are none."""
    from cloister.dsse import Envelope
    from cloister.provisioning import is_envelope
    from cloister.strictyaml import StrictYamlError, load

    why = "a key has at least one purpose"
    text = Envelope.parse(policy).payload if is_envelope(policy) else policy
    try:
        found: Any = load(text).root if text else {}
        purposes = found["spec"]["key"]["purposes"]
        if isinstance(purposes, list):
            return [PurposeName(name).value for name in purposes]
    except StrictYamlError as error:
        why = str(error)
    except (KeyError, TypeError, ValueError):
        why = "the policy names no purposes that a key can have"
    raise CloisterError(
        Code.ARGUMENT_INVALID,
        what="it is not clear what the key is for",
        why=why,
        todo="give --purpose train, serve, evaluate or export, or a policy with spec.key.purposes",
    )


async def list_keys(session: Session) -> list[dict[str, Any]]:
    """Return every key of the caller's, all pages."""
    from cloister.cli.trust import owner_keys

    return [key_document(key) for key in await (await owner_keys(session)).list()]


async def list_decisions(session: Session, *, limit: int, key_uri: str = "") -> list[dict[str, Any]]:
    """Return decisions of the broker's log, newest first, as documents."""
    from cloister.api.keybroker.v1 import keybroker_pb2, keybroker_pb2_grpc

    answer = await session.call(
        keybroker_pb2_grpc.DecisionLogServiceStub(session.channel("keybroker")).ListDecisions,
        keybroker_pb2.ListDecisionsRequest(limit=limit, key_uri=key_uri),
        what="reading the decision log",
    )
    return [
        {
            "index": decision.index,
            "time": _time(decision.time_unix_ms),
            "action": decision.action,
            "key_uri": decision.key_uri,
            "caller": decision.caller,
            "granted": decision.granted,
            "failed": [block.name for block in decision.blocks if not block.ok],
            "blocks": [
                {"name": block.name, "ok": block.ok, "wanted": block.wanted, "got": block.got}
                for block in decision.blocks
            ],
        }
        for decision in answer.decisions
    ]


def key_document(key: Any) -> dict[str, Any]:
    """Return a key as JSON output shows it."""
    from cloister.api.keybroker.v1 import keybroker_pb2

    return {
        "uri": key.uri,
        "version": key.version,
        "state": keybroker_pb2.KeyState.Name(key.state).removeprefix("KEY_STATE_").lower().replace("_", "-"),
        "purposes": [keybroker_pb2.Purpose.Name(p).removeprefix("PURPOSE_").lower() for p in key.purposes],
        "owner": key.owner,
        "created": _time(key.created_unix_ms),
        "policy_version": key.policy_version,
        "policy_digest": f"sha384:{key.policy_digest.hex()}" if key.policy_digest else "",
        "policy_withdrawn": key.policy_withdrawn,
        "min_version": key.min_version,
        "destroy_at": _time(key.destroy_at_unix_ms) if key.destroy_at_unix_ms else "",
        "signer": key.signer,
        "backend": key.backend,
        "imported": key.imported,
    }


def _one(state: Path | None, json: bool, ask: Callable[[OwnerKeyClient], Coroutine[Any, Any, Any]]) -> None:
    async def work(session: Session) -> dict[str, Any]:
        from cloister.cli.trust import owner_keys

        return key_document(await ask(await owner_keys(session)))

    Output(as_json=json).item(in_session(state, work))


def _note_verified(session: Session, output: Output) -> None:
    for service, found in session.verified.items():
        output.note(f"verified {service}: {len(found.checks)} checks of its evidence, here")


def _time(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="milliseconds")
