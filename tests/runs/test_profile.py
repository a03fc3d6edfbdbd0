"""Profiles have only the chosen steps, also after a resume, and readers find their files."""

import jax
import pytest

from helpers.tiny_runs import tiny, write_rows
from jaxrl_reason import train
from jaxrl_reason.runs import read_metrics
from jaxrl_reason.runs.profile import Profile


@pytest.fixture
def events(monkeypatch):
    """Returns the list of events of the profiler, to which `steps` adds its steps."""
    found = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: found.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append("stop"))
    return found


def steps(events, directory, bounds, numbers, **options):
    with Profile(directory, bounds, **options) as profile:
        for number in numbers:
            with profile.step(number):
                events.append(number)
    return events


@pytest.mark.parametrize(
    "bounds, numbers, expected",
    [
        ((2, 3), range(1, 6), [1, "start", 2, 3, "stop", 4, 5]),
        ((1, 1), range(1, 3), ["start", 1, "stop", 2]),
        ((2, 3), range(3, 6), ["start", 3, "stop", 4, 5]),  # resumed after step 2
        ((2, 3), range(4, 6), [4, 5]),  # resumed after these steps
        ((2, 9), range(1, 4), [1, "start", 2, 3, "stop"]),  # ended before the last step
        ((), range(1, 3), [1, 2]),
    ],
)
def test_only_the_chosen_steps_are_profiled(bounds, numbers, expected, events, tmp_path):
    assert steps(events, tmp_path, bounds, numbers) == expected


def test_a_step_that_raises_ends_the_profile(events, tmp_path):
    with pytest.raises(OSError), Profile(tmp_path, (1, 3)) as profile, profile.step(1):
        raise OSError
    assert events == ["start", "stop"]


def test_other_processes_write_none(events, tmp_path):
    assert steps(events, tmp_path, (1, 2), (1, 2), enabled=False) == [1, 2]


@pytest.mark.runs
@pytest.mark.usefixtures("quick_compilation")
def test_a_run_writes_the_profile_of_its_steps_once(tmp_path):
    config = tiny(write_rows(tmp_path / "rows.jsonl"), steps=4, log__profile=[2, 3])
    traces = lambda: sorted((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    train.train(train.setup(config, tmp_path / "run"))
    (trace,) = traces()
    assert trace.stat().st_size > 1000
    config.steps = 6
    train.train(train.setup(config, tmp_path / "run"))
    assert traces() == [trace] and len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 6
