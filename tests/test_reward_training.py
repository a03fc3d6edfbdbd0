"""Tests that a reward model learns, resumes exactly, is found again, and refuses input that does not fit."""

import dataclasses
import functools
import gc
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import rich.console

from helpers.golden import change_json
from helpers.tiny_runs import change, tiny, write_rows
from jaxrl_reason import compare, data, export, reward_training, train
from jaxrl_reason.config import ConfigError, to_dict
from jaxrl_reason.models import reward_model, sharding
from jaxrl_reason.rewards import model_files, model_training
from jaxrl_reason.rl.types import Rollout
from jaxrl_reason.runs import checkpoints, read_metrics

pytestmark = [pytest.mark.runs, pytest.mark.usefixtures("quick_compilation")]

# The prompt decides which of two digits is preferred. Each digit is as often chosen as rejected.
PAIRS = [
    {"question": word, "chosen": str(chosen), "rejected": str(rejected), "answer": str(chosen)}
    for low in range(10)
    for high in range(low + 2, 10)
    for word, chosen, rejected in (("Low.", low, high), ("High.", high, low))
]
random.Random(0).shuffle(PAIRS)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", PAIRS)


def tiny_pairs(rows, **changes):
    """Returns a configuration with a learned reward. Names without a section are fields of `reward_model`."""
    config = tiny(
        rows,
        data__train_split="[:54]",
        data__eval_split="[54:]",
        eval__prompts=15,
        model__mlp_width=32,
        reward__functions=["accuracy", "reward_model"],
        reward__weights=[1.0, 0.0],
    )
    own = dict(steps=4, batch_size=8) | {name: value for name, value in changes.items() if "__" not in name}
    others = {name: value for name, value in changes.items() if "__" in name}
    return change(config, **others, **{f"reward_model__{name}": value for name, value in own.items()})


def prepare(config, workdir):
    """Sets up a run in a work directory and returns (Run, Phase)."""
    run = train.setup(config, workdir)
    return run, run.reward_phase


def get(run, phase):
    """Returns (model, params, printed text) of `get_reward_model` on random weights."""
    out = rich.console.Console(file=io.StringIO(), width=200)
    model, params = model_training.get_reward_model(phase, run.programs.init().params, out)
    return model, params, out.file.getvalue()


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def description(directory):
    return json.loads((directory / "reward_model.json").read_text())


@pytest.fixture(scope="module")
def straight(rows, tmp_path_factory):
    """Trains without interruption and returns (configuration, its reward_model directory, weights)."""
    config = tiny_pairs(rows, steps=10, learning_rate=1e-2, checkpoint__every=3, checkpoint__keep=2)
    workdir = tmp_path_factory.mktemp("straight")
    _, params, _ = get(*prepare(config, workdir))
    return config, workdir / "reward_model", params


def losses(directory):
    return [line["reward_model/loss"] for line in read_metrics(directory / "metrics.jsonl")[1:]]


# -- training --------------------------------------------------------------------------------------


def without_timings(lines):
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def test_a_tiny_decoder_learns_what_is_preferred_and_is_found_again(rows, tmp_path):
    options = dict(steps=80, batch_size=32, learning_rate=1e-2)
    config = tiny_pairs(rows, log__tensorboard=True, log__progress=True, **options)
    run, phase = prepare(config, tmp_path)
    model, params, out = get(run, phase)
    directory = tmp_path / "reward_model"
    measured = [line for line in read_metrics(directory / "metrics.jsonl") if "reward_model/held_out/accuracy" in line]
    before, after = measured[0], measured[-1]
    accuracy = "reward_model/held_out/accuracy"
    assert before[accuracy] <= 0.75 and after[accuracy] >= 0.9 and after["reward_model/held_out/margin"] > 1

    lines = read_metrics(directory / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(81))
    names = {
        "step",
        "skipped_update_ratio",
        *(f"reward_model/{name}" for name in ("loss", "accuracy", "margin", "grad_norm")),
    }
    timings = [{name for name in line if name.startswith("perf/")} for line in lines]
    assert timings[1:-1] == [{"perf/step_seconds", "perf/host_memory_gib"}] * 79 and "perf/step_seconds" in timings[-1]
    lines, [after] = without_timings(lines), without_timings([after])
    assert all(set(line) == names for line in lines[1:-1]) and set(lines[-1]) == names | set(after)
    losses = [line["reward_model/loss"] for line in lines[1:]]
    assert abs(losses[0] - np.log(2)) < 0.05 and np.mean(losses[-20:]) < 0.3
    assert (directory / "params").is_dir() and list((directory / "tensorboard").iterdir())
    for text in ("reward model 80/80", "accuracy", "margin", "before", "after", f"Reward model: {directory}"):
        assert text in out
    assert f"{100 * after[accuracy]:.1f} %" in out

    # The held-out metrics are of the weights that are kept, on the first eval.prompts pairs of the evaluation split.
    scores = jax.jit(lambda p, b: reward_model.group_scores(model, p, b))
    margin = -np.diff(scores(params, phase.held_out.batch(0)))[: phase.held_out.size]
    assert phase.held_out.size == 15 and after[accuracy] == pytest.approx((margin > 0).mean())
    assert description(directory)["held_out"] == {
        "accuracy": after[accuracy],
        "margin": after["reward_model/held_out/margin"],
        "pairs": 15,
    }
    assert description(directory)["pairs"] == 54

    stamps = {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file() and p.name != "config.json"}
    run, phase = prepare(config, tmp_path)
    again, loaded, out = get(run, phase)
    assert again == model and f"The reward model in {directory} is trained." in out and "before" not in out
    assert_equal(loaded, params)
    assert stamps == {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file() and p.name != "config.json"}


@pytest.mark.slow
def test_each_option_of_the_training_changes_it(straight, rows, tmp_path):
    def changed(name, **options):
        get(*prepare(tiny_pairs(rows, **options), tmp_path / name))
        return losses(tmp_path / name / "reward_model")

    plain, rate = losses(straight[1]), changed("rate", steps=3, learning_rate=1e-3)
    assert (len(plain), len(rate)) == (10, 3)
    assert rate[0] == plain[0] and rate[1] != plain[1]
    assert changed("batch", batch_size=4, steps=1)[0] != plain[0]


def test_pairs_may_come_from_a_source_of_their_own(rows, tmp_path):
    """A file of pairs needs no answers. `reward_model` can name its splits; the splits of `data` are the default."""
    own = [{"question": "Low.", "chosen": f"{i}", "rejected": f"{i}0"} for i in range(8)]
    path = str(write_rows(tmp_path / "own.jsonl", own))
    sizes = lambda phase: (phase.pairs.size, phase.held_out.size)
    _, phase = prepare(tiny_pairs(rows, data=path, split="[:5]", eval_split="[5:]"), tmp_path / "a")
    assert sizes(phase) == (5, 3)
    _, phase = prepare(tiny_pairs(rows, split="[:30]", eval_split="[30:36]"), tmp_path / "b")
    assert sizes(phase) == (30, 6)
    _, phase = prepare(tiny_pairs(rows, data=path, data__train_split="[:4]", data__eval_split="[4:]"), tmp_path / "c")
    assert sizes(phase) == (4, 4)
    renamed = [{"q": row["question"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in own]
    other = dict(data__eval=str(write_rows(tmp_path / "eval.jsonl", renamed)), data__eval_split="all")
    _, phase = prepare(tiny_pairs(rows, **other, data__eval_columns={"question": "q"}), tmp_path / "e")
    assert sizes(phase)[1] == 8  # all rows of eval.jsonl, whose questions have another column
    (tmp_path / "own.jsonl").write_text('{"question": "a", "chosen": "b"}\n')
    with pytest.raises(ValueError, match="own.jsonl, there is no column 'rejected', only 'question', 'chosen'"):
        prepare(tiny_pairs(rows, data=path, split="all", eval_split="all"), tmp_path / "d")


def test_it_starts_from_the_given_policy_which_stays_usable(trained):
    """The one step of `trained` is too small to move a weight."""
    _, _, params, decoder = trained
    assert_equal(params["decoder"], decoder)
    assert np.abs(params["score"]).max() > 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_scorer_scores_rollouts_under_the_trained_model(accumulation, trained, rows, tmp_path):
    workdir, _, params, _ = trained
    config = tiny_pairs(rows, path=str(workdir / "reward_model"), update__accumulation=accumulation)
    run, phase = prepare(config, tmp_path)
    state = run.programs.init()
    score = model_training.scorer(phase, state.params, rich.console.Console(file=io.StringIO()))
    batch = run.prompts.batch(0)
    rollout = run.programs.generate(state.params, batch, state.step)
    with jax.transfer_guard("disallow"):
        scores, metrics = score(rollout, batch)
    assert metrics == {}
    assert scores.shape == rollout.mask.shape[:2] and len(set(np.asarray(scores).ravel())) > 1
    np.testing.assert_allclose(scores, reward_model.group_scores(phase.model, params, rollout), atol=1e-5)


# -- going on --------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_a_training_interrupted_again_and_again_ends_as_if_it_had_not_been(straight, tmp_path, monkeypatch):
    config, undisturbed, expected = straight
    directory = tmp_path / "reward_model"

    def stop(*_):
        raise Killed

    for moment, begin in (("a batch", 0), ("the weights", 6), ("the description", 10)):
        run, phase = prepare(config, tmp_path)
        out = rich.console.Console(file=io.StringIO(), width=200)
        with monkeypatch.context() as patch:
            if moment == "a batch":
                patch.setattr(phase.pairs, "batch", lambda i, batch=phase.pairs.batch: stop() if i == 7 else batch(i))
            elif moment == "the weights":
                patch.setattr(checkpoints, "save_params", stop)
            else:
                patch.setattr(model_training, "write_description", stop)
            with pytest.raises(Killed):
                model_training.get_reward_model(phase, run.programs.init().params, out)
        assert ("Going on from" in out.file.getvalue()) == (begin > 0)
        assert begin == 0 or f"{directory / 'checkpoints' / str(begin)}." in out.file.getvalue()
        assert not (directory / "reward_model.json").exists()

    _, params, out = get(*prepare(config, tmp_path))
    assert f"Going on from {directory / 'checkpoints' / '10'}." in out
    assert_equal(params, expected)
    lines = [without_timings(read_metrics(d / "metrics.jsonl")) for d in (directory, undisturbed)]
    assert lines[0] == lines[1]
    assert description(directory) == description(undisturbed)


def test_other_pairs_in_the_same_directory_are_refused(rows, tmp_path):
    own = write_rows(tmp_path / "own.jsonl", PAIRS[:20])
    config = tiny_pairs(rows, data=str(own), split="[:10]", eval_split="[10:]")
    _, phase = prepare(config, tmp_path / "run")
    phase.work.begin(phase.tokenizer)
    prepare(config, tmp_path / "run")
    write_rows(own, [*PAIRS[:19], PAIRS[20]])
    with pytest.raises(ConfigError, match="reward_model holds another run: its data have changed since it began"):
        prepare(config, tmp_path / "run")


def recipe(config, path):
    path.write_text(
        "from jaxrl_reason.config import Config, from_dict\n"
        f"def get_config():\n    return from_dict({to_dict(config)!r})\n"
    )
    return path


@pytest.mark.slow
def test_a_killed_command_ends_as_if_it_had_not_been(rows, tmp_path, shared_programs):
    """SIGKILL ends the command at a random moment. Then the same command runs to the end."""
    config = tiny_pairs(rows, steps=100, checkpoint__every=7, checkpoint__keep=2)
    file = recipe(config, tmp_path / "recipe.py")
    command = lambda name: [
        sys.executable,
        "-m",
        "jaxrl_reason.reward_training",
        f"--config={file}",
        f"--workdir={tmp_path / name}",
    ]
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | {k.upper(): str(v) for k, v in shared_programs.items()}
    straight = subprocess.run(command("straight"), env=env, capture_output=True, text=True)
    assert straight.returncode == 0, straight.stderr[-2000:]
    lines = random.randint(1, 99)
    print("killed after lines", lines)
    metrics = tmp_path / "killed" / "reward_model" / "metrics.jsonl"
    process = subprocess.Popen(command("killed"), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < lines):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    last = subprocess.run(command("killed"), env=env, capture_output=True, text=True)
    assert last.returncode == 0 and (lines <= 7 or "Going on from" in last.stdout), last.stderr[-2000:]
    a, b = (tmp_path / name / "reward_model" for name in ("straight", "killed"))
    assert read_metrics(a / "metrics.jsonl") == read_metrics(b / "metrics.jsonl") and description(a) == description(b)
    digest = description(a)["tokenizer_digest"]
    assert_equal(*(model_training.load_reward_model(directory, digest)[1] for directory in (a, b)))


# -- the trained model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(rows, tmp_path_factory):
    """Trains a reward model. Returns the work directory, the Phase, the weights, and the decoder that it began with."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    run, phase = prepare(tiny_pairs(rows, steps=1, learning_rate=1e-30), workdir)
    decoder = jax.tree.map(lambda x: x + 0.125, run.programs.init().params)
    model, params = model_training.get_reward_model(phase, decoder, rich.console.Console(file=io.StringIO()))
    assert model == run.model
    return workdir, phase, params, decoder


@pytest.fixture
def copied(trained, tmp_path):
    """Copies the trained model, which a test may then damage, and returns (directory, digest)."""
    shutil.copytree(trained[0] / "reward_model", tmp_path / "copy")
    return tmp_path / "copy", model_training.tokenizer_digest(trained[1].tokenizer)


def test_a_path_names_a_trained_model_of_any_size(trained, rows, tmp_path):
    workdir, phase, params, _ = trained
    config = tiny_pairs(rows, model__width=8, path=str(workdir / "reward_model"))  # a smaller policy
    run, other = prepare(config, tmp_path / "other")
    assert run.model != phase.model and (other.pairs, other.held_out) == (None, None)
    model, loaded, out = get(run, other)
    assert model == phase.model and "is trained" in out
    assert_equal(loaded, params)
    assert not (tmp_path / "other" / "reward_model").exists()


def test_the_model_is_described_in_full_and_keeps_its_tokenizer(trained):
    workdir, phase, *_ = trained
    content = description(workdir / "reward_model")
    assert content["model"] == json.loads(json.dumps(dataclasses.asdict(phase.model))) and content["steps"] == 1
    kept = data.load_tokenizer(workdir / "reward_model" / "tokenizer")
    assert content["tokenizer_digest"] == model_training.tokenizer_digest(kept)


def test_a_model_with_scaled_rotary_frequencies_is_read_as_it_was_written(copied):
    directory, digest = copied
    content = description(directory)
    content["model"]["rope_scaling"] = {
        "kind": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_length": 9,
    }
    (directory / "reward_model.json").write_text(json.dumps(content))
    model, _ = model_training.load_reward_model(directory, digest)
    assert (
        json.loads(json.dumps(dataclasses.asdict(model))) == content["model"]
        and model.rope_scaling.original_length == 9
    )


def test_the_digest_tells_tokenizers_apart_and_survives_saving(trained, tmp_path):
    tokenizer = trained[1].tokenizer  # trained here, not loaded
    digest = model_training.tokenizer_digest
    tokenizer.save(tmp_path)
    assert digest(data.load_tokenizer(tmp_path)) == digest(tokenizer) and len(digest(tokenizer)) == 64
    others = [
        data.train_tokenizer(["another text"] * 9, 270),
        dataclasses.replace(tokenizer, eos_ids=(1,)),
        dataclasses.replace(tokenizer, bos_id=None),
    ]
    assert len({digest(t) for t in (tokenizer, *others)}) == 4
    assert digest(dataclasses.replace(tokenizer, pad_id=2)) == digest(tokenizer)  # padding is masked


def test_a_model_of_another_tokenizer_is_refused_before_anything_is_written(trained, rows, tmp_path):
    directory = trained[0] / "reward_model"
    message = f"^The reward model in {directory} was trained with another tokenizer .digest .*000000000000.* Set config.data.tokenizer to {directory}/tokenizer, or.*\\.$"
    with pytest.raises(ValueError, match=message):
        model_training.load_reward_model(directory, "0" * 64)
    config = tiny_pairs(rows, path=str(directory), data__train_split="[:10]")
    config.data.template = "qa"  # the tokenizer learns from another text
    config.max_prompt_length = 60
    with pytest.raises(ValueError, match="another tokenizer"):
        prepare(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config.data.tokenizer = str(directory / "tokenizer")
    prepare(config, tmp_path / "run")


def test_a_directory_without_a_trained_model_is_refused(tmp_path, rows):
    with pytest.raises(
        FileNotFoundError, match=f"^There is no trained reward model in {tmp_path / 'x'}: it has no reward_model.json"
    ):
        model_training.load_reward_model(tmp_path / "x", "")
    with pytest.raises(
        ConfigError, match="has neither a reward_model.json .* nor a pretrained model: There is no .*config.json"
    ):
        prepare(tiny_pairs(rows, path=str(tmp_path)), tmp_path / "run")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"tokenizer_digest": "0", "model": {"width": 3}}',
        '{"tokenizer_digest": "0", "model": 3}',
        "null",
    ],
)
def test_a_damaged_description_is_refused_by_its_path(content, copied):
    (copied[0] / "reward_model.json").write_text(content)
    with pytest.raises(ValueError, match=f"^{copied[0] / 'reward_model.json'} does not describe a reward model: .*"):
        model_training.load_reward_model(*copied)


# The reader does not remove its callbacks.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["missing", "cut", "another shape"])
def test_weights_that_cannot_be_read_are_refused_by_their_path(damage, copied):
    directory, digest = copied
    if damage == "missing":
        shutil.rmtree(directory / "params")
    elif damage == "cut":
        for file in (directory / "params").rglob("d/*"):
            file.write_bytes(file.read_bytes()[:10])
    else:
        content = description(directory)
        content["model"]["mlp_width"] += 1
        (directory / "reward_model.json").write_text(json.dumps(content))
    with pytest.raises(checkpoints.CheckpointError, match=f"{directory / 'params'} cannot be read: ."):
        model_training.load_reward_model(directory, digest)
    gc.collect()


CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    "changes", [dict(data__template="qa", data__add_bos=True), dict(data__chat=True, data__system="Be low.")]
)
def test_an_exported_model_reads_texts_as_in_its_training(changes, rows, tmp_path, capsys):
    """Scores of pairs by the export, from their rows and texts, are those of their tokens in training. The end token pads."""
    words = data.train_tokenizer(["Question: Low.", "Answer: 12", "<user>High.<assistant>34<system>Be low."], 300)
    dataclasses.replace(words, chat_template=CHAT, pad_id=2).save(tmp_path / "words")
    config = change(tiny_pairs(rows, data__tokenizer=str(tmp_path / "words"), **changes), max_prompt_length=60)
    run, phase = prepare(config, tmp_path / "run")
    run.work.begin(run.tokenizer)
    phase.work.begin(phase.tokenizer)
    params = jax.tree.map(lambda x: 5 * x, reward_model.init_params(phase.model, jax.random.key(0)))
    checkpoints.save_params(phase.directory / "params", params)
    facts = {"steps": 1, "pairs": 54, "held_out": {"accuracy": 0.5, "margin": 0.0, "pairs": 15}}
    model_files.write_description(phase.directory, phase.model, model_training.tokenizer_digest(words), facts)
    out = tmp_path / "out"
    assert export.main([f"--workdir={tmp_path / 'run'}", f"--out={out}", "--reward-model"]) == 0, (
        capsys.readouterr().err
    )

    config = change(config, reward_model__path=str(out))
    pairs = phase.held_out.batch(0)
    read = data.load_source(str(rows), "[54:]").read(range(8))
    none = np.zeros(pairs.mask.shape, np.float32)
    rollout = jax.device_put(Rollout(*pairs, none, none[..., 0] > 0), sharding.batch_sharding(phase.mesh))
    batch = data.PromptBatch(pairs.prompt_tokens, pairs.prompt_mask, np.arange(8), np.ones(8), read)

    def scores():
        opened = model_training.open_pretrained(config, phase.mesh, tmp_path / "other")
        return model_training.pretrained_scorer(config, opened, phase.tokenizer, phase.mesh)(rollout, batch)[0]

    wanted = jax.jit(functools.partial(reward_model.group_scores, phase.model))
    found = scores()
    assert np.std(found) > 1e-3
    np.testing.assert_allclose(found, wanted(params, rollout), atol=1e-5)
    change_json(out / "config.json", pad_token_id=2)  # scores are read before the end token now
    shorter = rollout._replace(mask=rollout.mask & (rollout.tokens != 2))
    np.testing.assert_allclose(scores(), wanted(params, shorter), atol=1e-5)
    with pytest.raises(ConfigError, match="reward_model.system is set, and the reward model reads texts as in its tr"):
        model_training.open_pretrained(change(config, reward_model__system="Grade."), phase.mesh, tmp_path / "other")
    config.reward_model.system = ""
    for damage in ({"template": 3}, {"template": "nothing"}, {"other": 1}, 5, []):
        change_json(out / "config.json", jaxrl_reason=damage)
        with pytest.raises(ConfigError, match="its config.json has jaxrl_reason .*, which describes no texts: ") as e:
            model_training.open_pretrained(config, phase.mesh, tmp_path / "other")
        assert str(e.value).endswith(". Export the reward model again.")


# -- setup and the command -------------------------------------------------------------------------


def test_pairs_that_devices_cannot_share_are_refused(rows, tmp_path):
    run = train.setup(tiny_pairs(rows), tmp_path)
    run.config.reward_model.batch_size = 6
    mesh = jax.sharding.AbstractMesh((1, 2, 2, 1), sharding.AXES)
    message = "^config.reward_model.batch_size is 6, which .* = 4 devices cannot share evenly; near it, 4 and 8 can be shared.$"
    with pytest.raises(ValueError, match=message):
        model_training.setup(run.config, model=run.model, work=run.work, tokenizer=run.tokenizer, mesh=mesh)


def test_data_without_pairs_are_refused_by_row_and_column_and_leave_nothing(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": "1", "chosen": "1"}] * 99)
    with pytest.raises(ValueError, match="rows.jsonl, line 1: there is no column 'rejected'"):
        prepare(tiny_pairs(rows), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_column_that_pairs_of_their_own_lack_is_to_be_renamed_in_the_file(rows, tmp_path):
    for i, row in enumerate([{"question": "a", "chosen": "1"}, {"problem": "a", "chosen": "1", "rejected": "2"}]):
        pairs = write_rows(tmp_path / f"pairs{i}.jsonl", [row] * 60)
        with pytest.raises(ValueError, match=f"pairs{i}.jsonl, there is no column '(rejected|question)'.*only .*") as e:
            prepare(tiny_pairs(rows, data=str(pairs)), tmp_path / "run")
        assert str(e.value).endswith(
            "config.data.columns does not name columns of config.reward_model.data. Rename the columns of the data."
        )


def test_training_pairs_among_held_out_pairs_give_a_warning(rows, tmp_path):
    with pytest.warns(UserWarning, match="training pairs of .* are 6 of 6 held-out pairs"):
        prepare(tiny_pairs(rows, split="[:30]", eval_split="[20:26]"), tmp_path / "run")


def test_the_decoder_begins_as_the_newest_policy_past_its_supervised_phase(rows, tmp_path):
    config = tiny_pairs(rows, supervised__steps=2)
    config.data.template = "{question} "
    config.data.columns = {"solution": "answer"}
    run = train.setup(config, tmp_path)
    out = rich.console.Console(file=io.StringIO(), width=300)
    fresh = run.programs.init()
    for number, same in ((None, True), (1, True), (2, False), (3, False)):
        if number:
            saver = checkpoints.Checkpoints(tmp_path / "checkpoints", 5)
            saver.save(number, fresh._replace(trained=jax.tree.map(lambda x: x + number, fresh.trained)))
            saver.close()
        params = reward_training.start_decoder(run, out)
        assert_equal(params, fresh.params if same else jax.tree.map(lambda x: x + number, fresh.params))
    text = out.file.getvalue()
    assert text.count("starts from random weights") == 2 and f"starts from {tmp_path / 'checkpoints' / '3'}." in text


def test_the_decoder_begins_as_the_start_of_another_run_where_this_one_does(rows, tmp_path):
    run = train.setup(tiny_pairs(rows), tmp_path / "first")
    weights = jax.tree.map(lambda x: x + 1, run.programs.init().params)
    checkpoints.save_params(tmp_path / "first" / "start", weights)
    run = train.setup(tiny_pairs(rows, supervised__start_from=str(tmp_path / "first")), tmp_path / "second")
    out = rich.console.Console(file=io.StringIO(), width=300)
    assert_equal(reward_training.start_decoder(run, out), weights)
    assert f"starts from {tmp_path / 'first' / 'start'}." in out.file.getvalue()


def test_the_command_line_trains_and_then_has_nothing_to_do(rows, tmp_path, capsys):
    arguments = [f"--config={recipe(tiny_pairs(rows), tmp_path / 'recipe.py')}", f"--workdir={tmp_path / 'run'}"]
    assert reward_training.main(arguments) == 0
    out = capsys.readouterr().out
    assert "random weights" in out and "accuracy" in out and "Reward model:" in out
    assert (tmp_path / "run" / "reward_model" / "reward_model.json").is_file()
    assert reward_training.main(arguments) == 0
    assert "is trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config.steps=0"], "config.steps is 0"),
        (["--config.data.train_split=[:900]"], "'[:900]'"),
        (["--config.max_completion_length=1"], "max_completion_length"),
        (["--config.reward_model.steps=0"], "config.reward_model.steps is 0"),
        (["--config.reward.functions=accuracy", "--config.reward.weights=1.0"], "config.reward_model is set"),
        (["--nonsense=1"], "--nonsense"),
    ],
)
def test_what_cannot_run_is_one_sentence_and_a_non_zero_exit(flags, message, rows, tmp_path, capsys):
    arguments = [f"--config={recipe(tiny_pairs(rows), tmp_path / 'recipe.py')}", f"--workdir={tmp_path / 'run'}"]
    assert reward_training.main([*arguments, *flags]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if not line.startswith("  ")]  # each row is listed on a line
    assert error.startswith("error: ") and message in error and len(lines) == 1 + ("Raise the limit." in lines)


def test_a_run_without_a_learned_reward_is_refused(rows, tmp_path, capsys):
    file = recipe(tiny(rows), tmp_path / "recipe.py")
    assert reward_training.main([f"--config={file}", f"--workdir={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err.startswith("error: config.reward.functions names no learned reward")


def test_help_says_what_it_does(capsys):
    assert reward_training.main(["--help"]) == 0
    assert "preference pairs" in capsys.readouterr().out


def test_a_comparison_trains_the_shared_reward_model_when_a_row_uses_it(rows, tmp_path):
    config = tiny_pairs(rows, steps=2, eval__every=1)
    compare_rows = lambda *only: compare.compare(config, {"own": {"reward_model.steps": 3}}, tmp_path, only=only)
    steps = lambda row: read_metrics(tmp_path / "seed-0" / row / "reward_model" / "metrics.jsonl")[-1]["step"]
    start = tmp_path / "seed-0" / "start"
    compare_rows("own")
    assert steps("own") == 3 and (start / "start").exists() and not (start / "reward_model").exists()
    assert list(compare_rows()) == ["start", "grpo", "own"]
    assert steps("start") == 2 and not (tmp_path / "seed-0" / "method" / "reward_model").exists()
