"""The code blocks of the documents, and a `python` that runs their commands with small budgets."""

import pathlib
import re
import shlex
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "configs/README.md", "jaxrl_reason/*/README.md")
    for path in ROOT.glob(pattern)
)
NEEDS = ("nothing", "network", "tpu")
MARKER = re.compile(r"<!-- needs: (.*) -->")


class Block(NamedTuple):
    """A fenced block: the line of its fence, its language, its text, and the text of the marker before it, or ""."""

    line: int
    language: str
    text: str
    needs: str


def blocks(document: str) -> list[Block]:
    """Returns the bash and python blocks of a document, in order."""
    lines, found, begin = (ROOT / document).read_text().splitlines(), [], None
    for i, line in enumerate(lines):
        if begin is None and line.startswith("```"):
            begin = i
        elif begin is not None and line == "```":
            language = lines[begin].removeprefix("```")
            if language in ("bash", "python"):
                marker = MARKER.fullmatch(lines[begin - 1])
                text = "\n".join(lines[begin + 1 : i]) + "\n"
                found.append(Block(begin + 1, language, text, marker[1] if marker else ""))
            begin = None
    assert begin is None, f"{document}: the block that begins in line {begin} has no end"
    return found


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Returns the commands of the package in a bash block, also inside quotes: (name, arguments)."""
    found = []
    text = text.replace("\\\n", " ")
    for match in re.finditer(r"python -m jaxrl_reason\.(\w+)", text):
        rest = text[match.end() :].partition("\n")[0]
        words = shlex.shlex(rest, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        arguments = []
        for word in words:
            if re.fullmatch(r"[<>|&;()\d]+", word):
                break
            arguments.append(word)
        found.append((match[1], arguments))
    return found


TINY_RUN = {
    "steps": 1,
    "prompts_per_step": 2,
    "group_size": 2,
    "model.width": 16,
    "model.layers": 1,
    "model.heads": 2,
    "model.kv_heads": 2,
    "model.mlp_width": 16,
    "supervised.steps": 2,
    "supervised.batch_size": 4,
    "eval.every": 1,
    "eval.prompts": 2,
    "eval.samples": 2,
    "update.accumulation": 1,
}
RUN_FLAGS = [f"--config.{name}={value}" for name, value in TINY_RUN.items()]
SMALL = {  # shell pattern of command:arguments -> flags to add after the flags of the document
    "train:*": RUN_FLAGS,
    "compare:*hero*": [
        *RUN_FLAGS,
        "--seeds=1",
        "--config.reward_model.steps=2",
        "--config.reward_model.batch_size=4",
        "--only=hero",  # two of seven rows: each row compiles for seconds
        "--only=verifier only",
    ],
    "compare:*genre2*": [*RUN_FLAGS, "--seeds=1", "--only=genre2"],
    "compare:*": [*RUN_FLAGS, "--seeds=1"],
    "evaluate:*": ["--samples=2"],
    "bench:*": [
        "--size=tiny",
        "--prompts=1",
        "--group=2",
        "--prompt-length=4",
        "--new=2",
        "--steps=1",
        "--accumulation=1",
        "--rounds=1",
    ],
}


def write_small_python(folder: pathlib.Path) -> None:
    """Writes programs `python` and `pip` into a folder: commands of the package get small budgets, and pip installs nothing."""
    cases = "".join(
        f'  jaxrl_reason.{pattern}) set -- "$@" {shlex.join(flags)};;\n' for pattern, flags in SMALL.items()
    )
    python = f'#!/bin/sh\n[ "$1" = -m ] && case "$2:$*" in\n{cases}esac\nexec {shlex.quote(sys.executable)} "$@"\n'
    for name, text in {"python": python, "pip": "#!/bin/sh\n", "pytest": "#!/bin/sh\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
