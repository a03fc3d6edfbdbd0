"""Runs the studies of configs/README.md, or goes on with them, and writes their tables anew.

python configs/results/run_studies.py /tmp/studies              # all
python configs/results/run_studies.py /tmp/studies hero rlev

Results in the files next to this script are kept, and their runs are not repeated: delete a file to run its study from the
start. The script may be stopped at any time, and several may share the directory. All studies from the start
take about 18 hours of two busy CPU cores. GenRe2's ten tables need the extra `study`, the two with SmolLM2 the extra `gguf` and
the package with the model, and smollm2_chain_sum the extra `gym`.
"""

from collections.abc import Iterator, Sequence
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
TABLES = "boston carseats college cps diabetes hitters houses mpg salaries wage".split()

# By recipe: the number of seeds, and the rows of the table; no rows are all.
STUDIES: dict[str, tuple[int, Sequence[str]]] = {
    "estimators": (8, ()),
    "smollm2_sums": (4, ()),
    "smollm2_chain_sum": (3, ()),
    "genre2": (8, ()),
    "genre2_ieee": (8, ()),
    "genre2_p10": (8, ()),
    "laser": (8, ()),
    "laser_silent": (8, ()),
    "hero": (8, ()),
    "rlev": (8, ()),
    "progrpo": (8, ()),
    "progrpo_weak_start": (16, ()),
    "progrpo_off_policy": (8, ()),
}


def flags(name: str, workdir: pathlib.Path) -> Iterator[list[str]]:
    """Yields the flags of `compare` for a study: one list, or one per table."""
    seeds, rows = STUDIES[name]
    rest = [f"--seeds={seeds}", f"--results={HERE / name}.jsonl", *(f"--only={row}" for row in rows)]
    for table in TABLES if name.startswith("genre2") else [""]:
        data = [f"--config.data.train=small_tables/{table}"] if table else []
        yield [f"--config={HERE.parent / name}.py", f"--workdir={workdir / name / table}", *data, *rest]


def main(workdir: str, *names: str) -> None:
    if unknown := set(names) - STUDIES.keys():
        sys.exit(f"No study is named {', '.join(sorted(unknown))}. There are: {', '.join(STUDIES)}.")
    for name in names or STUDIES:
        for given in flags(name, pathlib.Path(workdir)):
            done = subprocess.run([sys.executable, "-m", "jaxrl_reason.compare", *given])
            if done.returncode:  # `compare` has said why
                sys.exit(done.returncode)
    subprocess.run([sys.executable, HERE / "write_tables.py"], check=True)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
