"""Tests the skeleton of the commands: flags, --help, and the exit code of each error."""

import dataclasses
import logging
import pathlib
import signal
import subprocess
import sys
import time
import warnings

import jax
import pytest

from helpers.tiny_runs import tiny, write_recipe
from jaxrl_reason import models
from jaxrl_reason.config import ConfigError
from jaxrl_reason.rl import hosts
from jaxrl_reason.runs import command
from jaxrl_reason.runs.checkpoints import CheckpointError
from jaxrl_reason.runs.command import Command, Flag, number, parse, path
from jaxrl_reason.runs.files import MetricsError
from jaxrl_reason.runs.watch import NonFiniteError


class RewardError(Exception):
    """An error of a later room, which a command names."""


COMMAND = Command(
    "cook",
    "Cooks a meal.\n\nIt takes a while.",
    (
        Flag("out", "DIR", "the pot", path, required=True),
        Flag("portions", "N", "number of portions", number, 2, alias="plates"),
        Flag("spice", "NAME", "the spice", choices=("salt", "pepper")),
        Flag("no-salt", "", "leaves the salt out"),
        Flag("data", "NAME", "the recipe's data", field="data.eval"),
        Flag("config.", "FIELD=VALUE", "a field"),
    ),
    "--out=pot",
    errors=(RewardError,),
)


@pytest.mark.parametrize(
    "argv",
    [
        ["--out=/pot", "--plates=3", "--no-salt", "--data=a=b", "--config.steps=", "--config.eval.every=-1"],
        [
            "--out",
            "/pot",
            "--portions",
            "3",
            "--no-salt",
            "--data",
            "a=b",
            "--config.steps=",
            "--config.eval.every",
            "-1",
        ],
    ],
)
def test_flags_have_their_value_after_an_equals_sign_or_a_space(argv):
    arguments = parse(COMMAND, argv)
    assert (arguments.out, arguments.portions, arguments.spice, arguments.no_salt) == (
        pathlib.Path("/pot"),
        3,
        None,
        True,
    )
    assert arguments.fields == {"data.eval": "a=b", "steps": "", "eval.every": "-1"}
    assert arguments.command_line.startswith("python -m jaxrl_reason.cook --out")


def test_flags_have_defaults():
    arguments = parse(COMMAND, ["--out=~/pot"])
    assert arguments.out == pathlib.Path("~/pot").expanduser() and arguments.portions == 2 and not arguments.no_salt
    assert arguments.fields == {}


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "^--out=DIR is missing: the pot.$"),
        (["--out="], "^--out=: expected a path.$"),
        (["--out"], "^--out needs a value: --out=...$"),
        (["--out", "--no-salt"], "^--out needs a value"),
        (["--out=a", "--portion=1"], "^There is no flag '--portion'. Did you mean '--portions'"),
        (["--out=a", "pepper"], "^There is no flag 'pepper'."),
        (["--out=a", "--portions=few"], "^--portions=few: expected a number.$"),
        (["--out=a", "--portions=-1"], "expected a number"),
        (["--out=a", "--portions=²"], "expected a number"),
        (["--out=a", "--spice=mint"], "^--spice is 'mint'; it must be one of salt, pepper.$"),
        (["--out=a", "--no-salt=yes"], "^--no-salt takes no value.$"),
        (["--out=gs://b/run"], "^--out=gs://b/run: expected a path on this machine: mount the bucket .gcsfuse b DIR."),
        (
            ["--out=~nobody-of-this-name/run"],
            "expected a path on this machine: no user has the name after ~, and ~/ is",
        ),
        (["--out", "s3:/b/run"], "mount the bucket .mount-s3 b DIR."),
    ],
)
def test_an_invalid_flag_is_one_sentence(argv, message):
    with pytest.raises(ConfigError, match=message):
        parse(COMMAND, argv)


def test_the_configuration_of_the_training_flags(tmp_path):
    recipe = write_recipe(tmp_path / "mine.py", tiny("rows.jsonl"))
    training = Command("train", None, command.TRAINING, "")
    arguments = parse(training, [f"--config={recipe}", "--config.steps=3", "--config.steps=7"])
    assert arguments.configuration().steps == 7 and arguments.training_workdir() == "runs/mine"
    assert parse(training, [f"--config={recipe}", "--workdir=w"]).training_workdir() == "w"
    with pytest.raises(ConfigError, match="--config=FILE is missing"):
        parse(training, ["--workdir=w"])
    with pytest.raises(ConfigError, match="config has no field 'stepz'"):
        parse(training, [f"--config={recipe}", "--config.stepz=7"]).configuration()
    for flag in ("config", "workdir"):
        with pytest.raises(
            ConfigError, match=f"--{flag}=gs://b/x.py: expected a path on this machine: mount the bucket"
        ):
            parse(training, [f"--config={recipe}", f"--{flag}=gs://b/x.py"])


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["--nonsense", "--help"]])
def test_help_has_the_purpose_the_flags_and_an_example(argv, capsys):
    assert command.run(COMMAND, argv, lambda _: pytest.fail("ran"), print) == 0
    out = capsys.readouterr().out
    assert out.startswith("Cooks a meal.\n") and out.endswith("\nExample:\n  python -m jaxrl_reason.cook --out=pot\n")
    assert "Usage: python -m jaxrl_reason.cook --out=DIR [flags]" in out
    assert "\n  --out=DIR             the pot (required)\n" in out
    assert "\n  --portions=N          number of portions (default: 2)\n" in out
    assert "\n  --spice=salt|pepper   the spice\n" in out and "\n  --config.FIELD=VALUE  a field\n" in out
    assert "\n  --no-salt             leaves the salt out\n" in out and "\n  --help                prints" in out


TRAINING = Command("cook", "Cooks.\n\n    as it is   drawn\n\nEnd.", command.TRAINING, "--config=meal.py")


@pytest.mark.parametrize("width", [57, 80, 200])
def test_help_is_as_wide_as_the_terminal(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    long = dataclasses.replace(TRAINING, doc="Cooks.\n\n" + "A meal for many. " * 20)
    assert command.run(long, ["--help"], lambda _: pytest.fail("ran"), print) == 0
    lines = capsys.readouterr().out.splitlines()
    unbreakable = [line for line in lines if len(line) > width]
    # Commands to paste, values and words are not split.
    whole = ("Usage: ", "  python -m ", "  --config.")
    assert all(line.startswith(whole) or len(line.split()) == 1 for line in unbreakable), unbreakable
    # The words of a paragraph and of a help text fill the lines.
    assert [len(line) > width - 6 for line in lines[2:5]] == [True] * 3 or width == 200


def test_help_keeps_drawings():
    assert "\n\n    as it is   drawn\n\n" in TRAINING.help()


@pytest.mark.parametrize("argv", [["--config=FILE", "--help"], ["-h", "--config", "FILE"]])
def test_help_has_the_values_of_a_recipe_and_of_the_command_line(argv, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    config = tiny("rows.jsonl", steps=5, method={"name": "hero", "alpha": 0.125, "base": "rloo"})
    recipe = write_recipe(tmp_path / "mine.py", config)
    argv = [word.replace("FILE", str(recipe)) for word in argv]
    assert command.run(TRAINING, [*argv, "--config.eval.samples=77"], lambda _: pytest.fail("ran"), print) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"Fields of the configuration and the values of {recipe}:" in out
    assert "--config.steps=5 RL steps" in out and "--config.eval.samples=77 " in out
    assert "grade, prompts" not in out and "alpha=0.125, beta=0.05," in out and "base='rloo'" in out


@pytest.mark.parametrize("base, said", [("hero", "'hero'"), ("rlo", "'rloo'"), (3, "'3'")])
def test_help_of_a_recipe_with_an_unknown_base_is_a_sentence(base, said, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "mine.py", tiny("rows.jsonl", method={"name": "rlev", "base": base}))
    assert command.run(TRAINING, [f"--config={recipe}", "--help"], lambda _: pytest.fail("ran"), print) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: method.base is ") and said in err


def test_help_of_a_recipe_that_is_missing_is_a_sentence(capsys):
    assert command.run(TRAINING, ["--config=/missing.py", "--help"], lambda _: pytest.fail("ran"), print) == 2
    assert capsys.readouterr() == ("", "error: There is no configuration file /missing.py.\n")


@pytest.mark.parametrize("place", ["prepare", "work"])
def test_a_warning_is_a_sentence_without_a_source_line(place):
    shown, texts = warnings.formatwarning, []
    warn = lambda _: texts.append(warnings.formatwarning("The pot is old.", UserWarning, "cook.py", 3, "line"))
    prepare, work = (warn, lambda _: None) if place == "prepare" else (lambda _: None, warn)
    assert command.run(COMMAND, ["--out=a"], prepare, work) == 0
    assert texts == ["warning: The pot is old.\n"]
    assert warnings.formatwarning is shown


def raising(error):
    def function(_):
        raise error

    return function


ERRORS = [
    *(kind("Too hot.") for kind in (ConfigError, CheckpointError, MetricsError, NonFiniteError, OSError, RewardError)),
    models.PretrainedError("Too hot."),
]


@pytest.mark.parametrize(
    "error", [*(e for e in ERRORS if not isinstance(e, NonFiniteError)), ValueError("Too hot.")], ids=repr
)
def test_errors_before_the_work_have_exit_code_2(error, capsys):
    assert command.run(COMMAND, ["--out=a"], raising(error), lambda _: pytest.fail("ran")) == 2
    assert capsys.readouterr().err == "error: Too hot.\n"


def test_control_characters_are_shown_as_escapes(capsys):
    said, shown = "Too hot:\n\x1b[2J\r\x07\u202e.", "Too hot:\n\\x1b[2J\\r\\x07\\u202e."

    def work(_):
        logging.getLogger("jaxrl_reason.data").warning("%s", said)
        sys.stderr.write(warnings.formatwarning(said, UserWarning, "cook.py", 3))
        raise OSError(said)

    assert command.run(COMMAND, ["--out=a"], lambda arguments: arguments, work) == 1
    assert capsys.readouterr().err == f"warning: {shown}\nwarning: {shown}\nerror: {shown}\n"


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_errors_of_the_work_have_exit_code_1(error, capsys):
    assert command.run(COMMAND, ["--out=a"], lambda arguments: arguments, raising(error)) == 1
    assert capsys.readouterr().err == "error: Too hot.\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("a bug"), RuntimeError("a bug")], ids=repr)
def test_other_errors_of_the_work_keep_their_traceback(error):
    with pytest.raises(type(error), match="a bug"):
        command.run(COMMAND, ["--out=a"], lambda arguments: arguments, raising(error))


def test_an_early_end_has_the_exit_code_of_its_signal(capsys):
    assert command.run(COMMAND, ["--out=a"], lambda arguments: arguments, raising(hosts.Preempted("step 3"))) == 143
    assert capsys.readouterr().err == "Asked to end, and saved after step 3: the same command continues from there.\n"


def test_ctrl_c_is_one_line(capsys):
    for prepare, work in (
        (raising(KeyboardInterrupt()), print),
        (lambda arguments: arguments, raising(KeyboardInterrupt())),
    ):
        assert command.run(COMMAND, ["--out=a"], prepare, work) == 130
        assert capsys.readouterr() == ("", "error: Ended by Ctrl-C, without saving.\n")
    saving = dataclasses.replace(COMMAND, interrupted="The same command continues.")
    assert command.run(saving, ["--out=a"], lambda arguments: arguments, raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: The same command continues.\n"


BUSY = """
import hashlib, sys
from jaxrl_reason.runs import command
from jaxrl_reason.rl import hosts

def work(_):
    with hosts.preemption():
        print("begun", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # compiled code, in which Python handles no signal

sys.exit(command.run(command.Command("busy", "Is busy.", (), ""), [], lambda arguments: arguments, work))
"""


AT_EXIT = """
import atexit, sys, time
from jaxrl_reason.runs import command
from jaxrl_reason.rl import hosts

def work(_):
    raise hosts.Preempted("step 3") if {saves} else KeyboardInterrupt

def leave():
    print("leaving", flush=True)
    time.sleep(60)

atexit.register(leave)
sys.exit(command.run(command.Command("busy", "Is busy.", (), ""), None, lambda arguments: arguments, work))
"""


@pytest.mark.processes
@pytest.mark.parametrize("saves", [True, False])
def test_a_second_ctrl_c_ends_a_process_that_is_leaving(saves):
    arguments = [sys.executable, "-c", AT_EXIT.format(saves=saves)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "leaving\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    finally:
        process.kill()
    said = "Asked to end, and saved after step 3: the same command continues from there.\n"
    assert (process.returncode, out) == (-signal.SIGINT, "")  # a shell shows the code 130
    assert err == (said if saves else "error: Ended by Ctrl-C, without saving.\n")


def test_ctrl_c_of_a_caller_in_python_stays(capsys):
    before = signal.getsignal(signal.SIGINT)
    assert command.run(COMMAND, ["--out=a"], lambda arguments: arguments, lambda _: None) == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_our_log_looks_like_warnings_and_each_kind_is_shown_once(capsys):
    def work(_):
        log = logging.getLogger("jaxrl_reason.rewards.host")
        for step in range(3):
            log.warning("Failure of step %d.", step, extra={"kind": "a"})
            log.warning("Other failure of step %d.", step, extra={"kind": "b"})
        log.warning("Again.")
        log.warning("Again.")

    for _ in range(2):  # two runs in one process are two commands
        assert command.run(COMMAND, ["--out=a"], lambda arguments: arguments, work) == 0
        shown = ["Failure of step 0.", "Other failure of step 0.", "Again.", "Again."]
        assert capsys.readouterr() == ("", "".join(f"warning: {line}\n" for line in shown))
    assert not logging.getLogger("jaxrl_reason").handlers


def test_a_handler_of_the_root_logger_prints_our_log_no_second_time(capsys):
    root, handlers = logging.getLogger(), []

    def work(_):
        handlers.append(logging.StreamHandler())  # as logging.basicConfig installs it
        handlers[0].setFormatter(logging.Formatter(logging.BASIC_FORMAT))
        root.addHandler(handlers[0])
        logging.getLogger("jaxrl_reason.rewards.host").warning("Ours.")
        logging.getLogger("other").warning("Theirs.")

    try:
        assert command.run(COMMAND, ["--out=a"], lambda arguments: arguments, work) == 0
        assert capsys.readouterr() == ("", "warning: Ours.\nWARNING:other:Theirs.\n")
        assert not handlers[0].filters
    finally:
        root.removeHandler(handlers[0])


@pytest.mark.processes
def test_a_second_ctrl_c_ends_a_process_in_compiled_code():
    arguments = [sys.executable, "-c", BUSY]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "")


def test_done_is_0_and_the_work_gets_what_was_prepared(capsys):
    assert command.run(COMMAND, ["--out=a"], lambda arguments: arguments.portions, print) == 0
    assert capsys.readouterr() == ("2\n", "")


@pytest.mark.parametrize("place", ["prepare", "work"])
def test_the_end_of_another_process_is_a_sentence_at_any_time(place, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "leave", lambda code: code)  # without the patch, the process would end
    ended, fine = raising(jax.errors.JaxRuntimeError("UNAVAILABLE: connection lost")), lambda arguments: arguments
    assert command.run(COMMAND, ["--out=a"], *((ended, fine) if place == "prepare" else (fine, ended))) == 1
    assert "cannot go on: a computation that all processes share has failed" in capsys.readouterr().err
