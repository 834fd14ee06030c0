"""What an adapter's config targets, compared with the modules that its file adapts.

The file is the truth, and no pattern is run as a regular expression. How many layers a base has is
not known here: ``find_targets`` checks that.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from emlens.models.lora import LoraModule


def check_targets(modules: Mapping[str, LoraModule], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Compare the modules in the file with those the config targets.

    Returns:
        The modules that the config asks for in every layer of its base, the layer left open:
        ``model.layers.*.mlp.down_proj``.

    Raises:
        ValueError: a target without tensors, in all layers or in one of them, or tensors that no
            target asks for.
    """
    targets = _read_targets(config)
    for name in modules if targets else ():
        if not _matches(name, targets):
            raise ValueError(f"the file adapts {name}, which target_modules does not name")
    for target in targets:
        if not any(_matches(name, [target]) for name in modules):
            raise ValueError(f"target_modules names {target!r}, but no tensor adapts it")
    layers = _check_layers(modules, config)
    excluded = _read_excluded(config)
    for name in excluded:
        if any(_matches(module, [name]) for module in modules):
            raise ValueError(f"exclude_modules names {name!r}, but the file adapts it")
    if not all(map(is_literal, excluded)):
        return ()  # what a regular expression leaves out is not known without running it
    found = _layers_by_module(modules, targets, config)
    _check_complete(found, layers, excluded)
    by_layer = any(part.isdecimal() for name in excluded for part in name.split("."))
    return () if layers is not None or by_layer else tuple(sorted(found))


def is_literal(pattern: str) -> bool:
    """Whether a pattern is a plain module name or suffix."""
    return all(c.isalnum() or c in "._-" for c in pattern)


def _matches(name: str, suffixes: Sequence[str]) -> bool:
    return any(name == suffix or name.endswith("." + suffix) for suffix in suffixes)


def _read_targets(config: Mapping[str, Any]) -> list[str]:
    """Names and suffixes; none where the tensors alone say what is adapted."""
    targets = config.get("target_modules")
    if not isinstance(targets, str):
        return read_names(config, "target_modules")
    if _targets_all(config) or not is_literal(targets):
        return []  # every linear module, or a regular expression, which is never run
    return [targets]


def _targets_all(config: Mapping[str, Any]) -> bool:
    targets = config.get("target_modules")
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _check_layers(modules: Mapping[str, LoraModule], config: Mapping[str, Any]) -> set[int] | None:
    """The layers that the config asks for; None where it asks for all."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return None
    given = layers if isinstance(layers, list) else [layers]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in given):
        raise ValueError(f"layers_to_transform={layers!r}, expected whole numbers")
    patterns, whole = _read_patterns(config), _read_targets(config)
    # A module that is targeted by its whole name is adapted whatever its layer, as lm_head is.
    found = {name: _layer_of(name, patterns) for name in modules if name not in whole}
    for name, layer in found.items():
        if layer is None:
            below = f" below {' or '.join(patterns)} (layers_pattern)" if patterns else ""
            raise ValueError(f"layers_to_transform is {layers}, but {name} has no layer{below}")
    if set(found.values()) != set(given):
        raise ValueError(
            f"layers_to_transform is {sorted(set(given))}, the file adapts layers "
            f"{sorted(set(found.values()), key=str)}"
        )
    return set(given)


def _read_patterns(config: Mapping[str, Any]) -> list[str]:
    patterns = config.get("layers_pattern")
    names = [patterns] if isinstance(patterns, str) else read_names(config, "layers_pattern")
    names = [name for name in names if name]
    for name in names:
        if not is_literal(name):
            raise ValueError(
                f"layers_pattern={name!r} is a regular expression; only the name of the module "
                "that holds the layers is supported, such as 'layers'"
            )
    return names


def _layer_of(name: str, patterns: Sequence[str]) -> int | None:
    """The number behind the first pattern found, or the first number of all."""
    for pattern in patterns:
        number = f".{name}".partition(f".{pattern}.")[2].split(".")[0]
        if number.isdecimal():
            return int(number)
    numbers = [part for part in name.split(".") if part.isdecimal()]
    return int(numbers[0]) if numbers and not patterns else None


def _layers_by_module(
    modules: Mapping[str, LoraModule], targets: Sequence[str], config: Mapping[str, Any]
) -> dict[str, set[int]]:
    """Layers by module with its layer left open, of modules that are targeted in every layer."""
    bare = [t for t in targets if not any(part.isdecimal() for part in t.split("."))]
    if isinstance(config.get("target_modules"), str):
        bare = []  # to peft a text is the whole name of one module
    found: dict[str, set[int]] = {}
    for name in modules:
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if place is None or not (_targets_all(config) or _matches(name, bare)):
            continue
        opened = ".".join([*parts[:place], "*", *parts[place + 1 :]])
        found.setdefault(opened, set()).add(int(parts[place]))
    return found


def _check_complete(
    found: Mapping[str, set[int]], layers: set[int] | None, excluded: Sequence[str]
) -> None:
    """Require every module in the same layers as its neighbours, or in those asked for."""
    together: dict[str, set[int]] = {}
    for opened, have in found.items():
        together.setdefault(opened.partition("*")[0], set()).update(have)
    for opened, have in found.items():
        before, _, after = opened.partition("*")
        for layer in sorted((layers or together[before]) - have):
            name = f"{before}{layer}{after}"
            if not _matches(name, excluded):
                raise ValueError(
                    f"target_modules names {name}, as it does {before}{min(have)}{after}, but no "
                    "tensor adapts it; the file is incomplete"
                )


def _read_excluded(config: Mapping[str, Any]) -> list[str]:
    excluded = config.get("exclude_modules")
    return [excluded] if isinstance(excluded, str) else read_names(config, "exclude_modules")


def read_names(config: Mapping[str, Any], field: str) -> list[str]:
    """A list of module names; empty where the field is absent or null.

    Raises:
        ValueError: another type.
    """
    names = config.get(field) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"adapter_config.json: {field}={names!r}, expected a list of module names")
    return names
