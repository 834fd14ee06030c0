"""The size gate: fails on a file, a function or a parameter list that has grown past its bound.

Not a style checker: what is shorter than the bounds is a reviewer's business.
"""

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("emlens", "tests", "benchmarks", "scripts", "docs")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 7


def count_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef, in_class: bool) -> int:
    """Parameters a caller can give, so without the `self` or `cls` of a method."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    static = any(
        isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list
    )
    bound = 1 if in_class and positional and not static else 0
    starred = (arguments.vararg is not None) + (arguments.kwarg is not None)
    return len(positional) - bound + len(arguments.kwonlyargs) + starred


def find_functions(
    node: ast.AST, in_class: bool = False
) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Every function below a node, and whether it stands directly in a class."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child, in_class
        yield from find_functions(child, isinstance(child, ast.ClassDef))


def find_violations(path: Path, shown_as: str) -> list[str]:
    """One line of text for each bound that a file breaks."""
    source = path.read_text(encoding="utf-8")
    lines = len(source.splitlines())
    found = []
    if lines > MAX_FILE_LINES:
        found.append(f"{shown_as}: {lines} lines, at most {MAX_FILE_LINES}: is it one idea?")
    for function, in_class in find_functions(ast.parse(source, filename=str(path))):
        where = f"{shown_as}:{function.lineno}: {function.name}"
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > MAX_FUNCTION_LINES:
            found.append(f"{where}: {length} lines, at most {MAX_FUNCTION_LINES}")
        parameters = count_parameters(function, in_class)
        if parameters > MAX_PARAMETERS:
            found.append(
                f"{where}: {parameters} parameters, at most {MAX_PARAMETERS}: "
                "those that travel together become one frozen dataclass"
            )
    return found


def check_tree(root: Path, folders: Sequence[str] = FOLDERS) -> tuple[int, list[str]]:
    """The number of files looked at below `root` and every violation in them."""
    paths = sorted(p for folder in folders for p in (root / folder).rglob("*.py"))
    return len(paths), [v for p in paths for v in find_violations(p, str(p.relative_to(root)))]


def main() -> int:
    """Print the violations; 0 where there are none."""
    count, violations = check_tree(ROOT)
    print("\n".join([*violations, f"{count} files, {len(violations)} over the bounds"]))
    return 1 if violations or not count else 0


if __name__ == "__main__":
    sys.exit(main())
