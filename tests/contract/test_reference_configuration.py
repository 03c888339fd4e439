# SPDX-License-Identifier: Apache-2.0
"""Claims about deploy/config: what operators copy is what the services read, and it is complete."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from cloister.errors import CloisterError, Code
from cloister.runtime.config import load_config
from cloister_attest.config import AttestConfig
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
