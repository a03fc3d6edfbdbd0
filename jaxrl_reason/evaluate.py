"""Held-out evaluation of a run: python -m jaxrl_reason.evaluate --workdir=DIR [--data=NAME_OR_PATH]

Samples several completions a prompt, judges them as the run's configuration says, and prints a table. Writes evaluation.json
(every number), evaluation.png and completions.jsonl; nothing else in the work directory is touched.

  --workdir=DIR       the work directory of a run: its config.json, tokenizer and checkpoints
  --data=NAME_OR_PATH another data set, as config.data.eval; its split is then "test", or all of a .jsonl file
  --split=SPLIT       as config.data.eval_split
  --prompts=N         prompts at most; default config.eval.prompts
  --samples=K         completions a prompt; default config.eval.samples, 1 at temperature 0
  --temperature=T     default config.eval.temperature; 0: greedy
  --checkpoint=N      a number under DIR/checkpoints; default the newest
  --out=DIR           default: evaluation, in the work directory

Other fields that the weights do not depend on are set as in training: --config.seed=1, --config.mesh.fsdp=-1 on another number of
devices, --config.data.columns={} where the other data set has other names.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
import dataclasses
import functools
import json
import logging
import math
import pathlib
import shlex
import sys
from typing import Any, NamedTuple

import jax
from matplotlib.figure import Figure
import numpy as np
import orbax.checkpoint as ocp
import rich.console
import rich.table

from jaxrl_reason import config as config_lib
from jaxrl_reason import data
from jaxrl_reason import experience
from jaxrl_reason import methods
from jaxrl_reason import metrics
from jaxrl_reason import models
from jaxrl_reason import programs as programs_lib
from jaxrl_reason import reward_training
from jaxrl_reason import writers
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.models import reward_model
from jaxrl_reason.models import sharding
from jaxrl_reason.progress import Progress
from jaxrl_reason.rewards import RewardError
from jaxrl_reason.rewards.numeric import extract_answer, parse_number
from jaxrl_reason.rewards.scorer import LEARNED, Scorer
from jaxrl_reason.rollout import Rollout

_log = logging.getLogger(__name__)

AnswerOf = Callable[[str, Mapping[str, Any]], Hashable | None]


class Evaluated(NamedTuple):
    """N held-out prompts with K completions each, on the host.

    Attributes:
      rows: the N rows of the data.
      numbers: int[N], the positions of these rows in the data.
      right: bool[N, K], the verdicts; a completion without one (missing reward) counts as wrong.
      lengths: int[N, K] in tokens, end token included.
      truncated: bool[N, K], no end token within the budget.
      logprobs: f32[N, K], of whole completions under the law that sampled them.
      rewards: name -> f32[N, K], NaN where missing.
      total: f32[N, K], their weighted sum; NaN where all are missing.
      texts: N lists of K completions; None where nothing was decoded.
      answers: N lists of K final answers, None for a completion without one; None where nothing was decoded.
      self_rewards: f32[N, K] of LaSeR, NaN where truncated; None where the policy gives none.
    """

    rows: list[dict[str, Any]]
    numbers: np.ndarray
    right: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray
    logprobs: np.ndarray
    rewards: dict[str, np.ndarray]
    total: np.ndarray
    texts: list[list[str]] | None
    answers: list[list[Hashable | None]] | None
    self_rewards: np.ndarray | None = None


def final_answer(completion: str, row: Mapping[str, Any]) -> Hashable | None:
    """What a completion votes for: its final answer as an exact number, or as text where it is none ("3/4" is "0.75")."""
    del row  # for answers that only mean something together with the question
    text = extract_answer(completion)
    number = None if text is None else parse_number(text)
    return text if number is None else number


def gather(
    generate: Callable[[PromptBatch], Rollout],
    batches: Sequence[PromptBatch],
    scorer: Scorer,
    tokenizer: data.Tokenizer | None = None,
    answer_of: AnswerOf = final_answer,
    verdict: str = "",
    self_reward: Callable[[Rollout], np.ndarray] | None = None,
) -> Evaluated:
    """Samples and judges.

    Args:
      generate: samples K completions for the prompts of a batch, with keys that do not change between evaluations: two
        policies are compared on the same noise.
      batches: from `data.eval_prompts`; rows of weight 0 count for nothing.
      scorer: its rewards.
      tokenizer: decodes the completions; without one there are no texts and no answers.
      answer_of: (completion, row) -> the final answer, equal and hashed alike where two answers are the same, or None.
      verdict: the reward whose value > 0.5 means right; empty: the scorer's verdict.
      self_reward: LaSeR's self-rewards f32[P, K] of a rollout, or None.
    """
    parts, rows, texts = [], [], []
    for batch in batches:
        rollout = generate(batch)
        rewards, _ = scorer(rollout, batch)
        mask, truncated, logprobs, rewards = jax.device_get(
            (rollout.mask, rollout.truncated, rollout.logprobs, rewards)
        )
        part = dict(
            numbers=batch.prompt_ids,
            lengths=mask.sum(axis=-1),
            truncated=truncated,
            logprobs=np.where(mask, logprobs, 0.0).sum(axis=-1),
            rewards=rewards,
        )
        if self_reward is not None:
            part["self_rewards"] = self_reward(rollout)
        real = batch.weight > 0
        parts.append(jax.tree.map(lambda x: x[real], part))
        rows += [row for row, counts in zip(batch.rows, real) if counts]
        if tokenizer is not None:
            tokens = jax.device_get(rollout.tokens)[real]
            ids = [[t[live].tolist() for t, live in zip(*group)] for group in zip(tokens, mask[real])]
            texts += [tokenizer.decode_batch(group) for group in ids]
    together = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    answers = [[answer_of(text, row) for text in group] for group, row in zip(texts, rows)]
    return Evaluated(
        rows=rows,
        right=together["rewards"][verdict or scorer.verdict] > 0.5,
        total=np.asarray(experience.total_reward(together["rewards"], scorer.weights)),
        texts=None if tokenizer is None else texts,
        answers=None if tokenizer is None else answers,
        **together,
    )


def evaluate(
    generate: Callable[[PromptBatch], Rollout],
    batches: Sequence[PromptBatch],
    scorer: Scorer,
    tokenizer: data.Tokenizer | None = None,
    *,
    answer_of: AnswerOf = final_answer,
    verdict: str = "",
    self_reward: Callable[[Rollout], np.ndarray] | None = None,
) -> dict[str, float]:
    """The evaluation of a run in progress; arguments as in `gather`.

    Returns:
      `eval/accuracy` (mean over all completions), `eval/pass@K`, `eval/mean_length` (tokens, end token included),
      `eval/clipped_ratio` (share without an end token), `eval/prompts`, with a tokenizer `eval/maj@K` (share of prompts whose
      most frequent answer is right), and what `method_metrics` adds.
    """
    found = gather(generate, batches, scorer, tokenizer, answer_of, verdict, self_reward)
    prompts, samples = found.right.shape
    majority = {}
    if found.answers is not None:
        majority[f"eval/maj@{samples}"] = _majority_accuracy(found.answers, found.right, samples)
    return {
        "eval/accuracy": float(found.right.mean()),
        f"eval/pass@{samples}": float(metrics.pass_at_k(samples, found.right.sum(axis=1), samples).mean()),
        "eval/mean_length": float(found.lengths.mean()),
        "eval/clipped_ratio": float(found.truncated.mean()),
        "eval/prompts": prompts,
        **majority,
        **{f"eval/{name}": value for name, value in method_metrics(found).items()},
    }


def method_metrics(found: Evaluated) -> dict[str, float]:
    """What the methods set out to improve, as far as the data and the rollout show it; {} where they show nothing.

    Where every row has a number `value` that is not negative (RLEV, arXiv 2510.20187): `h_accuracy`, `value_density`, accuracy
    on the fifth of the prompts of highest and of lowest value, and the mean length in each fifth, 1 being the lowest.
    Where completions are decoded (ProGRPO, arXiv 2602.05281): how many distinct final answers, and distinct completions, are
    right, per prompt.
    """
    out = self_reward_metrics(found)
    values = [row.get("value") for row in found.rows]
    if all(type(value) in (int, float) and 0 <= value < math.inf for value in values):
        accuracy, lengths = found.right.mean(axis=1), found.lengths.mean(axis=1)
        by_value = metrics.mean_by_quantile(accuracy, values)
        out |= {
            "h_accuracy": metrics.human_aligned_accuracy(accuracy, values),
            "value_density": metrics.value_density(accuracy, values, lengths),
            "high_value_accuracy": float(by_value[-1]),
            "low_value_accuracy": float(by_value[0]),
        }
        for fifth, length in enumerate(metrics.mean_by_quantile(lengths, values), start=1):
            out[f"mean_length_value_fifth_{fifth}"] = float(length)
    for name, things in (("answers", found.answers), ("completions", found.texts)):
        if things is not None:
            right = [{x for x, ok in zip(*group) if ok and x is not None} for group in zip(things, found.right)]
            out[f"distinct_right_{name}"] = float(np.mean([len(distinct) for distinct in right]))
    return out


def self_reward_metrics(found: Evaluated) -> dict[str, float]:
    """LaSeR, arXiv 2510.14943: how well self-rewards tell right from wrong, and what choosing by them gives; {} without them.

    `self_reward_f1` (harmonic mean of the accuracies on right and on wrong completions), `self_reward_calibration_error`,
    `best_of_K_accuracy` (the completion of highest self-reward) and, with answers, `weighted_vote`, to be compared with `maj@K`. A
    truncated completion has none: it is never chosen and its vote weighs 0.
    """
    if found.self_rewards is None:
        return {}
    known = ~np.isnan(found.self_rewards)
    scores = np.where(known, found.self_rewards, -np.inf)
    best = scores.argmax(axis=1)
    samples = found.right.shape[1]
    out = {
        "self_reward_f1": metrics.self_verification_f1(scores[known], found.right[known]),
        "self_reward_calibration_error": metrics.calibration_error(scores[known], found.right[known]),
        f"best_of_{samples}_accuracy": float(found.right[np.arange(len(best)), best].mean()),
    }
    if found.answers is not None:
        weights = np.clip(scores, 0.0, 1.0)
        chosen = [metrics.majority_vote(group, w) for group, w in zip(found.answers, weights)]
        won = [i is not None and ok[i] for i, ok in zip(chosen, found.right)]
        out["weighted_vote"] = float(np.mean(won))
    return out


def figures(found: Evaluated, temperature: float) -> dict[str, float]:
    """Every number of an evaluation whose completions are decoded; NaN where there is nothing to average.

    Returns:
      `accuracy` (the same as `avg@K`) with the 95 % interval `accuracy_low`, `accuracy_high` over prompts; for k = 1, 2, 4, ..., K
      the unbiased `pass@k` and, over the first k samples, `maj@k`, the share of prompts whose most frequent final answer is
      right; rewards; lengths, of right and of wrong completions too; `clipped_ratio`; `answered_ratio`, the share of completions
      with a final answer; `entropy` in nats a token, estimated from the sampled tokens (not at temperature 0); `prompts`; and
      what `method_metrics` adds.
    """
    right, lengths = found.right, found.lengths
    prompts, samples = right.shape
    low, high = metrics.bootstrap_interval(right.mean(axis=1))
    out = {
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        f"avg@{samples}": float(right.mean()),
        **{f"pass@{k}": float(metrics.pass_at_k(samples, right.sum(axis=1), k).mean()) for k in _powers(samples)},
        **{f"maj@{k}": _majority_accuracy(found.answers, right, k) for k in _powers(samples)},
        "reward": _mean(found.total),
        **{f"rewards/{name}": _mean(values) for name, values in found.rewards.items()},
        "mean_length": float(lengths.mean()),
        "mean_length_right": _mean(lengths[right]),
        "mean_length_wrong": _mean(lengths[~right]),
        "clipped_ratio": float(found.truncated.mean()),
        "answered_ratio": float(np.mean([[answer is not None for answer in group] for group in found.answers])),
    }
    if temperature > 0:
        out["entropy"] = float(-found.logprobs.sum(dtype=np.float64) / lengths.sum())
    return out | {"prompts": prompts} | method_metrics(found)


def _powers(samples: int) -> list[int]:
    """1, 2, 4, ... below `samples`, and `samples`."""
    return [2**i for i in range(samples.bit_length()) if 2**i < samples] + [samples]


def _majority_accuracy(answers: Sequence[Sequence[Hashable | None]], right: np.ndarray, k: int) -> float:
    chosen = [metrics.majority_vote(group[:k]) for group in answers]
    return float(np.mean([position is not None and ok[position] for position, ok in zip(chosen, right)]))


def _mean(x: np.ndarray) -> float:
    known = x[~np.isnan(x)]
    return float(known.mean()) if known.size else math.nan


# -- the command -----------------------------------------------------------------------------------

# Flags that are fields of the configuration by a shorter name.
FIELDS = {
    "--data": "data.eval",
    "--split": "data.eval_split",
    "--prompts": "eval.prompts",
    "--samples": "eval.samples",
    "--temperature": "eval.temperature",
}


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
      workdir: of the run.
      fields: configuration field -> text of its value.
      checkpoint: a number, or None for the newest.
      out: where the results go.
    """

    workdir: pathlib.Path
    fields: dict[str, str]
    checkpoint: int | None
    out: pathlib.Path


def parse_args(argv: Sequence[str]) -> Request:
    """Reads --flag=value and --flag value.

    Raises:
      ConfigError: an unknown flag, a flag without a value, or no --workdir.
    """
    known, argv, texts, fields = ["--workdir", "--checkpoint", "--out", *FIELDS], list(argv), {}, {}
    while argv:
        flag, equals, text = argv.pop(0).partition("=")
        if flag not in known and not flag.startswith("--config."):
            raise ConfigError(f"There is no flag {flag!r}.{methods.nearest(flag, known)}")
        if not equals and (not argv or argv[0].startswith("--")):
            raise ConfigError(f"{flag} needs a value: {flag}=...")
        texts[flag] = text if equals else argv.pop(0)
    for flag, text in texts.items():
        if flag in FIELDS or flag.startswith("--config."):
            fields[FIELDS.get(flag) or flag.removeprefix("--config.")] = text
    if not texts.get("--workdir"):
        raise ConfigError("--workdir=DIR is missing; name the work directory of a run.")
    number = texts.get("--checkpoint")
    if number is not None and not (number.isascii() and number.isdigit()):
        raise ConfigError(f"--checkpoint={number}: expected the number of a checkpoint.")
    workdir = pathlib.Path(texts["--workdir"]).expanduser().resolve()
    out = pathlib.Path(texts.get("--out") or workdir / "evaluation").expanduser().resolve()
    return Request(workdir, fields, None if number is None else int(number), out)


def load_config(workdir: pathlib.Path, fields: Mapping[str, str]) -> Config:
    """The configuration that a run began with, changed in `fields`, and checked.

    Raises:
      ConfigError: there is no run in this directory, or the configuration cannot run.
    """
    file = workdir / "config.json"
    if not file.is_file():
        missing = "it holds no config.json" if workdir.is_dir() else "there is no such directory"
        raise ConfigError(f"{workdir} is not the work directory of a run: {missing}.")
    try:
        config = config_lib.from_dict(json.loads(file.read_bytes())["config"])
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError) as e:
        raise ConfigError(f"{file} is not what a run writes ({type(e).__name__}: {e}); restore it.") from e
    for name, text in fields.items():
        config_lib.override(config, name, text)
    if "data.eval" in fields and "data.eval_split" not in fields:
        config.data.eval_split = "all" if config.data.eval.endswith(".jsonl") else "test"
    if config.eval.temperature == 0 and "eval.samples" not in fields:
        config.eval.samples = 1  # greedy completions are all alike
    config_lib.validate(config)
    if config.regression.tokenizer:
        raise ConfigError(
            f"The run in {workdir} predicts numbers, which this command does not judge; its held-out figures are the eval/... of "
            f"{workdir / 'metrics.jsonl'}."
        )
    return config


def checkpoint_numbers(workdir: pathlib.Path) -> list[int]:
    """The numbers of the complete checkpoints of a run, newest first."""
    directory = workdir / "checkpoints"
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True)


def load_weights(workdir: pathlib.Path, number: int | None, like) -> tuple[int, models.Params]:
    """The policy's weights out of a checkpoint, read without its optimizer; the directory is left as it is.

    Args:
      workdir: of the run.
      number: of the checkpoint; None for the newest that can be read.
      like: ShapeDtypeStructs with shardings.

    Returns:
      The number of the checkpoint, and the weights.

    Raises:
      ConfigError: there is no such checkpoint, it cannot be read, or its weights are of other shapes.
    """
    numbers = checkpoint_numbers(workdir)
    if not numbers:
        raise ConfigError(f"The run in {workdir} has no checkpoint yet; train it first.")
    if number is not None and number not in numbers:
        raise ConfigError(f"The run in {workdir} has no checkpoint {number}; it has {', '.join(map(str, numbers))}.")
    item = {"params": like}
    restore = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    shapes = lambda tree: jax.tree.map(lambda x: tuple(x.shape), tree)
    faults = []
    for candidate in numbers if number is None else [number]:
        directory = workdir / "checkpoints" / str(candidate)
        try:
            saved = ocp.PyTreeCheckpointHandler().metadata(directory / "default").tree["params"]
            if shapes(saved) != shapes(like):
                raise ValueError("its weights have other shapes than the configuration and the tokenizer ask for")
            with ocp.PyTreeCheckpointer() as checkpointer:
                params = checkpointer.restore(directory / "default", args=restore)["params"]
        except (ValueError, KeyError, OSError, TypeError) as e:
            faults.append(f"{directory} cannot be read: {str(e).partition(chr(10))[0]}")
            continue
        for fault in faults:
            _log.warning("Checkpoint %s", fault)
        return candidate, params
    raise ConfigError(f"Checkpoint {faults[0]}")


def run(request: Request, command: str) -> dict[str, float]:
    """Evaluates, prints the table and writes the results.

    Args:
      request: what to evaluate.
      command: the command line, for the record.

    Returns:
      The figures.

    Raises:
      ConfigError, RewardError, ValueError, OSError: a sentence that says what is wrong and where.
    """
    from jaxrl_reason import tasks  # which evaluates with this module's functions

    c, workdir = load_config(request.workdir, request.fields), request.workdir
    method = config_lib.make_method(c)
    mesh = sharding.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    source = data.load_source(
        c.data.eval or c.data.train,
        c.data.eval_split,
        data_dir=c.data.data_dir or None,
        columns=c.data.columns,
        on_bad_row=c.data.on_bad_row,
    )
    template = data.get_template(c.data.template)
    tokenizer = data.load_tokenizer(workdir / "tokenizer")
    # About as many completions at once as in training, which is known to fit.
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    at_once = min(c.prompts_per_step * c.group_size // c.eval.samples, c.eval.prompts, len(source))
    batches = data.eval_prompts(
        source,
        tokenizer,
        template,
        c.eval.prompts,
        batch_size=max(-(-at_once // ways), 1) * ways,
        max_prompt_length=c.max_prompt_length,
        on_long=c.data.on_long_prompt,
        add_bos=c.data.add_bos,
    )
    r = c.reward
    scorer = Scorer(
        r.functions,
        r.weights,
        r.verdict,
        r.max_failure_share,
        tokenizer=tokenizer,
        template=template,
        sharding=sharding.batch_sharding(mesh),
    )
    verdict = dict(zip(r.functions, scorer.names)).get(c.eval.verdict, scorer.verdict)
    for batch in batches:
        scorer.check(batch.rows)
    if LEARNED.keys() & set(r.functions):
        scorer = scorer.with_reward_model(_learned_reward(c, workdir, tokenizer, mesh))
    model = config_lib.model_config(c, tokenizer.vocab_size)
    programs = programs_lib.build(
        c,
        method,
        model,
        mesh,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        weights=scorer.weights,
        verdict=scorer.verdict,
        probe_token=tasks.probe_token(method, tokenizer),
    )
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        models.abstract_params(model),
        sharding.param_shardings(model, mesh),
    )
    number, params = load_weights(workdir, request.checkpoint, like)
    if request.out.exists() and not request.out.is_dir():
        raise ConfigError(f"--out={request.out} is a file; name a directory.")
    request.out.mkdir(parents=True, exist_ok=True)  # before the work that it is for

    console = rich.console.Console(highlight=False)
    with Progress(console, "evaluation", len(batches), enabled=c.log.progress) as bar:

        def generate(batch):
            rollout = jax.block_until_ready(programs.generate_eval(params, batch))
            bar.advance("")
            return rollout

        found = gather(
            generate,
            batches,
            scorer,
            tokenizer,
            scorer.answer_of(verdict) or final_answer,
            verdict,
            tasks.self_reward_of(method, _self_reward_constant(workdir)),
        )
    numbers = figures(found, c.eval.temperature)

    step = number - c.supervised.steps
    phase = f"RL step {step}" if step >= 0 else f"supervised step {number}"
    title = f"{workdir.name}, {phase}, on {source.name} ({c.data.eval_split})"
    record = {
        "command": command,
        "workdir": str(workdir),
        "checkpoint": number,
        "phase": phase,
        "data": {"name": source.name, "split": c.data.eval_split, "fingerprint": source.fingerprint},
        "prompts": len(found.rows),
        "samples": c.eval.samples,
        "temperature": c.eval.temperature,
        "max_completion_length": c.max_completion_length,
        "seed": c.seed,
        "rewards": dict(scorer.weights),
        "verdict": verdict,
        "metrics": {name: value if math.isfinite(value) else None for name, value in numbers.items()},
    }
    _write(request.out / "completions.jsonl", "".join(_lines(found, template)))
    plot(found, numbers, request.out / "evaluation.png", title=title)
    writers.write_json(
        request.out / "evaluation.json", record
    )  # last: where it is, the others are of the same evaluation
    for table in tables(numbers, title):
        console.print(table)
    console.print(f"Written: {request.out}/evaluation.json, evaluation.png, completions.jsonl", soft_wrap=True)
    return numbers


def _learned_reward(
    c: Config, workdir: pathlib.Path, tokenizer: data.Tokenizer, mesh: jax.sharding.Mesh
) -> Callable[[Rollout], jax.Array]:
    """Scores of the reward model that the run learnt from."""
    directory = pathlib.Path(c.reward_model.path).expanduser() if c.reward_model.path else workdir / "reward_model"
    digest = reward_training.tokenizer_digest(tokenizer)
    shape, params = reward_training.load_reward_model(directory, digest, mesh=mesh)
    return functools.partial(jax.jit(functools.partial(reward_model.group_scores, shape)), params)


def _self_reward_constant(workdir: pathlib.Path) -> float | None:
    """LaSeR's c_ref of the run; None where it has measured none."""
    file = workdir / "self_reward.json"
    try:
        return float(json.loads(file.read_bytes())["c_ref"]) if file.exists() else None
    except (ValueError, TypeError, KeyError) as e:
        raise ConfigError(f"{file} is not what a run writes ({type(e).__name__}: {e}); restore it.") from e


def _lines(found: Evaluated, template: data.PromptTemplate):
    """The lines of completions.jsonl, one a completion."""
    number = lambda x: None if math.isnan(x) else float(x)
    for n, k in np.ndindex(*found.right.shape):
        answer = found.answers[n][k]
        record = {
            "row": int(found.numbers[n]),
            "sample": k,
            "prompt": template.render_prompt(found.rows[n]),
            "completion": found.texts[n][k],
            "answer": None if answer is None else str(answer),
            "right": bool(found.right[n, k]),
            "rewards": {name: number(values[n, k]) for name, values in found.rewards.items()},
            "total": number(found.total[n, k]),
            "length": int(found.lengths[n, k]),
            "truncated": bool(found.truncated[n, k]),
        }
        if found.self_rewards is not None:
            record["self_reward"] = number(found.self_rewards[n, k])
        yield json.dumps(record, ensure_ascii=False) + "\n"


def _write(path: pathlib.Path, text: str) -> None:
    """Complete or absent. A character that is none (half of a surrogate pair) is written as its escape."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8", errors="backslashreplace")
    scratch.replace(path)


def tables(numbers: Mapping[str, float], title: str) -> list[rich.table.Table]:
    """What is shown on the screen: a row a figure, and pass@k beside maj@k. Shares are in percent, NaN is a dash."""

    def show(name: str, value: float) -> str:
        if math.isnan(value):
            return "-"
        if isinstance(value, int):
            return str(value)
        if "@" in name or name.endswith(("accuracy", "_ratio", "_vote")):
            return f"{100 * value:.1f} %"
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"

    main = rich.table.Table("", title=title)
    for heading in ("", "95 % interval"):
        main.add_column(heading, justify="right")
    curve = rich.table.Table("k", "pass@k", "maj@k")
    for name, value in numbers.items():
        kind, at, k = name.partition("@")
        if kind == "pass":
            curve.add_row(k, show(name, value), show(name, numbers[f"maj@{k}"]))
        elif name == "accuracy":
            interval = (100 * numbers[f"accuracy_{end}"] for end in ("low", "high"))
            main.add_row(name, show(name, value), "{:.1f} to {:.1f} %".format(*interval))
        elif kind != "maj" and name not in ("accuracy_low", "accuracy_high"):
            main.add_row(name.replace("_", " "), show(name, value), "")
    return [main, curve]


def plot(found: Evaluated, numbers: Mapping[str, float], path: pathlib.Path, *, title: str) -> None:
    """Draws pass@k and maj@k over k, and beside them how many prompts are answered right how often."""
    samples = found.right.shape[1]
    figure = Figure(figsize=(10, 4), layout="constrained")  # not pyplot: no global state, no display
    figure.suptitle(title)
    curves, histogram = figure.subplots(1, 2)
    for kind in ("pass", "maj"):
        points = [(k, 100 * numbers[f"{kind}@{k}"]) for k in _powers(samples)]
        curves.plot(*zip(*points), "o-", label=f"{kind}@k")
    curves.axhspan(
        *(100 * numbers[f"accuracy_{end}"] for end in ("low", "high")),
        alpha=0.2,
        color="tab:gray",
        label="accuracy, 95 % interval",
    )
    curves.set_xscale("log", base=2)
    curves.set_xticks(_powers(samples), [str(k) for k in _powers(samples)])
    curves.set_xlabel("k, completions a prompt")
    curves.set_ylabel("%")
    curves.legend(loc="best")
    counts = np.bincount(found.right.sum(axis=1), minlength=samples + 1)
    histogram.bar(100 * np.arange(samples + 1) / samples, counts, width=80 / (samples + 1))
    histogram.set_xlabel(f"accuracy of a prompt over {samples} completions (%)")
    histogram.set_ylabel("prompts")
    for axis in (curves, histogram):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    try:
        run(parse_args(argv), shlex.join(["python", "-m", "jaxrl_reason.evaluate", *argv]))
    except (ConfigError, RewardError, ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
