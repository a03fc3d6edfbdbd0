"""The notebook runs as it stands, headless, with fewer steps."""

import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOK = pathlib.Path(__file__).parents[1] / "colab" / "quickstart.ipynb"


def test_the_notebook_is_short_and_stored_without_output():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert len(cells) <= 12
    assert not any(cell.get("outputs") for cell in cells)


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
