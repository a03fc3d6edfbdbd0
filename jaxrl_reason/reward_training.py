"""Trains a reward model on preference pairs: python -m jaxrl_reason.reward_training --config=configs/hero.py --workdir=DIR

    pairs -> [ Bradley-Terry update ] x steps -> held-out accuracy -> DIR/reward_model/{params, reward_model.json}

The decoder begins as the policy of the work directory where its supervised phase is done, else with random weights. The same command
goes on from the newest checkpoint.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console

from jaxrl_reason import config as config_lib
from jaxrl_reason import data, models
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data.preferences import PreferenceStream
from jaxrl_reason.models import reward_model, sharding
from jaxrl_reason.models.formats.weights import read_json
from jaxrl_reason.rewards import RewardError
from jaxrl_reason.rewards.learned import chat_of, TextScorer
from jaxrl_reason.rl import hosts, learner
from jaxrl_reason.rl import programs as programs_lib
from jaxrl_reason.rl.learner import TrainState
from jaxrl_reason.runs import checkpoints, writers
from jaxrl_reason.runs.progress import Clock, Heartbeat, Progress
from jaxrl_reason.runs.watch import history, NonFiniteError, SkippedUpdates
from jaxrl_reason.runs.workdir import Workdir

# Folded into the seed for the score vector and, without a policy to begin with, the decoder; beside the purposes in `programs`.
_INIT = 101
_DESCRIPTION = "reward_model.json"  # written last: where it is, the weights are complete
_SOURCE = "source.json"  # where a pretrained one came from: its path, and its config.json with its commit
# Sources ask for an answer, which a file of pairs need not have and nothing here reads.
_PAIR_COLUMNS = {"answer": "question", "chosen": "chosen", "rejected": "rejected"}


@dataclasses.dataclass(frozen=True)
class Phase:
    """Everything a reward model's training needs before its first step; made by `setup`, which refuses what cannot run.

    Attributes:
      config: of the run; its section `reward_model` says how to come by the model.
      model: the policy's decoder, which a reward model trained here equals in shape.
      mesh: where arrays live.
      tokenizer: of the run.
      work: the directory of the reward model to train, not yet written to; None where config.reward_model.path names a trained one.
      pairs, held_out: what it learns from and is measured on; None likewise.
      pretrained: the model of config.reward_model.path in the Hugging Face layout, or None.
    """

    config: Config
    model: models.ModelConfig
    mesh: jax.sharding.Mesh
    tokenizer: data.Tokenizer
    work: Workdir | None = None
    pairs: PreferenceStream | None = None
    held_out: PreferenceStream | None = None
    pretrained: models.Opened | None = None

    @property
    def directory(self) -> pathlib.Path:
        """Where the trained reward model is, or will be."""
        return self.work.path if self.work else pathlib.Path(self.config.reward_model.path).expanduser()


def setup(
    config: Config, *, model: models.ModelConfig, work: Workdir, tokenizer: data.Tokenizer, mesh: jax.sharding.Mesh
) -> Phase:
    """Checks the pairs and the reward model's own directory, or the trained model that config.reward_model.path names; writes nothing.

    Args:
      config: of the run.
      model, work, tokenizer, mesh: of the run; the reward model is trained in the folder reward_model of its work directory.

    Raises:
      ConfigError, ValueError, OSError: a sentence that says what is wrong and where.
    """
    c, r = config, config.reward_model
    phase = Phase(config, models.lora.base_of(model), mesh, tokenizer)
    if r.path and not is_ours(r.path):
        return dataclasses.replace(phase, pretrained=open_pretrained(config, mesh, work.path))
    if r != dataclasses.replace(r, system="", max_length=config_lib.RewardModel().max_length):
        raise ConfigError(
            "config.reward_model.system and config.reward_model.max_length are for a pretrained reward model with a chat template and "
            "texts of its own; leave them out."
        )
    if r.path:
        described(phase.directory, tokenizer_digest(tokenizer))
        return phase
    sharding.check_batch(mesh, "config.reward_model.batch_size", r.batch_size)
    source = lambda name, split: data.load_source(
        r.data or name,
        split,
        data_dir=c.data.data_dir or None,
        columns=_PAIR_COLUMNS if r.data else c.data.columns,
        on_bad_row=c.data.on_bad_row,
    )
    rows = source(c.data.train, r.split or c.data.train_split)
    held_out = source(c.data.eval or c.data.train, r.eval_split or c.data.eval_split)
    stream = functools.partial(
        PreferenceStream,
        tokenizer=tokenizer,
        template=config_lib.prompt_template(c, tokenizer),
        batch_size=r.batch_size,
        places=hosts.places(sharding.batch_sharding(mesh), r.batch_size),
        max_prompt_length=c.max_prompt_length,
        max_completion_length=c.max_completion_length,
        seed=c.seed,
        on_long=c.data.on_long_prompt,
        add_bos=config_lib.begins_with_bos(c, tokenizer),
    )
    return dataclasses.replace(
        phase,
        pairs=stream(rows),
        held_out=stream(held_out.read(range(min(len(held_out), c.eval.prompts))), shuffle=False),
        work=Workdir(work.path / "reward_model", c, f"{rows.fingerprint}/{held_out.fingerprint}"),
    )


def open_pretrained(config: Config, mesh: jax.sharding.Mesh, workdir: pathlib.Path) -> models.Opened:
    """The pretrained reward model of config.reward_model.path, looked at; of the hub's models the commit that the run began with.

    Args:
      config: of the run.
      mesh: that has to divide it.
      workdir: of the run, where `begin` has kept the commit.

    Raises:
      ConfigError: there is none, its tokenizer or its chat template cannot be used, or the mesh does not divide it.
    """
    path, kept = config.reward_model.path, workdir / "reward_model" / _SOURCE
    origin = read_json(kept) if kept.is_file() else {}
    try:
        found = models.open_model(models.pinned(path, origin.get("config", {})) if origin.get("path") == path else path)
    except models.PretrainedError as e:
        raise ConfigError(
            f"config.reward_model.path is {path!r}, which has neither a {_DESCRIPTION} (the reward_model folder of a work directory in "
            f"which python -m jaxrl_reason.reward_training has ended) nor a pretrained model: {e}"
        ) from e
    if found.tokenizer is None:
        raise ConfigError(f"config.reward_model.path is {path!r}, and there is no tokenizer.json in it.")
    try:
        models.check_weights(found, found.config, models.RewardModel)
        reward_model.param_shardings(found.config, mesh)
        chat_of(found.tokenizer, config.reward_model.system)
    except ValueError as e:
        raise ConfigError(f"The reward model of config.reward_model.path cannot be used: {e}") from e
    return found


def begin(phase: Phase, workdir: pathlib.Path) -> None:
    """Keeps in the run's work directory where a pretrained reward model came from.

    Raises:
      OSError: it cannot be written.
    """
    if phase.pretrained:
        with writers.writing(workdir / "reward_model"):
            (workdir / "reward_model").mkdir(exist_ok=True)
        origin = {"path": phase.config.reward_model.path, "config": dict(phase.pretrained.source)}
        writers.write_json(workdir / "reward_model" / _SOURCE, origin)


def scorer(
    phase: Phase,
    decoder: models.Params,
    console: rich.console.Console,
    asked: Callable[[], bool] = lambda: False,
) -> Callable:
    """(Rollout, its batch) -> scores f32[P, G] under the phase's reward model, and metrics; see `Scorer.with_reward_model`.

    Arguments and errors as `train_reward_model`.
    """
    c = phase.config
    parts = c.update.accumulation * c.update.minibatches  # as the policy's log-probabilities are computed
    if phase.pretrained:
        return pretrained_scorer(c, phase.pretrained, phase.tokenizer, phase.mesh)
    model, params = get_reward_model(phase, decoder, console, asked)
    parts = sharding.microbatches(phase.mesh, c.prompts_per_step // c.sampling.parts, parts)
    score = group_scoring_program(programs_lib.with_attention(model, c, phase.mesh), phase.mesh, parts)
    return lambda rollout, batch: (score(params, rollout), {})


def group_scoring_program(model: models.ModelConfig, mesh: jax.sharding.Mesh, parts: int):
    """The jitted (params, rollout) -> scores f32[P, G]."""
    score = functools.partial(reward_model.group_scores, model, parts=parts)
    return jax.jit(sharding.on_mesh(mesh, score), out_shardings=sharding.batch_sharding(mesh))


def pretrained_scorer(
    c: Config, opened: models.Opened, tokenizer: data.Tokenizer, mesh: jax.sharding.Mesh
) -> TextScorer:
    """The scorer of a pretrained reward model, its weights on the mesh in the dtypes of the policy."""
    model = dataclasses.replace(
        programs_lib.with_attention(opened.config, c, mesh),
        param_dtype=c.model.param_dtype,
        compute_dtype=c.model.compute_dtype,
        remat="none",
    )
    return TextScorer(
        model,
        models.place_weights(opened, model, mesh, models.RewardModel),
        opened.tokenizer,
        policy_tokenizer=tokenizer,
        system=c.reward_model.system,
        max_length=c.reward_model.max_length,
        parts=c.update.accumulation * c.update.minibatches,
        sharding=sharding.batch_sharding(mesh),
    )


def get_reward_model(
    phase: Phase,
    decoder: models.Params,
    console: rich.console.Console,
    asked: Callable[[], bool] = lambda: False,
) -> tuple[models.ModelConfig, models.Params]:
    """The phase's reward model: loaded where it is trained already, else trained now from the weights of `decoder`."""
    if is_ours(phase.directory):
        console.print(f"The reward model in {phase.directory} is trained.", soft_wrap=True)
        return load_reward_model(phase.directory, tokenizer_digest(phase.tokenizer), mesh=phase.mesh)
    return phase.model, train_reward_model(phase, decoder, console, asked)


def train_reward_model(
    phase: Phase,
    decoder: models.Params,
    console: rich.console.Console,
    asked: Callable[[], bool] = lambda: False,
) -> models.Params:
    """The Bradley-Terry loop, from wherever the phase's directory stands; prints the table of held-out pairs before and after.

    Args:
      phase: from `setup`.
      decoder: weights to begin with, see `reward_model.init_params`; they stay the caller's.
      console: for the bar and the table.
      asked: whether to save and end, asked after every step; from `hosts.preemption`.

    Returns:
      The trained parameters, which also lie under the directory's params/, with metrics.jsonl and reward_model.json beside them.

    Raises:
      Preempted: it was asked to end; the last step is saved.
    """
    c, r, directory = phase.config, phase.config.reward_model, phase.directory
    key = jax.random.fold_in(jax.random.key(c.seed), _INIT)
    optimizer = programs_lib.make_supervised_optimizer(
        dataclasses.replace(c, supervised=config_lib.Supervised(steps=r.steps, learning_rate=r.learning_rate))
    )
    shardings = state_shardings(phase.model, phase.mesh, optimizer)
    by_prompt = sharding.batch_sharding(phase.mesh)
    place = lambda pairs: jax.tree.map(lambda x: hosts.put_share(x, by_prompt, r.batch_size), pairs)

    def fresh(decoder):
        params = reward_model.init_params(phase.model, key, decoder)
        return TrainState(jnp.int32(0), params, learner.init_opt_state(optimizer, params), (), jnp.int32(0))

    update = jax.jit(make_update(phase.model, optimizer), donate_argnums=0, out_shardings=(shardings, None))
    score = jax.jit(functools.partial(reward_model.group_scores, phase.model))
    evaluation = lambda params: evaluate(lambda batch: score(params, place(batch)), phase.held_out)

    if hosts.first():
        phase.work.begin(phase.tokenizer)
    hosts.barrier("reward model's directory")
    state = jax.jit(fresh, out_shardings=shardings)(decoder)
    saver = checkpoints.Checkpoints(directory / "checkpoints", c.checkpoint.keep)
    number, state = saver.restore(state) or (0, state)
    if number:
        console.print(f"Going on from {saver.directory / str(number)}.", soft_wrap=True)
    with contextlib.ExitStack() as stack:
        metrics_file = stack.enter_context(
            writers.MetricsWriter(directory, c.log.tensorboard, resume_step=number or -1, enabled=hosts.first())
        )
        if number == 0:
            metrics_file.write(0, evaluation(state.params))
        skipped = SkippedUpdates(c.optimizer.max_skipped, history(directory, number))
        heart = stack.enter_context(Heartbeat(functools.partial(console.print, soft_wrap=True), c.log.heartbeat))
        bar = stack.enter_context(Progress(console, "reward model", r.steps, number, enabled=c.log.progress))
        for step in range(number, r.steps):
            done, last = step + 1, step + 1 == r.steps
            heart.step(f"Step {done} of the reward model", Clock())
            state, metrics = update(state, place(phase.pairs.batch(step)))
            metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
            if last:
                metrics |= evaluation(state.params)
            metrics_file.write(done, metrics)
            if skipped.look(metrics):
                raise skipped.error(f"step {done} of the reward model", "Lower config.reward_model.learning_rate.")
            ending = asked() and not last
            if done % c.checkpoint.every == 0 or last or ending:
                saver.save(done, state)
            if ending:
                raise hosts.Preempted(f"step {done} of the reward model")
            bar.advance(f"loss {metrics['reward_model/loss']:.3f}")
    saver.close()
    checkpoints.save_params(directory / "params", state.params)
    if hosts.first():
        before, after = held_out_of(directory)
        _write_description(phase, after)
        console.print(writers.summary_table(before, after))
    hosts.barrier("reward model")
    console.print(f"Reward model: {directory}", soft_wrap=True)
    return state.params


def make_update(config: models.ModelConfig, optimizer: optax.GradientTransformation) -> Callable:
    """update(state, pairs) -> (state, metrics): one Bradley-Terry step, to be jitted with the state donated."""
    grad = jax.value_and_grad(functools.partial(reward_model.pair_loss, config), has_aux=True)

    def update(state: TrainState, pairs):
        (loss, metrics), grads = grad(state.params, pairs)
        params, opt_state, norm, applied = learner.apply_gradients(
            optimizer, state.params, state.opt_state, grads, loss
        )
        state = state._replace(step=state.step + 1, params=params, opt_state=opt_state, batches=state.batches + 1)
        metrics |= {"reward_model/loss": loss, "reward_model/grad_norm": norm, "skipped_update_ratio": 1.0 - applied}
        return state, metrics

    return update


def state_shardings(
    config: models.ModelConfig, mesh: jax.sharding.Mesh, optimizer: optax.GradientTransformation
) -> TrainState:
    """A sharding for every leaf of the TrainState; optimizer moments lie where their weights lie."""
    whole, params = sharding.replicated(mesh), reward_model.param_shardings(config, mesh)
    abstract = jax.eval_shape(
        functools.partial(learner.init_opt_state, optimizer), reward_model.abstract_params(config)
    )
    opt_state = optax.tree_utils.tree_map_params(
        optimizer, lambda _, s: s, abstract, params, transform_non_params=lambda _: whole
    )
    return TrainState(whole, params, opt_state, (), whole)


def evaluate(score: Callable, pairs: PreferenceStream) -> dict[str, float]:
    """How often and by how much the chosen completion scores above the rejected one, over one epoch of `pairs`.

    Args:
      score: a PreferenceBatch -> f32[B, 2].
      pairs: not shuffled; what the last batch holds beyond the epoch counts for nothing.

    Returns:
      `reward_model/held_out/accuracy`, the share of pairs with the chosen one strictly above, and `reward_model/held_out/margin`,
      the mean difference.
    """
    scores, count = [], 0
    while count < pairs.size:
        scores.append(hosts.whole(score(pairs.batch(len(scores)))))
        count += len(scores[-1])
    scores = np.concatenate(scores)[: pairs.size]
    margin = scores[:, 0] - scores[:, 1]
    return {
        "reward_model/held_out/accuracy": float((margin > 0).mean()),
        "reward_model/held_out/margin": float(margin.mean()),
    }


def held_out_of(directory: pathlib.Path) -> tuple[dict[str, float], dict[str, float]]:
    """The held-out figures before and after the training that left its metrics in `directory`."""
    prefix = "reward_model/held_out/"
    lines = [
        {name: value for name, value in line.items() if name.startswith(prefix)}
        for line in writers.read_metrics(directory / "metrics.jsonl")
    ]
    measured = [line for line in lines if line]
    return measured[0], measured[-1]


def tokenizer_digest(tokenizer: data.Tokenizer) -> str:
    """SHA-256 of what decides which ids a text gets, and which of them end and begin it; saving and loading does not change it."""
    content = [tokenizer.backend.to_str(), tokenizer.eos_ids, tokenizer.bos_id]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_reward_model(
    directory: str | pathlib.Path, tokenizer_digest: str, *, mesh: jax.sharding.Mesh | None = None
) -> tuple[models.ModelConfig, models.Params]:
    """A reward model that `train_reward_model` left in `directory` (DIR/reward_model).

    Args:
      directory: where reward_model.json and params/ are.
      tokenizer_digest: of the tokenizer whose ids are to be scored.
      mesh: where the weights are to live; None: on the first device.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it was trained with another tokenizer, or its files cannot be read.
    """
    directory = pathlib.Path(directory).expanduser()
    config = described(directory, tokenizer_digest)
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]) if mesh is None else mesh
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    like = jax.tree.map(place, reward_model.abstract_params(config), reward_model.param_shardings(config, mesh))
    return config, checkpoints.load_params(directory / "params", like)


def _write_description(phase: Phase, held_out: dict[str, float]) -> None:
    content = {
        "model": dataclasses.asdict(phase.model),
        "tokenizer_digest": tokenizer_digest(phase.tokenizer),
        "steps": phase.config.reward_model.steps,
        "pairs": phase.pairs.size,
        "held_out": {name.rpartition("/")[2]: value for name, value in held_out.items()}
        | {"pairs": phase.held_out.size},
    }
    writers.write_json(phase.directory / _DESCRIPTION, content)


def is_ours(directory: str | pathlib.Path) -> bool:
    """Whether `train_reward_model` has left a reward model there."""
    return (pathlib.Path(directory).expanduser() / _DESCRIPTION).is_file()


def described(directory: str | pathlib.Path, tokenizer_digest: str | None = None) -> models.ModelConfig:
    """The decoder of the trained reward model in a directory; refuses another tokenizer than this one, where one is given.

    Raises:
      FileNotFoundError, ValueError: as `load_reward_model`.
    """
    directory = pathlib.Path(directory).expanduser()
    file = directory / _DESCRIPTION
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no trained reward model in {directory}: it has no {_DESCRIPTION}. Give the reward_model folder of a work "
            "directory in which python -m jaxrl_reason.reward_training has ended."
        )
    try:
        content = json.loads(file.read_text())
        trained_with, sizes = str(content["tokenizer_digest"]), content["model"]
        scaling = sizes["rope_scaling"] and models.RopeScaling(**sizes["rope_scaling"])
        config = models.ModelConfig(**{**sizes, "rope_scaling": scaling})
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{file} does not describe a reward model: {type(e).__name__}: {e}.") from e
    if tokenizer_digest not in (None, trained_with):
        raise ValueError(
            f"The reward model in {directory} was trained with another tokenizer (digest {trained_with[:12]}, this one's is "
            f"{tokenizer_digest[:12]}), whose ids mean other texts: set config.data.tokenizer to {directory / 'tokenizer'}, or train a "
            "reward model with this one."
        )
    return config


def start_decoder(run, console: rich.console.Console) -> models.Params:
    """What a `train.Run` has of a policy past its supervised phase: its newest weights, else those it would start from."""
    from jaxrl_reason import train  # which has this module's training among its phases

    c = run.config
    saver = checkpoints.Checkpoints(run.work.path / "checkpoints", c.checkpoint.keep)
    number, state = saver.restore(run.programs.abstract_state) or (-1, None)
    saver.close()
    if number >= c.supervised.steps:
        origin, params = saver.directory / str(number), state.params
    else:
        start = c.supervised.start_from and pathlib.Path(c.supervised.start_from).expanduser() / "start"
        nothing = "random weights: the run has no policy yet that is past its supervised phase"
        origin = start or c.model.path or nothing
        params = train.first_state(run).params
    _, params = models.lora.merge(run.model, params)
    console.print(f"The reward model starts from {origin}.", soft_wrap=True)
    return params


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from jaxrl_reason import train

    argv = sys.argv[1:] if argv is None else argv
    if not argv or "--help" in argv or "-h" in argv:
        print(
            f"{__doc__}\nAny field of the configuration can be set as --config.section.field=value. Defaults:\n\n{config_lib.help_text()}"
        )
        return 0
    try:
        run = train.setup(*config_lib.parse_args(argv))
        if run.reward_phase is not None and run.reward_phase.pretrained:
            raise ConfigError("config.reward_model.path names a pretrained reward model, so there is none to train.")
        if run.reward_phase is None:
            raise ConfigError(
                "config.reward.functions names no learned reward, so this run has no reward model to train; add 'reward_model' there."
            )
    except (ConfigError, RewardError, ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    console = rich.console.Console(highlight=False, markup=False)
    try:
        with hosts.preemption() as asked:
            get_reward_model(run.reward_phase, start_decoder(run, console), console, asked)
    except (ConfigError, checkpoints.CheckpointError, writers.MetricsError, NonFiniteError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except hosts.Preempted as e:
        print(e, file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
