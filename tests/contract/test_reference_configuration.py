# SPDX-License-Identifier: Apache-2.0
"""Claims about deploy/config: what operators copy is what the services read, and it is complete."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from cloister.errors import CloisterError, Code
from cloister.runtime.config import load_config
from cloister_attest.config import AttestConfig, CaSection
from cloister_keybroker.config import Config as KeybrokerConfig
from cloister_serving.config import GatewayConfig
from cloister_trainer.config import TrainerConfig

CONFIG = Path(__file__).resolve().parents[2] / "deploy/config"
MODELS: dict[str, type[BaseModel]] = {
    "attest.toml": AttestConfig,
    "keybroker.toml": KeybrokerConfig,
    "trainer.toml": TrainerConfig,
    "gateway.toml": GatewayConfig,
}


@pytest.mark.parametrize(("name", "model"), MODELS.items())
def test_a_reference_configuration_loads(name: str, model: type[BaseModel]) -> None:
    config = load_config(CONFIG / name, model)
    assert config.service.state_dir == (CONFIG / "state" / name.removesuffix(".toml")).resolve()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "model"), MODELS.items())
def test_a_reference_configuration_names_every_key_of_its_own_section(name: str, model: type[BaseModel]) -> None:
    section = next(field for field in model.model_fields if field in {"attest", "keybroker", "trainer", "serving"})
    written = tomllib.loads((CONFIG / name).read_text())[section]
    declared = model.model_fields[section].annotation
    assert isinstance(declared, type)
    assert issubclass(declared, BaseModel)
    assert set(written) == set(declared.model_fields)


def test_the_reference_configuration_of_the_ca_loads_in_each_of_its_forms(tmp_path: Path) -> None:
    """The lines that are commented out are meant to be taken as they are."""
    text = (CONFIG / "attest.toml").read_text()
    present = 'kept = "memory"'
    shares = 'kept = "shares"\nholders = ["ann.pub", "ben.pub", "cas.pub"]\nthreshold = 2'
    for form in (present, shares, 'kept = "file"\nroot_key_file = "ca-root.key"'):
        (tmp_path / "attest.toml").write_text(text.replace(present, form, 1))
        load_config(tmp_path / "attest.toml", AttestConfig)
        for line in form.splitlines():
            assert line in text
    assert all(f"{name} = " in text for name in CaSection.model_fields)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ('kept = "file"', "root_key_file goes with"),
        ('root_key_file = "x"', "root_key_file goes with"),
        ('kept = "shares"', "holders go with"),
        ('holders = ["a.pub", "b.pub"]\nthreshold = 2', "holders go with"),
        ('kept = "shares"\nholders = ["a.pub", "b.pub"]', "threshold is 2 to"),
        ('kept = "shares"\nholders = ["a.pub", "b.pub"]\nthreshold = 3', "threshold is 2 to"),
        ("threshold = 2", "threshold goes with holders"),
        ('kept = "nowhere"', "kept"),
        ("overlap_s = 60", "overlap_s is shorter"),
        ("lead_s = 0", "lead_s"),
        ("renew_after_s = 7776000", "renew_after_s"),
    ],
)
def test_a_ca_that_is_kept_in_no_way_or_in_two_is_a_mistake(tmp_path: Path, lines: str, why: str) -> None:
    text = (CONFIG / "attest.toml").read_text()
    start, end = text.index("[ca]"), text.index("# A development root")
    (tmp_path / "attest.toml").write_text(f"{text[:start]}[ca]\n{lines}\n{text[end:]}")
    with pytest.raises(CloisterError) as caught:
        load_config(tmp_path / "attest.toml", AttestConfig)
    assert caught.value.code is Code.CONFIG_INVALID
    assert why in caught.value.why


@pytest.mark.parametrize(("name", "model"), MODELS.items())
def test_a_mistyped_key_is_named_with_its_line(name: str, model: type[BaseModel], tmp_path: Path) -> None:
    text = (CONFIG / name).read_text().replace("state_dir", "state_dri", 1)
    line = next(number for number, content in enumerate(text.splitlines(), 1) if content.startswith("state_dri"))
    (tmp_path / name).write_text(text)
    with pytest.raises(CloisterError) as caught:
        load_config(tmp_path / name, model)
    assert caught.value.code is Code.CONFIG_INVALID
    assert f"{name}, line {line} " in str(caught.value)
    assert "state_dir" in str(caught.value)
