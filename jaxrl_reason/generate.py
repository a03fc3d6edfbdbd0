"""Samples completions of prompts from a run or a pretrained model, and prints them.

Prompts come from --prompt, from a file, or from an interactive session, in which text appears as it is sampled. A run's
prompt template, system prompt and chat template apply as in training; a model without a run reads a prompt as the user's
turn if it has a chat template, else as it is. The session keeps the conversation if there is a chat template; /reset
forgets it, and /exit or Ctrl-D ends the session.
"""

from collections.abc import Iterator
import contextlib
import json
import pathlib
import sys
from typing import Any, NamedTuple

import jax

from jaxrl_reason import config as config_lib
from jaxrl_reason import data
from jaxrl_reason.config import ConfigError
from jaxrl_reason.models.decoding.texts import check_sampling
from jaxrl_reason.rl import hosts
from jaxrl_reason.runs import command
from jaxrl_reason.runs.command import Flag
from jaxrl_reason.runs.files import write_text
from jaxrl_reason.tasks import policies
from jaxrl_reason.tasks.policies import chosen_source, open_policy, OpenedPolicy
from jaxrl_reason.tasks.sampling import Sample, Sampler, visible


class Generation(NamedTuple):
    """Prompts and the policy that completes them."""

    opened: OpenedPolicy
    template: data.PromptTemplate | data.ChatTemplate
    prompts: list[str]  # none: a session
    ids: list[list[int]]  # of the prompts
    sampler: Sampler
    out: pathlib.Path | None


def prepare(arguments: command.Arguments) -> Generation:
    """Opens policy and prompts; a ConfigError, ValueError or OSError names the cause and its place."""
    command.load_recipe(arguments)
    if arguments.prompt and arguments.prompts:
        raise ConfigError("--prompt and --prompts both name prompts; give one of them.")
    check_sampling(0.0, arguments.top_p, arguments.top_k)
    fields = {"eval.samples": "1"} | ({} if arguments.workdir else {"data.template": "{question}"}) | arguments.fields
    prompts = list(arguments.prompt) or (read_prompts(arguments.prompts) if arguments.prompts else [])
    opened = open_policy(chosen_source(arguments.workdir, arguments.model), fields, arguments.checkpoint)
    if opened.numbers is not None:
        raise ConfigError(
            "This run predicts numbers, which generate does not print; use python -m jaxrl_reason.evaluate."
        )
    if not prompts and jax.process_count() > 1:
        raise ConfigError("A session runs on one process; on several, give --prompt or --prompts.")
    if not prompts and arguments.out:
        raise ConfigError("--out writes the completions of --prompt or --prompts; give one of them.")
    template = config_lib.prompt_template(opened.config, opened.tokenizer)
    ids = [encode(opened, template, prompt) for prompt in prompts]
    sampler = Sampler(opened, opened.load(), arguments.top_p, arguments.top_k)
    return Generation(opened, template, prompts, ids, sampler, arguments.out)


def encode(opened: OpenedPolicy, template: Any, question: Any) -> list[int]:
    """Returns the ids of a prompt. Raises ValueError if it is empty or too long."""
    if not question:
        raise ValueError("A prompt is empty; give a text.")
    c, text = opened.config, template.render_prompt({"question": question})
    ids = opened.tokenizer.encode(text, add_bos=config_lib.begins_with_bos(c, opened.tokenizer))
    if not 0 < len(ids) <= c.max_prompt_length:
        limit = f"1 to {c.max_prompt_length} fit; raise --config.max_prompt_length"
        raise ValueError(f"The prompt {question!r:.60} has {len(ids)} tokens; {limit}.")
    return ids


def read_prompts(path: pathlib.Path) -> list[Any]:
    """Reads prompts: the lines of a .txt file, or of a .jsonl file texts, or objects with a "question" or "prompt"."""
    lines = [(i, line) for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"--prompts={path}: a file of prompts ends in .txt (one per line) or .jsonl.")
    if not lines:
        raise ConfigError(f"--prompts={path} holds no prompts.")
    return [line for _, line in lines] if path.suffix == ".txt" else [_question(path, i, line) for i, line in lines]


def _question(path: pathlib.Path, number: int, line: str) -> Any:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path}, line {number}, is not JSON: {e}.") from e
    if isinstance(found, dict):
        found = found.get("question", found.get("prompt"))
    if not isinstance(found, str | list):
        raise ConfigError(f'{path}, line {number}, has to be a text, or an object with a "question" or a "prompt".')
    return found


def generate(generation: Generation) -> None:
    """Prints the completions, and writes them if the command line names a file; without prompts, runs a session."""
    if not generation.prompts:
        return session(generation)
    _, _, prompts, ids, sampler, out = generation
    found = sampler(ids)
    if not hosts.is_first():
        return None
    for prompt, samples in zip(prompts, found):
        print(f"> {visible(prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False))}")
        for i, sample in enumerate(samples, 1):
            print(f"[{i}] {describe(sample)}\n{visible(sample.text)}\n")
    if out:
        lines = [{"prompt": p, "samples": [s._asdict() for s in samples]} for p, samples in zip(prompts, found)]
        write_text(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return None


def describe(sample: Sample) -> str:
    """Returns one line about a completion."""
    parts = [f"{sample.tokens} tokens", f"log-probability {sample.logprob:.2f}"]
    parts += [f"self-reward {sample.self_reward:.3f}"] if sample.self_reward is not None else []
    return ", ".join([*parts, "no end token"] if sample.truncated else parts)


def session(generation: Generation) -> None:
    """Completes prompts from the standard input until its end."""
    opened, template, _, _, sampler, _ = generation
    chat, turns, asked = opened.config.data.chat, list[dict[str, str]](), 0
    for text in _inputs():
        if text == "/exit":
            return
        if text == "/reset":
            turns.clear()
            continue
        question: Any = [*turns, {"role": "user", "content": text}] if chat else text
        try:
            ids = encode(opened, template, question)
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
    """Yields the lines of the standard input that are not empty; a terminal shows a prompt."""
    with contextlib.suppress(EOFError):
        while True:
            text = input("> " if sys.stdin.isatty() else "").strip()
            if text:
                yield text


def real(text: str) -> float:
    """Returns a number, for --top_p."""
    try:
        return float(text)
    except ValueError:
        raise ValueError("a number") from None


COMMAND = command.Command(
    "generate",
    __doc__,
    (
        *policies.FLAGS,
        Flag("prompt", "TEXT", "a prompt; may be given several times", default=(), repeated=True),
        Flag("prompts", "FILE", "prompts: .txt, one per line, or .jsonl; without prompts, a session", command.path),
        Flag("samples", "K", "completions per prompt; 1 by default", field="eval.samples"),
        Flag("temperature", "T", "0 is greedy; config.eval.temperature by default", field="eval.temperature"),
        Flag("top_p", "P", "keeps the most probable tokens with this share", real, 1.0, alias="top-p"),
        Flag("top_k", "N", "keeps the N most probable tokens; 0 keeps all", command.number, 0, alias="top-k"),
        Flag(
            "max_completion_length",
            "N",
            "the largest number of tokens per completion; config.max_completion_length by default",
            field="max_completion_length",
            alias="max-completion-length",
        ),
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
