import collections
import re

import jax
import pytest

from helpers.tiny_runs import tiny, write_rows
from jaxrl_reason import train

pytestmark = [pytest.mark.runs, pytest.mark.usefixtures("quick_compilation")]

NUMBERS = dict(
    data__train_split="[:8]",
    data__eval_split="[8:]",
    regression__tokenizer="normalized",
    regression__target="y",
    reward__functions=["squared_error"],
    max_completion_length=8,
)


def compiled(run, caplog):
    """Returns the number of compilations of each program in a run, and the programs that separate threads compile."""
    jax.config.update("jax_log_compiles", True)
    try:
        train.train(run)
    finally:
        jax.config.update("jax_log_compiles", False)
    found = [(re.search(r"Compiling jit\((\w+)\)", r.getMessage()), r.threadName) for r in caplog.records]
    counts = collections.Counter(match[1] for match, _ in found if match)
    return counts, {match[1] for match, thread in found if match and thread.startswith("compile")}


# `supervised` is the step of the supervised phase, `update_step` that of RL, and `generate` samples for both training and evaluation.
@pytest.mark.parametrize("method", ["grpo", "progrpo", "remax"])
def test_every_program_is_compiled_once_and_the_large_ones_in_threads(method, tmp_path, caplog):
    config = tiny(write_rows(tmp_path / "rows.jsonl"), method={"name": method}, supervised__steps=1, eval__every=1)
    run = train.setup(config, tmp_path / "run")
    counts, threads = compiled(run, caplog)
    assert (counts["supervised"], counts["update_step"], counts["generate"]) == (1, 1, 2)
    assert not run.programs.ahead  # every program was called
    assert threads >= {"supervised", "generate"} and ("update_step" in threads) == (method != "remax")


def test_a_run_on_a_table_too(tmp_path, caplog):
    table = tmp_path / "table.csv"
    table.write_text("a,b,y\n" + "".join(f"{i},{i % 3},{i * 0.5}\n" for i in range(12)))
    run = train.setup(tiny(table, supervised__steps=1, eval__every=1, **NUMBERS), tmp_path / "run")
    counts, threads = compiled(run, caplog)
    assert (counts["supervised"], counts["update_step"], counts["generate"]) == (
        1,
        1,
        2,
    )  # greedy numbers need no other program
    assert threads >= {"supervised", "update_step", "generate"}


def test_an_error_of_the_compiler_is_raised_by_the_call(tmp_path, monkeypatch):
    run = train.setup(tiny(write_rows(tmp_path / "rows.jsonl")), tmp_path / "run")
    monkeypatch.setitem(run.programs.jitted, "update", jax.jit(lambda *_: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        train.train(run)
