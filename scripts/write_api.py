"""Write docs/api.json: the names, signatures, flags and JSON fields that the package promises.

Signatures are the text of the source, so that the file does not depend on a Python version or on
the test suite's type hook. Not a documentation generator.

    python scripts/write_api.py
"""

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import json
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "docs" / "api.json"
PACKAGES = (
    "models",
    "data",
    "activations",
    "interventions",
    "directions",
    "diffing",
    "adapters",
    "codecs",
    "features",
    "organisms",
    "evaluation",
    "attribution",
    "modularity",
    "reports",
    "studies",
)
"""Packages whose `__all__` is public; those that are not there yet are passed over."""


def parse_source(thing: Any) -> ast.stmt | None:
    """The definition as the source has it, None where there is none (a constant, an alias)."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None


def describe_function(node: ast.FunctionDef) -> str:
    """`(base: Source, *, dtype: str = 'auto') -> ModelPair`."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){returns}"


def describe_class(node: ast.ClassDef) -> dict[str, str]:
    """Public fields with their types, public methods with their signatures."""
    members = {}
    for child in node.body:
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            members[child.target.id] = ast.unparse(child.annotation)
        elif isinstance(child, ast.FunctionDef):
            members[child.name] = describe_function(child)
    return {name: text for name, text in members.items() if not name.startswith("_")}


def describe(thing: Any) -> str | dict[str, str]:
    """What a user of a public name may rely on."""
    node = parse_source(thing)
    if isinstance(node, ast.FunctionDef):
        return describe_function(node)
    if isinstance(node, ast.ClassDef):
        return describe_class(node)
    return type(thing).__name__


def list_public() -> Iterator[tuple[str, Any]]:
    """Every public name with what it stands for."""
    for module_name in ("emlens", *(f"emlens.{name}" for name in PACKAGES)):
        if importlib.util.find_spec(module_name) is None:
            continue
        module = importlib.import_module(module_name)
        for name in sorted(getattr(module, "__all__", ())):
            with contextlib.suppress(ImportError, AttributeError):  # found by test_house.py
                if name != "__version__":
                    yield f"{module_name}.{name}", getattr(module, name)


def list_commands() -> dict[str, list[str]]:
    """Each command of the CLI with its arguments and flags."""
    from typer.main import get_command

    from emlens.cli.main import app

    commands: dict[str, list[str]] = {}

    def walk(command: Any, path: str) -> None:
        names = [
            "/".join([*parameter.opts, *parameter.secondary_opts])
            if parameter.param_type_name == "option"
            else f"<{parameter.name}>"
            for parameter in command.params
        ]
        commands[path] = sorted(names)
        for name, child in sorted(getattr(command, "commands", {}).items()):
            walk(child, f"{path} {name}")

    walk(get_command(app), "emlens")
    return commands


def list_schemas() -> dict[str, dict[str, str]]:
    """Each kind of JSON result with its fields, and the dataclasses that these hold."""
    if importlib.util.find_spec("emlens.artifacts") is None:
        return {}
    from emlens.artifacts import Result
    from emlens.results import RESULT_CLASSES, result_class

    for kind in RESULT_CLASSES:  # imported, so that the list does not depend on what was
        result_class(kind)
    schemas: dict[str, dict[str, str]] = {}

    def add(cls: Any) -> None:
        kind = getattr(cls, "kind", None)
        name = kind if isinstance(kind, str) else cls.__name__
        if name in schemas:
            return
        node = parse_source(cls)
        written = describe_class(node) if isinstance(node, ast.ClassDef) else {}
        hints = typing.get_type_hints(cls)
        fields = [field.name for field in dataclasses.fields(cls)]
        schemas[name] = {field: written.get(field, str(hints[field])) for field in fields}
        for field in fields:
            find_held(hints[field])

    def find_held(hint: Any) -> None:
        own = getattr(hint, "__module__", "").startswith("emlens.")
        if own and isinstance(hint, type) and dataclasses.is_dataclass(hint):
            add(hint)
        for argument in typing.get_args(hint):
            find_held(argument)

    pending = list(Result.__subclasses__())
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if dataclasses.is_dataclass(cls) and cls.__module__.startswith("emlens."):
            add(cls)
    return schemas


def describe_api() -> dict[str, Any]:
    """The whole promise, as plain JSON."""
    names = {name: describe(thing) for name, thing in list_public()}
    return {"names": names, "commands": list_commands(), "schemas": list_schemas()}


def main() -> None:
    """Write the file; `git diff docs/api.json` then shows what a user would notice."""
    text = json.dumps(describe_api(), indent=1, sort_keys=True, ensure_ascii=False)
    API.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {API.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
