"""The notebook runs as it stands, headless, with fewer steps."""

import json
import os
import pathlib
import subprocess
import sys

import nbclient
import nbformat
import pytest

NOTEBOOK = pathlib.Path(__file__).parents[1] / "colab" / "quickstart.ipynb"


def test_the_notebook_is_short_and_stored_without_output():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert len(cells) <= 12
    assert not any(cell.get("outputs") for cell in cells)


@pytest.mark.parametrize("tpu", [False, True])
@pytest.mark.parametrize("where", ["colab", "a folder that holds the clone"])
def test_after_installing_the_package_is_found(where, tpu, tmp_path):
    """A Python without site-packages, whose pip is a record of its arguments; the folder is on its path, as in a notebook."""
    repository = NOTEBOOK.parents[1]
    if where == "colab":
        place, clone = NOTEBOOK.parent, ".."
    else:
        place, clone = tmp_path, "jaxrl_reason"
        (tmp_path / clone).symlink_to(repository)
    install = nbformat.read(NOTEBOOK, as_version=4).cells[1].source
    found = ["/dev/accel0"] if tpu else []
    script = (
        f"import glob\nglob.glob = lambda pattern: {found} * ('accel' in pattern)\n"
        "import subprocess\ncalls = []\nsubprocess.run = lambda arguments, **_: calls.append(arguments[1:])\n"
        f"{install}\n"
        "import json\nprint(json.dumps([calls, importlib.util.find_spec('jaxrl_reason').origin]))\n"
    )
    process = subprocess.run(
        [sys.executable, "-S", "-E", "-c", script], cwd=place, capture_output=True, text=True, env=os.environ
    )
    assert process.returncode == 0, process.stderr
    calls, origin = json.loads(process.stdout)
    assert calls == [["-m", "pip", "install", "-q", "-e", clone + "[tpu]" * tpu]]
    assert pathlib.Path(origin).samefile(repository / "jaxrl_reason" / "__init__.py")


@pytest.mark.slow
def test_the_notebook_runs_headless(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPS", "5")
    monkeypatch.setenv("SUPERVISED_STEPS", "4")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    # rich shows its tables as display data in a notebook.
    text = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "accuracy" in text and "advantage" in text
