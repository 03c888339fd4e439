# SPDX-License-Identifier: Apache-2.0
"""Back ends in the configuration: what is misspelt, weak or ambiguous is refused before anything is opened."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import CloisterError, Code
from cloister.secret import SecretBytes
from cloister_keybroker.backends.factory import open_backends
from cloister_keybroker.backends.uri import BackendUri, read_credential
from cloister_keybroker.rootkey import RootKey
from fakes.custodian_in_memory import Moments

ROOT = RootKey(SecretBytes(b"\x01" * 32))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Files as a configuration names them; whether they hold what they should is not looked at."""
    found = {name: tmp_path / name for name in ("ca", "token", "pin", "module")}
    for path in found.values():
        path.write_text("content\n")
        path.chmod(0o600)
    return found


async def opened(*uris: str, directory: Path) -> object:
    backends = await open_backends(uris[0], uris[1:], ROOT, state_dir=directory, clock=Moments())
    await backends.aclose()
    return backends


async def why_refused(*uris: str, directory: Path) -> str:
    with pytest.raises(CloisterError) as caught:
        await opened(*uris, directory=directory)
    assert caught.value.code is Code.CONFIG_INVALID
    return caught.value.why


async def test_the_forms_of_the_documentation_are_accepted(tmp_path: Path, files: dict[str, Path]) -> None:
    transit = f"transit:https://vault.example:8200/teams/a/transit?ca={files['ca']}&token={files['token']}"
    pkcs11 = f"pkcs11:token=my%20token;serial=00aa?module-path={files['module']}&pin-source=file:{files['pin']}"
    await opened("embedded:", directory=tmp_path)
    await opened(transit, "embedded:", pkcs11, directory=tmp_path)
    await opened(transit, f"{transit}&name=vault-b&namespace=ns1", directory=tmp_path)


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("", "scheme"),
        ("embedded", "scheme"),
        ("Embedded:", "scheme"),
        ("embedded:x", "no address"),
        ("embedded:?name=x", "no address"),
        ("azure:https://x", "the schemes are"),
        ("transit:https://h:1/m?token=/T&token=/T", "twice"),
        ("transit:https://h:1/m?token", "option=value"),
        ("transit:https://h:1/m?token=%ff", "UTF-8"),
        ("transit:https://h:1/m?name=Vault", "a name has"),
        ("transit:https://h:1/m?name=embedded", "only the embedded"),
        ("transit:http://h:1/m?ca=CA&token=TOKEN", "https://"),
        ("transit:https://user@h:1/m?ca=CA&token=TOKEN", "https://"),
        ("transit:https://h:99999/m?ca=CA&token=TOKEN", "https://"),
        ("transit:https://h:1?ca=CA&token=TOKEN", "mount"),
        ("transit:https://h:1/../sys?ca=CA&token=TOKEN&verify=no", "no option verify"),
        ("transit:https://h:1/m?token=TOKEN", "the option ca is missing"),
        ("transit:https://h:1/m?ca=CA", "the option token is missing"),
        ("transit:https://h:1/m?ca=ca.pem&token=TOKEN", "absolute"),
        ("transit:https://h:1/m?ca=/nowhere/ca.pem&token=TOKEN", "no CA file"),
        ("pkcs11:?module-path=MODULE&pin-source=PIN", "token=LABEL"),
        ("pkcs11:object=x?module-path=MODULE&pin-source=PIN", "token=LABEL"),
        ("pkcs11:token=a;token=b?module-path=MODULE&pin-source=PIN", "token=LABEL"),
        ("pkcs11:token=a?module-path=MODULE&pin-source=PIN&pin-value=1234", "no option pin-value"),
        ("pkcs11:token=a?module-path=/nowhere.so&pin-source=PIN", "no module"),
    ],
)
async def test_what_cannot_be_right_is_refused_with_the_reason(
    tmp_path: Path, files: dict[str, Path], uri: str, why: str
) -> None:
    for name, path in files.items():
        uri = uri.replace(f"={name.upper()}", f"={path}")
    assert why in await why_refused(uri, directory=tmp_path)


async def test_two_back_ends_of_one_name_are_refused(tmp_path: Path, files: dict[str, Path]) -> None:
    transit = f"transit:https://a:8200/transit?ca={files['ca']}&token={files['token']}"
    assert "two back ends" in await why_refused(transit, transit.replace("//a", "//b"), directory=tmp_path)
    assert "two back ends" in await why_refused("embedded:", "embedded:", directory=tmp_path)


@given(st.text(max_size=80))
def test_any_text_is_parsed_or_refused_as_configuration(text: str) -> None:
    with suppress(CloisterError):
        BackendUri.parse(text)


def test_a_credential_is_one_line_that_others_do_not_read(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("s.secret\n")
    path.chmod(0o640)  # a group may: Kubernetes mounts secrets so
    assert read_credential(path) == SecretBytes(b"s.secret")
    (tmp_path / "link").symlink_to(path)
    assert read_credential(tmp_path / "link") == SecretBytes(b"s.secret")
    path.chmod(0o644)
    with pytest.raises(CloisterError, match="refused") as caught:
        read_credential(path)
    assert "s.secret" not in str(caught.value)
    path.chmod(0o600)
    for bad in ("", "\n", "two\nlines\n", "x" * 20_000):
        path.write_text(bad)
        with pytest.raises(CloisterError, match="refused"):
            read_credential(path)
    with pytest.raises(CloisterError) as caught:
        read_credential(tmp_path / "absent")
    assert caught.value.code is Code.FILE_NOT_FOUND
    with pytest.raises(CloisterError, match="refused"):
        read_credential(tmp_path)


def test_a_broker_with_its_own_store_loads_no_other_store_s_libraries() -> None:
    program = (
        "import sys\n"
        "import cloister_keybroker.backends.factory\n"
        "print([name for name in ('requests', 'hvac', 'pkcs11', 'aiohttp') if name in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
