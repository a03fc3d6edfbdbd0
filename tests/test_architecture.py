"""Tests that imports of the package point one way, and that files and functions are short.

ARCHITECTURE.md explains the rooms.
"""

import ast
import pathlib
import re

import pytest

import jaxrl_reason

PACKAGE = pathlib.Path(jaxrl_reason.__file__).parent
# Each room imports only from rooms of its own row or of the rows before it.
ROWS = (
    ("advantages", "losses", "metrics", "data"),
    ("methods", "models"),
    ("config",),
    ("rl",),
    ("runs",),
    ("rewards",),
    ("tasks", "plan"),
    ("bench", "evaluate", "export", "generate", "report", "train"),
    ("compare", "replay", "reward_training"),
)
# Within a row, rooms do not import each other, except for these pairs.
SAME_ROW = {("methods", "advantages"), ("methods", "losses")}
ENTRIES = 24  # at most so many entries in jaxrl_reason/
LINES, FUNCTION_LINES = 450, 80

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(path: pathlib.Path, late: bool) -> set[str]:
    """Returns the modules of the package that a file imports at its top, or inside functions if `late` is true."""
    tree, found = ast.parse(path.read_text()), set()
    inside = {id(x) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for x in ast.walk(f)}
    for node in ast.walk(tree):
        if (id(node) in inside) != late:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxrl_reason"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "jaxrl_reason":
                parts = parts[1:]
                while parts and ".".join(parts) not in MODULES:
                    parts.pop()  # a name inside a module
                found.add(".".join(parts))
    return found - {""}


def row_of(module: str) -> int:
    room = module.split(".")[0]
    return next(i for i, row in enumerate(ROWS) if room in row)


@pytest.mark.parametrize("module", [name for name in MODULES if name not in ("__init__", "__main__")])
def test_imports_point_one_way(module):
    room = module.split(".")[0]
    for other in imports(MODULES[module], late=False):
        other_room = other.split(".")[0]
        if other_room != room:
            allowed = row_of(other) < row_of(module) or (room, other_room) in SAME_ROW
            assert allowed, f"{module} imports {other}, which is not before it in ROWS"


def test_no_import_is_hidden_in_a_function():
    assert not [(module, other) for module, path in MODULES.items() for other in imports(path, late=True)]


def test_consoles_print_names_as_they_are():
    """A path such as /tmp/a:key:b would have a picture of a key, and [b] would be markup."""
    for module, path in MODULES.items():
        for arguments in re.findall(r"rich\.console\.Console\(([^)]+)", path.read_text()):
            assert "markup=False" in arguments and "emoji=False" in arguments, module


def test_there_is_no_circle():
    graph = {module: imports(path, late=False) for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " imports ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_package_opens_on_one_screen():
    entries = {path.name for path in PACKAGE.iterdir() if not path.name.startswith((".", "__pycache__"))}
    assert len(entries) <= ENTRIES, sorted(entries)


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module):
    text = MODULES[module].read_text()
    assert text.count("\n") <= LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= FUNCTION_LINES, node.name
