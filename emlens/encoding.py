"""Values of results to JSON and back, as annotations say; not for values of unknown type.

NaN and infinities, which JSON has no numbers for, are the strings `"NaN"`, `"Infinity"` and
`"-Infinity"`. Decoding is led by the annotations of a class that the caller hands in: nothing in
the JSON can name a type or code.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from jaxtyping import AbstractArray
from torch import Tensor

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_TENSOR_KEY = "tensor"

Instance = TypeVar("Instance")


class ArtifactError(ValueError):
    """A file or folder is not what emlens writes: damaged, incomplete, or of another kind."""


def encode(value: Any, where: str, tensors: dict[str, Tensor] | None = None) -> Any:
    """JSON value for a plain value, tensor, dataclass, or tuple, list or str-keyed dict of these.

    Args:
        value: What to encode.
        where: Dotted name of the value, for messages and as the name of its tensors.
        tensors: Collects tensors under their dotted names, which then stand for them in the JSON;
            without it tensors are written out as nested lists.

    Raises:
        TypeError: A value is of another type; the message names it.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return _encode_float(float(value))
    if isinstance(value, Tensor):
        return _encode_tensor(value, where, tensors)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return encode_fields(value, where, tensors)
    if isinstance(value, tuple | list):
        return [encode(item, f"{where}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: encode(item, dotted(where, key), tensors) for key, item in value.items()}
    raise TypeError(
        f"{where} holds a {type(value).__name__}, expected str, int, float, bool, None, a tensor, "
        "a dataclass, or a tuple, list or dict with str keys of these"
    )


def encode_fields(value: Any, where: str, tensors: dict[str, Tensor] | None) -> dict[str, Any]:
    """JSON object of the fields of a dataclass instance; arguments as for `encode`."""
    names = field_names(value)
    return {name: encode(getattr(value, name), dotted(where, name), tensors) for name in names}


def field_names(value: Any) -> list[str]:
    """Names of the fields of a dataclass or of an instance of one, in order."""
    return [field.name for field in dataclasses.fields(value)]


def dotted(where: str, name: str) -> str:
    """Name of a part of something that may itself have no name."""
    return f"{where}.{name}" if where else name


def _encode_float(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _encode_tensor(value: Tensor, where: str, tensors: dict[str, Tensor] | None) -> Any:
    if value.is_complex():
        raise TypeError(f"{where} is a complex tensor, expected real numbers, integers or bools")
    if tensors is None:
        # Number by number only where a number needs its name.
        plain = value.detach().cpu()
        return plain.tolist() if plain.isfinite().all() else encode(plain.tolist(), where)
    if where in tensors:
        raise TypeError(f"two tensors are called {where!r}: keys of a dict must hold no dots")
    tensors[where] = value
    return {_TENSOR_KEY: where}


class Decoder:
    """Rebuilds one document from its JSON and its tensors.

    Args:
        source: Where the document came from, for messages.
        tensors: Name -> tensor.
    """

    def __init__(self, source: object, tensors: Mapping[str, Tensor]) -> None:
        self._source = source
        self._tensors = tensors
        self.taken: set[str] = set()
        """Names of the tensors that fields referred to."""

    def fields(self, cls: type[Instance], values: object, where: str = "") -> Instance:
        """Instance of a dataclass from the JSON object of its fields.

        Raises:
            ArtifactError: Fields are missing, unknown, or not what their annotations say.
        """
        at = where or cls.__name__
        if not isinstance(values, dict):
            raise self._error(at, values, f"an object with the fields of {cls.__name__}")
        hints = typing.get_type_hints(cls)
        names = field_names(cls)
        self._check_names(at, list(values), names)
        found = {name: self.value(hints[name], values[name], dotted(where, name)) for name in names}
        try:
            return cls(**found)
        except ValueError as error:
            raise ArtifactError(f"{self._source}: {at} is not valid: {error}") from error

    def value(self, hint: Any, value: object, where: str) -> Any:
        """Value of an annotation from its JSON."""
        origin, options = typing.get_origin(hint), typing.get_args(hint)
        if isinstance(hint, type) and issubclass(hint, Tensor | AbstractArray):
            return self._tensor(hint, value, where)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            return self.fields(hint, value, where)
        if origin in (typing.Union, types.UnionType):
            return self._union(options, value, where)
        if origin in (tuple, list):
            return origin(self._items(origin, options, value, where))
        if origin in (dict, Mapping):
            return self._mapping(options, value, where)
        return self._plain(hint, value, where)

    def _plain(self, hint: Any, value: object, where: str) -> Any:
        if typing.get_origin(hint) is Literal:
            options = typing.get_args(hint)
            if any(value == option and type(value) is type(option) for option in options):
                return value
            raise self._error(where, value, f"one of {list(options)}")
        if hint is float and (type(value) in (int, float) or value in list(_NON_FINITE)):
            return float(_NON_FINITE.get(str(value), value))  # type: ignore[arg-type]
        if hint in (str, bool, int) and type(value) is hint:
            return value
        if hint in (None, type(None)) and value is None:
            return None
        if hint in (str, bool, int, float, None, type(None)):
            raise self._error(where, value, getattr(hint, "__name__", "null"))
        raise TypeError(f"{where} is annotated {hint}, which emlens cannot read back from JSON")

    def _tensor(self, hint: Any, value: object, where: str) -> Tensor:
        name = value.get(_TENSOR_KEY) if isinstance(value, dict) and len(value) == 1 else None
        if not isinstance(name, str):
            raise self._error(where, value, "a reference to a tensor")
        if name not in self._tensors:
            raise ArtifactError(f"{self._source}: {where}: there is no tensor {name!r} in its file")
        tensor = self._tensors[name]
        if not isinstance(tensor, hint):
            raise ArtifactError(
                f"{self._source}: {where} is {tensor.dtype} {tuple(tensor.shape)}, expected {hint}"
            )
        self.taken.add(name)
        return tensor

    def _union(self, options: tuple[Any, ...], value: object, where: str) -> Any:
        if value is None and type(None) in options:
            return None
        others = [option for option in options if option is not type(None)]
        for option in others[:-1]:
            try:
                return self.value(option, value, where)
            except ArtifactError:
                continue
        return self.value(others[-1], value, where)

    def _items(self, origin: Any, options: tuple[Any, ...], value: object, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise self._error(where, value, "a list")
        repeated = origin is list or options[1:] == (...,)
        hints = [options[0]] * len(value) if repeated else list(options)
        if len(hints) != len(value):
            raise self._error(where, value, f"{len(hints)} items")
        return [
            self.value(hint, item, f"{where}.{i}")
            for i, (hint, item) in enumerate(zip(hints, value, strict=True))
        ]

    def _mapping(self, options: tuple[Any, ...], value: object, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._error(where, value, "an object")
        return {
            key: self.value(options[1], item, dotted(where, key)) for key, item in value.items()
        }

    def _check_names(self, at: str, got: list[str], expected: list[str]) -> None:
        unknown = [name for name in got if name not in expected]
        missing = [name for name in expected if name not in got]
        if unknown:
            near = difflib.get_close_matches(unknown[0], expected, 3, cutoff=0)
            raise ArtifactError(
                f"{self._source}: {at} has unknown fields {unknown}; nearest to the first: {near}"
            )
        if missing:
            raise ArtifactError(f"{self._source}: {at} lacks the fields {missing}")

    def _error(self, where: str, value: object, expected: str) -> ArtifactError:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return ArtifactError(f"{self._source}: {where} is {shown}, expected {expected}")
