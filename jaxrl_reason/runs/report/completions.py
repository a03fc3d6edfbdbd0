"""The completions of a report: chosen from samples.jsonl or held_out.jsonl, of which only an index is kept in memory."""

from collections.abc import Iterator, Mapping
import json
import pathlib
from typing import Any

import numpy as np

from jaxrl_reason.runs.files import MetricsError

COMPLETIONS = 240  # of each file, at most
CHARACTERS = 4000  # of a prompt or a completion, at most


class Tail:
    """The lines of a `.jsonl` file of a run that have been added since the last look."""

    def __init__(self, path: pathlib.Path):
        self._path, self._position = path, 0

    def lines(self) -> Iterator[tuple[dict[str, Any], int, int]]:
        """Yields new lines: record, position in the file, size. Waits for a torn last line to become complete.

        Raises MetricsError for a line that is no JSON object with a step.
        """
        if not self._path.exists():
            return
        with open(self._path, "rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                try:
                    record = json.loads(line, parse_constant=lambda _: None)
                    record["step"]
                except (ValueError, TypeError, KeyError) as e:
                    raise MetricsError(
                        f"A line of {self._path} is not a JSON object with a step (at byte {self._position}); repair or remove it."
                    ) from e
                yield record, self._position, len(line)
                self._position += len(line)


class Samples:
    """The completions in a file of a run."""

    def __init__(self, path: pathlib.Path):
        self._path, self._tail = path, Tail(path)
        self._of_step: dict[int, list[tuple[int, int]]] = {}  # step -> positions and sizes of its lines

    def chosen(self) -> dict[str, Any]:
        """Returns {"of", "prompts", "completions"}: at most `COMPLETIONS` of all "of" completions, as JSON.

        They are of the first step, the last one, and steps at equal distances between them. The prompt of a completion is a
        number in "prompts".
        """
        for record, position, size in self._tail.lines():
            if "completion" in record:
                self._of_step.setdefault(record["step"], []).append((position, size))
        prompts: dict[str, int] = {}  # a whole prompt -> its number
        found = [_shown(record, prompts) for record in self._read()] if self._of_step else []
        shown = [prompt[:CHARACTERS] for prompt in prompts]
        return {"of": sum(map(len, self._of_step.values())), "prompts": shown, "completions": found}

    def _read(self) -> Iterator[dict[str, Any]]:
        steps = list(self._of_step)
        count = min(len(steps), max(COMPLETIONS // max(map(len, self._of_step.values())), 2))
        with open(self._path, "rb") as file:
            for i in np.linspace(0, len(steps) - 1, count).round().astype(int):
                for position, size in self._of_step[steps[i]][: COMPLETIONS // count]:
                    file.seek(position)
                    yield json.loads(file.read(size))


def _shown(record: Mapping[str, Any], prompts: dict[str, int]) -> dict[str, Any]:
    """Returns the completion as the page shows it. "cut" is the length of a text that was cut; `prompts` get their numbers."""
    tokens, logprobs, room = [], [], CHARACTERS
    for token, logprob in zip(record.get("tokens", ()), record.get("logprobs", ())):
        if (room := room - max(len(token), 1)) < 0:  # also a token without text takes a place
            break
        tokens.append(token)
        logprobs.append(logprob)
    text = record["completion"]
    names = ("step", "total", "rewards", "advantage", "length", "truncated")
    known = {name: record[name] for name in names if record.get(name) is not None}
    known["prompt"] = prompts.setdefault(record["prompt"], len(prompts))
    known["correct"] = record.get("correct", record.get("right"))  # of an earlier version
    known |= {"tokens": tokens, "logprobs": logprobs} if "tokens" in record else {"text": text[:CHARACTERS]}
    is_cut = len(text) > CHARACTERS or len(tokens) < len(record.get("tokens", ()))
    return known | ({"cut": len(text)} if is_cut else {})
