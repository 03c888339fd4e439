# SPDX-License-Identifier: Apache-2.0
"""Nested objects of tensors as flat tensors and a JSON skeleton, so that a checkpoint needs no pickle.

What an optimizer's, a scheduler's and a trainer's state dicts are made of comes back as it was: dicts with keys of any
simple type in their order, lists, tuples, numbers exactly, text, bytes, and tensors; two names of one tensor (tied
weights) are one tensor again. Anything else is refused by its path: it would need code to come back.
"""

from __future__ import annotations

import base64
import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    import torch

_MAX_DEPTH: Final = 64
_NUMBERS: Final = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def take_apart(obj: object) -> tuple[dict[str, torch.Tensor], str]:
    """Return the tensors of an object by name and the JSON of all the rest; raise CloisterError(ARGUMENT_INVALID)."""
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[tuple[object, ...], str] = {}
    return tensors, json.dumps(_Writer(tensors, seen).describe(obj, "", 0), separators=(",", ":"))


def put_together(skeleton: str, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the object again; raise CloisterError(DATA_INVALID) for a skeleton that does not fit the tensors."""
    try:
        return _Reader(tensors).build(json.loads(skeleton), 0)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CloisterError(
            Code.DATA_INVALID,
            what="the saved object cannot be put together",
            why=f"its skeleton does not parse ({type(error).__name__}: {error})",
            todo="check which program wrote it, and write it again",
        ) from None


class _Writer:
    def __init__(self, tensors: dict[str, torch.Tensor], seen: dict[tuple[object, ...], str]) -> None:
        self._tensors = tensors
        self._seen = seen

    def describe(self, obj: object, path: str, depth: int) -> Any:
        import torch

        if depth > _MAX_DEPTH:
            raise _unusable(path, "it is nested too deeply, or holds itself")
        if obj is None or isinstance(obj, str) or type(obj) in {bool, int}:
            return obj
        if type(obj) is float:
            return obj if math.isfinite(obj) else {"float": str(obj)}
        if isinstance(obj, torch.Tensor):
            return {"tensor": self._name(obj, path or "tensor")}
        if isinstance(obj, Mapping) and type(obj) in {dict, OrderedDict}:
            pairs = [
                [self._key(key, path), self.describe(value, f"{path}.{key}" if path else str(key), depth + 1)]
                for key, value in obj.items()
            ]
            return {"dict" if type(obj) is dict else "ordered": pairs}
        if type(obj) in {list, tuple} and isinstance(obj, list | tuple):
            items = [self.describe(item, f"{path}[{place}]", depth + 1) for place, item in enumerate(obj)]
            return {"list" if type(obj) is list else "tuple": items}
        if type(obj) is bytes:
            return {"bytes": base64.b64encode(obj).decode("ascii")}
        if isinstance(obj, torch.Size):
            return {"size": list(obj)}
        if isinstance(obj, torch.dtype):
            return {"dtype": str(obj).removeprefix("torch.")}
        raise _unusable(path, f"it is a {type(obj).__module__}.{type(obj).__qualname__}")

    def _key(self, key: object, path: str) -> Any:
        if type(key) in {str, int, bool} or key is None:
            return key
        if type(key) is tuple:
            return {"tuple": [self._key(part, path) for part in key]}
        raise _unusable(path, f"a key in it is a {type(key).__qualname__}")

    def _name(self, tensor: torch.Tensor, path: str) -> str:
        """Return the name under which a tensor is saved; the same memory has one name."""
        if str(tensor.layout) != "torch.strided":
            raise _unusable(path, f"its layout is {tensor.layout}")
        identity = _identity(tensor)
        if identity in self._seen:
            return self._seen[identity]
        name, number = path, 1
        while name in self._tensors or name == "__metadata__":
            number += 1
            name = f"{path}#{number}"
        self._tensors[name] = tensor
        if tensor.numel():
            self._seen[identity] = name
        return name


class _Reader:
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def build(self, value: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        if value is None or isinstance(value, str | bool | int | float):
            return value
        if not isinstance(value, dict) or len(value) != 1:
            raise ValueError("not a value")
        ((kind, content),) = value.items()
        if kind in {"dict", "ordered", "list", "tuple", "size"} and not isinstance(content, list):
            raise ValueError("not a list")
        if kind in {"dict", "ordered"}:
            made: dict[Any, Any] = {} if kind == "dict" else OrderedDict()
            for key, item in content:
                made[self._key(key)] = self.build(item, depth + 1)
            if len(made) != len(content):
                raise ValueError("a key occurs twice")
            return made
        if kind in {"list", "tuple"}:
            items = [self.build(item, depth + 1) for item in content]
            return items if kind == "list" else tuple(items)
        return self._leaf(kind, content)

    def _leaf(self, kind: str, content: Any) -> Any:
        import torch

        match kind:
            case "tensor":
                return self._tensors[content]
            case "float":
                return _NUMBERS[content]
            case "bytes":
                return base64.b64decode(content, validate=True)
            case "size":
                return torch.Size(content)
            case "dtype":
                found = getattr(torch, content)
                if not isinstance(found, torch.dtype):
                    raise ValueError("not a type of tensors")
                return found
        raise ValueError(f"unknown kind {kind[:20]!r}")

    def _key(self, key: Any) -> Any:
        if isinstance(key, dict):
            (parts,) = key.values()
            return tuple(self._key(part) for part in parts)
        if key is None or isinstance(key, str | bool | int):
            return key
        raise ValueError("not a key")


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    """What makes two tensors one: memory, place in it, shape, strides and type."""
    return (
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.dtype,
    )


def _unusable(path: str, why: str) -> CloisterError:
    return CloisterError(
        Code.ARGUMENT_INVALID,
        what=f"{path or 'this object'} cannot be saved",
        why=f"{why}; dicts, lists, tuples, numbers, text, bytes and tensors can be",
        todo="save its state_dict(), or convert it",
    )
