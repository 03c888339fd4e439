# SPDX-License-Identifier: Apache-2.0
"""Job descriptions: what is taken, and that everything else is refused by the name of its field."""

from collections.abc import Callable

import pytest

from cloister.api.trainer.v1 import trainer_pb2 as pb
from cloister.errors import CloisterError, Code
from cloister.protocol import JobInput, job_config_digest
from cloister.tlv import sha384
from cloister_trainer.spec import MAX_SCRIPT_BYTES, parse_request_id, parse_spec
from cloister_trainer.wire import spec_message

DIGEST = b"\x11" * 48


def message() -> pb.JobSpec:
    return pb.JobSpec(
        name="reviews-1",
        script=b"print(1)",
        args=["--epochs", "2"],
        nodes=2,
        seed=2**64 - 1,
        cores=[1, 0],
        inputs=[
            pb.SealedInput(
                name="reviews", uri="file:///data/with%20space", key_uri="cloister-key://lab/d", manifest_digest=DIGEST
            )
        ],
        output=pb.SealedOutput(uri="file:///out", key_uri="cloister-key://lab/m"),
    )


def test_a_description_is_parsed_and_given_back_unchanged() -> None:
    spec = parse_spec(message())
    assert str(spec.inputs[0].directory) == "/data/with space"
    assert spec.cores == (1, 0)
    assert spec_message(spec) == message()


def test_the_digests_are_those_that_ranks_measure() -> None:
    spec = parse_spec(message())
    assert spec.script_digest == sha384(b"print(1)")
    assert spec.config_digest == job_config_digest(
        args=["--epochs", "2"],
        nodes=2,
        seed=2**64 - 1,
        inputs=[JobInput("reviews", "cloister-key://lab/d", DIGEST)],
        output_key_uri="cloister-key://lab/m",
    )


def test_name_cores_inputs_and_output_may_be_left_out() -> None:
    spec = parse_spec(pb.JobSpec(script=b"x", nodes=1))
    assert (spec.name, spec.cores, spec.inputs, spec.output) == ("job", (), (), None)


def changed(change: Callable[[pb.JobSpec], object]) -> pb.JobSpec:
    spec = message()
    change(spec)
    return spec


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("name", lambda s: setattr(s, "name", "Not A Name")),
        ("script", lambda s: setattr(s, "script", b"")),
        ("script", lambda s: setattr(s, "script", b"x" * (MAX_SCRIPT_BYTES + 1))),
        ("nodes", lambda s: setattr(s, "nodes", 0)),
        ("nodes", lambda s: setattr(s, "nodes", 65)),
        ("args", lambda s: s.args.extend(["x"] * 300)),
        ("args", lambda s: s.args.append("x" * 70_000)),
        ("args", lambda s: s.args.append("a\0b")),
        ("inputs", lambda s: s.inputs.append(s.inputs[0])),
        ("inputs", lambda s: s.inputs.extend([s.inputs[0]] * 40)),
        ("inputs[0].name", lambda s: setattr(s.inputs[0], "name", "../x")),
        ("inputs[0].uri", lambda s: setattr(s.inputs[0], "uri", "/data")),
        ("inputs[0].uri", lambda s: setattr(s.inputs[0], "uri", "file://host/data")),
        ("inputs[0].uri", lambda s: setattr(s.inputs[0], "uri", "file:///data/../../etc")),
        ("inputs[0].uri", lambda s: setattr(s.inputs[0], "uri", "file:///data%00")),
        ("inputs[0].uri", lambda s: setattr(s.inputs[0], "uri", "file:///data/%2e%2e/etc")),
        ("inputs[0].uri", lambda s: setattr(s.inputs[0], "uri", "s3://bucket/data")),
        ("inputs[0].uri", lambda s: setattr(s.inputs[0], "uri", "file:///" + "x" * 5000)),
        ("inputs[0].key_uri", lambda s: setattr(s.inputs[0], "key_uri", "key")),
        ("inputs[0].manifest_digest", lambda s: setattr(s.inputs[0], "manifest_digest", b"short")),
        ("output.uri", lambda s: setattr(s.output, "uri", "out")),
        ("output.uri", lambda s: setattr(s.output, "uri", "file:///data/with%20space/out")),
        ("output.key_uri", lambda s: setattr(s.output, "key_uri", "")),
        ("cores", lambda s: s.cores.append(2)),
        ("cores", lambda s: s.cores.__setitem__(slice(None), [1, 1])),
        ("cores", lambda s: s.cores.__setitem__(slice(None), [1, 70_000])),
    ],
)
def test_a_description_that_is_not_allowed_is_refused_by_field(
    field: str, change: Callable[[pb.JobSpec], object]
) -> None:
    with pytest.raises(CloisterError) as caught:
        parse_spec(changed(change))
    assert caught.value.code is Code.JOB_SPEC_INVALID
    assert caught.value.what == f"the job cannot be run: {field} is not allowed"
    assert caught.value.why
    assert caught.value.todo


@pytest.mark.parametrize("text", ["x" * 65, "line\nbreak"])
def test_a_request_id_that_is_too_long_or_not_printable_is_refused(text: str) -> None:
    with pytest.raises(CloisterError, match="client_request_id"):
        parse_request_id(text)
    assert parse_request_id("") == ""
