"""The code of the documents works. Each bash and python block has a marker of its needs; blocks without needs run."""

import ast
import importlib
import os
import re
import socket
import subprocess
import sys

import pytest

from helpers.documents import blocks, commands, DOCUMENTS, NEEDS, ROOT, write_small_python
from jaxrl_reason import bench, compare, config, evaluate, export, generate, replay, report, reward_training, train
from jaxrl_reason.plan import __main__ as plan
from jaxrl_reason.runs.command import parse

COMMANDS = {
    module.COMMAND.name: module.COMMAND
    for module in (bench, compare, evaluate, export, generate, plan, replay, report, reward_training, train)
}
BLOCKS = [pytest.param(name, block, id=f"{name}:{block.line}") for name in DOCUMENTS for block in blocks(name)]
LONG = ("_reason.train ", "_reason.compare ", "_reason.bench ", "_reason.evaluate ", "/tmp/")  # blocks with whole runs


def is_quick(block) -> bool:
    return block.language == "python" and not any(word in block.text for word in LONG)


@pytest.mark.parametrize("document, block", BLOCKS)
def test_a_block_says_what_it_needs(document, block):
    assert block.needs in NEEDS, (
        f"{document}, line {block.line}: write <!-- needs: {'|'.join(NEEDS)} --> before the block"
    )


@pytest.mark.parametrize("document, block", BLOCKS)
def test_commands_flags_fields_and_imports_exist(document, block, monkeypatch):
    monkeypatch.chdir(ROOT)
    if block.language == "python":
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")
        return
    for name, arguments in commands(block.text):
        assert name in COMMANDS, f"{document}, line {block.line}: there is no command {name}"
        if "--help" in arguments:
            continue
        parsed = parse(COMMANDS[name], arguments)
        recipe = getattr(parsed, "config", None)
        # This recipe reads its model when it is loaded. Its fields are the fields of any run.
        if recipe and "smollm2" in str(recipe):
            assert (ROOT / recipe).is_file()
            recipe = None
        fields = config.load(recipe) if recipe else config.Config()
        for field, value in parsed.fields.items():
            config.override(fields, field, value)


def test_links_lead_to_files():
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / document).read_text()):
            assert (ROOT / document).parent.joinpath(link).exists(), f"{document}: {link}"


def test_the_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 150


def run(block, folder, environment):
    """Runs a block as a reader does, in a folder with only the recipes. /tmp becomes a folder of the test."""
    for name in ("configs", "tests"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    programs, tmp = folder / "programs", folder / "tmp"
    if not programs.exists():
        programs.mkdir()
        tmp.mkdir()
        write_small_python(programs)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = block.text.replace("/tmp/", f"{tmp}/").replace("127.0.0.1:1234", f"127.0.0.1:{port}")
    shell = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    environment = os.environ | environment | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*shell, text], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"line {block.line}:\n{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert "error: " not in done.stderr, done.stderr  # processes in the background have no errors


@pytest.mark.runs
@pytest.mark.parametrize(
    "document, block", [b for b in BLOCKS if b.values[1].needs == "nothing" and is_quick(b.values[1])]
)
def test_a_quick_block_runs(document, block, tmp_path):
    run(block, tmp_path, {"JAX_PLATFORMS": "cpu"})


@pytest.mark.runs
@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_blocks_of_a_document_run_in_order(document, tmp_path, data_dir, shared_programs):
    """Blocks build on the files of the blocks before them."""
    environment = {name.upper(): str(value) for name, value in shared_programs.items()}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "TFDS_DATA_DIR": str(data_dir)}
    for block in blocks(document):
        if block.needs == "nothing" and not is_quick(block):
            run(block, tmp_path, environment)
