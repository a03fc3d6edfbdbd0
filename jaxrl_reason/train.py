"""Trains a policy by reinforcement learning on groups of completions.

    data -> (supervised start) -> [ rollout -> rewards
        -> advantages -> update ] x steps -> table, picture

The parts in brackets are compiled, and arrays stay on the device between them. Only host rewards cross: token ids out, rewards in. The same command
continues from the newest checkpoint.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import pathlib
import sys
from typing import Any, cast, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from jaxrl_reason import config as config_lib
from jaxrl_reason import models, tasks
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data import Tokenizer
from jaxrl_reason.methods import Method
from jaxrl_reason.rewards import model_training, RewardError
from jaxrl_reason.rewards.scorer import LEARNED
from jaxrl_reason.rl import dynamic_sampling, experience, hosts
from jaxrl_reason.rl import programs as programs_lib
from jaxrl_reason.rl.ahead import compile_ahead
from jaxrl_reason.rl.devices import check_waves
from jaxrl_reason.rl.types import Groups, LogProbs, Rollout, Step, TrainState
from jaxrl_reason.runs import checkpoints, command, compilation_cache, eval_settings, pictures, trackers
from jaxrl_reason.runs.loop import Loop, run_loop
from jaxrl_reason.runs.metrics_file import drop_later, HeldOutTable, SampleTable
from jaxrl_reason.runs.profile import Profile
from jaxrl_reason.runs.progress import Clock
from jaxrl_reason.runs.records import observer, save_for_replay
from jaxrl_reason.runs.report import Report
from jaxrl_reason.runs.watch import mismatch_limit
from jaxrl_reason.runs.workdir import write_recipe
from jaxrl_reason.tasks import self_reward, summary, supervised, TrainingTask


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that a run needs before its first step. Made by `setup`, which checks all of it."""

    config: Config
    method: Method
    task: TrainingTask  # data, rewards and evaluation
    programs: programs_lib.Programs  # the compiled functions
    reward_phase: model_training.Phase | None = None  # how to get the learned reward model

    work = property(lambda self: self.task.work)
    model = property(lambda self: self.task.model)
    tokenizer = property(lambda self: self.task.tokenizer)
    prompts = property(lambda self: self.task.prompts)
    solutions = property(lambda self: self.task.solutions)
    held_out = property(lambda self: self.task.held_out)
    scorer = property(lambda self: self.task.scorer)


def setup(
    config: Config,
    workdir: str | pathlib.Path,
    *,
    begin: bool = True,
    check: Callable[[Run], None] = lambda _: None,
) -> Run:
    """Checks the configuration, the data, the rewards and the work directory, then writes to the directory. Compiles nothing.

    On several processes the first one sets up first, and the others find the files it has prepared. With begin=False,
    the directory of a run that has begun is only read. Before anything is written, `check` may refuse the run by what it
    raises.

    Raises:
      ConfigError, RewardError, ValueError, OSError: a sentence that names the fault and its place.
    """
    compilation_cache.enable(config.compilation_cache)
    make = lambda: _setup(config, workdir, begin, check)
    turns = [hosts.agree(lambda: make() if hosts.is_first() else None, ConfigError, *_REFUSALS)]
    with warnings.catch_warnings():
        if not hosts.is_first():
            warnings.simplefilter("ignore")  # the first process has printed them
        turns += [hosts.agree(lambda: None if hosts.is_first() else make(), ConfigError, *_REFUSALS)]
    return next(run for run in turns if run)


_REFUSALS = (RewardError, ValueError, OSError)


def _setup(config: Config, workdir: str | pathlib.Path, begin: bool, check: Callable[[Run], None]) -> Run:
    method = config_lib.validate(config)
    if hosts.is_first():
        trackers.check(config)
    mesh = programs_lib.make_mesh(config)
    task = tasks.open_task(config, method, mesh, workdir)
    if not task.work.has_begun:
        check_waves(task.model, config, mesh)
    programs = tasks.build_programs(config, method, task, mesh)
    reward_phase = None
    if LEARNED.keys() & set(config.reward.functions):
        reward_phase = model_training.setup(
            config, model=task.model, work=task.work, tokenizer=cast(Tokenizer, task.tokenizer), mesh=mesh
        )
    run = Run(config, method, task, programs, reward_phase)
    check(run)
    # The files of a finished run keep the settings of the steps that were done.
    is_finished = task.work.is_finished(config.supervised.steps + config.steps)
    if hosts.is_first() and begin and not is_finished:
        with task.work.lock():
            task.work.begin(task.tokenizer, task.pretrained)
            if reward_phase:
                model_training.begin(reward_phase, task.work.path)
    else:
        task.work.check_shared()
    return run


class Collected(NamedTuple):
    """One batch of scored groups."""

    groups: Groups  # with dynamic sampling the informative groups of several prompt batches
    metrics: dict[str, float]  # of the host, over everything that was sampled
    data_position: int  # prompt batches drawn since the run began


def collect(run: Run, state: TrainState, weights: models.Params, clock: Clock) -> Collected:
    """Samples and scores one batch of groups with the policy's `weights` from `Programs.rollout_weights`."""
    first = int(jax.device_get(state.data_position))
    sample = lambda i: _sample_and_score(run, first + i, state.step, weights, clock)
    if run.method.dynamic_sampling:
        groups, metrics, drawn = dynamic_sampling.collect(run.programs, sample, run.config.sampling.max_batches)
        return Collected(groups, metrics, first + drawn)
    return Collected(*sample(0), first + 1)


def _sample_and_score(
    run: Run, number: int, step: jax.Array, weights: models.Params, clock: Clock
) -> tuple[Groups, dict[str, float]]:
    """Samples completions for prompt batch `number` and scores them."""
    batch, programs = run.prompts.batch(number), run.programs
    chunks = batch.split(run.config.sampling.parts)
    with clock("rollout"):
        # All chunks are dispatched; the host scores each one while the devices sample the next ones.
        rollouts = [programs.generate(weights, chunk, step) for chunk in chunks]
        scorings = [run.scorer.begin(*chunk) for chunk in zip(rollouts[:-1], chunks)]
        jax.block_until_ready(rollouts)
    with clock("reward"):
        scorings.append(run.scorer.begin(rollouts[-1], chunks[-1]))
        scored = jax.block_until_ready([finish() for finish in scorings])
    rewards, metrics = scored[0][0], dynamic_sampling.mean_metrics([metrics for _, metrics in scored])
    rollout = rollouts[0]
    if len(chunks) > 1:
        rollout, rewards = programs.join(*((r, rewards) for r, (rewards, _) in zip(rollouts, scored)))
    clock.count("rollout", int(jax.device_get(_count(rollout.mask))))
    if run.method.nonnegative_rewards:
        least = float(jax.device_get(_least_total(rewards, tuple(run.scorer.weights.items()))))
        if least < 0:
            raise RewardError(
                f"A reward of step {int(jax.device_get(step)) + 1} is {least:.3g}, and config.method.name {run.config.method['name']!r} "
                "refuses negative rewards; let the reward functions return values from 0 to 1, or choose another method."
            )
    columns = programs.place(
        {name: batch.columns[name] for name in programs.needs.columns}, run.config.prompts_per_step
    )
    return Groups(rollout, rewards, columns), metrics


_count = jax.jit(jnp.sum)
_least_total = jax.jit(
    lambda rewards, weights: jnp.nanmin(experience.total_reward(rewards, dict(weights)), initial=jnp.inf),
    static_argnums=1,
)
_drop_greedy = jax.jit(experience.drop_greedy, static_argnums=1)  # jit: else slicing moves its bounds to the device


def _floats(metrics: dict[str, jax.Array]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(metrics).items()}


def train_step(
    run: Run, state: TrainState, reference: models.Params | None, clock: Clock, c_ref: jax.Array | None = None
) -> Step:
    """Runs one step: rollout, rewards, advantages, update.

    Args:
      run: what to run.
      state: donated.
      reference: the reference policy's values of the weights that the run trains, or None.
      clock: measures the parts.
      c_ref: f32 scalar of LaSeR's self-reward, or None.
    """
    programs = run.programs
    weights = rollout_weights(run, state.params, clock)
    groups, metrics, position = collect(run, state, weights, clock)
    del weights  # if they are a copy, the update needs the memory
    with clock("update"):
        rollout = _drop_greedy(groups.rollout, run.method)
        old, ref = logprobs_again(run, state, reference, rollout)
        kl = None
        if ref is not None and programs.needs.kl:
            kl = experience.log_ratio(rollout if old is None else rollout._replace(logprobs=old), ref.logprobs)
        if ref is not None and c_ref is None:
            c_ref = ref.probe_logprobs
        batch, advantage_state, prepared = programs.make_experience(groups, state.advantage_state, kl, c_ref)
        batch = batch._replace(old_logprobs=old, ref_logprobs=None if ref is None or kl is None else ref.logprobs)
        state = state._replace(
            advantage_state=advantage_state, data_position=hosts.put(np.int32(position), state.data_position.sharding)
        )
        state, updated, mismatch = jax.block_until_ready(programs.update(state, batch))
    return Step(state, groups, batch, mismatch, metrics | _floats(prepared | updated))


def logprobs_again(
    run: Run, state: TrainState, reference: models.Params | None, rollout: Rollout
) -> tuple[jax.Array | None, LogProbs | None]:
    """Returns the log-probabilities before the update, and those under the reference policy; None if the step does not need them."""
    old = ref = None
    if run.programs.needs.old_logprobs:
        exact = run.programs.needs.exact_sampler
        old = rollout.logprobs if exact else run.programs.compute_logprobs(state.params, rollout).logprobs
    if reference is not None:
        ref = run.programs.compute_logprobs(models.lora.join(reference, state.frozen), rollout)
    return old, ref


def rollout_weights(run: Run, params: models.Params, clock: Clock) -> models.Params:
    """Returns the policy's weights as rollouts read them; the clock counts the seconds if they have to be moved."""
    if not run.programs.moves_weights:
        return params
    with clock("reshard"):
        return jax.block_until_ready(run.programs.rollout_weights(params))


def train(run: Run) -> dict[str, dict[str, float]]:
    """Runs to the end, from the newest checkpoint of the work directory.

    Returns:
      The result of `summary.report`; empty if the run had ended and reported before.

    Raises:
      Preempted: SIGTERM came; the last step is saved.
      ConfigError: another process trains in the work directory.
      RewardError, CheckpointError, MetricsError, OSError: a sentence that names the fault and its place.
    """
    with hosts.preemption() as should_stop, locked(run):
        return _train(run, should_stop)


def locked(run: Run) -> contextlib.AbstractContextManager:
    """Takes the lock of the run's work directory. Raises ConfigError on all processes if another process holds it."""
    return hosts.agree(run.work.lock, ConfigError, OSError)


def _train(run: Run, should_stop: Callable[[], bool]) -> dict[str, dict[str, float]]:
    c, work, needs = run.config, run.work, run.programs.needs
    console = rich.console.Console(highlight=False, markup=False, emoji=False, quiet=not hosts.is_first())
    say = functools.partial(console.print, soft_wrap=True)
    if compiled := compilation_cache.directory():
        say(f"Compiled programs are kept in {compiled}.")
    saver = checkpoints.Checkpoints(work.path / "checkpoints", c.checkpoint.keep)
    number, state = saver.restore(run.programs.abstract_state) or (None, None)
    if number is not None:
        # Without RL steps, the evaluation comes after the last checkpoint.
        if number >= c.supervised.steps + c.steps and (c.steps or summary.picture_of(work.path).exists()):
            done = number - c.supervised.steps
            what = f"all {c.steps} steps are done" if done == c.steps else f"{done} steps are done, of {c.steps}"
            say(f"This run is finished: {what}. Raise config.steps, or choose another --workdir.")
            if hosts.is_first():
                drop_later(work.path, done)
            return {} if summary.picture_of(work.path).exists() else summary.report(work.path, c, run.method, console)
        say(f"Going on from {saver.directory / str(number)}.")
    if hosts.is_first():
        summary.picture_of(work.path).unlink(missing_ok=True)  # the picture of a shorter run
    run, state = _before_rl(run, number, state, saver, console, should_stop)
    reference = checkpoints.load_params(work.path / "start", state.trained) if needs.reference else None
    weights = lambda: rollout_weights(run, state.params, Clock())
    c_ref = self_reward.constant(run.method, run.programs, run.prompts, work, state, weights)
    reinforce(run, state, reference, c_ref, saver, console, should_stop)
    saver.close()
    return summary.report(work.path, c, run.method, console)


def _before_rl(
    run: Run,
    number: int | None,
    state: TrainState | None,
    saver: checkpoints.Checkpoints,
    console: rich.console.Console,
    should_stop: Callable[[], bool],
) -> tuple[Run, TrainState]:
    """Runs the phases before RL, as far as they are not done at checkpoint `number` with its `state`, or None for both.

    They are the supervised start, its weights in start/ if they are kept, and the learned reward model. Returns the run
    with its reward model, and the state.
    """
    c, work = run.config, run.work
    if trimmed := run.task.trimmed_lengths(c):
        console.print(trimmed, soft_wrap=True)
    state = supervised.first_state(run.task, run.programs) if state is None else state
    supervises = c.supervised.steps > (number or 0)
    compile_ahead(
        run.programs,
        prompts=run.prompts.batch(0),
        solutions=run.solutions.batch(0) if supervises else None,
        held_out=run.held_out[0] if c.eval.every else None,
        rewards=run.scorer.weights,
    )
    if number is None or supervises:
        if c.supervised.steps:
            state = supervised.train(run.task, run.programs, state, saver, console, should_stop)
            params = state.params
            del state  # frees the optimizer's state before another one is made
            state = run.programs.restart(params)
        saver.save(c.supervised.steps, state)
    if int(state.step) == 0 and (run.programs.needs.reference or c.checkpoint.keep_start):
        checkpoints.save_params(work.path / "start", state.trained)
    if run.reward_phase:
        merged = lambda: models.lora.merge(run.model, state.params)[1]  # a variable would keep the copy during RL
        score = model_training.scorer(run.reward_phase, merged(), console, should_stop)
        run = dataclasses.replace(run, task=run.task.with_reward_model(score))
    return run, state


def make_start(run: Run) -> None:
    """Runs the phases before RL only, from the newest checkpoint, and keeps their results for other runs.

    The policy's weights are in start/ of the work directory, because the run has config.checkpoint.keep_start; a learned
    reward model is in reward_model/. Raises what `train` raises.
    """
    with hosts.preemption() as should_stop, locked(run):
        console = rich.console.Console(highlight=False, markup=False, emoji=False, quiet=not hosts.is_first())
        saver = checkpoints.Checkpoints(run.work.path / "checkpoints", run.config.checkpoint.keep)
        number, state = saver.restore(run.programs.abstract_state) or (None, None)
        _before_rl(run, number, state, saver, console, should_stop)
        saver.close()


def reinforce(
    run: Run,
    state: TrainState,
    reference: models.Params | None,
    c_ref: jax.Array | None,
    saver: checkpoints.Checkpoints,
    console: rich.console.Console,
    should_stop: Callable[[], bool],
) -> TrainState:
    """Runs the RL phase: the loop around `train_step`, with evaluations, samples and warnings."""
    c, programs, work, begin = run.config, run.programs, run.work, int(state.step)

    def step(i: int, state: TrainState, clock: Clock):
        learning_rate = programs.learning_rate(state)  # before the step donates the state
        with profile.step(i + 1), jax.transfer_guard("disallow"):  # an unintended transfer is an error
            done = train_step(run, state, reference, clock, c_ref)
        clock.count("update", int(_count(done.batch.mask)))
        return done.state, done.metrics | {"learning_rate": learning_rate}, done

    def evaluate(done: int, state: TrainState) -> dict[str, float]:
        weights = rollout_weights(run, state.params, Clock())
        probe = self_reward.probe_reference(run.method, programs, c_ref, reference, state.frozen)
        keep = functools.partial(held_out.write, done)
        return run.task.evaluate(functools.partial(programs.generate_eval, weights), run.scorer, probe, keep)

    def before() -> dict[str, float]:
        if hosts.is_first():
            eval_settings.write(work.path, c)
        return evaluate(0, state) | run.task.baselines()

    def after(done: int, state: TrainState, metrics: dict, details: Step, clock: Clock) -> dict[str, float]:
        if not c.eval.every or (done % c.eval.every and done != c.steps):
            return {}
        with clock("evaluation"):
            return evaluate(done, state)

    first = hosts.is_first()
    files: Any = dict(resume_step=begin or -1, enabled=first)
    with (
        SampleTable(work.path, **files) as samples,
        HeldOutTable(work.path, c.log.samples if c.log.samples_every else 0, **files) as held_out,
        Report(work.path, c, mismatch_limit(c, programs.needs), enabled=first) as report,
        Profile(work.path / "profile", c.log.profile, enabled=first) as profile,
    ):
        verdict = "" if c.regression.tokenizer else run.scorer.verdict  # numbers are not correct or incorrect
        return run_loop(
            Loop("RL", "step {}", work.path, begin, c.steps, c, console, should_stop),
            state,
            step,
            lambda done, state: saver.save(c.supervised.steps + done, state),
            progress=pictures.reward_text,
            advice=lambda done, state, details: (
                f"{save_for_replay(work.path, done, state, details)} The newest checkpoint holds the weights from before. In another --workdir, a "
                "lower config.optimizer.learning_rate, rewards of a smaller scale or float32 help most often."
            ),
            before=before if c.eval.every else None,
            after=after,
            observe=functools.partial(
                observer, c, samples, programs, run.tokenizer, run.scorer.weights, verdict, report, console
            ),
        )


COMMAND = command.Command(
    "train",
    __doc__,
    command.TRAINING,
    "--config=configs/quickstart.py --workdir=/tmp/quickstart",
    errors=(RewardError,),
)


def prepare(arguments: command.Arguments) -> Run:
    """Connects the processes and sets the run up. Raises what `setup` raises."""
    config = arguments.configuration()
    hosts.initialize(config.mesh.host_timeout, config.mesh.initialization_timeout)
    run = setup(config, arguments.training_workdir())
    if hosts.is_first():
        write_recipe(run.work.path, arguments.config, arguments.recipe)
    return run


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return command.run(COMMAND, argv, prepare, train)


if __name__ == "__main__":
    sys.exit(main())
