"""Executes the notebooks of colab/, and stores them with their outputs.

cd tests && python -m helpers.notebooks one_step quickstart tpu_qwen kaggle_v5e8
cd tests && python -m helpers.notebooks --keep-runs hero      # keeps the outputs of cells that train
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import tempfile

import nbclient
import nbformat

from helpers import reference_decoder
from jaxrl_reason import data, models

COLAB = pathlib.Path(__file__).parents[2] / "colab"
NOTEBOOKS = sorted(path.stem for path in COLAB.glob("*.ipynb"))
METHODS = ("genre2", "hero", "laser", "progrpo", "rlev")  # notebooks of one method each
INSTALL = 1  # the cell that installs the library
BY_HAND = 3  # in the notebook of a method, the cell that computes a group of four
TRAINS = "trains"  # the tag of the cells that train, or show a result of training
# Outputs with one of these texts are not stored.
NOISE = (
    "ownload",
    " are padded to ",
    " has been going on for ",
    f"{tempfile.gettempdir()}/",
    f"{pathlib.Path.home()}/",
)

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


def read(notebook: str):
    """Returns a stored notebook."""
    return nbformat.read(COLAB / f"{notebook}.ipynb", as_version=4)


def execute(notebook: str, folder, *, train: bool = True):
    """Returns the notebook executed in a folder, without the cell that installs the library.

    It runs in colab/ of a folder that looks like a clone. Without `train`, cells that train keep their stored outputs.
    """
    place = pathlib.Path(folder, "colab")
    place.mkdir(parents=True)
    for name in ("setup.cfg", "configs"):
        place.with_name(name).symlink_to(COLAB.parent / name)
    stored, done = read(notebook), read(notebook)
    skipped = [INSTALL]
    if not train:
        skipped += [i for i, cell in enumerate(done.cells) if TRAINS in cell.metadata.get("tags", ())]
    for i in skipped:
        done.cells[i].source = "pass"
    nbclient.NotebookClient(done, timeout=1800, resources={"metadata": {"path": str(place)}}).execute()
    for i in skipped:
        done.cells[i].source, done.cells[i].outputs = stored.cells[i].source, stored.cells[i].outputs
    return done


def outputs_of(notebook) -> list:
    """Returns the outputs of all cells."""
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def images(notebook) -> int:
    """Returns the number of pictures among the outputs."""
    return sum("image/png" in output.get("data", ()) for output in outputs_of(notebook))


def text(notebook) -> str:
    """Returns the text of all outputs; rich shows its tables as display data in a notebook."""
    shown = lambda output: output.get("text", "") + output.get("data", {}).get("text/plain", "")
    return "".join(map(shown, outputs_of(notebook)))


def without_noise(notebook):
    """Returns the notebook without warnings, paths of this machine and times of execution; joins pieces of printed text."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        outputs = []
        for output in cell.get("outputs", ()):
            if output.get("name") == "stdout":
                lines = output.text.splitlines(keepends=True)
                output.text = "".join(line for line in lines if not any(noise in line for noise in NOISE))
            shown = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            if output.get("name") == "stderr" or output.get("text") == "" or any(noise in shown for noise in NOISE):
                continue
            if outputs and output.get("name") == outputs[-1].get("name") == "stdout":
                outputs[-1].text += output.text
            else:
                outputs.append(output)
        if cell.cell_type == "code":
            cell.outputs = outputs
    return notebook


def write_stand_in(folder: pathlib.Path) -> dict[str, str]:
    """Writes a model of width 16 and a hundred sums, which replace Qwen3-0.6B and GSM8K.

    The model has random weights, and is a directory in the layout of the hub.

    Returns:
      The environment under which tpu_qwen.ipynb uses both, for two steps.
    """
    tokenizer = data.train_tokenizer(["1 + 1?", "Please reason step by step. It is 2."], 300)
    config = models.ModelConfig(
        vocab_size=tokenizer.vocab_size, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24, qk_norm=True
    )
    params = reference_decoder.random_params(config, scale=0.3)
    policy = models.Policy(config, params, dataclasses.replace(tokenizer, chat_template=CHAT))
    models.save_pretrained(folder / "model", policy)
    assert json.loads((folder / "model" / "config.json").read_text())["model_type"] == "qwen3"
    problems = folder / "problems.jsonl"
    problems.write_text("".join(json.dumps({"question": f"1 + {i}?", "answer": str(1 + i)}) + "\n" for i in range(100)))
    return dict(STEPS="2", MODEL=str(folder / "model"), PROBLEMS=str(problems), WORKDIR=str(folder / "run"))


def write_session(folder: pathlib.Path, steps: int = 2, seconds: int = 600) -> dict[str, str]:
    """Writes the files of `write_stand_in`, unless they exist.

    Returns:
      The environment under which kaggle_v5e8.ipynb uses it, for a number of steps, and of seconds at most. The notebook's
      input is folder/input, its output folder/working.
    """
    if not (folder / "model").exists():
        write_stand_in(folder)
    fields = {
        "steps": steps,
        "prompts_per_step": 2,
        "group_size": 2,
        "max_prompt_length": 128,
        "max_completion_length": 8,
        "model.path": folder / "model",
        "data.train": folder / "problems.jsonl",
        "data.train_split": "[:90%]",
        "data.eval_split": "[90%:]",
        "update.accumulation": 1,
        "mesh.fsdp": 1,
        "mesh.rollout_tensor": 0,
        "lora.rank": 2,
        "eval.every": 1,
        "eval.prompts": 4,
        "log.samples_every": 1,
        "checkpoint.every": 1,
    }
    return dict(
        INPUT=str(folder / "input"),
        WORKDIR=str(folder / "working" / "run"),
        SECONDS_OF_TRAINING=str(seconds),
        FIELDS=" ".join(f"--config.{name}={value}" for name, value in fields.items()),
    )


def main(arguments) -> None:
    for name in (argument for argument in arguments if argument != "--keep-runs"):
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(COLAB.parent):
            os.environ["TFDS_DATA_DIR"] = folder
            if name == "tpu_qwen":
                os.environ.update(write_stand_in(pathlib.Path(folder)))
            if name == "kaggle_v5e8":
                os.environ.update(write_session(pathlib.Path(folder)))
            done = execute(name, folder, train="--keep-runs" not in arguments)
            nbformat.write(without_noise(done), COLAB / f"{name}.ipynb")


if __name__ == "__main__":
    main(sys.argv[1:])
