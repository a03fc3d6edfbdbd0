"""In a work directory, `begin` writes first, a kill leaves whole files, and another run is refused by its fields."""

import json
import subprocess
import sys

import pytest

from helpers.tiny_runs import change, tiny, write_rows
from jaxrl_reason import data, reward_training, train
from jaxrl_reason.config import Config, ConfigError, Data, Model
from jaxrl_reason.runs.workdir import load_config, read_recipe, Workdir, write_recipe

TOKENIZER = data.train_tokenizer([], vocab_size=259)
TWO_ENDS = data.Tokenizer(TOKENIZER.backend, eos_ids=(2, 0), pad_id=0, bos_id=1)


def not_needed():
    raise AssertionError("The tokenizer of the directory was to be read.")


def test_a_directory_that_the_first_process_has_not_begun_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="all processes must see the same work directory"):
        Workdir(tmp_path, Config(), "f").check_shared()
    Workdir(tmp_path, Config(), "f").begin(TOKENIZER)
    Workdir(tmp_path, Config(), "f").check_shared()


@pytest.mark.processes
def test_one_process_trains_in_a_directory(tmp_path):
    code = "import pathlib, sys; from jaxrl_reason.runs import locks; lock = locks.take(pathlib.Path(sys.argv[1])); print(bool(lock), flush=True); input()"
    config, workdir = tiny(write_rows(tmp_path / "rows.jsonl"), steps=1), tmp_path / "run"
    run = train.setup(config, workdir)
    command = [sys.executable, "-c", code, workdir / "run.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "True\n"
        config.steps, before = 2, (workdir / "config.json").read_text()
        said = f"^Another process trains in {workdir}; wait for its end"
        for trains in (
            lambda: train.setup(config, workdir),
            lambda: train.train(run),
            lambda: train.make_start(run),
            lambda: reward_training.work(run, None),
        ):
            with pytest.raises(ConfigError, match=said):
                trains()
        assert sorted(path.name for path in workdir.iterdir()) == ["config.json", "run.lock", "tokenizer"]
        assert (workdir / "config.json").read_text() == before
        other.kill()  # frees the lock
    with run.work.lock():
        pass


def test_the_constructor_writes_nothing_and_begin_writes_both_files(tmp_path):
    work = Workdir(tmp_path / "runs" / "a", Config(), "f")
    assert work.tokenizer(lambda: TWO_ENDS) is TWO_ENDS
    assert not list(tmp_path.iterdir())
    work.begin(TWO_ENDS)
    assert sorted(p.name for p in work.path.iterdir()) == ["config.json", "tokenizer"]
    assert Workdir(work.path, Config(), "f").tokenizer(not_needed).eos_ids == (2, 0)


def test_a_run_keeps_the_tokenizer_it_began_with(tmp_path):
    Workdir(tmp_path, Config(), "f").begin(TWO_ENDS)
    again = Workdir(tmp_path, Config(), "f")
    again.begin(TOKENIZER)
    assert again.tokenizer(not_needed).eos_ids == (2, 0)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_kill_while_the_tokenizer_is_written_leaves_none(file, tmp_path, monkeypatch):
    """After a kill at any file, the next `begin` writes a tokenizer with all of its end tokens."""
    save = data.Tokenizer.save

    def torn(self, directory):
        save(self, directory)
        (directory / file).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(data.Tokenizer, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        Workdir(tmp_path, Config(), "f").begin(TWO_ENDS)
    monkeypatch.undo()
    assert not (tmp_path / "tokenizer").exists()
    work = Workdir(tmp_path, Config(), "f")
    tokenizer = work.tokenizer(lambda: TWO_ENDS)
    work.begin(tokenizer)
    assert work.tokenizer(not_needed).eos_ids == (2, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "tokenizer"]


@pytest.mark.parametrize(
    "changes",
    [
        dict(steps=7),
        dict(mesh__fsdp=1),
        dict(checkpoint__keep=9),
        dict(eval__every=3),
        dict(eval__samples=1),
        dict(log__samples=1),
        dict(compilation_cache=""),
        dict(update__accumulation=2),
    ],
)
def test_fields_that_may_change_are_taken_over(changes, tmp_path):
    Workdir(tmp_path, Config(), "f").begin(TOKENIZER)
    config = change(Config(), **changes)
    Workdir(tmp_path, config, "f").begin(TOKENIZER)
    with pytest.raises(ConfigError, match="another run"):
        Workdir(tmp_path, config, "g")
    saved = json.loads((tmp_path / "config.json").read_text())["config"]
    for name in changes:
        section, _, field = name.partition("__")
        assert (saved[section][field] if field else saved[section]) == changes[name]


@pytest.mark.parametrize(
    "other, difference",
    [
        (Config(data=Data(template="qa")), "config.data.template was 'plain' and is 'qa'"),
        (Config(model=Model(width=32)), f"config.model.width was {Model().width} and is 32"),
        (Config(method={"name": "rloo"}), "config.method.name was 'grpo' and is 'rloo'"),
    ],
)
def test_other_changes_are_refused_and_nothing_is_written(other, difference, tmp_path):
    Workdir(tmp_path, Config(), "f").begin(TOKENIZER)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ConfigError) as error:
        Workdir(tmp_path, other, "f")
    assert str(error.value) == (
        f"{tmp_path} holds another run: {difference}. Restore the old data and values, or choose another --workdir."
    )
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_field_whose_name_only_begins_like_one_that_may_change_is_refused(tmp_path):
    Workdir(tmp_path, Config(), "f").begin(TOKENIZER)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    saved["config"]["steps_an_epoch"] = 3
    file.write_text(json.dumps(saved))
    with pytest.raises(ConfigError, match="config.steps_an_epoch was 3 and is None"):
        Workdir(tmp_path, Config(), "f")


def test_other_directories_are_left_alone(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(ConfigError, match="tokenizer exists without .*config.json, .*; choose another --workdir"):
        Workdir(tmp_path, Config(), "f")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json is not valid JSON .*; restore it"):
        Workdir(tmp_path, Config(), "f")


def test_a_run_goes_on_under_a_version_with_more_fields(tmp_path):
    Workdir(tmp_path, Config(), "f").begin(TOKENIZER)
    begun = json.loads((tmp_path / "config.json").read_text())
    del begun["config"]["regression"]["encoder_dropout"], begun["config"]["update"]
    (tmp_path / "config.json").write_text(json.dumps(begun))
    Workdir(tmp_path, Config(), "f")
    changed = change(Config(), regression__encoder_dropout=0.5, update__epochs=2)
    with pytest.raises(
        ConfigError, match="config.regression.encoder_dropout was 0.0 and is 0.5; .*epochs was 1 and is 2"
    ):
        Workdir(tmp_path, changed, "f")
    begun["config"]["retired"] = 3
    (tmp_path / "config.json").write_text(json.dumps(begun))
    with pytest.raises(ConfigError, match="config.retired was 3 and is None"):
        Workdir(tmp_path, Config(), "f")


@pytest.mark.parametrize("content", ["[]", "{}", '{"config": 3}'])
def test_a_configuration_that_is_none_is_one_sentence(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match="config.json is damaged: it has no config; restore it"):
        Workdir(tmp_path, Config(), "f")


def test_a_row_of_a_comparison_goes_on_where_it_was_moved_with_its_start(tmp_path):
    def config(place, name="seed-0"):
        return change(
            Config(),
            supervised__start_from=str(tmp_path / place / name / "start"),
            reward_model__path=str(tmp_path / place / name / "start" / "reward_model"),
        )

    Workdir(tmp_path / "old" / "seed-0" / "method", config("old"), "f").begin(TOKENIZER)
    Workdir(tmp_path / "old" / "seed-0" / "weak" / "reward_model", config("old"), "f").begin(TOKENIZER)
    (tmp_path / "old").rename(tmp_path / "new")
    for row in ("method", "weak/reward_model"):  # the reward model of a row has a directory in it
        Workdir(tmp_path / "new" / "seed-0" / row, config("new"), "f")
    Workdir(tmp_path / "new" / "seed-0" / "method", config("old"), "f")  # moved back, as it were
    for other in (config("other"), config("new", "seed-1")):
        with pytest.raises(ConfigError, match="config.supervised.start_from was .*; config.reward_model.path was"):
            Workdir(tmp_path / "new" / "seed-0" / "method", other, "f")


def test_a_model_is_no_work_directory(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="is a model, and not the work directory of a run: name it with --model"):
        load_config(tmp_path, {})


def test_a_damaged_file_of_the_recipe_is_one_sentence(tmp_path):
    assert read_recipe(tmp_path) is None
    write_recipe(tmp_path, "mine.py", {"steps": 2})
    assert read_recipe(tmp_path) == ("mine.py", {"steps": 2})
    for text in ("{}", '{"recipe": "mine.py", "config": []}', '{"recipe": 1, "config": {}}'):
        (tmp_path / "recipe.json").write_text(text)
        with pytest.raises(ConfigError, match="recipe.json is damaged; remove it, and the report shows no differences"):
            read_recipe(tmp_path)


def test_tokens_of_waves_without_waves_are_refused_before_a_run_begins_only(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    config = tiny(rows, update__wave_tokens=64)
    with pytest.raises(ConfigError, match="config.update.wave_tokens is 64, and updates of this run have one length"):
        train.setup(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    train.setup(tiny(rows), tmp_path / "old")
    begun = json.loads((tmp_path / "old" / "config.json").read_text())
    begun["config"]["update"]["wave_tokens"] = 64
    (tmp_path / "old" / "config.json").write_text(json.dumps(begun))
    train.setup(config, tmp_path / "old")  # of an earlier version, which ignored the field
