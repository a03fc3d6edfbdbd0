"""The files of a run, and how the run resumes from them.

    files           JSON and append-only files that survive a kill
    metrics_file    metrics.jsonl, samples.jsonl, TensorBoard events
    pictures        the learning curve, tables
    workdir         which configuration, data and tokenizer a work directory belongs to; the weights of a finished run
    checkpoints     the training state; `digests` finds a single wrong bit in it
    watch           updates that are skipped too often, and warnings about metrics
    progress        progress bar, heartbeat, timings
    command         flags, --help, errors and exit codes of every command

README.md lists the files of a work directory.
"""

from jaxrl_reason.runs.metrics_file import read_metrics
from jaxrl_reason.runs.workdir import checkpoint_numbers, load_config, load_weights, numbers_in
