"""The training loop: python -m jaxrl_reason.train --config=configs/quickstart.py --workdir=DIR

    data -> (supervised start) -> [ rollout -> rewards -> advantages -> update ] x steps -> table, picture

What stands in brackets is compiled; arrays stay on the device between its parts. Only host rewards cross:
token ids out, rewards in. The same command goes on from the newest checkpoint.
"""

import contextlib
import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from jaxrl_reason import checkpoints
from jaxrl_reason import config as config_lib
from jaxrl_reason import data
from jaxrl_reason import experience
from jaxrl_reason import models
from jaxrl_reason import programs as programs_lib
from jaxrl_reason import writers
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.evaluate import evaluate
from jaxrl_reason.learner import TrainState
from jaxrl_reason.methods import Method
from jaxrl_reason.models import sharding
from jaxrl_reason.progress import Clock, Progress
from jaxrl_reason.rewards import RewardError
from jaxrl_reason.rewards.scorer import Scorer
from jaxrl_reason.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a run needs before its first step; made by `setup`, which refuses what cannot run."""

    config: Config
    method: Method
    model: models.ModelConfig
    work: Workdir
    tokenizer: data.Tokenizer
    prompts: data.PromptStream
    held_out: list[data.PromptBatch]
    solutions: data.SolutionStream | None
    scorer: Scorer
    programs: programs_lib.Programs


def setup(config: Config, workdir: str | pathlib.Path) -> Run:
    """Checks the configuration, opens the data and the work directory; compiles nothing.

    Raises:
      ConfigError, RewardError, ValueError, OSError: a sentence that says what is wrong and where.
    """
    c, method = config, config_lib.validate(config)
    mesh = sharding.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    source = lambda name, split: data.load_source(
        name, split, data_dir=c.data.data_dir or None, columns=c.data.columns, on_bad_row=c.data.on_bad_row
    )
    train_rows = source(c.data.train, c.data.train_split)
    eval_rows = source(c.data.eval or c.data.train, c.data.eval_split)
    template = data.get_template(c.data.template)

    def make_tokenizer():
        if c.data.tokenizer:
            return data.load_tokenizer(c.data.tokenizer)
        rows = train_rows.read(range(min(len(train_rows), 2000)))
        texts = [
            template.render_prompt(row) + (template.render_solution(row) if "solution" in row else "") for row in rows
        ]
        return data.train_tokenizer(texts, c.data.vocab_size)

    work = Workdir(workdir, c, f"{train_rows.fingerprint}/{eval_rows.fingerprint}")
    tokenizer = work.tokenizer(make_tokenizer)
    texts = dict(max_prompt_length=c.max_prompt_length, on_long=c.data.on_long_prompt, add_bos=c.data.add_bos)
    scorer = Scorer(
        c.reward.functions,
        c.reward.weights,
        c.reward.verdict,
        c.reward.max_failure_share,
        tokenizer=tokenizer,
        template=template,
        sharding=sharding.batch_sharding(mesh),
    )
    model = config_lib.model_config(c, tokenizer.vocab_size)
    solutions = None
    if c.supervised.steps:
        solutions = data.SolutionStream(
            train_rows,
            tokenizer,
            template,
            batch_size=c.supervised.batch_size,
            seed=c.seed,
            max_completion_length=c.max_completion_length,
            **texts,
        )
    return Run(
        config=c,
        method=method,
        model=model,
        work=work,
        tokenizer=tokenizer,
        scorer=scorer,
        solutions=solutions,
        prompts=data.PromptStream(train_rows, tokenizer, template, batch_size=c.prompts_per_step, seed=c.seed, **texts),
        held_out=data.eval_prompts(
            eval_rows, tokenizer, template, c.eval.prompts, batch_size=c.prompts_per_step, **texts
        ),
        programs=programs_lib.build(
            c,
            method,
            model,
            mesh,
            eos_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
            weights=scorer.weights,
            verdict=scorer.verdict,
        ),
    )


def supervised(
    run: Run, state: TrainState, saver: checkpoints.Checkpoints, console: rich.console.Console
) -> TrainState:
    """The supervised phase: cross-entropy on worked solutions, with checkpoints and metrics of its own."""
    c, begin = run.config, int(state.step)
    with contextlib.ExitStack() as stack:
        metrics_file = stack.enter_context(
            writers.MetricsWriter(run.work.path / "supervised", c.log.tensorboard, resume_step=begin or -1)
        )
        bar = stack.enter_context(Progress(console, "supervised", c.supervised.steps, begin, enabled=c.log.progress))
        for step in range(begin, c.supervised.steps):
            state, metrics = run.programs.supervised_update(state, run.solutions.batch(step))
            metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
            metrics_file.write(step + 1, metrics)
            bar.advance(f"loss {metrics['sft/loss']:.3f}")
            if (step + 1) % c.checkpoint.every == 0 and step + 1 < c.supervised.steps:
                saver.save(step + 1, state)
    return state


def collect(run: Run, state: TrainState, clock: Clock) -> tuple[experience.Groups, dict[str, float], int]:
    """One batch of scored groups; with dynamic sampling, of groups that inform, drawn from several prompt batches.

    Returns:
      The groups, metrics of the host, and the number of prompt batches drawn since the run began.
    """

    def draw(i):
        batch = run.prompts.batch(i)
        with clock("rollout"):
            rollout = jax.block_until_ready(run.programs.generate(state.params, batch, state.step))
        with clock("reward"):
            rewards, metrics = jax.block_until_ready(run.scorer(rollout, batch))
        return experience.Groups(rollout, rewards), metrics

    first = int(jax.device_get(state.batches))
    groups, metrics = draw(first)
    if not run.method.dynamic_sampling:
        return groups, metrics, first + 1
    buffer, filled, shares = (
        _empty_like(run.programs.sharding)(groups),
        jax.device_put(np.int32(0), state.batches.sharding),
        [],
    )
    while True:
        buffer, filled, share = run.programs.fill(buffer, filled, groups)
        count, share = jax.device_get((filled, share))
        shares.append(float(share))
        if count == run.config.prompts_per_step or len(shares) == run.config.sampling.max_batches:
            break
        groups, metrics = draw(first + len(shares))
    metrics |= {
        "dynamic_sampling/batches": len(shares),
        "dynamic_sampling/groups": int(count),
        "dynamic_sampling/kept_ratio": sum(shares) / len(shares),
    }
    return buffer, metrics, first + len(shares)


@functools.cache
def _empty_like(sharding: jax.sharding.Sharding):
    """A compiled `experience.empty_like`. A copy: `fill` donates its buffer, which must share no array with the groups."""
    return jax.jit(lambda groups: jax.tree.map(jnp.copy, experience.empty_like(groups)), out_shardings=sharding)


_trained = jax.jit(experience.trained, static_argnums=1)  # uncompiled, slicing would carry its borders to the device


def train_step(run: Run, state: TrainState, reference, clock: Clock):
    """Rollout, rewards, advantages, update: one step.

    Args:
      run: what to run.
      state: donated.
      reference: weights of the reference policy, or None.
      clock: measures the parts.

    Returns:
      (state, groups, experience, metrics).
    """
    programs, u = run.programs, run.config.update
    groups, metrics, batches = collect(run, state, clock)
    with clock("update"):
        rollout = _trained(groups.rollout, run.method)
        old_logprobs = ref_logprobs = kl = None
        if u.epochs * u.minibatches > 1:
            # The float32 sampler agrees with the trainer to 1e-5; a bfloat16 rollout is scored again by the trainer's forward.
            exact = run.model.compute_dtype == run.model.param_dtype == "float32"
            old_logprobs = rollout.logprobs if exact else programs.score(state.params, rollout)
        if reference is not None:
            ref_logprobs = programs.score(reference, rollout)
            kl = experience.log_ratio(rollout, ref_logprobs)
        batch, advantage_state, prepared = programs.prepare(groups, state.advantage_state, kl)
        batch = batch._replace(old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
        state = state._replace(
            advantage_state=advantage_state, batches=jax.device_put(np.int32(batches), state.batches.sharding)
        )
        state, updated = jax.block_until_ready(programs.update(state, batch))
    metrics |= {k: float(v) for k, v in jax.device_get(prepared | updated).items()}
    return state, groups, batch, metrics


def train(run: Run) -> dict[str, dict[str, float]]:
    """Runs to the end, from wherever the work directory stands.

    Returns:
      The first and the last evaluation: {"before": {...}, "after": {...}}; empty where the run was finished already.
    """
    c, programs, work = run.config, run.programs, run.work
    console = rich.console.Console(highlight=False)
    saver = checkpoints.Checkpoints(work.path / "checkpoints", c.checkpoint.keep)
    state = programs.init()
    number, state = saver.restore(state) or (None, state)
    if number is not None:
        if number >= c.supervised.steps + c.steps:
            console.print(
                f"This run is finished: all {c.steps} steps are done. Raise config.steps, or choose another --workdir.",
                soft_wrap=True,
            )
            return {}
        console.print(f"Going on from {saver.directory / str(number)}.", soft_wrap=True)
    if number is None or number < c.supervised.steps:
        if run.solutions:
            state = supervised(run, state, saver, console)
        state = programs.restart(state.params)
        saver.save(c.supervised.steps, state)

    begin = int(state.step)
    reference = reference_policy(run, state) if needs_reference(run) else None
    evaluation = lambda state: evaluate(
        functools.partial(programs.generate_eval, state.params), run.held_out, run.scorer
    )
    with contextlib.ExitStack() as stack:
        resume = dict(resume_step=begin or -1)
        metrics_file = stack.enter_context(writers.MetricsWriter(work.path, c.log.tensorboard, **resume))
        samples_file = stack.enter_context(writers.SampleTable(work.path, **resume))
        if begin == 0 and c.eval.every:
            metrics_file.write(0, evaluation(state))
        bar = stack.enter_context(Progress(console, "RL", c.steps, begin, enabled=c.log.progress))
        for step in range(begin, c.steps):
            clock, done, last = Clock(), step + 1, step + 1 == c.steps
            with jax.transfer_guard("disallow"):  # an unintended crossing is an error
                state, groups, batch, metrics = train_step(run, state, reference, clock)
            metrics["learning_rate"] = programs.learning_rate(step)
            metrics |= clock.metrics(float(batch.mask.sum()))
            if c.eval.every and (done % c.eval.every == 0 or last):
                metrics |= evaluation(state)
            metrics_file.write(done, metrics)
            if c.log.samples_every and (done % c.log.samples_every == 0 or last):
                write_samples(run, samples_file, done, groups, batch)
            if done % c.checkpoint.every == 0 or last:
                saver.save(c.supervised.steps + done, state)
            bar.advance(f"reward {metrics['reward']:.3f}")
    saver.close()
    return report(run, console)


def needs_reference(run: Run) -> bool:
    return run.config.update.kl_coefficient > 0 or "kl" in run.method.signals


def reference_policy(run: Run, state: TrainState):
    """The weights that RL began with, kept beside the checkpoints so that a resumed run finds them."""
    directory = run.work.path / "reference"
    if int(state.step) == 0:
        checkpoints.save_params(directory, state.params)
    return checkpoints.load_params(directory, state.params)


def write_samples(run: Run, table: writers.SampleTable, step: int, groups: experience.Groups, batch) -> None:
    """A few completions with their rewards and advantages, for people to read."""
    count = -(-run.config.log.samples // run.config.group_size)  # whole groups
    rollout, groups, advantages, mask = jax.device_get(
        jax.tree.map(lambda x: x[:count], (batch.rollout, groups, batch.advantages, batch.mask))
    )
    if advantages.ndim == 3:  # per token: their mean over the completion
        advantages = (advantages * mask).sum(-1) / np.maximum(mask.sum(-1), 1)
    G = rollout.tokens.shape[1]
    rewards = {name: r[:, :G] for name, r in groups.rewards.items()}
    texts = [
        run.tokenizer.decode_batch([t[m].tolist() for t, m in zip(*group)])
        for group in zip(rollout.tokens, rollout.mask)
    ]
    prompts = run.tokenizer.decode_batch([t[m].tolist() for t, m in zip(rollout.prompt_tokens, rollout.prompt_mask)])
    total = np.asarray(experience.total_reward(rewards, run.scorer.weights))
    table.write(
        step,
        prompts,
        texts,
        rewards=rewards,
        total=total,
        advantages=advantages,
        lengths=rollout.mask.sum(-1),
        truncated=rollout.truncated,
    )


def report(run: Run, console: rich.console.Console) -> dict[str, dict[str, float]]:
    """Prints the table of before and after, draws the learning curve; returns both evaluations."""
    metrics_path, picture = run.work.path / "metrics.jsonl", run.work.path / "learning_curve.png"
    evaluations = [
        {k: v for k, v in line.items() if k.startswith("eval/") and k != "eval/prompts"}
        for line in writers.read_metrics(metrics_path)
        if "eval/accuracy" in line
    ]
    writers.plot_learning_curve(metrics_path, picture, title=run.work.path.name)
    if evaluations:
        console.print(writers.summary_table(evaluations[0], evaluations[-1]))
    console.print(f"Learning curve: {picture}", soft_wrap=True)
    return {"before": evaluations[0], "after": evaluations[-1]} if evaluations else {}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or "--help" in argv or "-h" in argv:
        print(
            f"{__doc__}\nAny field of the configuration can be set as --config.section.field=value. Defaults:\n\n{config_lib.help_text()}"
        )
        return 0
    try:
        run = setup(*config_lib.parse_args(argv))
    except (ConfigError, RewardError, ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    try:
        train(run)
    except RewardError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
