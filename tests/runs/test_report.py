"""Tests report.html of a run and comparison.html without a browser: their numbers, sizes and safety."""

import base64
import hashlib
from html.parser import HTMLParser
from importlib import resources
import json
import math
import os
import re

import pytest

from helpers.report_runs import content_of, HOSTILE, metrics_of, report, write_run
from jaxrl_reason import report as command
from jaxrl_reason.config import Config, Eval
from jaxrl_reason.runs import eval_settings, read_metrics
from jaxrl_reason.runs.files import MetricsError
from jaxrl_reason.runs.metrics_file import MetricsWriter
from jaxrl_reason.runs.report import Report, write_comparison
from jaxrl_reason.runs.report import run as report_run
from jaxrl_reason.runs.report.completions import CHARACTERS, COMPLETIONS, Samples
from jaxrl_reason.runs.report.curves import Curves, POINTS, thinned
from jaxrl_reason.runs.report.page import to_script
from jaxrl_reason.runs.statistics import Estimate
from jaxrl_reason.runs.watch import PATIENCE
from jaxrl_reason.runs.workdir import write_recipe

PAGE = resources.files("jaxrl_reason.runs.report").joinpath("page.html").read_text("utf-8")


def curves_of(content):
    """Returns {metric: curve}, with one curve per metric."""
    curves = [curve for chart in content["charts"] for curve in chart["curves"]]
    assert len({curve["name"] for curve in curves}) == len(curves)
    return {curve["name"]: curve for curve in curves}


def test_the_curves_are_the_lines_of_metrics(tmp_path):
    config = write_run(tmp_path, 20)
    curves, lines = curves_of(content_of(report(tmp_path, config))), read_metrics(tmp_path / "metrics.jsonl")
    assert curves.keys() == {name for line in lines for name in line} - {"step"}
    for name, curve in curves.items():
        expected = [(line["step"], float(f"{line[name]:.5g}")) for line in lines if name in line]
        assert list(zip(curve["steps"], curve["values"])) == expected
        assert curve.keys() == {"name", "steps", "values"}
    assert curves["eval/accuracy"]["steps"] == [0, 10, 20]


def test_metrics_have_their_charts(tmp_path):
    config = write_run(tmp_path, 10)
    charts = {chart["title"]: chart for chart in content_of(report(tmp_path, config))["charts"]}
    names = {title: [curve["name"] for curve in chart["curves"]] for title, chart in charts.items()}
    assert names["Reward"] == ["reward", "rewards/accuracy/mean"] and charts["Reward"]["main"]
    assert names["Held-out accuracy"] == ["eval/accuracy", "eval/pass@4"] and charts["Held-out accuracy"]["unit"] == "%"
    assert names["Time of a step by part"] == ["perf/step_seconds", "perf/step_seconds/rollout"]
    assert charts["Time of a step by part"]["log"] and not charts["Reward"]["log"]
    assert names["Memory"] == ["perf/host_memory_gib"]
    assert names["hero"] == ["hero/spread"] and not charts["hero"]["main"]  # a metric of a method


def test_metrics_of_predicted_numbers_have_their_charts():
    curves = Curves()
    names = "eval/r2 eval/greedy_r2 eval/r2@8 eval/spearman eval/rmse eval/rmse@8 eval/spread least_squares/r2 squared_error_head/rmse"
    curves.add({"step": 0} | dict.fromkeys(names.split(), 0.5))
    found = {chart["title"]: [curve["name"] for curve in chart["curves"]] for chart in curves.charts()}
    assert found == {
        "Held-out fit": ["eval/greedy_r2", "eval/r2", "eval/spearman", "least_squares/r2"],
        "Held-out fit of 1 and 8 samples": ["eval/r2@8"],
        "Held-out error and spread": ["eval/rmse", "eval/spread", "squared_error_head/rmse"],
        "Held-out error of 1 and 8 samples": ["eval/rmse@8"],
    }


def test_the_head_compares_equal_evaluations_only_and_shows_the_reward_of_all_groups(tmp_path):
    config = write_run(tmp_path, 10)
    facts = lambda config: dict(content_of(report(tmp_path, config))["facts"])
    assert facts(config)["Held-out accuracy"] == "50.0 %"  # the settings of the first evaluation are unknown
    assert facts(config)["Reward"] == "0.3 → 0.3"
    eval_settings.write(tmp_path, config)
    assert facts(config)["Held-out accuracy"] == "50.0 % → 50.0 %"
    other = Config(steps=10, eval=Eval(samples=9))
    assert facts(other)["Held-out accuracy"] == "50.0 %"
    (warning,) = content_of(report(tmp_path, other))["warnings"]
    assert warning["step"] == 10 and "settings of the evaluation have changed" in warning["text"]
    assert content_of(report(tmp_path, config))["warnings"] == []
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        line["dynamic_sampling/reward"] = line["step"] / 100
    late = [line for line in lines if line["step"]]  # without an evaluation before training
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in late))
    assert facts(config)["Reward"] == "0.01 → 0.1" and facts(config)["Held-out accuracy"] == "50.0 %"


def test_an_unknown_value_is_no_point(tmp_path):
    config = write_run(tmp_path, 10)
    with MetricsWriter(tmp_path, False) as writer:
        writer.write(11, metrics_of(11) | {"entropy": math.nan})
    curve = curves_of(content_of(report(tmp_path, config)))["entropy"]
    assert curve["steps"] == list(range(1, 11))


def test_values_that_are_no_numbers_are_no_points(tmp_path):
    config = write_run(tmp_path, 2)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "entropy": NaN, "reward": "0.5"}\n')
    curves = curves_of(content_of(report(tmp_path, config)))
    assert curves["entropy"]["steps"] == curves["reward"]["steps"] == [1, 2]


def test_a_long_curve_has_means_and_bands():
    steps = list(range(1, 1001))
    curve = thinned(steps, [float(step % 4) for step in steps])  # 1 2 | 3 0 | 1 2 | 3 0 ...
    assert curve["steps"] == list(range(2, 1001, 2))
    assert curve["values"][:4] == [1.5, 1.5, 1.5, 1.5]
    assert curve["low"][:3] == [1, 0, 1] and curve["high"][:3] == [2, 3, 2]
    for count, width in ((501, 2), (1002, 5), (2501, 10), (10_000, 20), (100_000, 200)):
        curve = thinned(range(1, count + 1), range(1, count + 1))
        assert len(curve["steps"]) == -(-count // width) <= POINTS
        assert curve["steps"][-1] == count and curve["low"][1] == width + 1 and curve["high"][0] == width
        assert curve["values"][0] == pytest.approx((width + 1) / 2, rel=1e-4)
    assert thinned(range(POINTS), range(POINTS)) == {"steps": list(range(POINTS)), "values": list(range(POINTS))}


def test_a_long_run_has_a_small_report(tmp_path):
    config = write_run(tmp_path, 10_000, ("a" * 9000, "short"), Config(steps=10_000))
    page = report(tmp_path, config)
    content = content_of(page)
    assert page.stat().st_size < 4_000_000
    assert all(len(curve["steps"]) <= POINTS for curve in curves_of(content).values())
    for found, recorded in ((content["completions"]["samples"], 4000), (content["completions"]["held_out"], 2000)):
        assert found["of"] == recorded and COMPLETIONS / 2 < len(found["completions"]) <= COMPLETIONS
        steps = sorted({c["step"] for c in found["completions"]})
        assert steps[0] == 10 and steps[-1] == 10_000 and max(b - a for a, b in zip(steps, steps[1:])) < 200
        assert all(len("".join(c.get("tokens", c.get("text")))) <= CHARACTERS for c in found["completions"])
        assert {c.get("cut") for c in found["completions"]} == {9000, None}
        assert all(len(prompt) <= CHARACTERS for prompt in found["prompts"])


def test_completions_are_those_of_the_run(tmp_path):
    config = write_run(tmp_path, 20)
    found = content_of(report(tmp_path, config))["completions"]
    samples = found["samples"]
    assert [(c["step"], round(c["advantage"], 9), c["correct"]) for c in samples["completions"][:4]] == [
        (10, -1.99, True),
        (10, -0.99, False),
        (10, 0.01, True),
        (10, 1.01, False),
    ]
    first = samples["completions"][0]
    assert first["tokens"] == ["4", " + 3 = 7", ""] and first["logprobs"] == [-0.1, -2.0, None] and "text" not in first
    assert samples["prompts"][first["prompt"]] == "Prompt of step 10: 4 + 3 = 7"
    held_out = found["held_out"]
    assert held_out["prompts"] == ["Held out: 4 + 3 = 7"]  # one prompt in all steps
    assert [(c["step"], c["text"], c["correct"]) for c in held_out["completions"]] == [
        (step, text, right) for step in (10, 20) for text, right in (("4 + 3 = 7", True), ("It is 8.", False))
    ]


def test_completions_of_an_earlier_version_have_their_verdicts(tmp_path):
    config = write_run(tmp_path, 20)
    verdicts = lambda: [
        c["correct"] for c in content_of(report(tmp_path, config))["completions"]["held_out"]["completions"]
    ]
    file, now = tmp_path / "held_out.jsonl", verdicts()
    file.write_text(file.read_text().replace('"correct"', '"right"'))
    assert verdicts() == now == [True, False, True, False]


def test_long_prompts_that_begin_alike_stay_apart_and_tokens_without_text_take_room(tmp_path):
    lines = [
        {
            "step": 1,
            "prompt": "a" * CHARACTERS + end,
            "completion": "x",
            "tokens": tokens,
            "logprobs": [-1] * len(tokens),
        }
        for end, tokens in (("b", ["x", ""]), ("c", ["x"] + [""] * 2 * CHARACTERS), ("b", ["x"]))
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = Samples(tmp_path / "samples.jsonl").chosen()
    assert [c["prompt"] for c in found["completions"]] == [0, 1, 0]
    assert found["prompts"] == ["a" * CHARACTERS] * 2
    assert [len(c["tokens"]) for c in found["completions"]] == [2, CHARACTERS, 1]
    assert [c.get("cut") for c in found["completions"]] == [None, 1, None]  # a cut is no end


def test_warnings_of_the_watch(tmp_path):
    config = write_run(tmp_path, PATIENCE + 5)
    assert content_of(report(tmp_path, config))["warnings"] == []
    lines = [json.dumps(line | {"frac_reward_zero_std": 1.0}) for line in read_metrics(tmp_path / "metrics.jsonl")]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (warning,) = content_of(report(tmp_path, config))["warnings"]
    assert warning["step"] == PATIENCE and "the completions of every group have had equal rewards" in warning["text"]


@pytest.mark.parametrize("recipe", [True, False])
def test_fields_that_differ(recipe, tmp_path):
    config = Config(steps=20, seed=3, method={"name": "dapo", "clip_low": 0.1})
    write_run(tmp_path, 20, config=config)
    if recipe:
        values = json.loads((tmp_path / "config.json").read_text())["config"]
        write_recipe(tmp_path, "my.py", values | {"steps": 7, "method": {"name": "dapo", "alpha": 2}})
    fields = content_of(report(tmp_path, config))["fields"]
    rows = {name: rest for name, *rest in fields["rows"]}
    assert fields["recipe"] == ("my.py" if recipe else "")
    assert rows["steps"] == ["20", "7" if recipe else None, "100"]
    assert rows["seed"] == ["3", None, "0"]
    assert rows["group_size"] == ["8", None, None]
    assert rows["method.clip_low"] == ["0.1", "not set" if recipe else None, "not set"]
    assert rows.get("method.alpha") == (["not set", "2", None] if recipe else None)


class Tags(HTMLParser):
    """Collects the tags of a page with their attributes, and the texts of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag in ("script", "style")

    def handle_data(self, data):
        if self._inside:
            self.texts.append(data)
            self._inside = False


def test_strangers_texts_are_inert(tmp_path):
    hostile = "".join(HOSTILE)
    config = Config(steps=20, method={"name": "grpo", hostile: hostile})
    config.model.path = config.data.train = hostile
    workdir = tmp_path / "</title><script>document.title = 'owned'<"
    write_run(workdir, 20, HOSTILE, config)
    write_recipe(workdir, hostile, {"steps": hostile})
    page = Report(workdir, Config(steps=20), 0.01)
    page._config = config
    page.finish()
    text = page.path.read_text("utf-8")
    empty = Tags(PAGE.replace("CONTENT", "{}"))
    found = Tags(text)
    policy = dict(found.tags[3][1])
    assert policy.pop("content") and [t for t, _ in found.tags] == [t for t, _ in empty.tags]
    assert len(found.texts) == 3 and found.texts[2] == empty.texts[2] and found.texts[0] == empty.texts[0]
    data = found.texts[1]
    assert data.isascii() and not set("<>&") & set(data) and "owned" not in text.replace(data, "")
    content = json.loads(data)
    assert content["facts"][0] == ["Model", hostile] and content["fields"]["recipe"] == hostile
    texts = ["".join(c["tokens"]) for c in content["completions"]["samples"]["completions"]]
    assert texts == [*HOSTILE] * 4


def test_any_text_comes_back_from_a_script():
    text = "".join(map(chr, range(0x3000))) + "\ud800" + HOSTILE[1]
    assert json.loads(to_script({"text": text})) == {"text": text}


def test_the_policy_allows_only_the_own_script_and_style(tmp_path):
    text = report(tmp_path, write_run(tmp_path)).read_text("utf-8")
    found = Tags(text)
    (policy,) = [
        a["content"] for t, a in found.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    style, _, script = found.texts
    digest = lambda x: base64.b64encode(hashlib.sha256(x.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{digest(script)}'; style-src 'sha256-{digest(style)}'; base-uri 'none'; form-action 'none'"
    )
    assert text.index("Content-Security-Policy") < text.index("<style>")
    for tag, attributes in found.tags:
        assert not {"src", "href", "style", "srcset"} & attributes.keys(), tag
        assert not [name for name in attributes if name.startswith("on")]


def test_the_script_makes_no_markup_of_texts_and_asks_for_nothing():
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval",
        "Function(",
        "fetch",
        "XMLHttp",
        "import",
        "@import",
    ):
        assert word not in PAGE, word
    addresses = re.findall(r"\w+://[^\s\"']+", PAGE)
    assert addresses == ["http://www.w3.org/2000/svg"]  # a name of SVG, not an address
    assert PAGE.count("CONTENT") == PAGE.count("POLICY") == 1


def test_the_same_files_give_the_same_bytes_and_a_run_goes_on_with_its_report(tmp_path):
    config = write_run(tmp_path / "run", 20)
    once = report(tmp_path / "run", config).read_bytes()
    assert report(tmp_path / "run", config).read_bytes() == once
    (tmp_path / "other").mkdir()
    (tmp_path / "run" / "report.html").unlink()
    growing = Report(tmp_path / "other", config, 0.01)
    for share in (0.0, 0.31, 0.62, 1.0):  # files grow, and end in the middle of a line
        for path in (tmp_path / "run").iterdir():
            content = path.read_bytes()
            (tmp_path / "other" / path.name).write_bytes(content[: int(share * len(content))])
        growing.finish()
    assert growing.path.read_bytes().replace(b'"other"', b'"run"') == once
    assert sorted(p.name for p in (tmp_path / "other").iterdir()) == sorted(
        [*(p.name for p in (tmp_path / "run").iterdir()), "report.html"]
    )


def test_a_kill_while_the_report_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    config = write_run(tmp_path, 10)
    before = report(tmp_path, config).read_bytes()
    write_run(tmp_path, 20, config=config)

    def killed(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(SystemExit):
            report(tmp_path, config)
    assert (tmp_path / "report.html").read_bytes() == before
    assert report(tmp_path, config).read_bytes() != before


def test_a_report_takes_at_most_its_share_of_the_time(tmp_path, monkeypatch):
    now = [100.0]

    def clock():
        now[0] += 0.25  # a write takes 0.25 s
        return now[0]

    monkeypatch.setattr(report_run.time, "monotonic", clock)
    found = Report(tmp_path, write_run(tmp_path), 0.01)
    steps = lambda: content_of(found.path)["subtitle"]
    found.write()
    assert steps() == "grpo, step 20 of 20"
    with MetricsWriter(tmp_path, False) as writer:
        writer.write(21, metrics_of(21))
    now[0] += 0.25 / report_run.SHARE - 1
    found.write()
    assert steps() == "grpo, step 20 of 20"
    now[0] += 1
    found.write()
    assert steps() == "grpo, step 21 of 20"


def test_the_end_of_a_run_writes_its_report(tmp_path, monkeypatch):
    config = write_run(tmp_path)
    with Report(tmp_path, config, 0.01):
        pass
    assert content_of(tmp_path / "report.html")["subtitle"] == "grpo, step 20 of 20"
    with MetricsWriter(tmp_path, False) as writer:
        writer.write(21, metrics_of(21))
    with pytest.raises(RuntimeError, match="diverged"):
        with Report(tmp_path, config, 0.01) as found:
            found.finish()
            raise RuntimeError("diverged")
    assert content_of(tmp_path / "report.html")["subtitle"] == "grpo, step 21 of 20"
    with pytest.raises(RuntimeError, match="diverged"):
        with Report(tmp_path, config, 0.01) as found:
            found.finish()
            (tmp_path / ".report.html.tmp").mkdir()  # the report cannot be written any more
            raise RuntimeError("diverged")
    with pytest.raises(OSError, match=r"report\.html cannot be written"):
        found.finish()


def test_a_run_of_a_comparison_has_the_name_of_its_seed(tmp_path):
    workdir = tmp_path / "hero" / "seed-3" / "method"
    assert content_of(report(workdir, write_run(workdir)))["title"] == "seed-3/method"


def test_only_the_first_process_writes(tmp_path):
    config = write_run(tmp_path)
    with Report(tmp_path, config, 0.01, enabled=False) as found:
        found.write()
    assert not found.path.exists()


def test_a_damaged_line_is_named(tmp_path):
    config = write_run(tmp_path)
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(MetricsError, match=r"samples\.jsonl is not a JSON object with a step \(at byte 12\)"):
        report(tmp_path, config)


def test_the_command(tmp_path, capsys):
    write_run(tmp_path / "run")
    assert command.main([f"--workdir={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().out == f"Report: {tmp_path / 'run' / 'report.html'}\n"
    assert content_of(tmp_path / "run" / "report.html")["title"] == "run"
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert command.main([f"--workdir={tmp_path / 'run'}"]) == 2
    assert "has no metrics.jsonl, so there is nothing to report yet; train first." in capsys.readouterr().err
    assert command.main([f"--workdir={tmp_path / 'none'}"]) == 2


def test_a_comparison(tmp_path):
    rows = {
        "start": {"eval/accuracy": 0.5, "half_width": {"eval/accuracy": None}, "difference": {}},
        "hero": {
            "eval/accuracy": 0.75,
            "half_width": {"eval/accuracy": 0.125},
            "difference": {},
            "differs": {"method.name": "hero"},
            "runs": {"0": {"seconds": 60.0}, "1": {"seconds": 90.0}},
        },
        "verifier only": {
            "eval/accuracy": 0.625,
            "half_width": {"eval/accuracy": None},
            "difference": {"eval/accuracy": {"mean": -0.125, "low": -0.25, "high": 0.0}},
            "differs": {"method.name": "grpo"},
            "runs": {"0": {"seconds": 30.0}},
        },
    }
    curves = {
        "eval/accuracy": {
            "hero": {0: Estimate(0.5, None, 2), 9: Estimate(0.75, 0.125, 2)},
            "verifier only": {0: Estimate(0.5, None, 1)},
        }
    }
    places = {"hero": {0: "seed-0/method/report.html", 1: ""}}
    path = tmp_path / "comparison.html"
    write_comparison(path, rows, curves, ["eval/accuracy"], places, title="study")
    content = content_of(path)
    assert content["subtitle"].startswith("3 rows, seeds 0, 1. Means over seeds")
    assert content["subtitle"].endswith("as bands.")
    (chart,) = content["charts"]
    assert (chart["title"], chart["unit"]) == ("accuracy", "%")
    assert chart["curves"] == [
        {"name": "hero", "steps": [0, 9], "values": [0.5, 0.75], "low": [0.5, 0.625], "high": [0.5, 0.875]},
        {"name": "verifier only", "steps": [0], "values": [0.5]},
    ]
    tables = {table["title"]: table for table in content["tables"]}
    assert tables["Results"]["rows"] == [["start", "50.0 %"], ["hero", "75.0 ± 12.5 %"], ["verifier only", "62.5 %"]]
    assert tables["Differences"]["rows"] == [["verifier only", "-12.5 [-25.0, +0.0] points"]]
    assert tables["Differences"]["note"].startswith("To hero, paired by seed")
    assert tables["Fields that differ"]["rows"] == [["hero", '"hero"'], ["verifier only", '"grpo"']]
    assert tables["Runs"]["rows"] == [
        ["hero", "0", "1.0", {"text": "report", "link": "seed-0/method/report.html"}],
        ["hero", "1", "1.5", "elsewhere"],
        ["verifier only", "0", "0.5", "elsewhere"],
    ]
    write_comparison(path, rows, {}, ["eval/r2", "eval/rmse"], places, title="numbers")
    assert content_of(path)["subtitle"].endswith("rmse and spread are in standard deviations of the training targets.")
