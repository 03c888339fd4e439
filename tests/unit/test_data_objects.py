# SPDX-License-Identifier: Apache-2.0
"""Objects of tensors in sealed files: everything comes back bit by bit, nothing runs code."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import torch as safetensors

from cloister.data import keyring
from cloister.data.objects import load, open_sealed, save
from cloister.data.skeleton import put_together, take_apart
from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey
from cloister.sealed.format import AssociatedData
from cloister.sealed.stream import SealedWriter
from fakes.sealed_material import data_key

KEY = data_key()


def same(one: Any, other: Any) -> bool:
    """Compare type by type and bit by bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or (isinstance(one, float) and math.isnan(one) and math.isnan(other))


def there_and_back(obj: Any, path: Path) -> Any:
    save(obj, path, data_key=KEY)
    return load(path, data_key=KEY)


def test_a_file_may_be_named_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "model.sealed"
    save({"w": torch.ones(2)}, path, data_key=KEY)
    assert torch.equal(load(path, data_key=KEY)["w"], torch.ones(2))
    with open_sealed(path, data_key=KEY) as file:
        assert file.header.associated.path == "model"


def test_a_name_that_cannot_be_bound_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CloisterError) as caught:
        save({}, tmp_path / "a\nb", data_key=KEY)
    assert caught.value.code is Code.ARGUMENT_INVALID
    assert list(tmp_path.iterdir()) == []


def test_a_state_dict_is_a_plain_safetensors_file_inside(tmp_path: Path) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict()
    save(state, tmp_path / "model", data_key=KEY)
    with open_sealed(tmp_path / "model", data_key=KEY) as file:
        theirs = safetensors.load(file.readall())
    assert theirs.keys() == state.keys()
    assert all(torch.equal(theirs[name], state[name]) for name in state)
    assert all(torch.equal(value, state[name]) for name, value in load(tmp_path / "model", data_key=KEY).items())


def test_an_optimizer_continues_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    def trained(steps: int, model: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 3, generator=generator)).square().sum().backward()
            optimizer.step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    def fresh() -> tuple[torch.nn.Linear, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)

    model, optimizer, scheduler = fresh()
    trained(3, model, optimizer)
    scheduler.step()
    parts = (model.state_dict(), optimizer.state_dict(), scheduler.state_dict())
    saved = {"model": parts[0], "optimizer": parts[1], "scheduler": parts[2], "rng": torch.get_rng_state(), "step": 3}
    loaded = there_and_back(saved, tmp_path / "checkpoint")
    assert same(dict(loaded["optimizer"]), dict(saved["optimizer"]))
    other, other_optimizer, other_scheduler = fresh()
    other.load_state_dict(loaded["model"])
    other_optimizer.load_state_dict(loaded["optimizer"])
    other_scheduler.load_state_dict(loaded["scheduler"])
    assert all(map(torch.equal, trained(2, model, optimizer), trained(2, other, other_optimizer)))


@pytest.mark.parametrize(
    "obj",
    [
        {},
        [],
        None,
        "text",
        {"a": [1, 2.5, True, None, "x", b"\x00\xff", (1, (2,))]},
        {"nan": float("nan"), "inf": [math.inf, -math.inf], "small": 5e-324, "pi": math.pi},
        {1: "int", "1": "text", None: 0, (1, "a"): 2},
        OrderedDict([("z", torch.ones(2)), ("a", torch.zeros(0))]),
        {"deep": {"same": torch.ones(1)}, "deep.same": torch.zeros(1)},
        {"__metadata__": torch.ones(1)},
        torch.arange(6).reshape(2, 3).t(),
        {"size": torch.Size([1, 2]), "dtype": torch.bfloat16, "half": torch.ones(2, dtype=torch.bfloat16)},
    ],
)
def test_what_state_dicts_are_made_of_comes_back(tmp_path: Path, obj: Any) -> None:
    assert same(there_and_back(obj, tmp_path / "o"), obj)


def test_tied_weights_are_saved_once_and_tied_again(tmp_path: Path) -> None:
    weight = torch.randn(100, 100)
    loaded = there_and_back({"encoder": weight, "decoder": weight, "row": weight[3]}, tmp_path / "o")
    assert loaded["encoder"] is loaded["decoder"]
    assert torch.equal(loaded["row"], weight[3])
    assert (tmp_path / "o").stat().st_size < 1.1 * weight.nbytes + 4096


class Custom:
    """What would need code to come back."""


@pytest.mark.parametrize(
    ("obj", "path"),
    [
        ({"a": {"b": Custom()}}, "a.b"),
        ([0, Custom], "[1]"),
        ({"model": torch.nn.Linear(1, 1)}, "model"),
        ({"f": lambda: 1}, "f"),
        ({Custom(): 1}, "this object"),
        ({"s": {1, 2}}, "s"),
        ({"sparse": torch.eye(3).to_sparse()}, "sparse"),
        ({"q": torch.complex(torch.ones(1), torch.ones(1)).to(torch.complex128)}, "q"),
    ],
)
def test_what_needs_code_to_come_back_is_refused_by_its_path(tmp_path: Path, obj: Any, path: str) -> None:
    (tmp_path / "o").write_bytes(b"the old file")
    with pytest.raises(CloisterError) as caught:
        save(obj, tmp_path / "o", data_key=KEY)
    assert caught.value.code is Code.ARGUMENT_INVALID
    assert path in caught.value.what
    assert (tmp_path / "o").read_bytes() == b"the old file"


def test_an_object_that_holds_itself_is_refused(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(CloisterError, match="holds itself"):
        save(loop, tmp_path / "o", data_key=KEY)


def sealed_torch(obj: Any, path: Path) -> None:
    with SealedWriter(path, data_key=KEY, associated=AssociatedData("objects", "o")) as file:
        torch.save(obj, file)


def test_what_torch_saved_loads_when_it_is_only_weights(tmp_path: Path) -> None:
    sealed_torch({"w": torch.ones(3), "step": 4}, tmp_path / "o")
    assert same(load(tmp_path / "o", data_key=KEY), {"w": torch.ones(3), "step": 4})


def test_a_pickle_with_code_in_it_is_refused_even_under_seal(tmp_path: Path) -> None:
    sealed_torch(torch.nn.Linear(1, 1), tmp_path / "o")
    with pytest.raises(CloisterError, match="needs code") as caught:
        load(tmp_path / "o", data_key=KEY)
    assert caught.value.code is Code.DATA_INVALID


class Ring:
    """A keyring that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def open(self, key_uri: str, *, key_version: int, wrapped: bytes, manifest_digest: bytes = b"") -> DataKey:
        self.asked.append(f"open {key_uri} {key_version}")
        return data_key("ring")

    def new(self, key_uri: str = "") -> DataKey:
        self.asked.append(f"new {key_uri}")
        return data_key("ring")


def test_in_a_job_the_key_is_found_by_itself(tmp_path: Path) -> None:
    ring = Ring()
    with keyring.using(ring):
        save({"a": torch.ones(1)}, tmp_path / "o")
        assert same(load(tmp_path / "o"), {"a": torch.ones(1)})
        save({}, tmp_path / "named", key="cloister-key://hospital-a/models/m")
    version = data_key().key_version
    assert ring.asked == [
        "new ",
        f"open {data_key().key_uri} {version}",
        "new cloister-key://hospital-a/models/m",
    ]
    for action in (lambda: save({}, tmp_path / "x"), lambda: load(tmp_path / "o")):
        with pytest.raises(CloisterError) as caught:
            action()
        assert caught.value.code is Code.KEYRING_MISSING
    with pytest.raises(CloisterError, match="CLO-1401"):
        load(tmp_path / "o", data_key=KEY)  # another key than the one it is under


@pytest.mark.parametrize(
    "skeleton",
    [
        "",
        "[",
        "[1]",
        '{"a":1,"b":2}',
        '{"tensor":"missing"}',
        '{"tensor":1}',
        '{"dtype":"load"}',
        '{"dtype":1}',
        '{"float":"0"}',
        '{"bytes":"?"}',
        '{"dict":[["a",1],["a",2]]}',
        '{"dict":[[1.5,1]]}',
        '{"dict":[1]}',
        '{"dict":[[{"tuple":[1],"b":2},1]]}',
        '{"size":["a"]}',
        '{"list":' * 70 + "1" + "}" * 70,
        '{"code":"print(1)"}',
    ],
)
def test_a_skeleton_that_says_nothing_is_refused(skeleton: str) -> None:
    with pytest.raises(CloisterError, match="skeleton") as caught:
        put_together(skeleton, {})
    assert caught.value.code is Code.DATA_INVALID


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=12,
)


@settings(deadline=None)
@given(JSON)
def test_every_simple_object_comes_back(obj: Any) -> None:
    tensors, skeleton = take_apart(obj)
    assert same(put_together(skeleton, tensors), obj)


@settings(deadline=None)
@given(JSON)
def test_any_skeleton_is_built_or_refused(document: Any) -> None:
    with suppress(CloisterError):
        put_together(json.dumps(document), {"a": torch.ones(1)})
