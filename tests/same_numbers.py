"""Compares the numbers of short runs before and after a change that must not change them.

    git worktree add /tmp/before HEAD~3
    python tests/same_numbers.py record /tmp/before.json --checkout=/tmp/before
    python tests/same_numbers.py record /tmp/after.json
    python tests/same_numbers.py compare /tmp/before.json /tmp/after.json

`record` runs the quickstart and the recipes of the five methods for a few steps on the CPU. `compare` prints one line
per recipe. It exits with 1 if `metrics.jsonl` or `samples.jsonl` differ in anything but timings.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

RECIPES = ("quickstart", "genre2", "hero", "laser", "rlev", "progrpo")
SHORT = {
    "steps": 3,
    "supervised.steps": 12,
    "prompts_per_step": 8,
    "eval.every": 2,
    "eval.prompts": 16,
    "eval.samples": 2,
    "checkpoint.every": 2,
    "log.samples_every": 1,
    "log.progress": False,
    "log.tensorboard": False,
}
OF_RECIPE = {
    "hero": {"reward_model.steps": 6},
    "laser": {"method.reasoning_warmup": 1, "method.self_reward_warmup": 1},
}
TIMINGS = ("perf/", "time")


def run(checkout: pathlib.Path, recipe: str, workdir: pathlib.Path) -> dict[str, list[dict]]:
    """Trains a shortened recipe with the code of `checkout`, and returns the lines of its files without timings."""
    changes = SHORT | OF_RECIPE.get(recipe, {})
    command = [sys.executable, "-m", "jaxrl_reason.train", f"--config=configs/{recipe}.py", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in changes.items()]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{recipe} in {checkout} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found = {}
    for file in sorted(workdir.rglob("*.jsonl")):
        lines = map(json.loads, file.read_text().splitlines())
        found[str(file.relative_to(workdir))] = [
            {k: v for k, v in line.items() if not k.startswith(TIMINGS)} for line in lines
        ]
    return found


def differences(before: dict[str, list[dict]], after: dict[str, list[dict]]) -> list[str]:
    """Returns texts about the places in which two runs differ."""
    found = [f"{name} is in one run only" for name in before.keys() ^ after.keys()]
    for name in sorted(before.keys() & after.keys()):
        if len(before[name]) != len(after[name]):
            found.append(f"{name} has {len(before[name])} and {len(after[name])} lines")
        for i, (a, b) in enumerate(zip(before[name], after[name]), 1):
            changed = sorted(k for k in a.keys() | b.keys() if json.dumps(a.get(k)) != json.dumps(b.get(k)))
            found += [f"{name}, line {i}, {k}: {a.get(k)!r:.80} and {b.get(k)!r:.80}" for k in changed]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record", help="run the recipes and keep their numbers in a file")
    record.add_argument("file", type=pathlib.Path)
    record.add_argument("--checkout", type=pathlib.Path, default=pathlib.Path(__file__).parents[1])
    record.add_argument("--recipes", default=",".join(RECIPES))
    compare = commands.add_parser("compare", help="compare two such files")
    compare.add_argument("before", type=pathlib.Path)
    compare.add_argument("after", type=pathlib.Path)
    args = parser.parse_args()
    if args.command == "record":
        numbers = {}
        for recipe in args.recipes.split(","):
            with tempfile.TemporaryDirectory() as scratch:
                numbers[recipe] = run(args.checkout.resolve(), recipe, pathlib.Path(scratch))
            print(f"{recipe}: {sum(map(len, numbers[recipe].values()))} lines", flush=True)
        args.file.write_text(json.dumps(numbers))
        return 0
    before, after = (json.loads(file.read_text()) for file in (args.before, args.after))
    differ = False
    for recipe in sorted(before.keys() & after.keys()):
        found = differences(before[recipe], after[recipe])
        differ |= bool(found)
        print(f"{recipe}: {f'{len(found)} differences' if found else 'the same'}", *found[:10], sep="\n  ")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
