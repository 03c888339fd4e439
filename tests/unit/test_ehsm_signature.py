# SPDX-License-Identifier: Apache-2.0
"""The text that an EHSM request signs: sixteen worked examples, and what holds for any request."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister import ehsm
from cloister.secret import SecretBytes

API_KEY = SecretBytes(b"44RPFy3SEqLbAahaP9PXSGQ6ABB6gctr")
A = "3309ecfa-d02f-49b3-a107-b47d6c7d3854"
T = "1700000000123"
K = "aac3e45a-d3dc-4791-89b6-4ada0e38e6ef"
CREATE = {
    "keyspec": "EH_AES_GCM_256",
    "origin": "EH_INTERNAL_KEY",
    "keyusage": "EH_KEYUSAGE_ENCRYPT_DECRYPT",
}

# (members besides appid and timestamp, text with A, K and T for the three constants, signature)
EXAMPLES: list[tuple[dict[str, Any], str, str]] = [
    ({}, "appid=A&timestamp=T", "KcVXJenreJwH1Vwx6sb7VZO1ZTIxcapoiCxqEhJHH3c="),
    ({"payload": {}}, "appid=A&payload=&timestamp=T", "wSBNekZS5yhnYdH9Ecr87s83wnliw/wxN+cWCEcbhak="),
    (
        {"nonce": "5f1c0d9a7be34c2286f0a1d3c4b5e697", "payload": CREATE},
        (
            "appid=A&nonce=5f1c0d9a7be34c2286f0a1d3c4b5e697&payload=keyspec=EH_AES_GCM_256"
            "&keyusage=EH_KEYUSAGE_ENCRYPT_DECRYPT&origin=EH_INTERNAL_KEY&timestamp=T"
        ),
        "LZovKeGh6B+K+ufHZNd6wXQlQIKppFGV39dAowcuUHE=",
    ),
    (
        {"nonce": "00112233445566778899aabbccddeeff", "payload": {"keyid": K, "keylen": 32, "aad": "Y3R4"}},
        "appid=A&nonce=00112233445566778899aabbccddeeff&payload=aad=Y3R4&keyid=K&keylen=32&timestamp=T",
        "btWz0VXg0C8/FeefFF08K61Mi1I4SFDWsNbZ3vG0ioM=",
    ),
    (
        {"payload": {"keyid": K, "plaintext": "aGVsbG8=", "aad": ""}},
        "appid=A&payload=keyid=K&plaintext=aGVsbG8=&timestamp=T",
        "IAgDr1o0o9dJpSbe1MN0EGTLjwNJrVxXyplS2Vjpitw=",
    ),
    (
        {"nonce": "n1", "payload": {"keyid": K, "ciphertext": "+/+/AAECAwQ=", "aad": "dGVzdA=="}},
        "appid=A&nonce=n1&payload=aad=dGVzdA==&ciphertext=+/+/AAECAwQ=&keyid=K&timestamp=T",
        "RzQB720pwo/LalUNB0IK9XVeQncEB0zUEunQcLB7coI=",
    ),
    (
        {"payload": {"keyid": K, "keylen": 32, "aad": "test"}},
        "appid=A&payload=aad=test&keyid=K&keylen=32&timestamp=T",
        "L/InM9xb/h0kuxLUDBX9QfPZuDVx+AY00XLaNAvMD/Y=",
    ),
    (
        {"payload": {"keyid": K}, "nonce": ""},
        "appid=A&payload=keyid=K&timestamp=T",
        "ZhhaNEY4JFxTRbRNTQskMOxTbGHbAEA3nGXVOz2807U=",
    ),
    (
        {"payload": {"keyid": K}, "nonce": 2374462904},
        "appid=A&nonce=2374462904&payload=keyid=K&timestamp=T",
        "gfekk4n+mpo2A21arV54YOU1aDgRUwxUW6RT3yRM7Wo=",
    ),
    (
        {"payload": {"secretName": "a&b=c", "secretData": "50% +1 / 中文 🔑"}},
        "appid=A&payload=secretData=50% +1 / 中文 🔑&secretName=a&b=c&timestamp=T",
        "PS/bvcIMTo4pvANEgUlTt3EoFinScYj489ZLOiiBaSk=",
    ),
    (
        {"payload": {"a": 0, "b": False, "c": True, "d": 1}},
        "appid=A&payload=c=true&d=1&timestamp=T",
        "M/5yCKg+P2LUGqIU+04vkSfC/hF5UuFNarh3HiJ2FN4=",
    ),
    (
        {"payload": {"z": "1", "m": {"b": 2, "a": "x", "c": None}}},
        "appid=A&payload=m=a=x&b=2&z=1&timestamp=T",
        "Jh1XEulpSSlLzlpVIufv8qiV6T9ylvQbG7I1kjYRewo=",
    ),
    (
        {"payload": {"l": [f"v{number}" for number in range(12)]}},
        "appid=A&payload=l=0=v0&1=v1&10=v10&11=v11&2=v2&3=v3&4=v4&5=v5&6=v6&7=v7&8=v8&9=v9&timestamp=T",
        "n9IEzXxnub8XGTMNUVIJ21KysFjUXFJSRp0WYfItc74=",
    ),
    (
        {"payload": {"a": [], "b": [""], "c": [0], "d": [[]], "e": {}}},
        "appid=A&payload=c=&e=&timestamp=T",
        "P5DyGUsBttXD3tvHr+PvaxMvlx9UE5orQWv3VLsbLXY=",
    ),
    (
        {"payload": {"a": 1.0, "b": 1.5, "c": 1e21, "d": 1e-7, "e": 123456789012, "f": -3}},
        "appid=A&payload=a=1&b=1.5&c=1e+21&d=1e-7&e=123456789012&f=-3&timestamp=T",
        "pKGyhWDz83J5FInKfD6fhLIrRkXM5faDK24OCKrrjWw=",
    ),
    (
        {"payload": {"b": "1", "B": "2", "10": "3", "2": "4", "_": "5", "é": "6"}},
        "appid=A&payload=10=3&2=4&B=2&_=5&b=1&é=6&timestamp=T",
        "6Wkr6NqPHrz2Cgc6XF+0EdsbXdT4XkdWJN501ZwM+Tk=",
    ),
]


def request(members: dict[str, Any]) -> dict[str, Any]:
    return {"appid": A, "timestamp": T, **members}


@pytest.mark.parametrize(("members", "text", "signature"), EXAMPLES, ids=range(1, len(EXAMPLES) + 1))
def test_worked_example(members: dict[str, Any], text: str, signature: str) -> None:
    spelled = text.replace("appid=A&", f"appid={A}&").replace("=T", f"={T}").replace("keyid=K", f"keyid={K}")
    assert ehsm.canonical(request(members)) == spelled
    assert ehsm.sign(API_KEY, request(members)) == signature


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.1, "0.1"),
        (123.456, "123.456"),
        (1e20, "100000000000000000000"),
        (123456789012345680000, "123456789012345680000"),
        (10**21, "1e+21"),
        (1.5e300, "1.5e+300"),
        (0.000001, "0.000001"),
        (0.00000123, "0.00000123"),
        (1.25e-9, "1.25e-9"),
        (5e-324, "5e-324"),
        (-2.5, "-2.5"),
        (2**53 + 1, "9007199254740992"),
        (10**400, "Infinity"),
        (-(10**400), "-Infinity"),
    ],
)
def test_numbers_are_written_as_javascript_writes_them(number: float, text: str) -> None:
    assert ehsm.canonical({"n": number}) == f"n={text}"


@pytest.mark.parametrize("value", [None, "", 0, 0.0, -0.0, False, [], [""], [None], [[]], [[[""]]], ()])
def test_what_reads_as_nothing_vanishes(value: Any) -> None:
    assert ehsm.canonical({"a": value, "b": "x"}) == "b=x"


@pytest.mark.parametrize("value", [{}, [0], [False], ["", ""], [[], []], [{}]])
def test_what_does_not_read_as_nothing_leaves_at_least_its_name(value: Any) -> None:
    assert ehsm.canonical({"a": value}).startswith("a=")


def test_names_are_sorted_by_utf_16_code_units_and_lone_surrogates_become_the_replacement_character() -> None:
    # U+1F511 is D83D DD11 in UTF-16: before U+FF21, although its code point is larger.
    assert ehsm.canonical({"Ａ": "1", "🔑": "2"}) == "🔑=2&Ａ=1"
    lone = json.loads('"\\ud83d"')
    assert ehsm.sign(API_KEY, {"a": lone}) == ehsm.sign(API_KEY, {"a": "\ufffd"})


def test_a_request_nested_without_end_is_refused() -> None:
    nested: Any = "x"
    for _ in range(ehsm.MAX_DEPTH + 1):
        nested = {"a": nested}
    with pytest.raises(ValueError, match="deep"):
        ehsm.canonical(nested)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=6), JSON, max_size=5))
def test_any_request_can_be_signed_and_the_order_of_its_members_does_not_matter(members: dict[str, Any]) -> None:
    signature = ehsm.sign(API_KEY, members)
    assert len(base64.b64decode(signature, validate=True)) == 32
    assert ehsm.sign(API_KEY, dict(reversed(members.items()))) == signature
    # What a parser of JSON makes of it signs the same.
    assert ehsm.sign(API_KEY, json.loads(json.dumps(members))) == signature


PLAIN_VALUE = st.text("abc019+/=-.:_", min_size=1, max_size=6) | st.integers(1, 2**53)
PLAIN = st.fixed_dictionaries(
    {
        "appid": st.just(A),
        "timestamp": st.integers(10**12, 10**13 - 1).map(str),
        "nonce": st.text("0123456789abcdef", min_size=1, max_size=4),
    },
    optional={
        "payload": st.dictionaries(st.sampled_from(["aad", "keyid", "plaintext", "timestamp"]), PLAIN_VALUE, min_size=1)
    },
)


@given(PLAIN, PLAIN)
def test_two_plain_requests_never_have_one_text(first: dict[str, Any], second: dict[str, Any]) -> None:
    def spelled(value: Any) -> Any:
        return {name: spelled(inner) for name, inner in value.items()} if isinstance(value, dict) else str(value)

    ehsm.require_plain(first)
    ehsm.require_plain(second)
    assert (ehsm.canonical(first) == ehsm.canonical(second)) == (spelled(first) == spelled(second))


@pytest.mark.parametrize(
    "members",
    [
        {"payload": {"keyid": K}},
        {"nonce": "", "payload": {"keyid": K}},
        {"nonce": "ab==", "payload": {"keyid": K}},
        {"nonce": "AB", "payload": {"keyid": K}},
        {"nonce": "ab", "payload": {"keyid": "a&b"}},
        {"nonce": "ab", "payload": {"keyid": ""}},
        {"nonce": "ab", "payload": {"keyid": "é"}},
        {"nonce": "ab", "payload": {"keylen": 0}},
        {"nonce": "ab", "payload": {"keylen": 2**53 + 1}},
        {"nonce": "ab", "payload": {"keylen": 1.5}},
        {"nonce": "ab", "payload": {"flag": True}},
        {"nonce": "ab", "payload": {"list": ["x"]}},
        {"nonce": "ab", "payload": {"inner": {"a": "x"}}},
        {"nonce": "ab", "payload": {"a=b": "x"}},
        {"nonce": "ab", "other": {"a": "x"}},
    ],
)
def test_what_could_be_read_in_two_ways_is_not_plain(members: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ehsm.require_plain(request(members))


@given(st.binary(max_size=64))
def test_base64_decodes_only_what_encoding_makes(data: bytes) -> None:
    text = ehsm.encode(data)
    if data:
        assert ehsm.decode(text) == data
    for wrong in (text[:-1], text + "=", text.replace("+", "-").replace("/", "_") + "!", text[:1] + "\n" + text[1:]):
        if wrong != text:
            with pytest.raises(ValueError):
                ehsm.decode(wrong)


def test_base64_with_spare_bits_set_is_refused() -> None:
    assert ehsm.decode("dGVzdA==") == b"test"
    with pytest.raises(ValueError, match="spare"):
        ehsm.decode("dGVzdB==")
    assert ehsm.decode("test") == bytes.fromhex("b5eb2d")
    with pytest.raises(ValueError):
        ehsm.decode("")


def test_key_ids_are_lower_case() -> None:
    assert ehsm.is_key_id(K)
    for wrong in (K.upper(), K[:-1], K + "0", K.replace("-", ""), f"{K}\n"):
        assert not ehsm.is_key_id(wrong)
