"""Runs every command of the package. One tiny run is trained, and the other commands work on it."""

import configparser
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

from helpers.report_runs import content_of
from helpers.tiny_runs import tiny, write_recipe, write_rows
import jaxrl_reason
from jaxrl_reason import __main__ as listing
from jaxrl_reason import bench, compare, evaluate, export, generate, replay, report, reward_training, train
from jaxrl_reason.plan import __main__ as plan
from jaxrl_reason.runs.watch import NonFiniteError

pytestmark = pytest.mark.usefixtures("quick_compilation")

PAIRS = [
    {"question": f"Write {i}.", "answer": str(i), "chosen": str(i), "rejected": str((i + 1) % 10)} for i in range(10)
]
OVERFLOWING = """
def overflowing(completion_ids, **_):
    return [3e38 * (i % 2) for i, _ in enumerate(completion_ids)]
"""


COMMANDS = {  # command -> flags that it accepts, first the required one
    "train": (train.main, ["--config=configs/quickstart.py", "--workdir=w"]),
    "reward_training": (reward_training.main, ["--config=configs/hero.py", "--workdir=w"]),
    "compare": (compare.main, ["--config=configs/hero.py", "--workdir=w", "--seeds=2", "--only=hero", "--results=r"]),
    "evaluate": (evaluate.main, ["--workdir=w", "--samples=2"]),
    "generate": (generate.main, ["--workdir=w", "--samples=2"]),
    "export": (export.main, ["--workdir=w", "--out=o"]),
    "replay": (replay.main, ["--workdir=w", "--step=1"]),
    "report": (report.main, ["--workdir=w", "--config=c"]),
    "plan": (plan.main, ["--config=configs/quickstart.py", "--topology=v5e:2x2"]),
    "bench": (bench.main, ["--size", "--steps=1"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, capsys):
    main, flags = COMMANDS[name]
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    summary, _, rest = out.partition("\n\n")
    assert re.fullmatch(r"[A-Z][a-z]+s [^.]+\.", summary.replace("\n", " ")), summary
    for flag in flags:
        assert re.search(rf"^  {flag.partition('=')[0]}=\S+  +\S", rest, re.MULTILINE), flag
    assert f"\nExample:\n  python -m jaxrl_reason.{name} --" in rest


@pytest.mark.parametrize("width", [60, 80])
def test_help_fits_into_the_terminal(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    for name, (main, _) in COMMANDS.items():
        assert main(["--help"]) == 0
        assert not [line for line in capsys.readouterr().out.splitlines() if len(line) > width], name


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_or_a_missing_flag_is_one_sentence(name, capsys):
    main, flags = COMMANDS[name]
    missing = flags[:1] if name == "bench" else flags[1:]  # bench has no required flag, so a value is missing
    for arguments in ([*flags, "--nonsense=1"], missing):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert re.fullmatch(r"error: [^\n]+\n", captured.err) and not captured.out


def test_the_process_has_the_exit_code_and_no_traceback(tmp_path):
    arguments = [sys.executable, "-m", "jaxrl_reason.replay", f"--workdir={tmp_path}"]
    result = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert result.returncode == 2 and not result.stdout
    assert re.fullmatch(r"error: .* is not the work directory of a run: .*\n", result.stderr)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Trains a reward model and then a policy, and returns the work directory."""
    folder = tmp_path_factory.mktemp("commands")
    learned = dict(
        reward__functions=["accuracy", "reward_model"],
        reward__weights=[1.0, 0.0],
        reward_model__steps=1,
        reward_model__batch_size=4,
    )
    config = tiny(write_rows(folder / "pairs.jsonl", PAIRS), steps=1, eval__every=1, **learned)
    flags = [f"--config={write_recipe(folder / 'recipe.py', config)}", f"--workdir={folder / 'run'}"]
    assert reward_training.main(flags) == 0
    assert (folder / "run" / "reward_model" / "reward_model.json").is_file()
    assert train.main(flags) == 0
    return folder / "run"


def test_reward_training_and_train(workdir):
    assert (workdir / "learning_curve.png").is_file()


def test_report(workdir):
    before = (workdir / "report.html").read_bytes()
    assert report.main([f"--workdir={workdir}"]) == 0
    assert (workdir / "report.html").read_bytes() == before  # as the run has left it


def test_evaluate(workdir, tmp_path):
    assert evaluate.main([f"--workdir={workdir}", f"--out={tmp_path}", "--samples=2"]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["samples"] == 2


def test_evaluate_sets_with_truncation_against_an_earlier_evaluation(workdir, tmp_path):
    sampling = ["--temperature=0.5", "--top_k=9", "--top_p=0.9", "--max_completion_length=3", "--samples=2"]
    flags = [f"--workdir={workdir}", f"--sets={write_rows(tmp_path / 'set.jsonl', PAIRS[:4])}@3", *sampling]
    for more in ([f"--out={tmp_path / 'first'}"], [f"--out={tmp_path / 'second'}", f"--against={tmp_path / 'first'}"]):
        assert evaluate.main([*flags, *more]) == 0
    record = json.loads((tmp_path / "second" / "evaluation.json").read_text())
    found = record["sets"]["set"]
    assert (found["samples"], found["top_k"], found["top_p"], found["max_completion_length"]) == (3, 9, 0.9, 3)
    assert record["against"]["differences"]["set"]["accuracy"]["difference"] == 0


def test_evaluate_a_model(workdir, tmp_path, capsys):
    assert export.main([f"--workdir={workdir}", f"--out={tmp_path / 'model'}"]) == 0
    flags = [f"--model={tmp_path / 'model'}", f"--data={write_rows(tmp_path / 'set.jsonl', PAIRS[:2])}"]
    assert evaluate.main([*flags, f"--out={tmp_path / 'out'}", "--samples=1", "--max-completion-length=2"]) == 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["phase"] == "pretrained"
    assert re.search(r"evaluation 1/1 +\d+ tokens/s, with compilation\n", capsys.readouterr().out)


@pytest.mark.parametrize("switches", [[], ["--reward-model"]])
def test_export(switches, workdir, tmp_path):
    assert export.main([f"--workdir={workdir}", f"--out={tmp_path / 'model'}", *switches]) == 0
    assert (tmp_path / "model" / "config.json").is_file()


def test_compare(tmp_path):
    config = tiny(write_rows(tmp_path / "rows.jsonl"), steps=1, eval__every=1)
    recipe = write_recipe(tmp_path / "recipe.py", config, {"other": {"optimizer.b1": 0.8}})
    flags = ["--seeds=1", "--only=grpo", "--only=other", f"--results={tmp_path / 'results.jsonl'}"]
    assert compare.main([f"--config={recipe}", f"--workdir={tmp_path / 'runs'}", *flags]) == 0
    assert list(json.loads((tmp_path / "runs" / "comparison.json").read_text())) == ["start", "grpo", "other"]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    tables = {table["title"]: table["rows"] for table in content_of(tmp_path / "runs" / "comparison.html")["tables"]}
    links = [f"seed-0/{name}/report.html" for name in ("method", "other")]
    assert [row[3] for row in tables["Runs"]] == [{"text": "report", "link": link} for link in links]
    fields = content_of(tmp_path / "runs" / links[1])["fields"]
    assert fields["recipe"] == "the recipe of the comparison"
    assert [row[:3] for row in fields["rows"] if row[2] is not None] == [["optimizer.b1", "0.8", "0.9"]]


def test_replay(tmp_path, capsys):
    (tmp_path / "rewards.py").write_text(OVERFLOWING)
    reward = f"{tmp_path / 'rewards.py'}:overflowing"
    config = tiny(
        write_rows(tmp_path / "rows.jsonl"),
        method={"name": "dr_grpo"},
        reward__functions=[reward],
        optimizer__max_skipped=1,
    )
    flags = [f"--config={write_recipe(tmp_path / 'recipe.py', config)}", f"--workdir={tmp_path / 'run'}"]
    assert train.main(flags) == 1
    assert "error: At step 1 the loss or its gradient was not finite" in capsys.readouterr().err
    assert replay.main([f"--workdir={tmp_path / 'run'}"]) == 0
    assert "Step 1: loss" in capsys.readouterr().out


def test_a_run_that_diverges_has_exit_code_1_from_compare_as_well(tmp_path, capsys, monkeypatch):
    recipe = write_recipe(tmp_path / "recipe.py", tiny(write_rows(tmp_path / "rows.jsonl"), eval__every=1), {})

    def diverging(_):
        raise NonFiniteError("It diverged.")

    monkeypatch.setattr(train, "train", diverging)
    assert compare.main([f"--config={recipe}", f"--workdir={tmp_path / 'runs'}"]) == 1
    assert capsys.readouterr().err.endswith("error: It diverged.\n")


def test_bench(capsys):
    sizes = ["--prompts=1", "--group=2", "--prompt-len=4", "--new=2", "--steps=1"]
    assert bench.main(["--size=tiny", "--lengths=mixed", *sizes]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["work"]["prompt_len"] == 4 and math.isfinite(result["step_seconds"]) and result["timed_steps"] == 1


@pytest.mark.runs
def test_bench_compares_settings_in_turn(capsys):
    sizes = ["--prompts=1", "--group=2", "--prompt-len=4", "--new=2", "--steps=1"]
    assert bench.main(["--size=tiny", *sizes, "--compare=--remat=layer --group=3", "--rounds=1"]) == 0
    *lines, table = capsys.readouterr().out.split("\n", 2)
    work = [json.loads(line)["work"] for line in lines]
    assert [(x["group"], x["remat"]) for x in work] == [(2, "none"), (3, "layer")]
    assert "as given" in table and "--remat=layer" in table and "step_seconds" in table


def test_a_comparison_leaves_the_devices_to_its_processes():
    parse = "command.parse(bench.COMMAND, ['--compare=--halvings=0'])"
    code = f"from jaxrl_reason import bench; from jaxrl_reason.runs import command; print(bench.prepare_comparison({parse}).rounds)"
    env = {**os.environ, "JAX_PLATFORMS": "nowhere"}  # whatever asks for a device fails
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("2\n", 0), done.stderr


@pytest.mark.parametrize(
    "text, said",
    [
        ("'unclosed", 'error: --compare="\'unclosed": No closing quotation\n'),
        ("", "error: --compare='' has no flags, so nothing differs; give flags, such as '--halvings=0'.\n"),
        ("--lengths=some", "error: --compare='--lengths=some': --lengths is 'some'; it must be one of full, mixed.\n"),
    ],
)
def test_a_setting_that_cannot_be_measured_is_one_sentence(text, said, capsys):
    assert bench.main([f"--compare={text}"]) == 2
    assert capsys.readouterr().err == said


def test_the_setting_as_given_is_checked_first(capsys):
    assert bench.main(["--wave-tokens=64", "--update-lengths=1", "--compare=--update-lengths=2"]) == 2
    assert "--compare" not in (said := capsys.readouterr().err) and "config.update.lengths is 1" in said


def test_the_ratios_of_a_comparison_are_of_medians():
    line = lambda x: dict.fromkeys(bench.COMPARED, x)
    found = {"as given": [line(4.0), line(2.0), line(9.0)], "other": [line(3.0), line(1.0), line(2.0)]}
    assert bench.ratios(found) == {"as given": ["4 (1.00)"] * 5, "other": ["2 (0.50)"] * 5}


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--compare=--halvings=0", "--compare=--nothing=1"], "--compare='--nothing=1': There is no flag '--nothing'."),
        (["--compare=--compare=--halvings=0"], "--compare='--compare=--halvings=0': There is no flag '--compare'."),
        (["--compare=--accumulation=3"], "--compare='--accumulation=3': config"),
        (["--halvings=-x"], "--halvings=-x: expected a number."),
        (["--update-lengths=2.5"], "--update-lengths=2.5: expected a number."),
        (["--compare=--halvings=0", "--rounds=0"], "--rounds is 0; give the number of rounds, at least 1."),
    ],
)
def test_bench_refuses_settings_before_it_measures(flags, said, capsys):
    assert bench.main(flags) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {said}") and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize("flags", [["--steps=3", "--max-steps=2"], ["--max-steps=5"], ["--max-steps=0"]])
def test_bench_refuses_fewer_steps_at_most_than_steps(flags, capsys):
    assert bench.main(flags) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: --max-steps=\d is less than --steps=\d; raise it, or lower --steps.\n", err)


def test_the_package_lists_its_commands(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert listing.main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"jaxrl_reason {jaxrl_reason.__version__}\n") and max(map(len, out.splitlines())) <= 100
    assert set(listing.COMMANDS) == set(COMMANDS)
    for name, (main, _) in COMMANDS.items():
        summary = " ".join((sys.modules[main.__module__].__doc__ or "").partition("\n\n")[0].split())
        assert re.search(rf"^  python -m jaxrl_reason\.{name} +{re.escape(summary[:30])}", out, re.MULTILINE)
        assert summary in " ".join(out.split())
    assert listing.main(["--help"]) == 0 and capsys.readouterr().out == out
    monkeypatch.setenv("COLUMNS", "50")
    assert listing.main([]) == 0
    narrow = capsys.readouterr().out
    assert narrow.split() == out.split() and max(map(len, narrow.splitlines()[:-1])) <= 50  # the example is on one line


@pytest.mark.parametrize(
    "argv, code, said",
    [
        (["--version"], 0, f"jaxrl_reason {jaxrl_reason.__version__}\n"),
        (["train", "--config=x"], 2, "error: 'train' is not an argument; write python -m jaxrl_reason.train.\n"),
        (["bake"], 2, f"error: 'bake' is not an argument; commands are {', '.join(listing.COMMANDS)}.\n"),
    ],
)
def test_arguments_of_the_package(argv, code, said, capsys):
    assert listing.main(argv) == code
    assert "".join(capsys.readouterr()) == said


def test_the_version_has_one_place():
    setup = configparser.ConfigParser()
    setup.read(pathlib.Path(jaxrl_reason.__file__).parents[1] / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: jaxrl_reason.__version__"


def test_a_command_says_what_it_refuses_without_the_libraries_of_data_and_pictures():
    """Their import would take half a second of the two seconds of a refusal."""
    code = "import sys, jaxrl_reason.train; print(sorted({'matplotlib', 'tensorflow_datasets'} & sys.modules.keys()))"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "[]\n", done.stderr


def test_plan(tmp_path):
    """The plan runs in a process of its own, because libtpu stays loaded."""
    pytest.importorskip("libtpu")
    out = tmp_path / "plan.json"
    recipe = write_recipe(tmp_path / "recipe.py", tiny("rows.jsonl"))
    flags = [f"--config={recipe}", "--topology=v5e:2x2", f"--out={out}"]
    result = subprocess.run(
        [sys.executable, "-m", "jaxrl_reason.plan", *flags], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(out.read_text())["fits"]
