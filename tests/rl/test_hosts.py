"""Tests the real command line in several processes.

Samples, losses and weights stay the same, a process that dies ends the others, and checkpoints move to other meshes.
"""

import json
import signal
import time

import jax
import jax.flatten_util
import numpy as np
import pytest

from helpers.processes import finish, launch
from helpers.tiny_runs import ROWS, tiny, write_rows
from jaxrl_reason import train
from jaxrl_reason.config import to_dict
from jaxrl_reason.runs import checkpoints, read_metrics

pytestmark = pytest.mark.processes

REWARDS = """
import os

def even(completions, answer, **_):
    with open(os.environ["SEEN"] + os.environ.get("JAX_PROCESS_ID", "0"), "a") as f:
        f.writelines(f"{a} {len(c)}\\n" for a, c in zip(answer, completions))
    return [float(len(c) % 2) for c in completions]

def fails_on_one(completions, **_):
    if os.environ.get("JAX_PROCESS_ID") == "1":
        raise ValueError("no reward here")
    return [0.5] * len(completions)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    write_rows(folder / "rows.jsonl", [{**row, "question": f"Write {row['answer']} down, in figures."} for row in ROWS])
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def recipe(folder, name, **changes):
    """Writes a recipe of five steps on 8 prompts with the fields `changes`. Returns the configuration and the path."""
    config = tiny(
        folder / "rows.jsonl",
        **dict(
            steps=5,
            prompts_per_step=8,
            max_prompt_length=32,
            group_size=4,
            model__layers=2,
            model__heads=4,
            optimizer__eps=1e-5,  # with a smaller one, Adam divides rounding errors
            supervised__steps=2,
            supervised__batch_size=8,
            reward__functions=[f"{folder / 'rewards.py'}:even", "match_answer"],
            eval__every=5,
            eval__prompts=10,
            log__samples_every=1,
            log__samples=8,
            checkpoint__every=2,
            mesh__host_timeout=10,
        )
        | changes,
    )
    path = folder / f"{name}.py"
    path.write_text(
        "from jaxrl_reason.config import Config, from_dict\n"
        f"def get_config():\n    return from_dict({to_dict(config)!r})\n"
    )
    return config, path


def start(recipe, workdir, shared_programs, processes=1, devices=1):
    """Starts the training in `processes` processes with `devices` simulated devices each."""
    env = {k.upper(): str(v) for k, v in shared_programs.items()} | {"SEEN": f"{workdir}.seen"}
    command = ["-m", "jaxrl_reason.train", f"--config={recipe}", f"--workdir={workdir}"]
    return launch(command, processes, devices, env)


def run(recipe, workdir, shared_programs, processes=1, devices=1):
    ended = finish(start(recipe, workdir, shared_programs, processes, devices))
    assert [code for code, _, _ in ended] == [0] * processes, "\n".join(err[-2000:] for *_, err in ended)
    return ended


def weights(config, workdir):
    """Returns the number and all parameters of the newest checkpoint. This process reads them alone."""
    config.mesh.data = config.mesh.fsdp = config.mesh.tensor = config.mesh.slice = 1
    config.mesh.rollout_tensor = 0
    ready = train.setup(config, workdir)
    saver = checkpoints.Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    number, state = saver.restore(ready.programs.abstract_state)
    saver.close()
    return number, np.asarray(jax.flatten_util.ravel_pytree(state.params)[0])


def compare(folder, one, other, tolerance=1e-5):
    """Asserts that two runs have identical samples, and metrics that are equal within the tolerance."""
    samples = lambda name: [
        (s["step"], s["prompt"], s["completion"], s["total"])
        for s in map(json.loads, (folder / name / "samples.jsonl").read_text().splitlines())
    ]
    assert samples(one) == samples(other)
    for file in ("metrics.jsonl", "supervised/metrics.jsonl"):
        lines, others = read_metrics(folder / one / file), read_metrics(folder / other / file)
        assert len(lines) == len(others) > 0
        for a, b in zip(lines, others):
            names = [name for name in a if not name.startswith(("perf/", "sampling/logp_difference"))]
            assert set(names) <= set(b)
            for name in names:
                if a[name] is None or b[name] is None:
                    assert a[name] == b[name]
                else:
                    np.testing.assert_allclose(
                        b[name], a[name], rtol=tolerance, atol=0.3 * tolerance, err_msg=f"{name} {a['step']}"
                    )


@pytest.fixture(scope="module")
def alone(folder, shared_programs):
    """Trains in one process on one device and returns `weights`. All other runs are compared with this one."""
    config, path = recipe(folder, "alone", mesh__fsdp=1)
    run(path, folder / "alone", shared_programs)
    return weights(config, folder / "alone")


@pytest.mark.parametrize(
    "processes, devices, mesh",
    [
        (2, 1, dict(mesh__fsdp=2)),
        pytest.param(2, 2, dict(mesh__data=2, mesh__fsdp=1, mesh__tensor=2), marks=pytest.mark.slow),
        pytest.param(4, 1, dict(mesh__data=2, mesh__fsdp=2), marks=pytest.mark.slow),
        pytest.param(2, 2, dict(mesh__data=1, mesh__fsdp=1, mesh__tensor=2, mesh__slice=2), marks=pytest.mark.slow),
        pytest.param(2, 1, dict(mesh__data=1, mesh__fsdp=1, mesh__tensor=2), marks=pytest.mark.slow),
        pytest.param(1, 8, dict(mesh__data=8, mesh__fsdp=1), marks=pytest.mark.slow),
        pytest.param(1, 8, dict(mesh__data=1, mesh__fsdp=8), marks=pytest.mark.slow),
        pytest.param(1, 8, dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2), marks=pytest.mark.slow),
        pytest.param(
            1, 8, dict(mesh__data=2, mesh__fsdp=4, mesh__tensor=1, mesh__rollout_tensor=2), marks=pytest.mark.slow
        ),
    ],
    ids=["2", "2x2", "4", "2slices", "2tensor", "8data", "8fsdp", "8cube", "8resharded"],
)
def test_processes_and_devices_change_neither_samples_nor_losses_nor_weights(
    processes, devices, mesh, folder, alone, shared_programs
):
    name = f"run{processes}x{devices}" + "".join(map(str, mesh.values()))
    config, path = recipe(folder, name, **mesh)
    ended = run(path, folder / name, shared_programs, processes, devices)
    compare(folder, "alone", name)
    number, params = weights(config, folder / name)
    assert number == alone[0] == 7
    np.testing.assert_allclose(params, alone[1], rtol=1e-5, atol=1e-6)
    # Only the first process prints results.
    assert "Learning curve" in ended[0][1] and all(
        "Gloo" in line for _, out, _ in ended[1:] for line in out.splitlines()
    )
    if "mesh__rollout_tensor" in mesh or mesh["mesh__fsdp"] > 1:
        assert read_metrics(folder / name / "metrics.jsonl")[1]["perf/step_seconds/reshard"] > 0
    # Each process scores its own share of the completions of training, and no others.
    seen = [(folder / f"{name}.seen{i}").read_text().splitlines() for i in range(processes)]
    everything = (folder / "alone.seen0").read_text().splitlines()
    everything, seen[0] = (lines[config.group_size :] for lines in (everything, seen[0]))  # without the trial in set-up
    copies = processes if mesh == dict(mesh__data=1, mesh__fsdp=1, mesh__tensor=2) else 1  # they hold the same prompts
    assert sorted(sum(seen, [])) == sorted(everything * copies)
    assert len({len(lines) for lines in seen}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(method={"name": "dapo"}, sampling__max_batches=3, sampling__parts=2),
        dict(update__kl_coefficient=0.1, update__minibatches=2, sampling__parts=2),
        dict(method={"name": "remax"}, lora__rank=2),
        dict(method={"name": "laser", "reasoning_warmup": 1, "self_reward_warmup": 1}),
        dict(
            method={"name": "hero"},
            reward__functions=["match_answer", "reward_model"],
            reward__weights=[1.0, 0.0],
            reward_model__steps=2,
            reward_model__batch_size=8,
        ),
    ],
    ids=["dapo", "kl", "remax", "laser", "hero"],
)
def test_two_processes_do_what_one_does_with_every_part_of_a_step(options, folder, shared_programs, tmp_path):
    pairs = [
        {**row, "question": f"Write {row['answer']}.", "chosen": f"#### {row['answer']}", "rejected": f"#### {i + 1}"}
        for i, row in enumerate(ROWS)
    ]
    data = write_rows(tmp_path / "rows.jsonl", pairs)
    options = dict(data__train=str(data), **options)
    for processes, name in ((1, "one"), (2, "two")):
        _, path = recipe(folder, f"part_{name}", mesh__fsdp=processes, **options)
        run(path, tmp_path / name, shared_programs, processes)
    # Scores of a reward model that has hardly learnt differ by less than 1e-3, and HERO divides by their spread.
    compare(tmp_path, "one", "two", tolerance=3e-4 if "reward_model__steps" in options else 1e-5)


def test_two_processes_evaluate_as_one_does_and_continue(folder, alone, shared_programs, tmp_path):
    """Two processes evaluate two sets like one process, and continue an evaluation that lacks its last prompts."""
    env = {k.upper(): str(v) for k, v in shared_programs.items()} | {"SEEN": str(tmp_path / "seen")}
    sets = f"--sets={folder / 'rows.jsonl'}@3,{write_rows(tmp_path / 'more.jsonl', ROWS[:3])}@2"

    def evaluated(processes, name, *more):
        command = ["-m", "jaxrl_reason.evaluate", f"--workdir={folder / 'alone'}", f"--out={tmp_path / name}", sets]
        command += ["--config.mesh.fsdp=-1", "--config.prompts_per_step=8", "--config.group_size=3", *more]
        ended = finish(launch(command, processes, 1, env))
        assert [code for code, _, _ in ended] == [0] * processes, "\n".join(err[-2000:] for *_, err in ended)
        assert all("Written" not in out for _, out, _ in ended[1:])
        texts = [
            [(x["row"], x["sample"], x["completion"], x["rewards"], x["answer"]) for x in map(json.loads, lines)]
            for lines in ((tmp_path / name / label / "completions.jsonl").open() for label in ("rows", "more"))
        ]
        return texts, json.loads((tmp_path / name / "evaluation.json").read_text())

    one, expected = evaluated(1, "one")
    two, found = evaluated(2, "two", f"--against={tmp_path / 'one'}")
    assert one == two and [len(texts) for texts in one] == [60, 6]
    for label, record in expected["sets"].items():
        for name, value in record["metrics"].items():
            assert found["sets"][label]["metrics"][name] == pytest.approx(value, rel=1e-5, nan_ok=True), name
    differences = found["against"]["differences"]
    assert {x["difference"] for name, x in differences["rows"].items() if name != "prompts"} == {0.0}
    file = tmp_path / "two" / "rows" / "completions.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    again, record = evaluated(2, "two")
    assert again == one and record["sets"] == found["sets"] and file.read_bytes() == content


def test_sigterm_ends_an_evaluation_and_the_other_process_at_once(folder, alone, shared_programs, tmp_path):
    """jax catches SIGTERM for commands that save before they end. An evaluation has already saved everything."""
    env = {k.upper(): str(v) for k, v in shared_programs.items()} | {"SEEN": str(tmp_path / "seen")}
    data = write_rows(tmp_path / "long.jsonl", ROWS * 100)
    command = ["-m", "jaxrl_reason.evaluate", f"--workdir={folder / 'alone'}", f"--out={tmp_path / 'out'}"]
    command += [f"--data={data}", "--prompts=2000", "--config.mesh.fsdp=-1", "--config.mesh.host_timeout=20"]
    started, file = launch(command, 2, 1, env), tmp_path / "out" / "completions.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not (file.exists() and file.stat().st_size):
            assert time.monotonic() < deadline and started[1].poll() is None
            time.sleep(0.05)
        started[1].terminate()
        ended = finish(started, 40)
    finally:
        for process in started:
            process.kill()
    assert ended[1][0] == -signal.SIGTERM and ended[0][0] == 1
    assert "error: Process 0 of 2 cannot go on" in ended[0][2]
    assert json.loads(file.read_bytes().splitlines()[0])["row"] == 0


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_goes_on_with_another_mesh_in_one(folder, alone, shared_programs):
    config, path = recipe(folder, "moved", mesh__fsdp=2, steps=2)
    run(path, folder / "moved", shared_programs, processes=2)
    config, path = recipe(folder, "moved", mesh__fsdp=1, mesh__tensor=2)
    ((_, out, _),) = run(path, folder / "moved", shared_programs, devices=2)
    assert "Going on from" in out
    compare(folder, "alone", "moved")
    number, params = weights(config, folder / "moved")
    assert number == alone[0]
    np.testing.assert_allclose(params, alone[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "who, how",
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
    ids=["1", "0", "stopped"],
)
def test_a_process_that_dies_ends_the_other_within_the_limit(who, how, folder, shared_programs, tmp_path):
    _, path = recipe(folder, f"killed{who}", mesh__fsdp=2, steps=100_000, eval__every=0)
    started = start(path, tmp_path / "run", shared_programs, processes=2)
    try:
        deadline = time.monotonic() + 120
        file = tmp_path / "run" / "metrics.jsonl"
        while not (file.exists() and file.read_bytes().count(b"\n") > 2):
            assert time.monotonic() < deadline and started[who].poll() is None
            time.sleep(0.05)
        started[who].send_signal(how)
        killed = time.monotonic()
        _, err = started[1 - who].communicate(timeout=40)
        assert time.monotonic() - killed < 30 and started[1 - who].returncode != 0
        assert "cannot go on" in err or "another task died" in err, err[-2000:]
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_sigterm_in_the_supervised_phase_saves_too(folder, shared_programs, tmp_path):
    _, path = recipe(folder, "taught", mesh__fsdp=1, supervised__steps=100_000, checkpoint__every=100_000)
    started = start(path, tmp_path / "run", shared_programs)
    file = tmp_path / "run" / "supervised" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") > 2):
        assert time.monotonic() < deadline and started[0].poll() is None
        time.sleep(0.05)
    started[0].terminate()
    ((code, _, err),) = finish(started, limit=60)
    done = read_metrics(file)[-1]["step"]
    assert code == 143 and f"saved after supervised step {done}" in err
    assert (tmp_path / "run" / "checkpoints" / str(done)).is_dir()


@pytest.mark.slow
def test_processes_that_hold_the_same_prompts_learn_from_one_answer(folder, shared_programs, tmp_path):
    """Each process returns its own number as reward. The number of the first process counts for both."""
    (folder / "who.py").write_text(
        "import os\ndef who(completions, **_):\n    return [float(os.environ['JAX_PROCESS_ID'])] * len(completions)\n"
    )
    _, path = recipe(
        folder, "who_says", mesh__fsdp=1, mesh__tensor=2, steps=2, reward__functions=[f"{folder / 'who.py'}:who"]
    )
    run(path, tmp_path / "run", shared_programs, processes=2)
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["step"]]
    assert [line["rewards/who/mean"] for line in lines] == [0.0, 0.0]


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_skipped_by_both(folder, alone, shared_programs):
    """Damages the part that only process 1 reads, first of the newest checkpoint and then of all checkpoints."""
    _, path = recipe(folder, "damaged", mesh__fsdp=2)
    workdir = folder / "damaged"
    run(path, workdir, shared_programs, processes=2)
    damage(workdir / "checkpoints" / "7")
    (_, _, err), _ = run(path, workdir, shared_programs, processes=2)
    assert (
        f"Checkpoint {workdir / 'checkpoints' / '7'} cannot be read and is skipped; it is now damaged-7: On process 1: "
        in err
    )
    compare(folder, "alone", "damaged")
    for number in "67":
        damage(workdir / "checkpoints" / number)
    ended = finish(start(path, workdir, shared_programs, processes=2))
    assert [code for code, *_ in ended] == [1, 1]
    for _, _, err in ended:
        assert "error: None of the checkpoints under" in err and "the newest (7)" in err and "Traceback" not in err


ONE_COPY_IS_WRONG = """
import pathlib, sys
import jax, numpy as np
from jaxrl_reason.runs import checkpoints
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.types import TrainState
from jaxrl_reason.models import sharding

hosts.initialize(10, 60)
everywhere = jax.NamedSharding(sharding.make_mesh(2, 1, 1), jax.P())
state = TrainState(np.int32(1), {"w": np.arange(4, dtype=np.float32)}, {}, (), (), np.int32(1))
state = jax.tree.map(lambda x: hosts.put(x, everywhere), state)
saver = checkpoints.Checkpoints(pathlib.Path(sys.argv[1]), keep=2)
saver.save(1, state)
saver.save(2, state)
read = checkpoints._restored

def wrong(directory, like):
    parts = read(directory, like)
    if jax.process_index() == 1 and "2" in directory.parts:
        parts["params"]["w"] = hosts.put(np.float32([0, 1, 2, 4]), everywhere)
    return parts

checkpoints._restored = wrong
if jax.process_index() == 1:  # where a directory is seen late
    saver._manager.all_steps = lambda: []
number, state = saver.restore(state)
print("restored", number, *hosts.to_host(state.params["w"]))
"""


@pytest.mark.slow
def test_where_one_copy_of_an_array_is_wrong_all_processes_skip_the_checkpoint(tmp_path):
    (code, out, err), other = finish(launch(["-c", ONE_COPY_IS_WRONG, tmp_path / "checkpoints"], processes=2), limit=60)
    assert code == other[0] == 0, err + other[2]
    assert "restored 1 0.0 1.0 2.0 3.0" in out and "restored 1 0.0 1.0 2.0 3.0" in other[1]
    assert "it is now damaged-2: On process 1: params.w differs from the saved array" in err


def damage(checkpoint):
    for file in (checkpoint / "default").glob("ocdbt.process_1/d/*"):
        file.write_bytes(b"")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_and_ctrl_c_save_and_the_same_command_goes_on(processes, number, folder, shared_programs, tmp_path):
    _, path = recipe(
        folder, f"stopped{processes}{number}", mesh__fsdp=processes, steps=100_000, checkpoint__every=100_000
    )
    started = start(path, tmp_path / "run", shared_programs, processes)
    file = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") > 2):
        assert time.monotonic() < deadline and started[0].poll() is None
        time.sleep(0.05)
    started[-1].send_signal(number)  # one process is enough
    ended = finish(started, limit=60)
    assert [code for code, _, _ in ended] == [143] * processes, ended
    assert "Traceback" not in ended[0][2] and ended[0][2].splitlines()[-1].startswith("Asked to end"), ended
    done = read_metrics(file)[-1]["step"]
    assert f"saved after step {done}" in ended[0][2]
    _, path = recipe(folder, f"goes_on{number}", mesh__fsdp=1, steps=done + 1, checkpoint__every=100_000)
    ((_, out, _),) = run(path, tmp_path / "run", shared_programs)
    assert f"Going on from {tmp_path / 'run' / 'checkpoints' / str(done + 2)}" in out
    assert [line["step"] for line in read_metrics(file)] == list(range(done + 2))


@pytest.mark.slow
def test_a_reward_that_fails_on_one_process_stops_both_in_a_sentence(folder, shared_programs, tmp_path):
    function = f"{folder / 'rewards.py'}:fails_on_one"
    changes = dict(reward__functions=[function], reward__max_failure_share=0.4, eval__every=0)
    _, path = recipe(folder, "failing", mesh__fsdp=2, **changes)
    ended = finish(start(path, tmp_path / "run", shared_programs, processes=2), limit=60)
    assert [code for code, _, _ in ended] == [1, 1]
    assert "error: On process 1: " in ended[0][2]
    for *_, err in ended:
        assert "failed on 50.0%" in err and "no reward here" in err and "Traceback" not in err


@pytest.mark.slow
def test_a_set_up_may_take_longer_than_cpus_wait_for_each_other(folder, shared_programs, tmp_path):
    """The first process needs 35 seconds to load its rewards, and the other one waits."""
    _, path = recipe(folder, "late", mesh__fsdp=2, steps=1, eval__every=0)
    late = "import os, time\nif os.environ.get('JAX_PROCESS_ID') == '0': time.sleep(35)\n"
    rewards = folder / "late_rewards.py"
    rewards.write_text(late + REWARDS)
    path.write_text(path.read_text().replace(str(folder / "rewards.py"), str(rewards)))
    run(path, tmp_path / "run", shared_programs, processes=2)


@pytest.mark.slow
def test_a_process_that_dies_in_set_up_ends_the_others_in_a_sentence(folder, shared_programs, tmp_path):
    _, path = recipe(folder, "dies", mesh__fsdp=2, steps=1, eval__every=0)
    rewards = folder / "dying_rewards.py"
    rewards.write_text("import os\nif os.environ.get('JAX_PROCESS_ID') == '1': os._exit(9)\n" + REWARDS)
    path.write_text(path.read_text().replace(str(folder / "rewards.py"), str(rewards)))
    (other, _, err), (code, *_) = finish(start(path, tmp_path / "run", shared_programs, processes=2), limit=60)
    assert code == 9 and other == 1 and "error: " in err and "Traceback" not in err


def test_what_cannot_run_is_refused_by_all(folder, shared_programs, tmp_path):
    _, path = recipe(folder, "odd", mesh__fsdp=2, prompts_per_step=5)
    ended = finish(start(path, tmp_path / "run", shared_programs, processes=2), limit=60)
    assert [code for code, _, _ in ended] == [2, 2]
    assert "config.prompts_per_step is 5" in ended[0][2] and "4 and 6 can be shared" in ended[1][2]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("who", [0, 1])
def test_a_process_whose_others_never_come_ends_in_a_sentence_within_the_limit(who, folder, shared_programs, tmp_path):
    _, path = recipe(folder, f"waits{who}", mesh__fsdp=2, mesh__initialization_timeout=20)
    started = start(path, tmp_path / "run", shared_programs, processes=2)
    started[1 - who].kill()
    begin = time.monotonic()
    code, out, err = finish(started, limit=60)[who]
    assert code == 1 and 18 < time.monotonic() - begin < 50
    assert (
        "waits for the others, up to 20 s" in err and "error: The other processes have not connected within 20 s" in err
    )
    assert "Traceback" not in err and "stack trace" not in err


@pytest.mark.slow
def test_a_work_directory_that_not_all_see_is_refused(folder, shared_programs, tmp_path):
    _, path = recipe(folder, "unshared", mesh__fsdp=2)
    ended = finish(start(path, tmp_path / "run{process}", shared_programs, processes=2), limit=60)
    assert [code for code, *_ in ended] == [2, 2]
    assert all("all processes must see the same work directory" in err and "Traceback" not in err for *_, err in ended)
