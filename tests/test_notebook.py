"""The notebooks run as they stand, headless, with fewer steps."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import nbclient
import nbformat
import pytest

from helpers import reference_decoder
from jaxrl_reason import data, models

COLAB = pathlib.Path(__file__).parents[1] / "colab"
NOTEBOOKS = sorted(path.stem for path in COLAB.glob("*.ipynb"))


def read(notebook):
    return nbformat.read(COLAB / f"{notebook}.ipynb", as_version=4)


def run(notebook, folder):
    """The notebook executed in a folder, and what it printed; rich shows its tables as display data in a notebook."""
    done = read(notebook)
    nbclient.NotebookClient(done, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in done.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    text = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "accuracy" in text and "advantage" in text
    return text


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_is_short_and_stored_without_output(notebook):
    cells = read(notebook).cells
    assert len(cells) <= 14
    assert not any(cell.get("outputs") for cell in cells)


@pytest.mark.parametrize("tpu", [False, True])
@pytest.mark.parametrize("where", ["colab", "a folder that holds the clone"])
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_after_installing_the_package_is_found(notebook, where, tpu, tmp_path):
    """A Python without site-packages, whose pip is a record of its arguments; the folder is on its path, as in a notebook."""
    repository = COLAB.parent
    if where == "colab":
        place, clone = COLAB, ".."
    else:
        place, clone = tmp_path, "jaxrl_reason"
        (tmp_path / clone).symlink_to(repository)
    install = read(notebook).cells[1].source
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
def test_the_quickstart_runs_headless(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPS", "5")
    monkeypatch.setenv("SUPERVISED_STEPS", "4")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    run("quickstart", tmp_path)


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


@pytest.fixture
def small_qwen3(tmp_path):
    """A directory in the layout of the hub like that of Qwen3, with random weights of width 16."""
    tokenizer = data.train_tokenizer(["1 + 1?", "Please reason step by step. It is 2."], 300)
    config = models.ModelConfig(
        vocab_size=tokenizer.vocab_size, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24, qk_norm=True
    )
    params = reference_decoder.random_params(config, scale=0.3)
    policy = models.Policy(config, params, dataclasses.replace(tokenizer, chat_template=CHAT))
    models.save_pretrained(tmp_path / "model", policy)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "qwen3"
    return tmp_path / "model"


@pytest.mark.slow
def test_qwen_runs_headless_and_is_exported(small_qwen3, tmp_path, monkeypatch):
    """On a model and problems of this size in place of Qwen3-0.6B and GSM8K."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"question": f"1 + {i}?", "answer": str(1 + i)}) + "\n" for i in range(100)))
    for name, value in dict(STEPS="2", MODEL=small_qwen3, PROBLEMS=problems, WORKDIR=tmp_path / "run").items():
        monkeypatch.setenv(name, str(value))
    text = run("tpu_qwen", tmp_path)
    assert "<user>1 + " in text and "<think></think>" in text  # a sample, in the model's chat without thinking
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    exported = models.load_pretrained(tmp_path / "run" / "model")
    assert exported.config.qk_norm and not exported.config.lora_rank
    assert "config.json" in text and "model.safetensors" in text
