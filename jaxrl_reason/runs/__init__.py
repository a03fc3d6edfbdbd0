"""The files of a run, which README.md lists, and how the run resumes from them.

`workdir` knows the configuration, data and tokenizer of a work directory, and the weights of a finished run;
`checkpoints` keeps the training state, in which `digests` finds a single wrong bit. `files` has JSON and append-only
files that survive a kill, `metrics_file` metrics.jsonl, samples.jsonl and TensorBoard events, `trackers` sends the
metrics to Weights & Biases, Trackio and MLflow, `profile` writes jax's profile of some steps, `pictures` has the learning
curve and tables, `report` one page for a browser. `loop` is the skeleton of training; `watch` warns, and ends a run that
skips updates too often;
`progress` shows bar, heartbeat and timings. `compilation_cache` keeps compiled programs between starts. `command` has
flags, --help, errors and exit codes of every command; `terminal` shows control characters as escapes.

Of a comparison, `study` has the runs with their configurations and directories, `locks` tells processes apart, `results`
reads and writes the entries of a study, and `statistics` has the intervals.
"""

from jaxrl_reason.runs.checkpoints import numbers_in
from jaxrl_reason.runs.metrics_file import read_metrics
from jaxrl_reason.runs.workdir import checkpoint_numbers, load_config, load_weights
