# SPDX-License-Identifier: Apache-2.0
"""Strict YAML keeps every scalar text and refuses everything that could mean two things."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cloister.strictyaml import MAX_DEPTH, MAX_SIZE, StrictYamlError, Value, load, path_text

# JSON escapes what lies beyond U+FFFF as two surrogates, which YAML does not know.
BMP = st.characters(max_codepoint=0xFFFF, exclude_categories=("Cs",))
KEYS = st.text(BMP, min_size=1, max_size=12).filter(lambda key: key != "<<")
TEXTS = st.text(BMP, max_size=20)
VALUES = st.recursive(TEXTS, lambda v: st.lists(v, max_size=4) | st.dictionaries(KEYS, v, max_size=4), max_leaves=12)


def only_text(value: object) -> bool:
    if isinstance(value, list):
        return all(only_text(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and only_text(item) for key, item in value.items())
    return isinstance(value, str)


@pytest.mark.parametrize("scalar", ["no", "1", "1.0", "0x10", "2026-02-11", "true", "~", "null", "35d", "1:30"])
def test_a_scalar_stays_the_text_it_is(scalar: str) -> None:
    assert load(f"a: {scalar}\nb: [{scalar}]\n".encode()).root == {"a": scalar, "b": [scalar]}


def test_block_and_flow_style_say_the_same() -> None:
    block = b"spec:\n  key:\n    purposes:\n      - train\n      - serve\n"
    assert load(block).root == load(b"spec: {key: {purposes: [train, serve]}}").root


def test_values_know_their_lines() -> None:
    document = load(b"a:\n  b: x\n  c:\n    - one\n    - two\n")
    assert document.line_of(("a", "b")) == 2
    assert document.line_of(("a", "c", 1)) == 5
    assert document.line_of(("a", "missing", "deeper")) == 2  # of the nearest value above


def test_paths_read_like_people_write_them() -> None:
    assert path_text(("spec", "when", "tcb", "status", 0)) == "spec.when.tcb.status[0]"
    assert path_text(()) == "(document)"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 1\na: 2\n", "stands twice"),
        ("x: {a: 1, a: 1}\n", "stands twice"),
        ("a: &x 1\nb: *x\n", "anchors are refused"),
        ("a: *x\n", "aliases are refused"),
        ("a: !!str 1\n", "tags are refused"),
        ("a: !x {}\n", "tags are refused"),
        ("? !!str a\n: b\n", "tags are refused"),
        ("a: !!python/object/apply:os.system [ls]\n", "tags are refused"),
        ("<<: {a: b}\n", "merge keys are refused"),
        ("%YAML 1.1\n---\na: b\n", "directives are refused"),
        ("%TAG ! tag:x,2000:\n---\na: b\n", "directives are refused"),
        ("a: b\n---\nc: d\n", "second document"),
        ("a:\n", "a value is missing"),
        ("a: [x, , y]\n", "."),
        ("? [a, b]\n: c\n", "a key must be plain text"),
        ("? {a: b}\n: c\n", "a key must be plain text"),
        ("a: [b\n", "."),
        ("a: b: c\n", "."),
        ("\ta: b\n", "."),
        ("", "empty"),
        ("# only a comment\n", "empty"),
        ("\ufeffa: b\n", "byte order mark"),
        ('a: "\\ud800"\n', "escape sequence"),
        ('a: "\\UFFFFFFFF"\n', "escape sequence"),
        ('a: "\\q"\n', "."),
        ("a: \x07\n", "."),
        ("[" * 40 + "]" * 40, "nested deeper"),
        ("a: " + "b" * MAX_SIZE, "longer than"),
        ("[" + "a," * 9000 + "a]", "more than"),
    ],
)
def test_what_could_mean_two_things_is_refused(text: str, why: str) -> None:
    with pytest.raises(StrictYamlError, match=why):
        load(text.encode())


def test_a_refusal_names_its_line() -> None:
    with pytest.raises(StrictYamlError) as refused:
        load(b"a: 1\nb: 2\na: 3\n")
    assert refused.value.line == 3


def test_text_that_is_not_utf8_is_refused_with_its_line() -> None:
    with pytest.raises(StrictYamlError, match="not UTF-8") as refused:
        load(b"a: b\nc: \xff\n")
    assert refused.value.line == 2


def test_nesting_up_to_the_limit_is_fine() -> None:
    load(("[" * MAX_DEPTH + "a" + "]" * MAX_DEPTH).encode())
    with pytest.raises(StrictYamlError, match="nested"):
        load(("[" * (MAX_DEPTH + 1) + "a" + "]" * (MAX_DEPTH + 1)).encode())


@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=4))
def test_json_with_text_for_every_scalar_reads_back(value: dict[str, Value]) -> None:
    assert load(json.dumps(value).encode("utf-8")).root == value


@given(st.binary(max_size=300))
@example(b"{a: !!binary x}")
@example(b"- - - - ?")
@example(b"a: |\n  x\n ...\n")
def test_any_bytes_give_text_or_one_error(data: bytes) -> None:
    try:
        document = load(data)
    except StrictYamlError:
        return
    assert only_text(document.root)


@given(st.text(alphabet="ab:,-?[]{}&*!|>'\"%@`# \n\t<\\u0", max_size=60))
def test_any_punctuation_gives_text_or_one_error(text: str) -> None:
    try:
        document = load(text.encode())
    except StrictYamlError:
        return
    assert only_text(document.root)
