"""README and tutorial do what they say: their Python runs, their commands and links exist."""

import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import emlens
from emlens.cli.main import app
from emlens.data import Chat, Message, load_chats

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))


def read_page(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def list_blocks(page: str, language: str) -> list[str]:
    fence = rf"^```{language}\n(.*?)^```$"
    return re.findall(fence, read_page(page), flags=re.DOTALL | re.MULTILINE)


def list_commands(page: str, program: str) -> list[str]:
    joined = [block.replace("\\\n", " ") for block in list_blocks(page, "console")]
    lines = [line for block in joined for line in block.splitlines()]
    return [line[2:] for line in lines if line.startswith(f"$ {program} ")]


def list_all_commands(program: str) -> list[tuple[str, str]]:
    return [(page, line) for page in PAGES for line in list_commands(page, program)]


def find_faults(tree: ast.Module) -> Iterator[str]:
    """Names and keywords of examples that the package does not have, and imports in vain."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            public = getattr(module, "__all__", [n for n in dir(module) if n[0] != "_"])
            names = [alias.name for alias in node.names]
            yield from (f"{node.module}.{name}" for name in names if name not in public)
            yield from (f"unused: {name}" for name in names if name not in used)
        elif (name := name_of_root(node)) and name not in emlens.__all__:
            yield f"emlens.{name}"
        elif isinstance(node, ast.Call) and (name := name_of_root(node.func)) in emlens.__all__:
            known = inspect.signature(getattr(emlens, name)).parameters
            yield from (f"{word.arg}=" for word in node.keywords if word.arg not in known)


def name_of_root(node: ast.AST) -> str:
    """`name` of `emlens.name`, empty for anything else."""
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "emlens":
        return node.attr
    return ""


def load_short_chats(*given: Any, **named: Any) -> list[Chat]:
    """Chats as the package loads them, with the first eight words of each message."""
    return [
        replace(chat, messages=tuple(map(shorten, chat.messages)))
        for chat in load_chats(*given, **named)
    ]


def shorten(message: Message) -> Message:
    return replace(message, content=" ".join(message.content.split()[:8]))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_python_examples_of_the_readme_run_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the model, adapter and texts that they name, each text cut after a few words."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emlens, "load_chats", load_short_chats)
    blocks = list_blocks("README.md", "python")
    assert blocks
    namespace: dict[str, Any] = {"__name__": "readme"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)
    assert (tmp_path / "report.html").stat().st_size > 1000


@pytest.mark.parametrize("page", PAGES)
def test_python_examples_use_public_names_and_whatever_they_import(page: str) -> None:
    blocks = list_blocks(page, "python")
    assert list(find_faults(ast.parse("\n".join(blocks)))) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("from emlens.data import Batching", "unused: Batching"),
        ("from emlens.data import Batch_ing\nBatch_ing()", "emlens.data.Batch_ing"),
        ("import emlens\nemlens.load_pairs", "emlens.load_pairs"),
        ("import emlens\nemlens.load_chats('x', limits=2)", "limits="),
    ],
)
def test_a_fault_of_an_example_is_found(source: str, fault: str) -> None:
    assert list(find_faults(ast.parse(source))) == [fault]


def test_there_are_commands_to_check() -> None:
    assert len(list_commands("README.md", "emlens")) >= 3
    assert len(list_commands("README.md", "make")) == 2
    assert len(list_commands("docs/tutorial.md", "emlens")) >= 6


@pytest.mark.parametrize(("page", "line"), list_all_commands("emlens"))
def test_a_command_has_the_flags_that_a_page_gives_it(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    command: Any = get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    assert not getattr(command, "commands", {}), f"{page}: no such command: {line}"
    known = {flag for parameter in command.params for flag in parameter.opts} | {"--help"}
    assert {word for word in words if word.startswith("--")} <= known


def test_no_two_commands_write_into_one_folder() -> None:
    found: dict[str, set[str]] = {}
    for _, line in list_all_commands("emlens"):
        words = shlex.split(line, comments=True)
        if "--out" in words:
            found.setdefault(words[words.index("--out") + 1], set()).add(" ".join(words))
    assert len(found) >= 6
    # The same command again only goes on with its run.
    assert {out: lines for out, lines in found.items() if len(lines) > 1} == {}


@pytest.mark.parametrize(("page", "line"), list_all_commands("make"))
def test_a_make_target_of_a_page_exists(page: str, line: str) -> None:
    target = shlex.split(line, comments=True)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(
    ("page", "target"),
    [
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:]+)\)", read_page(page))
    ],
)
def test_a_link_of_a_page_leads_somewhere(page: str, target: str) -> None:
    assert ((ROOT / page).parent / target).exists()


def test_the_tree_of_the_readme_is_the_tree() -> None:
    tree = list_blocks("README.md", "text")[-1].splitlines()
    inside = {line.split()[0] for line in tree if re.match(r"  \S", line)}
    assert [name for name in inside if not (ROOT / "emlens" / name).exists()] == []
    shown = {name.rstrip("/").removesuffix(".py") for name in inside}
    there = {
        p.stem
        for p in (ROOT / "emlens").iterdir()
        if not p.name.startswith("__") and p.suffix in {"", ".py"}
    }
    assert there - shown == set()
