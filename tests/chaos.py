"""Kills runs at random moments and compares their files, bit for bit, with the files of runs that were never killed.

    JAX_PLATFORMS=cpu python tests/chaos.py --kills=100 --seed=0 [--configs=grpo,hero] [--folder=DIR]

Each configuration first runs to its end twice without a kill. Both runs must be equal, and the second one shows how
long a run takes. Then the same command starts in an empty directory. It is killed with SIGKILL and started again
several times, until it reaches its end. The configurations take turns until the given number of kills is reached.

The comparison covers the metrics (without perf/*), the scalars of TensorBoard and the samples. It covers every array of
every checkpoint and of start/, and the names and contents of all other files. Times and the pixels of pictures are not
compared. The script prints one line per kill and a summary. After a difference, the exit code is 1 and the files stay.
"""

import argparse
from collections.abc import Callable, Iterator
import dataclasses
import itertools
import json
import logging
import math
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from tensorboardX.proto.event_pb2 import Event

from helpers.report_runs import content_of
from helpers.tiny_runs import ROWS, tiny, write_rows
from jaxrl_reason.config import Data, Model, Regression, Reward, RewardModel, to_dict

REWARDS = '''"""Rewards for runs that are to be killed."""
import time

def spread(completion_ids, **_):
    """Never the same for two different completions; a while, so that a step lasts long enough to be hit."""
    time.sleep(0.02)
    return [sum((i + 1) * token for i, token in enumerate(ids)) % 1009 / 1009 for ids in completion_ids]

def even(completion_ids, **_):
    return [float(ids[0] % 2) for ids in completion_ids]
'''
GRADED = [row | {"value": i / 40, "chosen": f"#### {i}", "rejected": f"#### {i + 1}"} for i, row in enumerate(ROWS)]
WARM_UP = {"reasoning_warmup": 1, "self_reward_warmup": 3}
LEARNED = dict(
    reward=Reward(functions=["accuracy", "reward_model"], weights=[1.0, 0.0]),
    reward_model=RewardModel(steps=12, batch_size=4),
)
ANSWERING = dict(supervised__steps=30, supervised__learning_rate=1e-2, supervised__batch_size=4)  # completions that end

# The fields of each configuration. {rewards} is the file of host rewards, `processes` is the number of processes.
CONFIGS = {
    "grpo": dict(supervised__steps=6, supervised__batch_size=4, reward__functions=["{rewards}:spread"], eval__every=4),
    "dapo": dict(  # draws at most ten batches per step; an epoch has four
        method={"name": "dapo"},
        sampling__max_batches=10,
        group_size=2,
        reward__functions=["{rewards}:even", "{rewards}:spread"],
        reward__verdict="{rewards}:even",
        checkpoint__every=2,
    ),
    "laser": dict(
        ANSWERING,
        method={"name": "laser", **WARM_UP},
        update__epochs=2,
        update__minibatches=2,
        update__kl_coefficient=0.1,
        optimizer__schedule="cosine",
        checkpoint__every=3,
        eval__every=5,
    ),
    "hero": dict(ANSWERING, **LEARNED, method={"name": "hero"}, checkpoint__every=4),
    "genre2": dict(
        method={"name": "genre2", "base": "grpo", "expert_coefficient": 0.05},
        data=Data(train="{table}", train_split="[:80%]", eval_split="[80%:]"),
        regression=Regression(tokenizer="normalized", target="y", prefix_length=2, encoder_width=32),
        reward=Reward(functions=["squared_error"]),
        max_prompt_length=1,
        max_completion_length=8,
        supervised__steps=6,
        eval__every=6,
    ),
    "rlev": dict(ANSWERING, method={"name": "rlev", "base": "rloo"}, eval__every=3, lora__rank=2),
    "progrpo": dict(ANSWERING, method={"name": "progrpo"}, sampling__parts=2, update__minibatches=2),
    "stack": dict(
        ANSWERING,
        **LEARNED,
        method={"name": "hero+laser+rlev+progrpo", "base": "rloo", "laser": WARM_UP | {"reference": "exact"}},
        checkpoint__every=2,
        eval__every=6,
    ),
    "two": dict(  # two processes
        supervised__steps=4,
        supervised__batch_size=4,
        reward__functions=["{rewards}:spread"],
        update__kl_coefficient=0.1,
        mesh__fsdp=2,
        mesh__host_timeout=10,
        mesh__initialization_timeout=60,
        processes=2,
    ),
    "two_dapo": dict(
        method={"name": "dapo"},
        sampling__max_batches=10,
        group_size=2,
        reward__functions=["{rewards}:even"],
        checkpoint__every=2,
        mesh__fsdp=2,
        mesh__host_timeout=10,
        mesh__initialization_timeout=60,
        processes=2,
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration that is ready to run.

    Attributes:
      name: the name in `CONFIGS`.
      folder: the folder of the recipe, of the run that is never killed (straight/) and of the run that is (killed/).
      compiled: the folder of compiled programs, which all runs share.
      processes: the number of processes of a run.
    """

    name: str
    folder: pathlib.Path
    compiled: pathlib.Path
    processes: int

    straight = property(lambda self: self.folder / "straight")
    killed = property(lambda self: self.folder / "killed")


def prepare(name: str, folder: pathlib.Path, compiled: pathlib.Path, **changes) -> Case:
    """Writes the data, rewards and recipe of a configuration with the fields `changes` into a folder of its own."""
    folder = folder / name
    folder.mkdir(parents=True)
    rows = write_rows(folder / "rows.jsonl", GRADED)
    (folder / "rewards.py").write_text(REWARDS)
    numbers = np.random.default_rng(0).normal(size=(80, 2)).round(3)
    (folder / "table.csv").write_text("a,b,y\n" + "".join(f"{a},{b},{2 * a - b:.4f}\n" for a, b in numbers))
    defaults = dict(
        steps=10,
        data__train_split="[:16]",
        data__eval_split="[16:]",
        checkpoint__every=1,
        checkpoint__keep_start=True,
        log__samples_every=1,
        log__tensorboard=True,
        model=Model(width=16, layers=1, heads=2, kv_heads=2, mlp_width=16),
    )
    wanted = defaults | CONFIGS[name] | changes
    processes = wanted.pop("processes", 1)
    recipe = json.dumps(to_dict(tiny(rows, **wanted)))
    recipe = recipe.replace("{rewards}", str(folder / "rewards.py")).replace("{table}", str(folder / "table.csv"))
    (folder / "recipe.py").write_text(
        "import json\nfrom jaxrl_reason.config import from_dict\n"
        f"def get_config():\n    return from_dict(json.loads({recipe!r}))\n"
    )
    return Case(name, folder, compiled, processes)


def command(case: Case, workdir: pathlib.Path) -> list[str]:
    """Returns the command line of the training."""
    recipe = case.folder / "recipe.py"
    return [sys.executable, "-m", "jaxrl_reason.train", f"--config={recipe}", f"--workdir={workdir}"]


def environment(case: Case) -> dict[str, str]:
    """Returns environment variables with which each run finds the programs that another run has compiled."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(case.compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # each program runs a few times
        "CHAOS": str(case.folder),  # `left_alone` finds the processes of the case by it
    }


def start(case: Case, workdir: pathlib.Path) -> list[subprocess.Popen]:
    """Starts the training in the processes of the case. Process i writes its output to said.<i>.txt."""
    common = environment(case)
    if case.processes > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            common["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{s.getsockname()[1]}"
        common["JAX_NUM_PROCESSES"] = str(case.processes)
    started = []
    for i in range(case.processes):
        own = common | ({"JAX_PROCESS_ID": str(i)} if case.processes > 1 else {})
        with open(case.folder / f"said.{i}.txt", "wb") as out:
            started.append(subprocess.Popen(command(case, workdir), env=own, stdout=out, stderr=out))
    return started


def said(case: Case) -> str:
    return "\n".join((case.folder / f"said.{i}.txt").read_text(errors="replace") for i in range(case.processes))


def go_through(case: Case, workdir: pathlib.Path, limit: float = 300) -> float:
    """Runs the training to its end and returns the seconds that it took.

    Raises:
      RuntimeError: the run failed.
    """
    begin, started = time.monotonic(), start(case, workdir)
    try:
        codes = [process.wait(timeout=limit) for process in started]
    finally:
        _end(started)
    if any(codes) or "Traceback" in said(case):
        raise RuntimeError(f"{case.name} ended with {codes}: {said(case)[-3000:]}")
    return time.monotonic() - begin


def run_straight(case: Case) -> float:
    """Runs the training twice without a kill, and then starts the finished run once more.

    Returns:
      The seconds of the second run, which finds compiled programs.

    Raises:
      RuntimeError: a run failed, the two runs differ, or the finished run does not say that it is finished.
    """
    go_through(case, case.straight)
    seconds = go_through(case, case.killed)
    found = differences(case.straight, case.killed)
    go_through(case, case.killed)
    if "This run is finished" not in said(case):
        found.append(f"the finished run says {said(case)[-300:]!r}")
    if found:
        raise RuntimeError(f"{case.name}, never killed: " + "; ".join(found))
    shutil.rmtree(case.killed)
    return seconds


# -- when to kill ----------------------------------------------------------------------------------


def moments(case: Case, seconds: float, rng: random.Random) -> tuple[str, Callable[[], bool]]:
    """Draws the moment of a kill.

    Half of the moments are at any time of the run, including its start. A quarter follow a change of the unfinished
    checkpoints and weights. The last quarter follow a change of the files and folders.

    Returns:
      A description of the moment, and a function that returns whether the moment has come.
    """
    kind, begin = rng.choice(["time", "time", "save", "files"]), time.monotonic()
    if kind == "time":
        after = rng.uniform(0, seconds)
        return f"after {after:.2f} s", lambda: time.monotonic() - begin >= after
    saving = lambda names: sorted(name for name in names if "orbax-checkpoint-tmp" in name)
    look = saving if kind == "save" else sorted
    changes, delay = rng.randint(1, 20 if kind == "save" else 60), rng.uniform(0, 0.03)
    state = {"names": look(_names(case.killed)), "changes": 0, "since": None}

    def due() -> bool:
        if state["since"] is None:
            names = look(_names(case.killed))
            state["changes"] += names != state["names"]
            state["names"] = names
            if state["changes"] < changes:
                return False
            state["since"] = time.monotonic()
        return time.monotonic() - state["since"] >= delay

    return f"{1000 * delay:.0f} ms behind change {changes} of the {kind}", due


def _names(workdir: pathlib.Path) -> Iterator[str]:
    """Yields the paths of the files and folders in a work directory, three levels deep."""
    folders = [(str(workdir), 0)]
    for folder, depth in folders:
        try:
            for entry in os.scandir(folder):
                yield entry.path
                if depth < 2 and entry.is_dir():
                    folders.append((entry.path, depth + 1))
        except OSError:  # the folder was removed meanwhile, or does not exist yet
            continue


def kill_once(case: Case, seconds: float, rng: random.Random) -> tuple[bool, str]:
    """Starts or continues the run and kills it. Of several processes, it kills one or all.

    Returns:
      Whether the run was killed before its end, and a description of the event.

    Raises:
      RuntimeError: the run ended in another way, or the processes that were not killed did not end.
    """
    when, due = moments(case, seconds, rng)
    victims = rng.sample(range(case.processes), rng.choice([1, case.processes]))
    started = start(case, case.killed)
    try:
        while not due() and any(process.poll() is None for process in started):
            time.sleep(0.001)
        running = [i for i in victims if started[i].poll() is None]
        for i in running:
            started[i].send_signal(signal.SIGKILL)
        for i in running:
            started[i].wait()
        try:
            codes = [process.wait(timeout=90) for process in started]
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"{case.name}: killed {when}, and the others of {victims} run on: {said(case)[-3000:]}"
            ) from None
        if alone := left_alone(case):
            raise RuntimeError(f"{case.name}: killed {when}, and {alone} run on without it")
    finally:
        _end(started)
    which = f"{case.name}, process {victims}" if case.processes > 1 else case.name
    if running:
        return True, f"{which}: killed {when}"
    if any(codes) or "Traceback" in said(case):
        raise RuntimeError(f"{case.name} ended with {codes}: {said(case)[-3000:]}")
    return False, f"{case.name}: through"


def left_alone(case: Case, patience: float = 20) -> list[str]:
    """Waits up to `patience` seconds for the end of all processes of a case. Returns the commands of the rest."""
    mark, deadline = f"CHAOS={case.folder}".encode(), time.monotonic() + patience
    while True:
        found = []
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
            except OSError:  # the process has ended, or belongs to another user
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def _end(started: list[subprocess.Popen]) -> None:
    for process in started:
        process.kill()
        process.wait()


def kill_until_through(
    case: Case, seconds: float, rng: random.Random, kills: int, report: Callable[[str], None]
) -> tuple[int, list[str]]:
    """Kills a run up to `kills` times, and then lets it end.

    Returns:
      The number of kills, and sentences about a failure or about differences from the run that was never killed.
    """
    shutil.rmtree(case.killed, ignore_errors=True)
    done, what = 0, []
    try:
        for _ in range(kills):
            killed, what_happened = kill_once(case, seconds, rng)
            report(what_happened)
            what.append(what_happened)
            if not killed:
                break
            done += 1
        else:
            go_through(case, case.killed)
    except RuntimeError as e:
        return done, [f"{e} (before: {what})"]
    return done, differences(case.straight, case.killed)


# -- the files of a run ----------------------------------------------------------------------------


def differences(expected: pathlib.Path, found: pathlib.Path) -> list[str]:
    """Returns one sentence for each difference between two finished work directories.

    Checkpoints of `found` that are older than all checkpoints of `expected` do not count. A kill after the last save
    can prevent the removal of old checkpoints.
    """
    contents = [_contents(workdir) for workdir in (expected, found)]
    oldest = {}
    for folder, number in map(_checkpoint, contents[0]):
        oldest[folder] = min(number, oldest.get(folder, number))
    contents[1] = {
        name: x for name, x in contents[1].items() if _checkpoint(name)[1] >= oldest.get(_checkpoint(name)[0], 0)
    }
    names = [set(content) for content in contents]
    result = [f"{name} is missing" for name in sorted(names[0] - names[1])]
    result += [f"{name} was left behind" for name in sorted(names[1] - names[0])]
    for name in sorted(names[0] & names[1]):
        a, b = (content[name] for content in contents)
        if a != b:
            result.append(f"{name} differs{_where(a, b)}")
    return result


def _checkpoint(name: str) -> tuple[str, float]:
    """Returns the folder and the number of the checkpoint of an entry of `_contents`, or ("", infinity)."""
    found = re.match(r"(.*\bcheckpoints)/(\d+)\b", name)
    return (found[1], int(found[2])) if found else ("", math.inf)


def _contents(workdir: pathlib.Path) -> dict[str, object]:
    """Returns the content of every file of a work directory that must be equal, by its path.

    Each array of the checkpoints and weights is an entry of its own.
    """
    result, weights = {}, []
    for metadata in sorted(workdir.rglob("_METADATA")):
        folder = metadata.parent
        weights.append(folder.parent if folder.name == "default" else folder)
        for name, array in arrays_of(folder).items():
            result[f"{folder.relative_to(workdir)}:{name}"] = (str(array.dtype), array.shape, array.tobytes())
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if any(folder in (path, *path.parents) for folder in weights):
            continue
        if path.parent.name == "tensorboard":
            result[str(path.parent.relative_to(workdir))] = scalars_of(path.parent)
        elif path.is_dir():
            result[f"{name}/"] = None
        elif path.name == "metrics.jsonl":
            lines = map(json.loads, path.read_bytes().splitlines())
            result[name] = [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]
        elif path.name == "report.html":
            result[name] = _without_times(content_of(path))
        elif path.suffix == ".jsonl":
            result[name] = path.read_bytes().splitlines()
        elif path.suffix == ".png":
            result[name] = path.read_bytes()[:8]  # the picture shows the values of metrics.jsonl
        else:
            result[name] = path.read_bytes()
    return result


def _without_times(report: dict) -> dict:
    """Returns the content of a report without the name of its directory and without values that depend on time."""
    curves = [[c for c in chart["curves"] if not c["name"].startswith("perf/")] for chart in report["charts"]]
    facts = [fact for fact in report["facts"] if fact[0] != "Time of RL"]
    return report | {"title": "", "facts": facts, "charts": [found for found in curves if found]}


def arrays_of(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a checkpoint by their paths. This process reads them all, even if several wrote them."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.metadata(directory).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found)
        restored = reader.restore(directory, ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(restored)}


def scalars_of(directory: pathlib.Path) -> dict[str, dict[int, float]]:
    """Returns {tag: {step: value}} as TensorBoard shows it: a restart removes earlier values from its step on."""
    result = {}
    for path in sorted(directory.iterdir(), key=lambda path: (path.name.split(".")[3], path.stat().st_mtime_ns)):
        content = path.read_bytes()
        while len(content) >= 12:
            length = int.from_bytes(content[:8], "little")
            if len(content) < 16 + length:
                break  # a kill has cut this event
            event, content = Event.FromString(content[12 : 12 + length]), content[16 + length :]
            if event.HasField("session_log"):
                for values in result.values():
                    for step in [step for step in values if step >= event.step]:
                        del values[step]
            for value in event.summary.value:
                if not value.tag.startswith("perf/"):
                    result.setdefault(value.tag, {})[event.step] = value.simple_value
    return result


def _where(a, b) -> str:
    """Returns a short text about the first difference between two lists or dicts, and "" for other contents."""
    if isinstance(a, dict):
        a, b = (sorted((k, repr(v)) for k, v in x.items()) for x in (a, b))
    if isinstance(a, list):
        pairs = itertools.zip_longest(a, b)
        first = next((i, x, y) for i, (x, y) in enumerate(pairs) if x != y)
        if isinstance(first[1], dict) and isinstance(first[2], dict):
            keys = [k for k in dict.fromkeys([*first[1], *first[2]]) if first[1].get(k) != first[2].get(k)]
            return f" in line {first[0] + 1} of {len(a)} and {len(b)}: " + ", ".join(
                f"{k} {first[1].get(k)!r} != {first[2].get(k)!r}" for k in keys[:5]
            )
        return f" in entry {first[0] + 1} of {len(a)} and {len(b)}: {first[1]!r:.200} != {first[2]!r:.200}"
    return ""


def main(argv: list[str] | None = None) -> int:
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns of files of its own that it does not need
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kills in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--configs", default=",".join(CONFIGS), help="configurations, in turn (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=8, help="kills of a run at most, before it may end")
    parser.add_argument("--folder", help="where the runs go (default: a temporary one)")
    options = parser.parse_args(argv)
    folder = pathlib.Path(options.folder or tempfile.mkdtemp(prefix="chaos-"))
    names = options.configs.split(",")
    if unknown := [name for name in names if name not in CONFIGS]:
        parser.error(f"There is no configuration {unknown[0]!r}; there are {', '.join(CONFIGS)}.")
    say = lambda text: print(time.strftime("%H:%M:%S"), text, flush=True)
    done, runs, broken, cases = 0, 0, [], {}
    rng = random.Random(options.seed)
    for name in itertools.cycle(names):
        if done >= options.kills:
            break
        if name not in cases:
            case = prepare(name, folder, folder / "compiled")
            cases[name] = case, run_straight(case)
            say(f"{name}: {cases[name][1]:.1f} s undisturbed")
        case, seconds = cases[name]
        limit = min(rng.randint(1, options.at_once), options.kills - done)
        killed, found = kill_until_through(case, seconds, rng, limit, say)
        done, runs = done + killed, runs + 1
        if found:
            aside = case.folder / f"differs{len(broken)}"
            if case.killed.exists():
                case.killed.rename(aside)
            broken.append(name)
            say(f"{name}: DIFFERS ({aside}): " + "; ".join(found))
        else:
            say(f"{name}: the same after {killed} kills ({done} of {options.kills})")
    print(f"{done} kills, {runs} runs of {len(cases)} configurations, {len(broken)} of them different: {broken}")
    if not broken and not options.folder:
        shutil.rmtree(folder)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
