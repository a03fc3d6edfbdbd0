"""Samples completions of prompts from a run or a pretrained model, and prints them.

Prompts come from --prompt, from a file, or from an interactive session, in which text appears as it is sampled. A run's
prompt template, system prompt and chat template apply as in training; a model without a run reads a prompt as the user's
turn if it has a chat template, else as it is. The session keeps the conversation if there is a chat template; /reset
forgets it, and /exit or Ctrl-D ends the session.

A run that predicts numbers takes rows of its table: --prompt='{"age": 59, "bmi": 32.1}', or a .jsonl or .csv file. For
each row it prints the mean of the samples, config.eval.samples by default, their median and their standard deviation.
"""

from collections.abc import Iterator, Mapping
import contextlib
import json
import math
import pathlib
import sys
from typing import Any, NamedTuple

import jax

from jaxrl_reason import config as config_lib
from jaxrl_reason import data, runs
from jaxrl_reason.config import ConfigError
from jaxrl_reason.data.files import rename_columns
from jaxrl_reason.data.parsers import read_cells
from jaxrl_reason.rl import hosts
from jaxrl_reason.runs import command
from jaxrl_reason.runs.command import Flag
from jaxrl_reason.runs.files import finite, write_text
from jaxrl_reason.runs.terminal import visible
from jaxrl_reason.tasks import policies
from jaxrl_reason.tasks.policies import chosen_source, open_policy, OpenedPolicy
from jaxrl_reason.tasks.regression.opening import open_rows
from jaxrl_reason.tasks.regression.prediction import predict_rows
from jaxrl_reason.tasks.sampling import Sample, Sampler

with contextlib.suppress(ImportError):  # not on Windows
    import readline  # noqa: F401  -- `input` then has a history, and arrow keys edit the line


class Generation(NamedTuple):
    """Prompts and the policy that completes them."""

    opened: OpenedPolicy
    template: data.PromptTemplate | data.ChatTemplate
    prompts: list[Any]  # texts and conversations; none: a session
    ids: list[list[int]]  # of the prompts
    sampler: Sampler
    out: pathlib.Path | None


class Regression(NamedTuple):
    """Rows of a table and the run that predicts their numbers."""

    opened: OpenedPolicy
    rows: list[dict[str, Any]]
    batches: list[data.PromptBatch]
    out: pathlib.Path | None


def prepare(arguments: command.Arguments) -> Generation | Regression:
    """Opens policy and prompts; a ConfigError, ValueError or OSError names the cause and its place."""
    command.load_recipe(arguments)
    if arguments.prompt and arguments.prompts:
        raise ConfigError("--prompt and --prompts both name prompts; give one of them.")
    source = chosen_source(arguments.workdir, arguments.model)
    if arguments.model:
        fields = {"eval.samples": "1", "data.template": "{question}"}
    else:
        run = runs.load_config(arguments.workdir, {})
        fields = {"eval.samples": "1"}
        if run.regression.tokenizer:  # only the training table is read: its scales are needed, and no held-out rows
            fields = {"data.eval": "", "data.eval_split": run.data.train_split}
            fields |= {
                "regression.validation_split": "",
                "regression.validation_every": str(config_lib.Regression().validation_every),
            }
    prompts = list(arguments.prompt) or (read_prompts(arguments.prompts) if arguments.prompts else [])
    opened = open_policy(source, fields | arguments.fields, arguments.checkpoint)
    if not prompts and arguments.out:
        raise ConfigError("--out writes the completions of --prompt or --prompts; give one of them.")
    if arguments.out:
        hosts.agree(lambda: _check_out(arguments.out, arguments.prompts) if hosts.is_first() else None, ConfigError)
    if opened.numbers is not None:
        return _regression(opened, prompts, arguments.out)
    if not prompts and jax.process_count() > 1:
        raise ConfigError("A session runs on one process; on several, give --prompt or --prompts.")
    template = config_lib.prompt_template(opened.config, opened.tokenizer)
    rows = [row_of(prompt, opened.config.data.columns) for prompt in prompts]
    ids = [encode(opened, template, row) for row in rows]
    return Generation(
        opened, template, [row["question"] for row in rows], ids, Sampler(opened, opened.load()), arguments.out
    )


def _check_out(out: pathlib.Path, prompts: pathlib.Path | None) -> None:
    """Raises ConfigError if the completions could not be written to `out`, or would replace the prompts."""
    if out == prompts:
        raise ConfigError(f"--out={out} is the file of the prompts; name another one.")
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out={out} is {'a directory' if out.is_dir() else 'in no directory'}; name a file.")


def _regression(opened: OpenedPolicy, prompts: list[Any], out: pathlib.Path | None) -> Regression:
    assert opened.workdir is not None  # a model without a run predicts no numbers
    if not prompts:
        raise ConfigError(
            "This run predicts numbers and has no session; give rows of its table by --prompt or --prompts."
        )
    rows = []
    for i, prompt in enumerate(prompts):
        try:
            row = json.loads(prompt) if isinstance(prompt, str) else prompt
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ConfigError(
                f"Prompt {i} is {prompt!r:.60}; this run predicts numbers, so give a row as a JSON object."
            )
        rows.append(row)
    return Regression(opened, rows, open_rows(opened.config, opened.mesh, opened.workdir, rows), out)


def encode(opened: OpenedPolicy, template: Any, row: Mapping[str, Any]) -> list[int]:
    """Returns the ids of a prompt: a question, with the other columns of the template. Raises ValueError if it is empty or too long."""
    question = row["question"]
    if not question:
        raise ValueError("A prompt is empty; give a text.")
    c, text = opened.config, template.render_prompt(row)
    if any("\ud800" <= x <= "\udfff" for x in text):
        raise ValueError(f"The prompt {question!r:.60} has half of a surrogate pair or bytes that are not UTF-8.")
    ids = opened.tokenizer.encode(text, add_bos=config_lib.begins_with_bos(c, opened.tokenizer))
    if not 0 < len(ids) <= c.max_prompt_length:
        limit = f"1 to {c.max_prompt_length} fit; raise --config.max_prompt_length"
        raise ValueError(f"The prompt {question!r:.60} has {len(ids)} tokens; {limit}.")
    return ids


def read_prompts(path: pathlib.Path) -> list[Any]:
    """Reads prompts: the lines of a .txt file, the texts or objects of a .jsonl file, or the rows of a .csv file."""
    kind = path.suffix.lower()
    if kind == ".csv":
        return _rows(path)
    if kind not in (".txt", ".jsonl"):
        raise ConfigError(f"--prompts={path}: a file of prompts ends in .txt (one per line), .jsonl or .csv.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise ConfigError(f"--prompts={path} is not text in UTF-8 ({e.reason} at byte {e.start}).") from e
    # Not splitlines, which also breaks lines at characters that a prompt may hold.
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"--prompts={path} holds no prompts.")
    return [line if kind == ".txt" else _parsed(path, i, line) for i, line in lines]


def _rows(path: pathlib.Path) -> list[dict[str, str]]:
    header, found = read_cells(path, ",")
    rows = []
    for line, cells in found:
        if isinstance(cells, ValueError):
            raise ConfigError(f"{path}, line {line} has {cells}.")
        rows.append(dict(zip(header, cells, strict=True)))
    return rows


def _parsed(path: pathlib.Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path}, line {number}, is not JSON: {e}.") from e


def row_of(prompt: Any, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Returns the row of a prompt: a text, a conversation, or an object like a row of the training data.

    `columns`, config.data.columns, may name the object's question; else it is "question", "prompt" or "messages".
    """
    row = {"question": prompt}
    if isinstance(prompt, dict):
        theirs = (columns or {}).get("question", "question")
        given = theirs in prompt or ("question" not in prompt and theirs.partition(".")[0] in prompt)
        try:
            # As in training, a conversation in a row may be JSON text.
            row = rename_columns(prompt, {"question": theirs} if given else {})
        except ValueError as e:
            raise ConfigError(f"A prompt is {prompt!r:.60}, and {e}.") from e
    if not isinstance(row["question"], str | list):
        raise ConfigError(
            f'A prompt is {prompt!r:.60}; give a text, or an object with a "question", a "prompt" or "messages".'
        )
    return row


def generate(generation: Generation | Regression) -> None:
    """Prints the completions, and writes them if the command line names a file; without prompts, runs a session."""
    if isinstance(generation, Regression):
        return regress(generation)
    if not generation.prompts:
        return session(generation)
    _, _, prompts, ids, sampler, out = generation
    found = sampler(ids)
    if not hosts.is_first():
        return None
    _write(out, [{"prompt": p, "samples": [s._asdict() for s in samples]} for p, samples in zip(prompts, found)])
    for prompt, samples in zip(prompts, found):
        print(f"> {visible(prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False))}")
        for i, sample in enumerate(samples, 1):
            print(f"[{i}] {describe(sample)}\n{visible(sample.text)}\n")
    return None


def regress(regression: Regression) -> None:
    """Prints the predicted number of each row with its spread, and writes all samples if the command line names a file."""
    opened, rows, batches, out = regression
    loaded = opened.load()
    found = predict_rows(loaded.programs, loaded.weights, batches, opened.tokenizer)
    if not hosts.is_first():
        return
    numbers = lambda x: {"mean": finite(x.mean), "median": finite(x.median), "spread": finite(x.spread)}
    samples = lambda x: {"samples": [finite(number) for number in x.samples]}
    _write(out, [{"row": row, **numbers(x), **samples(x)} for row, x in zip(rows, found, strict=True)])
    std = opened.tokenizer.target.std
    places = max(0, 3 - math.floor(math.log10(std)))  # three below the first digit of the targets' standard deviation
    show = lambda x: f"{x:.{places}f}" if places <= 9 and abs(x) < 1e15 else f"{x:.12g}"
    for row, x in zip(rows, found, strict=True):
        count = f"{len(x.samples)} samples, median {show(x.median)}, standard deviation {x.spread:.3g}"
        print(f"> {visible(json.dumps(row, ensure_ascii=False))}\n{show(x.mean)} ({count})\n")


def _write(out: pathlib.Path | None, lines: list[dict[str, Any]]) -> None:
    if out:
        write_text(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def describe(sample: Sample) -> str:
    """Returns one line about a completion."""
    parts = [f"{sample.tokens} tokens", f"log-probability {sample.logprob:.2f}"]
    parts += [f"self-reward {sample.self_reward:.3f}"] if sample.self_reward is not None else []
    return ", ".join([*parts, "no end token"] if sample.truncated else parts)


def session(generation: Generation) -> None:
    """Completes prompts from the standard input until its end."""
    opened, template, _, _, sampler, _ = generation
    if sys.stdin.isatty():
        forgets = "/reset forgets the conversation, " if opened.config.data.chat else ""
        print(f"Type a prompt for {opened.name}; {forgets}/exit or Ctrl-D ends the session.", flush=True)
    chat, turns, asked = opened.config.data.chat, list[dict[str, str]](), 0
    for text in _inputs():
        if text == "/exit":
            return
        if text == "/reset":
            turns.clear()
            continue
        asks: Any = [*turns, {"role": "user", "content": text}] if chat else text
        try:
            ids = encode(opened, template, {"question": asks})
        except ValueError as e:
            print(f"error: {visible(str(e))}", flush=True)
            continue
        samples = sampler([ids], asked, lambda x: print(visible(x), end="", flush=True))[0]
        print(f"\n({describe(samples[0])})", flush=True)
        for i, sample in enumerate(samples[1:], 2):
            print(f"[{i}] {visible(sample.text)}\n({describe(sample)})", flush=True)
        turns += [{"role": "user", "content": text}, {"role": "assistant", "content": samples[0].text}] if chat else []
        asked += 1


def _inputs() -> Iterator[str]:
    """Yields the lines of the standard input that are not empty; a terminal shows a prompt.

    Raises ConfigError for bytes that are no text.
    """
    prompt = "> " if sys.stdin.isatty() else ""
    with contextlib.suppress(EOFError):
        while True:
            try:
                text = input(prompt).strip()
            except UnicodeDecodeError as e:
                raise ConfigError(
                    f"A line of the standard input is not text in {e.encoding}; convert it to {e.encoding}."
                ) from e
            if text:
                yield text
    print(end="\n" if prompt else "")  # Ctrl-D leaves the cursor in the line of the prompt


COMMAND = command.Command(
    "generate",
    __doc__,
    (
        *policies.FLAGS,
        Flag("prompt", "TEXT", "a prompt; may be given several times", default=(), repeated=True),
        Flag(
            "prompts",
            "FILE",
            "prompts: .txt, one per line, .jsonl or .csv; without prompts, a session",
            command.path,
        ),
        Flag(
            "samples",
            "K",
            "completions per prompt; 1 by default, config.eval.samples for numbers",
            field="eval.samples",
        ),
        *policies.SAMPLING,
        Flag("seed", "N", "another seed gives other samples", field="seed"),
        Flag("system", "TEXT", "the system prompt, as config.data.system", field="data.system"),
        Flag("out", "FILE", "a .jsonl file for the completions of --prompt or --prompts", command.path),
        command.RECIPE,
        Flag("config.", "FIELD=VALUE", "sets a field of the configuration"),
    ),
    "--workdir=/tmp/quickstart --prompt='3 + 4 = ?' --samples=4",
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return command.run(COMMAND, argv, prepare, generate)


if __name__ == "__main__":
    sys.exit(main())
