"""Lists the commands: python -m jaxrl_reason."""

import ast
import pathlib
import shutil
import sys
import textwrap

import jaxrl_reason

COMMANDS = (
    "train",
    "evaluate",
    "generate",
    "compare",
    "export",
    "report",
    "replay",
    "bench",
    "plan",
    "reward_training",
)


def purpose(name: str) -> str:
    """Returns the first sentence of a command's docstring; the command is not imported, which takes seconds."""
    file = pathlib.Path(__file__).with_name(f"{name}.py")
    file = file if file.exists() else file.with_suffix("") / "__main__.py"
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def main(argv: list[str]) -> int:
    """Prints the version and the commands. Returns 2 if there are arguments: a command has a module of its own."""
    if argv and argv[0] not in ("--help", "-h", "--version"):
        known = argv[0] in COMMANDS
        remedy = f"write python -m jaxrl_reason.{argv[0]}" if known else f"commands are {', '.join(COMMANDS)}"
        print(f"error: {argv[0]!r} is not an argument; {remedy}.", file=sys.stderr)
        return 2
    print(f"jaxrl_reason {jaxrl_reason.__version__}")
    if argv[:1] == ["--version"]:
        return 0
    print("\nCommands:\n")
    width = max(shutil.get_terminal_size().columns, 40)
    indent = " " * (42 if width >= 72 else 6)
    for name in COMMANDS:
        program = f"  python -m jaxrl_reason.{name}"
        text = textwrap.fill(purpose(name), width, initial_indent=indent, subsequent_indent=indent)
        print(program + text[len(program) :] if width >= 72 else f"{program}\n{text}")
    print("\nEach has --help. A first run:\n")
    print("  python -m jaxrl_reason.train --config=configs/quickstart.py --workdir=/tmp/quickstart")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
