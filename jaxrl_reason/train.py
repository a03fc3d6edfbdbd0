"""The training loop: python -m jaxrl_reason.train --config=configs/quickstart.py --workdir=DIR

    data -> (supervised start) -> [ rollout -> rewards -> advantages -> update ] x steps -> table, picture

What stands in brackets is compiled; arrays stay on the device between its parts. Only host rewards cross:
token ids out, rewards in. The same command goes on from the newest checkpoint.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from jaxrl_reason import config as config_lib
from jaxrl_reason import models, reward_training, tasks
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.methods import Method
from jaxrl_reason.models import sharding
from jaxrl_reason.models.formats.weights import read_json
from jaxrl_reason.rewards import RewardError
from jaxrl_reason.rewards.scorer import LEARNED
from jaxrl_reason.rl import experience, hosts, learner
from jaxrl_reason.rl import programs as programs_lib
from jaxrl_reason.rl.learner import TrainState
from jaxrl_reason.runs import checkpoints, writers
from jaxrl_reason.runs.progress import Clock, Heartbeat, Progress
from jaxrl_reason.runs.watch import history, NonFiniteError, SkippedUpdates, Watch
from jaxrl_reason.tasks import Task


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a run needs before its first step; made by `setup`, which refuses what cannot run.

    Attributes:
      config, method: what was asked for.
      task: data, scorer and evaluation.
      programs: the compiled functions.
      reward_phase: how to get the learned reward model, or None.
    """

    config: Config
    method: Method
    task: Task
    programs: programs_lib.Programs
    reward_phase: reward_training.Phase | None = None

    work = property(lambda self: self.task.work)
    model = property(lambda self: self.task.model)
    tokenizer = property(lambda self: self.task.tokenizer)
    prompts = property(lambda self: self.task.prompts)
    solutions = property(lambda self: self.task.solutions)
    held_out = property(lambda self: self.task.held_out)
    scorer = property(lambda self: self.task.scorer)


def setup(config: Config, workdir: str | pathlib.Path) -> Run:
    """Checks the configuration, the data, the rewards and the work directory, and only then writes there; compiles nothing.

    Of several processes the first goes first: the others find what it has prepared.

    Raises:
      ConfigError, RewardError, ValueError, OSError: a sentence that says what is wrong and where.
    """
    turns = [hosts.agree(lambda: _setup(config, workdir) if hosts.first() else None, ConfigError, *_REFUSALS)]
    with warnings.catch_warnings():
        if not hosts.first():
            warnings.simplefilter("ignore")  # the first has said them
        turns += [hosts.agree(lambda: None if hosts.first() else _setup(config, workdir), ConfigError, *_REFUSALS)]
    return next(run for run in turns if run)


_REFUSALS = (RewardError, ValueError, OSError)


def _setup(config: Config, workdir: str | pathlib.Path) -> Run:
    method = config_lib.validate(config)
    mesh = programs_lib.mesh_of(config)
    task = tasks.open_task(config, method, mesh, workdir)
    programs = programs_lib.build(
        config,
        method,
        task.model,
        mesh,
        eos_ids=task.tokenizer.eos_ids,
        pad_id=task.tokenizer.pad_id,
        weights=task.scorer.weights,
        verdict=task.scorer.verdict,
        probe_token=tasks.probe_token(method, task.tokenizer),
        legal=task.legal,
        expert=task.expert,
    )
    reward_phase = None
    if LEARNED.keys() & set(config.reward.functions):
        reward_phase = reward_training.setup(
            config, model=task.model, work=task.work, tokenizer=task.tokenizer, mesh=mesh
        )
    if hosts.first():
        task.work.begin(task.tokenizer, task.pretrained)
        if reward_phase:
            reward_training.begin(reward_phase, task.work.path)
    else:
        task.work.check_shared()
    return Run(config, method, task, programs, reward_phase)


def first_state(run: Run) -> TrainState:
    """Step 0 of a run: another run's start, a pretrained model, or random weights."""
    start = run.config.supervised.start_from
    if not start and not run.task.load_weights:
        return run.programs.init()
    trained, frozen = models.lora.split(run.model, run.programs.abstract_state.params)
    if not start or frozen:
        trained, frozen = models.lora.split(
            run.model, run.task.load_weights() if run.task.load_weights else run.programs.init().params
        )
    if start:
        trained = checkpoints.load_params(pathlib.Path(start).expanduser() / "start", trained)
    return run.programs.restart(models.lora.join(trained, frozen))


def supervised(
    run: Run, state: TrainState, saver: checkpoints.Checkpoints, console: rich.console.Console, asked: Callable
) -> TrainState:
    """The supervised phase: cross-entropy on worked solutions, with checkpoints and metrics of its own."""
    c, begin = run.config, int(state.step)
    with contextlib.ExitStack() as stack:
        metrics_file = stack.enter_context(
            writers.MetricsWriter(
                run.work.path / "supervised", c.log.tensorboard, resume_step=begin or -1, enabled=hosts.first()
            )
        )
        skipped = SkippedUpdates(c.optimizer.max_skipped, history(run.work.path / "supervised", begin))
        heart = stack.enter_context(Heartbeat(functools.partial(console.print, soft_wrap=True), c.log.heartbeat))
        bar = stack.enter_context(Progress(console, "supervised", c.supervised.steps, begin, enabled=c.log.progress))
        for step in range(begin, c.supervised.steps):
            heart.step(f"Supervised step {step + 1}", Clock())
            state, metrics = run.programs.supervised_update(state, run.solutions.batch(step))
            metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
            metrics_file.write(step + 1, metrics)
            if skipped.look(metrics):
                raise skipped.error(f"supervised step {step + 1}", "Lower config.supervised.learning_rate.")
            bar.advance(f"loss {metrics['sft/loss']:.3f}")
            ending = asked()
            if (ending or (step + 1) % c.checkpoint.every == 0) and step + 1 < c.supervised.steps:
                saver.save(step + 1, state)
                if ending:
                    raise hosts.Preempted(f"supervised step {step + 1}")
    return state


def collect(run: Run, state: TrainState, weights, clock: Clock) -> tuple[experience.Groups, dict[str, float], int]:
    """One batch of scored groups; with dynamic sampling, of groups that inform, drawn from several prompt batches.

    Args:
      run, state, clock: see `train_step`.
      weights: the policy's, from `Programs.for_rollouts`.

    Returns:
      The groups, metrics of the host over all that was drawn, and the number of prompt batches drawn since the run began.
    """

    def draw(i):
        batch = run.prompts.batch(i)
        parts = batch.split(run.config.sampling.parts)
        with clock("rollout"):
            # All parts are dispatched; the host scores each while the devices sample those behind it.
            rollouts = [run.programs.generate(weights, part, state.step) for part in parts]
            scorings = [run.scorer.begin(*part) for part in zip(rollouts[:-1], parts)]
            jax.block_until_ready(rollouts)
        with clock("reward"):
            scorings.append(run.scorer.begin(rollouts[-1], parts[-1]))
            scored = jax.block_until_ready([finish() for finish in scorings])
        rewards, metrics = scored[0][0], _means([metrics for _, metrics in scored])
        rollout = rollouts[0]
        if len(parts) > 1:
            rollout, rewards = run.programs.join(*((r, rewards) for r, (rewards, _) in zip(rollouts, scored)))
        clock.count("rollout", int(jax.device_get(_count(rollout.mask))))
        names, size = programs_lib.columns_of(run.method), run.config.prompts_per_step
        columns = {name: hosts.put_share(batch.columns[name], run.programs.sharding, size) for name in names}
        return experience.Groups(rollout, rewards, columns), metrics

    first = int(jax.device_get(state.batches))
    groups, metrics = draw(first)
    if not run.method.dynamic_sampling:
        return groups, metrics, first + 1
    buffer = _empty_like(run.programs.sharding)(groups)
    filled = hosts.put(np.int32(0), state.batches.sharding)
    shares, means, drawn = [], [], [metrics]
    while True:
        means.append(run.programs.mean_reward(groups))
        buffer, filled, share = run.programs.fill(buffer, filled, groups)
        count, share = jax.device_get((filled, share))
        shares.append(float(share))
        if count == run.config.prompts_per_step or len(shares) == run.config.sampling.max_batches:
            break
        groups, metrics = draw(first + len(shares))
        drawn.append(metrics)
    metrics = _means(drawn) | {
        "dynamic_sampling/batches": len(shares),
        "dynamic_sampling/groups": int(count),
        "dynamic_sampling/kept_ratio": sum(shares) / len(shares),
        # `reward` is of the groups that were kept, none of them all right or all wrong: this tells how good the policy is.
        "dynamic_sampling/reward": float(np.mean(jax.device_get(means))),
    }
    return buffer, metrics, first + len(shares)


def _means(several: list[dict[str, float]]) -> dict[str, float]:
    """The mean of every figure; one that is missing counts as 0."""
    names = dict.fromkeys(itertools.chain(*several))
    return {name: sum(m.get(name, 0.0) for m in several) / len(several) for name in names}


@functools.cache
def _empty_like(sharding: jax.sharding.Sharding):
    """A compiled `experience.empty_like`. A copy: `fill` donates its buffer, which must share no array with the groups."""
    return jax.jit(lambda groups: jax.tree.map(jnp.copy, experience.empty_like(groups)), out_shardings=sharding)


_count = jax.jit(jnp.sum)
_trained = jax.jit(experience.trained, static_argnums=1)  # uncompiled, slicing would carry its borders to the device


def train_step(run: Run, state: TrainState, reference, clock: Clock, c_ref: jax.Array | None = None):
    """Rollout, rewards, advantages, update: one step.

    Args:
      run: what to run.
      state: donated.
      reference: of the weights of the reference policy those that the run trains, or None.
      clock: measures the parts.
      c_ref: f32 scalar of LaSeR's self-reward, or None.

    Returns:
      (state, groups, experience, learner.Mismatch, metrics).
    """
    programs = run.programs
    weights = rollout_weights(run, state.params, clock)
    groups, metrics, batches = collect(run, state, weights, clock)
    del weights  # where they are a copy, the update needs the room
    with clock("update"):
        rollout = _trained(groups.rollout, run.method)
        old_logprobs = ref_logprobs = kl = None
        if programs_lib.needs_old_logprobs(run.config, run.method):
            exact = programs_lib.sampler_is_exact(run.config)
            old_logprobs = rollout.logprobs if exact else programs.score(state.params, rollout).logprobs
        if reference is not None:
            _, frozen = models.lora.split(run.model, state.params)
            of_reference = programs.score(models.lora.join(reference, frozen), rollout)
            if programs_lib.needs_kl(run.config, run.method):
                ref_logprobs = of_reference.logprobs
                law = rollout if old_logprobs is None else rollout._replace(logprobs=old_logprobs)
                kl = experience.log_ratio(law, ref_logprobs)
            c_ref = of_reference.probe_logprobs if c_ref is None else c_ref
        batch, advantage_state, prepared = programs.prepare(groups, state.advantage_state, kl, c_ref)
        batch = batch._replace(old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
        state = state._replace(
            advantage_state=advantage_state, batches=hosts.put(np.int32(batches), state.batches.sharding)
        )
        state, updated, mismatch = jax.block_until_ready(programs.update(state, batch))
    metrics |= {k: float(v) for k, v in jax.device_get(prepared | updated).items()}
    return state, groups, batch, mismatch, metrics


def rollout_weights(run: Run, params: models.Params, clock: Clock) -> models.Params:
    """The policy's weights as rollouts read them; the seconds are counted where they have to be moved."""
    if run.programs.for_rollouts is None:
        return params
    with clock("reshard"):
        return jax.block_until_ready(run.programs.for_rollouts(params))


def train(run: Run) -> dict[str, dict[str, float]]:
    """Runs to the end, from wherever the work directory stands.

    Returns:
      As `report`; empty where the run was finished and reported already.

    Raises:
      Preempted: SIGTERM came; the last step is saved.
      RewardError, CheckpointError, MetricsError, OSError: a sentence that says what is wrong and where.
    """
    with hosts.preemption() as asked:
        return _train(run, asked)


def _train(run: Run, asked: Callable[[], bool]) -> dict[str, dict[str, float]]:
    c, programs, work = run.config, run.programs, run.work
    console = rich.console.Console(highlight=False, markup=False, quiet=not hosts.first())
    say = functools.partial(console.print, soft_wrap=True)
    saver = checkpoints.Checkpoints(work.path / "checkpoints", c.checkpoint.keep)
    number, state = saver.restore(programs.abstract_state) or (None, None)
    if number is not None:
        if number >= c.supervised.steps + c.steps:
            say(f"This run is finished: all {c.steps} steps are done. Raise config.steps, or choose another --workdir.")
            return {} if picture_of(run).exists() else report(run, console)
        say(f"Going on from {saver.directory / str(number)}.")
    if hosts.first():
        picture_of(run).unlink(missing_ok=True)  # that of a shorter run: it would pass for this one's
    if number is None or number < c.supervised.steps:
        state = first_state(run) if state is None else state
        if run.solutions:
            state = supervised(run, state, saver, console, asked)
        params, state = state.params, None  # the optimizer's state goes before another is made
        state = programs.restart(params)
        saver.save(c.supervised.steps, state)

    begin = int(state.step)
    if begin == 0 and (programs_lib.needs_reference(run.config, run.method) or c.checkpoint.keep_start):
        checkpoints.save_params(work.path / "start", trained_of(run, state.params))
    reference = None
    if programs_lib.needs_reference(run.config, run.method):
        reference = checkpoints.load_params(work.path / "start", trained_of(run, state.params))
    c_ref = self_reward_constant(run, state)
    exact = c_ref is not None and run.method.loss.self_reward.reference == "exact"
    if run.reward_phase:
        score = reward_training.scorer(run.reward_phase, models.lora.merge(run.model, state.params)[1], console, asked)
        run = dataclasses.replace(run, task=dataclasses.replace(run.task, scorer=run.scorer.with_reward_model(score)))
    evaluation = lambda state: run.task.evaluate(
        functools.partial(programs.generate_eval, rollout_weights(run, state.params, Clock())), run.scorer, c_ref
    )
    with contextlib.ExitStack() as stack:
        resume = dict(resume_step=begin or -1, enabled=hosts.first())
        metrics_file = stack.enter_context(writers.MetricsWriter(work.path, c.log.tensorboard, **resume))
        samples_file = stack.enter_context(writers.SampleTable(work.path, **resume))
        heart = stack.enter_context(Heartbeat(say, c.log.heartbeat))
        if begin == 0 and c.eval.every:
            heart.step("The evaluation before training", Clock())
            if hosts.first():
                writers.write_json(work.path / "evaluation.json", judged_by(c))
            metrics_file.write(0, evaluation(state) | run.task.baselines())
        before = history(work.path, begin)
        watch, skipped = Watch(say, mismatch_limit(c), before), SkippedUpdates(c.optimizer.max_skipped, before)
        bar = stack.enter_context(Progress(console, "RL", c.steps, begin, enabled=c.log.progress))
        for step in range(begin, c.steps):
            clock, done, last = Clock(), step + 1, step + 1 == c.steps
            heart.step(f"Step {done}", clock)
            with jax.transfer_guard("disallow"):  # an unintended crossing is an error
                state, groups, batch, mismatch, metrics = train_step(
                    run, state, reference, clock, None if exact else c_ref
                )
            metrics["learning_rate"] = programs.learning_rate(step)
            clock.count("update", int(_count(batch.mask)))
            metrics |= clock.metrics()
            if c.eval.every and (done % c.eval.every == 0 or last):
                with clock("evaluation"):
                    metrics |= evaluation(state)
            metrics_file.write(done, metrics)
            watch.look(metrics, lambda: describe(run, batch, mismatch))
            if hosts.first() and c.log.samples_every and (done % c.log.samples_every == 0 or last):
                write_samples(run, samples_file, done, groups, batch)
            if skipped.look(metrics):
                saved = save_for_replay(run, done, state, groups, batch)
                raise skipped.error(
                    f"step {done}",
                    f"{saved} A lower "
                    "config.optimizer.learning_rate, rewards of a smaller scale or float32 help most often; what the run learnt before is in its "
                    "newest checkpoint.",
                )
            ending = asked() and not last
            if done % c.checkpoint.every == 0 or last or ending:
                with clock("checkpoint"):
                    saver.save(c.supervised.steps + done, state)
            if ending:
                raise hosts.Preempted(f"step {done}")
            bar.advance(f"reward {metrics['reward']:.3f}")
    saver.close()
    return report(run, console)


def mismatch_limit(config: Config) -> float:
    """Nats by which the sampler's and the trainer's log-probability of a token may differ before the run says so."""
    return config.sampling.mismatch_limit or (0.01 if programs_lib.sampler_is_exact(config) else 1.0)


def describe(run: Run, batch: learner.Experience, mismatch: learner.Mismatch) -> str:
    """A sentence about the token of a batch on which sampler and trainer agree least, with its text where this process has it."""
    difference, p, g, t = (x.item() for x in jax.device_get(mismatch))
    place = f"token {t} of completion {g} of prompt {p}"
    mine = hosts.places_of(batch.mask)
    if p not in mine:
        return f"{place}, which another process holds."
    rollout = jax.tree.map(lambda x: hosts.share(x, run.programs.sharding)[np.searchsorted(mine, p)], batch.rollout)
    completion, token = run.tokenizer.decode_batch(
        [rollout.tokens[g][rollout.mask[g]].tolist(), [int(rollout.tokens[g, t])]]
    )
    sampled = float(rollout.logprobs[g, t])
    # repr: what a terminal would obey is escaped
    return f"{place}, {token!r} in {completion!r:.300}, was sampled at {sampled:.3g} and is {sampled + difference:.3g} to the trainer."


def save_for_replay(run: Run, step: int, state: TrainState, groups: experience.Groups, batch) -> str:
    """Writes the weights and the batch of a step to a folder, and says so, or why not, in a sentence."""
    directory = run.work.path / "replay" / str(step)
    said = f"Its weights and batch are in {directory}: python -m jaxrl_reason.replay --workdir={run.work.path} names what is at fault."
    batch, rewards = jax.tree.map(hosts.whole, (batch, groups.rewards))
    try:
        checkpoints.save_params(directory / "params", state.params)
        if hosts.first():
            checkpoints.save_batch(directory / "batch.npz", batch, rewards)
    except (checkpoints.CheckpointError, OSError) as e:
        said = f"It could not be saved for replay: {e}"
    hosts.barrier("saved for replay")  # nobody ends while another writes
    return said


def trained_of(run: Run, params: models.Params) -> models.Params:
    """The weights that the run trains: all, or the adapters."""
    return models.lora.split(run.model, params)[0]


def self_reward_constant(run: Run, state: TrainState) -> jax.Array | None:
    """LaSeR's c_ref, measured once on the policy that RL begins with and kept in self_reward.json.

    Evaluation uses it even where training scores every completion under the reference policy (reference "exact").

    Returns:
      f32 scalar; None where the method has no self-reward.
    """
    if not run.method.loss.self_reward:
        return None
    file = run.work.path / "self_reward.json"
    if int(state.step) == 0:
        found, weights = [], rollout_weights(run, state.params, Clock())
        for i in range(4):
            for part in run.prompts.batch(i).split(run.config.sampling.parts):
                rollout = run.programs.generate(weights, part, state.step)
                values, truncated = hosts.whole(rollout.probe_logprobs), hosts.whole(rollout.truncated)
                found.append(values[~truncated & np.isfinite(values)])
        found = np.concatenate(found)
        if not found.size:
            raise ConfigError(
                "No completion of the policy that RL begins with has ended, so LaSeR's constant cannot be measured: raise "
                "config.max_completion_length, or begin with config.supervised.steps."
            )
        c_ref = float(np.float32(found.mean()))
        if hosts.first():
            writers.write_json(file, {"c_ref": c_ref, "completions": int(found.size)})
    else:
        c_ref = json.loads(file.read_text())["c_ref"]
    return hosts.put(np.float32(c_ref), sharding.replicated(run.programs.sharding.mesh))


def write_samples(run: Run, table: writers.SampleTable, step: int, groups: experience.Groups, batch) -> None:
    """A few completions of this process's share with their rewards and advantages, for people to read."""
    count = -(-run.config.log.samples // run.config.group_size)  # whole groups
    rollout, groups, advantages, mask = jax.tree.map(
        lambda x: hosts.share(x, run.programs.sharding)[:count], (batch.rollout, groups, batch.advantages, batch.mask)
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


def picture_of(run: Run) -> pathlib.Path:
    """The learning curve, which a run draws last: where it lies, the run was reported."""
    return run.work.path / "learning_curve.png"


def judged_by(config: Config) -> dict:
    """What an evaluation is: two that differ in this are not compared."""
    return dataclasses.asdict(config.eval) | {"every": None}


def report(run: Run, console: rich.console.Console) -> dict[str, dict[str, float]]:
    """Prints the table of before and after, draws the learning curve.

    Returns:
      {"before": the evaluation of step 0, "after": the last of a later step}; without those that were not made, and without the first
      where config.eval has changed since. Nothing on other processes than the first.
    """
    if not hosts.first():
        return {}
    metrics_path, picture = run.work.path / "metrics.jsonl", picture_of(run)
    evaluations, beside = {}, {}
    for line in writers.read_metrics(metrics_path):
        if any(name.startswith("eval/") for name in line):
            figures = {k: v for k, v in line.items() if k.startswith("eval/") and k != "eval/prompts"}
            evaluations["after" if line["step"] else "before"] = figures
        beside |= {k: v for k, v in line.items() if k.startswith(tasks.BASELINES)}
    judged = run.work.path / "evaluation.json"
    if "before" in evaluations and not (judged.exists() and read_json(judged) == judged_by(run.config)):
        console.print(
            "The evaluation before training was another one (config.eval has changed) and is not compared.",
            soft_wrap=True,
        )
        del evaluations["before"]
    if evaluations:
        shown = tuple(f"eval/{name}" for name in tasks.headlines(run.method))
        before, after = (
            {k: v for k, v in evaluations.get(side, {}).items() if k.startswith(shown)} for side in ("before", "after")
        )
        console.print(writers.summary_table(before, after))
    if beside:
        console.print("Beside it: " + ", ".join(f"{name} {writers.cell(name, x)}" for name, x in beside.items()))
    scratch = picture.with_suffix(".tmp")
    writers.plot_learning_curve(metrics_path, scratch, title=run.work.path.name)
    scratch.replace(picture)
    console.print(f"Learning curve: {picture}", soft_wrap=True)
    return evaluations


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or "--help" in argv or "-h" in argv:
        print(
            f"{__doc__}\nAny field of the configuration can be set as --config.section.field=value. Defaults:\n\n{config_lib.help_text()}"
        )
        return 0
    try:
        config, workdir = config_lib.parse_args(argv)
        hosts.initialize(config.mesh.host_timeout, config.mesh.initialization_timeout)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    with hosts.leaving_together():
        return _main(config, workdir)


def _main(config: Config, workdir: str) -> int:
    try:
        try:
            run = setup(config, workdir)
        except (ConfigError, *_REFUSALS) as e:
            if jax.process_count() > 1 and hosts.came_from_devices(e):
                raise  # another process has died
            print(f"error: {e}", file=sys.stderr)
            return 2
        train(run)
        hosts.barrier("end")
    except (
        ConfigError,
        RewardError,
        checkpoints.CheckpointError,
        writers.MetricsError,
        models.PretrainedError,
        NonFiniteError,
        OSError,
    ) as e:
        print(f"error: {e}", file=sys.stderr)
        return hosts.leave(1)
    except hosts.Preempted as e:
        hosts.barrier("preempted")
        print(e, file=sys.stderr)
        return hosts.leave(e.exit_code)
    except (jax.errors.JaxRuntimeError, ValueError) as e:
        if jax.process_count() == 1 or not hosts.came_from_devices(e):
            raise
        print(f"error: {hosts.why_it_stopped(e)}", file=sys.stderr)
        return hosts.leave(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
