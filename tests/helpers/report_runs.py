"""Writes work directories like a run, but without a run, and reads their reports as data."""

import json
import pathlib
import re
from typing import Any

import numpy as np

from jaxrl_reason.config import Config, to_dict
from jaxrl_reason.runs.metrics_file import HeldOutTable, MetricsWriter, SampleTable
from jaxrl_reason.runs.report import Report

# Hostile texts of a model, a data set or a file name.
HOSTILE = (
    "<script>document.title = 'owned'; console.error('owned')</script>",
    "</script><script>document.title = 'owned'</script>",
    "<!--<script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    "<svg onload=\"document.title = 'owned'\"></svg><style>* { display: none }</style>",
    "<a href=\"javascript:document.title = 'owned'\">x</a> <iframe srcdoc='<script>1</script>'></iframe>",
    "&lt;b&gt; &amp; CONTENT POLICY ${document.title = 'owned'} `'\"\\",
    "line\u2028paragraph\u2029half \ud800 of a pair \udfff, \x00\x07\x1b[31m control, \u202eright to left\u2066",
    "日本語 😀 \ufeff\u200d ]]> --!> \r\n\t",
)


def metrics_of(step: int) -> dict[str, Any]:
    """Returns the metrics of a step, all of them different."""
    x = step / 7
    line = {
        "reward": 0.3 + x / 1e4,
        "rewards/accuracy/mean": 0.2 + x / 1e4,
        "completions/mean_length": 20 + x,
        "entropy": 1 / (1 + x),
        "grad_norm": 0.1 + x,
        "frac_reward_zero_std": 0.25,
        "loss": -x,
        "hero/spread": x,
        "sampling/logp_difference_max": 1e-6,
        "skipped_update_ratio": 0.0,
        "perf/step_seconds": 1.5 + x / 1e4,
        "perf/step_seconds/rollout": 1.0,
        "perf/host_memory_gib": 2.0,
    }
    return line | ({"eval/accuracy": 0.5 + x / 1e5, "eval/pass@4": 0.75} if step % 10 == 0 else {})


def write_run(
    workdir: pathlib.Path,
    steps: int = 20,
    texts: tuple[str, ...] = ("4 + 3 = 7", "It is 8."),
    config: Config | None = None,
) -> Config:
    """Writes the files of a run: metrics of each step, and samples and held-out completions every 10 steps."""
    config = config or Config(steps=steps)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps({"config": to_dict(config), "data_fingerprint": "0"}))
    count = len(texts)
    with (
        MetricsWriter(workdir, False) as metrics,
        SampleTable(workdir) as samples,
        HeldOutTable(workdir, 8) as held_out,
    ):
        metrics.write(0, {"eval/accuracy": 0.5, "eval/pass@4": 0.75})
        for step in range(1, steps + 1):
            if step % 10 == 0:
                numbers = np.arange(2 * count).reshape(2, count) + step / 1000
                samples.write(
                    step,
                    [f"Prompt of step {step}: {texts[0]}", f"Another of step {step}"],
                    [texts, texts],
                    rewards={"accuracy": numbers},
                    total=numbers,
                    advantages=numbers - count,
                    lengths=np.full((2, count), 3),
                    truncated=np.arange(2 * count).reshape(2, count) % 3 == 0,
                    correct=np.arange(2 * count).reshape(2, count) % 2 == 0,
                    tokens=[[[text[:1], text[1:], ""] for text in texts]] * 2,
                    logprobs=[[[-0.1, -2.0, np.nan]] * count] * 2,
                )
                lines = [
                    {
                        "row": 0,
                        "sample": k,
                        "prompt": f"Held out: {texts[0]}",
                        "completion": text,
                        "correct": k == 0,
                        "total": 1.0,
                    }
                    for k, text in enumerate(texts)
                ]
                held_out.write(step, lines)
            metrics.write(step, metrics_of(step))
    return config


def report(workdir: pathlib.Path, config: Config) -> pathlib.Path:
    """Writes the report of a work directory and returns its path."""
    Report(workdir, config, 0.01).finish()
    return workdir / "report.html"


def content_of(page: pathlib.Path) -> dict[str, Any]:
    """Returns the content of a page."""
    found = re.search(
        r'<script type="application/json" id="content">(.*?)</script>', page.read_text("utf-8"), re.DOTALL
    )
    assert found
    return json.loads(found[1])
