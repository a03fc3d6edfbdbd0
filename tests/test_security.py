"""Searches the source of the package for dangerous calls, and tests names under checkpoints/ that lead elsewhere.

models/test_hostile_models.py has hostile models, data/test_chat.py has hostile chat templates, and rewards/ has hostile
answers.
"""

import ast
import pathlib

import pytest

import jaxrl_reason
from jaxrl_reason import export, runs
from jaxrl_reason.config import ConfigError
from jaxrl_reason.models import ModelConfig
from jaxrl_reason.runs.command import parse

PACKAGE = pathlib.Path(jaxrl_reason.__file__).parent

# Modules that run code from their input, or unpack archives.
MODULES = {
    "_pickle",
    "cloudpickle",
    "code",
    "dill",
    "joblib",
    "marshal",
    "pickle",
    "runpy",
    "shelve",
    "tarfile",
    "torch",
    "yaml",
}
CALLS = {"__import__", "compile", "eval", "exec"}  # functions of texts; methods named `compile` are harmless
METHODS = {
    "exec_module",
    "extract",
    "extractall",
    "getoutput",
    "import_module",
    "popen",
    "system",
    "unpack_archive",
    "unsafe_load",
}
UNPICKLES = {"recv", "loads"}  # of multiprocessing's connections and ForkingPickler; json.loads is harmless

# Calls and imports with a purpose: (file, function, name).
ALLOWED = {
    ("config/command_line.py", "load_module", "exec_module"),  # a recipe is a Python file that the user names
    ("rewards/loading.py", "_import_file", "exec_module"),  # a reward function is in a Python file that the user names,
    ("rewards/loading.py", "_import_module", "import_module"),  # or in a module
    ("data/sources.py", "open_prepared", "import_module"),  # one of our builders, from a table
    ("runs/trackers.py", "run", "import_module"),  # a tracker, from a table
    # A worker unpickles messages of the process that started it. That process never unpickles reports of a worker.
    ("rewards/pool.py", "", "multiprocessing.reduction"),
    ("rewards/worker.py", "", "multiprocessing.reduction"),
    ("rewards/worker.py", "_serve", "recv"),
    ("rewards/worker.py", "_serve", "loads"),
}


def findings(source: str):
    """Yields (function, name) for each dangerous call or import of a module."""

    def visit(node, function):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.partition(".")[0] in MODULES or name == "multiprocessing.reduction":
                    yield function, name
        if isinstance(node, ast.Call):
            called = node.func
            keywords = {k.arg: k.value for k in node.keywords}
            if isinstance(called, ast.Name) and called.id in CALLS:
                yield function, called.id
            if isinstance(called, ast.Attribute):
                owner = called.value.id if isinstance(called.value, ast.Name) else ""
                if called.attr in METHODS:
                    yield function, called.attr
                if called.attr in UNPICKLES and owner != "json":
                    yield function, called.attr
                if called.attr == "load" and owner in ("np", "numpy"):
                    if not (
                        isinstance(keywords.get("allow_pickle"), ast.Constant)
                        and keywords["allow_pickle"].value is False
                    ):
                        yield function, "np.load"
            if "shell" in keywords or "trust_remote_code" in keywords:
                yield function, "shell" if "shell" in keywords else "trust_remote_code"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(ast.parse(source), "")


def test_no_module_runs_what_it_reads():
    found = {
        (path.relative_to(PACKAGE).as_posix(), *finding)
        for path in sorted(PACKAGE.rglob("*.py"))
        for finding in findings(path.read_text())
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "source, what",
    [
        ("import pickle", "pickle"),
        ("from torch.nn import x", "torch.nn"),
        ("def f():\n    from marshal import loads", "marshal"),
        ("eval(text)", "eval"),
        ("np.load(file)", "np.load"),
        ("np.load(file, allow_pickle=True)", "np.load"),
        ("subprocess.run(text, shell=True)", "shell"),
        ("os.system(text)", "system"),
        ("archive.extractall(there)", "extractall"),
        ("value = connection.recv()", "recv"),
        ("Auto.from_pretrained(x, trust_remote_code=flag)", "trust_remote_code"),
    ],
)
def test_the_search_finds_what_it_looks_for(source, what):
    assert [found for _, found in findings(source)] == [what]
    harmless = "re.compile(x)\nlowered.compile()\njson.loads(x)\nnp.load(x, allow_pickle=False)\nast.literal_eval(x)"
    assert not list(findings(harmless))


def test_names_under_checkpoints_are_plain_numbers(tmp_path):
    for name in ("7", "12", "-1", "3.5", "٣", "²", "7 ", "damaged-9", "..."):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert runs.checkpoint_numbers(tmp_path) == [12, 7]
    for text in ("../../x", "/etc", "-1", "٣", "²", "1.0", ""):
        with pytest.raises(ConfigError, match="--checkpoint=.*: expected a number"):
            parse(export.COMMAND, ["--workdir=a", "--out=b", f"--checkpoint={text}"])


def test_a_checkpoint_that_is_a_link_to_elsewhere_is_not_read(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "7").symlink_to(tmp_path / "elsewhere")
    for number in (None, 7):
        with pytest.raises(ConfigError, match="7 cannot be read: .*7 leads to .*elsewhere, outside of .*checkpoints"):
            runs.load_weights(
                tmp_path / "run",
                number,
                {"embedding": 0},
                ModelConfig(vocab_size=8, width=8, layers=1, heads=1, kv_heads=1, mlp_width=8),
            )
