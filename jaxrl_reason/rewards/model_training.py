"""The learned reward model of a run: checked before the run, then loaded, or trained on pairs by the Bradley-Terry loss.

pairs -> [ Bradley-Terry update ] x steps -> held-out accuracy -> DIR/reward_model/{params, reward_model.json}
"""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console

from jaxrl_reason import config as config_lib
from jaxrl_reason import data, models
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data import files
from jaxrl_reason.data.preferences import PreferenceStream, warn_of_leaks
from jaxrl_reason.models import reward_model, sharding
from jaxrl_reason.models.formats.weights import read_json
from jaxrl_reason.rewards import model_files
from jaxrl_reason.rewards.learned import texts_of, TextScorer
from jaxrl_reason.rewards.model_files import is_ours, load_reward_model, tokenizer_digest, write_description
from jaxrl_reason.rewards.scorer import RewardModelScorer
from jaxrl_reason.rl import devices, hosts, scoring
from jaxrl_reason.rl.optimizer import apply_gradients, init_opt_state, make_supervised_optimizer
from jaxrl_reason.rl.programs import optimizer_shardings
from jaxrl_reason.rl.types import Rollout, TrainState
from jaxrl_reason.runs import checkpoints, read_metrics
from jaxrl_reason.runs.files import write_json, writing
from jaxrl_reason.runs.loop import Loop, run_loop
from jaxrl_reason.runs.pictures import print_summary
from jaxrl_reason.runs.progress import Clock
from jaxrl_reason.runs.workdir import Workdir

# Folded into the seed for the score vector and, without a policy, the decoder. `rl.programs` uses other numbers.
_INIT = 101
# The columns that every row of config.reward_model.data needs, next to the question.
_PAIR_COLUMNS = {"chosen": "chosen", "rejected": "rejected"}
_NAMING = "config.data.columns does not name columns of config.reward_model.data. Rename the columns of the data."
_HELD_OUT = "reward_model/held_out/"


@dataclasses.dataclass(frozen=True)
class Phase:
    """Everything that is needed to load or train a reward model. Made by `setup`, which checks all of it."""

    config: Config
    model: models.ModelConfig  # the policy's decoder, whose shape a reward model that is trained here has
    mesh: jax.sharding.Mesh
    tokenizer: data.Tokenizer
    work: Workdir | None = None  # of the model to train, not yet written to; None if config.reward_model.path is set
    pairs: PreferenceStream | None = None
    held_out: PreferenceStream | None = None  # pairs of the evaluation
    pretrained: models.Opened | None = None  # of config.reward_model.path, in the Hugging Face layout

    @property
    def directory(self) -> pathlib.Path:
        """The directory of the trained reward model, before or after its training."""
        return self.work.path if self.work else pathlib.Path(self.config.reward_model.path).expanduser()


def setup(
    config: Config, *, model: models.ModelConfig, work: Workdir, tokenizer: data.Tokenizer, mesh: jax.sharding.Mesh
) -> Phase:
    """Checks the pairs and the reward model's directory, or the model of config.reward_model.path. Writes nothing.

    A reward model is trained in the folder reward_model of `work`. Raises ConfigError, ValueError or OSError, which name
    the fault and its place.
    """
    c, r = config, config.reward_model
    phase = Phase(config, models.lora.base_of(model), mesh, tokenizer)
    if r.path and not is_ours(r.path):
        return dataclasses.replace(phase, pretrained=open_pretrained(config, mesh, work.path))
    if r != dataclasses.replace(r, system="", max_length=config_lib.RewardModel().max_length):
        raise ConfigError(
            "config.reward_model.system and config.reward_model.max_length are for a pretrained reward model with a chat "
            "template and texts of its own; leave them out."
        )
    if r.path:
        model_files.described(phase.directory, tokenizer_digest(tokenizer))
        return phase
    sharding.check_batch(mesh, "config.reward_model.batch_size", r.batch_size)
    source = lambda name, split, columns: data.load_source(
        r.data or name,
        split,
        data_dir=c.data.data_dir or None,
        columns=_PAIR_COLUMNS if r.data else columns,
        on_bad_row=c.data.on_bad_row,
        naming=_NAMING if r.data else files.NAMING,
    )
    rows = source(c.data.train, r.split or c.data.train_split, c.data.columns)
    columns = c.data.eval_columns or c.data.columns
    held_out = source(c.data.eval or c.data.train, r.eval_split or c.data.eval_split, columns)
    stream = functools.partial(
        PreferenceStream,
        tokenizer=tokenizer,
        template=config_lib.prompt_template(c, tokenizer),
        batch_size=r.batch_size,
        local_rows=hosts.local_rows(sharding.batch_sharding(mesh), r.batch_size),
        max_prompt_length=c.max_prompt_length,
        max_completion_length=c.max_completion_length,
        seed=c.seed,
        on_long=c.data.on_long_prompt,
        add_bos=config_lib.begins_with_bos(c, tokenizer),
    )
    pairs = stream(rows)  # first, because its errors name the file and the line of a row
    evaluated = stream(held_out.read(range(min(len(held_out), c.eval.prompts))), shuffle=False)
    warn_of_leaks(rows, held_out)
    own = Workdir(work.path / "reward_model", c, f"{rows.fingerprint}/{held_out.fingerprint}")
    return dataclasses.replace(phase, pairs=pairs, held_out=evaluated, work=own)


def open_pretrained(config: Config, mesh: jax.sharding.Mesh, workdir: pathlib.Path) -> models.Opened:
    """Opens the pretrained reward model of config.reward_model.path; of a hub's model, the commit kept by `begin`.

    Raises ConfigError if there is none, if the mesh does not divide it, or if its tokenizer or chat cannot be used.
    """
    path, kept = config.reward_model.path, workdir / "reward_model" / model_files.SOURCE
    origin = read_json(kept) if kept.is_file() else {}
    try:
        found = models.reopen(path, origin.get("config", {}) if origin.get("path") == path else {})
    except models.PretrainedError as e:
        raise ConfigError(
            f"config.reward_model.path is {path!r}, which has neither a {model_files.DESCRIPTION} (the reward_model folder "
            f"of a work directory in which python -m jaxrl_reason.reward_training has ended) nor a pretrained model: {e}"
        ) from e
    if found.tokenizer is None:
        raise ConfigError(f"config.reward_model.path is {path!r}, and there is no tokenizer.json in it.")
    try:
        models.check_weights(found, found.config, models.RewardModel)
        reward_model.param_shardings(found.config, mesh)
        texts_of(found.source, found.tokenizer, config.reward_model.system)
    except ValueError as e:
        raise ConfigError(f"The reward model of config.reward_model.path cannot be used: {e}") from e
    return found


def begin(phase: Phase, workdir: pathlib.Path) -> None:
    """Writes the source of a pretrained reward model to the run's work directory."""
    if phase.pretrained:
        with writing(workdir / "reward_model"):
            (workdir / "reward_model").mkdir(exist_ok=True)
        origin = {"path": phase.config.reward_model.path, "config": dict(phase.pretrained.source)}
        write_json(workdir / "reward_model" / model_files.SOURCE, origin)


def scorer(
    phase: Phase, decoder: models.Params, console: rich.console.Console, should_stop: Callable[[], bool] = lambda: False
) -> RewardModelScorer:
    """Returns the scorer of the phase's reward model. Trains the model first if it is not trained yet."""
    c = phase.config
    if phase.pretrained:
        return pretrained_scorer(c, phase.pretrained, phase.tokenizer, phase.mesh)
    model, params = get_reward_model(phase, decoder, console, should_stop)
    return _trained_scorer(c, model, params, phase.mesh, c.prompts_per_step // c.sampling.parts)


def load_scorer(
    c: Config, workdir: pathlib.Path, tokenizer: data.Tokenizer, mesh: jax.sharding.Mesh, batch_size: int
) -> RewardModelScorer:
    """Returns the scorer of a reward model: of config.reward_model.path, else of the run in `workdir`.

    `tokenizer` is that of the policy. The prompts of a batch are scored in as many microbatches as in training, if the devices can share them evenly.
    Raises ConfigError, ValueError or OSError if there is no such reward model, or if its tokenizer is another one.
    """
    directory = pathlib.Path(c.reward_model.path).expanduser() if c.reward_model.path else workdir / "reward_model"
    if c.reward_model.path and not is_ours(directory):
        return pretrained_scorer(c, open_pretrained(c, mesh, workdir), tokenizer, mesh)
    model, params = load_reward_model(directory, tokenizer_digest(tokenizer), mesh=mesh)
    return _trained_scorer(c, model, params, mesh, batch_size)


def _trained_scorer(
    c: Config, model: models.ModelConfig, params: models.Params, mesh: jax.sharding.Mesh, batch_size: int
) -> RewardModelScorer:
    # As many microbatches as for the log-probabilities of a policy of this size.
    parts = sharding.microbatches(mesh, batch_size, devices.microbatches(model, c, mesh) * c.update.minibatches)
    score = group_scoring_program(
        devices.for_devices(model, c, mesh), mesh, parts, **devices.update_sizes(model, c, mesh)
    )
    return lambda rollout, batch: (score(params, rollout), {})


def group_scoring_program(
    model: models.ModelConfig, mesh: jax.sharding.Mesh, microbatches: int, lengths: int = 1, wave_tokens: int = 0
) -> Callable[[models.Params, Rollout], jax.Array]:
    """Returns the jitted (params, rollout) -> scores f32[P, G], NaN for no tokens; `lengths`, `wave_tokens` as in `scoring.score`."""

    def score(params: models.Params, rollout: Rollout) -> jax.Array:
        if lengths == 1:
            return reward_model.group_scores(model, params, rollout, parts=microbatches)
        decoder, none = reward_model.headless(model), jnp.full(rollout.tokens.shape[:2], jnp.nan)

        def one(part, prompts):
            return reward_model.completion_scores(model, params, part.tokens, part.mask, scoring.prompt_cache(prompts))

        return scoring.map_waves(decoder, params["decoder"], rollout, one, none, microbatches, lengths, wave_tokens)

    return jax.jit(sharding.on_mesh(mesh, score), out_shardings=sharding.batch_sharding(mesh))


def pretrained_scorer(
    c: Config, opened: models.Opened, tokenizer: data.Tokenizer, mesh: jax.sharding.Mesh
) -> TextScorer:
    """Returns the scorer of a pretrained reward model, with its weights on the mesh in the dtypes of the policy."""
    assert opened.tokenizer is not None  # checked by `open_pretrained`
    model, m = devices.for_devices(opened.config, c, mesh), c.model
    model = dataclasses.replace(model, param_dtype=m.param_dtype, compute_dtype=m.compute_dtype, remat="none")
    return TextScorer(
        model,
        models.place_weights(opened, model, mesh, models.RewardModel),
        opened.tokenizer,
        opened.source,
        policy_tokenizer=tokenizer,
        skip_special=c.reward.skip_special_tokens,
        system=c.reward_model.system,
        max_length=c.reward_model.max_length,
        parts=devices.microbatches(model, c, mesh) * c.update.minibatches,
        sharding=sharding.batch_sharding(mesh),
        **devices.update_sizes(model, c, mesh),
    )


def get_reward_model(
    phase: Phase, decoder: models.Params, console: rich.console.Console, should_stop: Callable[[], bool] = lambda: False
) -> tuple[models.ModelConfig, models.Params]:
    """Loads the phase's reward model if it is trained, else trains it from the weights of `decoder`."""
    if is_ours(phase.directory):
        console.print(f"The reward model in {phase.directory} is trained.", soft_wrap=True)
        return load_reward_model(phase.directory, tokenizer_digest(phase.tokenizer), mesh=phase.mesh)
    return phase.model, train_reward_model(phase, decoder, console, should_stop)


def train_reward_model(
    phase: Phase, decoder: models.Params, console: rich.console.Console, should_stop: Callable[[], bool] = lambda: False
) -> models.Params:
    """Trains on the pairs from the newest checkpoint of a phase; prints held-out metrics before and after.

    Training begins with the weights `decoder`, see `reward_model.init_params`, which are not donated. `should_stop`, from
    `hosts.preemption`, is called after every step; if it is true the step is saved and Preempted is raised.

    Returns the trained parameters. They are also in the directory's params/, next to metrics.jsonl and reward_model.json.
    """
    c, r, directory = phase.config, phase.config.reward_model, phase.directory
    work, pairs, held_out = phase.work, phase.pairs, phase.held_out
    assert work is not None and pairs is not None and held_out is not None  # `setup` makes all three, or none
    supervised = config_lib.Supervised(steps=r.steps, learning_rate=r.learning_rate)
    optimizer = make_supervised_optimizer(dataclasses.replace(c, supervised=supervised))
    shardings, by_prompt = state_shardings(phase.model, phase.mesh, optimizer), sharding.batch_sharding(phase.mesh)
    place = lambda batch: jax.tree.map(lambda x: hosts.put_rows(x, by_prompt, r.batch_size), batch)

    def fresh(decoder, seed) -> TrainState:
        key = jax.random.fold_in(jax.random.key(seed), _INIT)
        params = reward_model.init_params(phase.model, key, decoder)
        return TrainState(jnp.int32(0), params, {}, init_opt_state(optimizer, params), (), jnp.int32(0))

    model = devices.with_remat_of_pairs(phase.model, c, phase.mesh)
    update = jax.jit(make_update(model, optimizer), donate_argnums=0, out_shardings=(shardings, None))
    score = jax.jit(functools.partial(reward_model.group_scores, phase.model))
    evaluation = lambda params: evaluate(lambda batch: score(params, place(batch)), held_out)

    def step(i: int, state: TrainState, clock: Clock):
        state, metrics = update(state, place(pairs.batch(i)))
        return state, {k: float(v) for k, v in jax.device_get(metrics).items()}, None

    if hosts.is_first():
        work.begin(phase.tokenizer)
    hosts.barrier("reward model's directory")
    state = jax.jit(fresh, out_shardings=shardings)(decoder, np.int32(c.seed))
    saver = checkpoints.Checkpoints(directory / "checkpoints", c.checkpoint.keep)
    number, state = saver.restore(state) or (0, state)
    if number:
        console.print(f"Going on from {saver.directory / str(number)}.", soft_wrap=True)
    begun = state.params
    state = run_loop(
        Loop("reward model", "step {} of the reward model", directory, number, r.steps, c, console, should_stop),
        state,
        step,
        saver.save,
        progress=lambda metrics: f"loss {metrics['reward_model/loss']:.3f}",
        advice=lambda *_: "Lower config.reward_model.learning_rate.",
        before=lambda: evaluation(begun),
        after=lambda done, state, *_: evaluation(state.params) if done == r.steps else {},
    )
    saver.close()
    checkpoints.save_params(directory / "params", state.params)
    if hosts.is_first():
        _report(phase, console)
    hosts.barrier("reward model")
    console.print(f"Reward model: {directory}", soft_wrap=True)
    return state.params


def _report(phase: Phase, console: rich.console.Console) -> None:
    """Writes reward_model.json and prints the held-out metrics before and after the training."""
    metrics = read_metrics(phase.directory / "metrics.jsonl")
    lines = [{name: value for name, value in line.items() if name.startswith(_HELD_OUT)} for line in metrics]
    measured = [line for line in lines if line]
    held_out = {name.removeprefix(_HELD_OUT): value for name, value in measured[-1].items()}
    assert phase.pairs is not None and phase.held_out is not None
    facts: dict[str, Any] = {"steps": phase.config.reward_model.steps, "pairs": phase.pairs.size}
    facts["held_out"] = held_out | {"pairs": phase.held_out.size}
    write_description(phase.directory, phase.model, tokenizer_digest(phase.tokenizer), facts)
    print_summary(console, measured[0], measured[-1])
    console.print(f"The held-out metrics are of {phase.held_out.size} pairs; there are at most config.eval.prompts.")


def make_update(config: models.ModelConfig, optimizer: optax.GradientTransformation) -> Callable:
    """Makes update(state, pairs) -> (state, metrics), one Bradley-Terry step; jit it with the state donated."""
    grad = jax.value_and_grad(functools.partial(reward_model.pair_loss, config), has_aux=True)

    def update(state: TrainState, pairs):
        (loss, metrics), grads = grad(state.trained, pairs)
        params, opt_state, norm, applied = apply_gradients(optimizer, state.trained, state.opt_state, grads, loss)
        number, position = state.step + 1, state.data_position + 1
        state = state._replace(step=number, trained=params, opt_state=opt_state, data_position=position)
        metrics |= {"reward_model/loss": loss, "reward_model/grad_norm": norm, "skipped_update_ratio": 1.0 - applied}
        return state, metrics

    return update


def state_shardings(
    config: models.ModelConfig, mesh: jax.sharding.Mesh, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the sharding of every leaf of the TrainState; optimizer moments are sharded like their weights."""
    whole: Any = sharding.replicated(mesh)  # shardings in the places of arrays
    params = reward_model.param_shardings(config, mesh)
    opt_state = optimizer_shardings(optimizer, reward_model.abstract_params(config), params, whole)
    return TrainState(whole, params, {}, opt_state, (), whole)


def evaluate(score: Callable, pairs: PreferenceStream) -> dict[str, float]:
    """Measures on one epoch of pairs how often and by how much the chosen completion scores above the rejected one.

    `score` maps a PreferenceBatch to f32[B, 2]. Pairs are not shuffled, and pairs of the last batch beyond the epoch do
    not count. Returns `reward_model/held_out/accuracy`, the share of pairs with the chosen one strictly above, and
    `reward_model/held_out/margin`, the mean difference.
    """
    scores: list[np.ndarray] = []
    count = 0
    while count < pairs.size:
        scores.append(hosts.to_host(score(pairs.batch(len(scores)))))
        count += len(scores[-1])
    table = np.concatenate(scores)[: pairs.size]
    margin = table[:, 0] - table[:, 1]
    return {f"{_HELD_OUT}accuracy": float((margin > 0).mean()), f"{_HELD_OUT}margin": float(margin.mean())}
