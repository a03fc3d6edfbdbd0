"""Writes the tables of configs/README.md anew, from the files of results next to this script.

python configs/results/write_tables.py
"""

import pathlib
import sys

from jaxrl_reason.runs.result_tables import with_tables
from jaxrl_reason.tasks import BASELINES

HERE = pathlib.Path(__file__).parent
README = HERE.parent / "README.md"

if __name__ == "__main__":
    old = README.read_text()
    try:
        new = with_tables(old, HERE, BASELINES)
    except ValueError as e:  # such as rows with different seeds
        sys.exit(f"error: {e}")
    if new != old:
        README.write_text(new)
