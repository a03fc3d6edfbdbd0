"""The compiled functions of a run, and the shardings of their arrays: shared by `train`, `evaluate`, `bench` and `plan`."""

from collections.abc import Callable, Iterable, Mapping
import concurrent.futures
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_reason import models
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data import PromptBatch, SolutionBatch
from jaxrl_reason.methods import Method
from jaxrl_reason.models import sharding
from jaxrl_reason.models.decoding import compaction, rollout
from jaxrl_reason.rl import experience, hosts, learner, scoring
from jaxrl_reason.rl.devices import for_devices, microbatches, supervised_microbatches, update_sizes
from jaxrl_reason.rl.optimizer import init_opt_state, make_optimizer, make_supervised_optimizer
from jaxrl_reason.rl.requirements import Requirements, requirements
from jaxrl_reason.rl.types import Experience, Gradient, Groups, LogProbs, Prepared, Rollout, TrainState, UpdateResult

# The purposes of random numbers, folded into the seed before anything else.
INIT, ROLLOUT, UPDATE, EVAL, SUPERVISED = range(5)
SEED = jax.ShapeDtypeStruct((), jnp.int32)  # the last argument of the programs that draw random numbers


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """The jitted functions of a run as methods. P prompts, G completions per prompt (one more if the method asks for a greedy one), T tokens."""

    config: Config
    model: models.ModelConfig  # the decoder, with what suits the devices
    needs: Requirements
    sharding: jax.sharding.NamedSharding  # of arrays with a leading prompt axis
    decoding: jax.sharding.NamedSharding  # the same on the mesh that samples; both are equal if one mesh does both
    jitted: Mapping[str, Any]  # the functions before their constants are bound, by name, to compile ahead of time
    abstract_state: TrainState  # shapes, dtypes and shardings; nothing is allocated
    schedule: Callable  # the learning rate as a function of the optimizer update
    ahead: dict[str, concurrent.futures.Future] = dataclasses.field(default_factory=dict)  # see `rl.ahead`

    def _call(self, name: str, *arguments: Any) -> Any:
        """Calls a program; if `rl.ahead` compiles it, waits for the end first. If that failed, the call raises the error."""
        if name in self.ahead:
            concurrent.futures.wait([self.ahead.pop(name)])
        return self.jitted[name](*arguments)

    def init(self) -> TrainState:
        """Returns step 0 with random weights."""
        return self.jitted["init"](self._seed)

    def restart(self, params: models.Params) -> TrainState:
        """Returns step 0 with these weights, which are donated."""
        return self.jitted["restart"](params)

    @property
    def moves_weights(self) -> bool:
        """Returns whether rollouts have a mesh of their own."""
        return self.decoding.mesh is not self.sharding.mesh

    def rollout_weights(self, params: models.Params) -> models.Params:
        """Returns the weights in the shardings and dtypes in which rollouts read them."""
        return self.jitted["reshard"](params) if self.moves_weights else params

    def generate(self, weights: models.Params, chunk: PromptBatch, step: jax.Array) -> Rollout:
        """Samples training completions for this process's rows of a batch, or of one of its `config.sampling.parts`.

        `weights` are from `rollout_weights`; `step` is an int32 scalar on the device.
        """
        temperatures = (self.config.sampling.temperature,) * self.config.group_size + (0.0,) * self.needs.greedy
        size = self.config.prompts_per_step // self.config.sampling.parts
        return self._sample("rollout", size, weights, chunk, step, self._constant(temperatures))

    def generate_eval(self, weights: models.Params, batch: PromptBatch, temperature: float | None = None) -> Rollout:
        """Samples completions for an evaluation batch that every process has whole. Its random numbers never change.

        `temperature` None is config.eval.temperature; 0 makes all completions of a prompt greedy.
        """
        size = len(batch.rows)
        mine = batch.take(hosts.local_rows(self.sharding, size))
        heat = self._constant(self.config.eval.temperature if temperature is None else temperature)
        return self._sample("evaluation", size, weights, mine, self._constant(0, np.int32), heat, self.truncation)

    @property
    def truncation(self) -> tuple[jax.Array | None, jax.Array | None]:
        """The last arguments of the evaluation's sampler: top-k and top-p, None if they keep all tokens. Training has none."""
        e = self.config.eval
        top_k = self._constant(e.top_k, np.int32) if e.top_k else None
        return top_k, self._constant(e.top_p) if e.top_p < 1 else None

    def join(self, *parts: Any) -> Any:
        """Joins the trees of the parts of a batch."""
        return self.jitted["join"](*parts)

    def make_experience(
        self,
        groups: Groups,
        advantage_state: Any,
        kl: jax.Array | None = None,
        probe_reference: jax.Array | None = None,
    ) -> Prepared:
        """See `experience.make_experience`."""
        return self.jitted["make_experience"](groups, advantage_state, kl, probe_reference)

    def sampled_means(self, groups: Groups) -> dict[str, jax.Array]:
        """Returns the mean total reward and length over all groups, informative or not; f32 scalars."""
        return self.jitted["sampled_means"](groups)

    def fill(self, buffer: Groups, filled: jax.Array, groups: Groups) -> tuple[Groups, jax.Array, jax.Array]:
        """See `experience.fill`; the buffer is donated."""
        return self.jitted["fill"](buffer, filled, groups)

    def compute_logprobs(self, params: models.Params, rollout: Rollout) -> LogProbs:
        """Computes the log-probabilities of a rollout under any weights."""
        return self.jitted["score"](params, rollout, self._constant(self.config.sampling.temperature))

    def update(self, state: TrainState, batch: Experience) -> UpdateResult:
        """Updates the weights; the state is donated."""
        return self._call("update", state, batch, self._constant(self.config.sampling.temperature), self._seed)

    def gradient(self, params: models.Params, batch: Experience) -> Gradient:
        """Computes the gradient of the whole batch as one minibatch."""
        return self.jitted["gradient"](params, batch, self._constant(self.config.sampling.temperature))

    def supervised_update(self, state: TrainState, batch: SolutionBatch) -> tuple[TrainState, dict[str, jax.Array]]:
        """Imitates a batch of solutions; the state is donated."""
        return self._call("supervised", state, self.place(batch, self.config.supervised.batch_size), self._seed)

    def cross_entropy(self, params: models.Params, batches: Iterable[SolutionBatch]) -> float:
        """Computes the mean cross-entropy per token of batches of solutions, of `config.supervised.batch_size` rows each."""
        placed = [self.place(batch, self.config.supervised.batch_size) for batch in batches]
        sums = jax.device_get([self.jitted["cross_entropy"](params, *batch) for batch in placed])
        return float(sum(loss for loss, _ in sums) / sum(tokens for _, tokens in sums))

    def learning_rate(self, state: TrainState) -> float:
        """Returns the learning rate of the next optimizer update. A skipped update does not move the schedule."""
        (_, count), *_ = optax.tree.get_all_with_path(state.opt_state, "count")
        return float(self.schedule(jax.device_get(count)))

    def place(self, tree: Any, size: int) -> Any:
        """Puts this process's rows of [size, ...] arrays on the devices."""
        return jax.tree.map(lambda x: hosts.put_rows(x, self.sharding, size), tree)

    def _sample(
        self, name: str, size: int, weights: models.Params, batch: PromptBatch, step, temperature, truncation=()
    ) -> Rollout:
        prompts = self.place((batch.tokens, batch.mask, batch.prompt_ids, batch.features), size)
        scalars = step, temperature, self._seed, *truncation
        if self.moves_weights:  # a rollout's inputs have to be on its mesh
            prompts, scalars = self.jitted["move"](prompts, scalars)
        return self._call(name, weights, *prompts, *scalars)

    @property
    def _seed(self) -> jax.Array:
        """The seed is an argument of the programs: the same compiled programs serve every seed."""
        return self._constant(self.config.seed, np.int32)

    @functools.cached_property
    def _constant(self) -> Callable[..., jax.Array]:
        """(value, dtype) -> a replicated array, put on the devices once."""
        whole = sharding.replicated(self.sharding.mesh)
        return functools.cache(lambda value, dtype=np.float32: hosts.put(np.asarray(value, dtype), whole))


def make_mesh(config: Config, devices: Any = None) -> jax.sharding.Mesh:
    """Returns the mesh of a configuration over these devices; None: all."""
    m = config.mesh
    return sharding.make_mesh(m.data, m.fsdp, m.tensor, m.slice, devices=devices)


def build(
    config: Config,
    method: Method,
    model: models.ModelConfig,
    mesh: jax.sharding.Mesh,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    weights: Mapping[str, float],
    verdict: str,
    probe_token: int | None = None,
    legal: np.ndarray | None = None,
    expert: Callable | None = None,
    end_at: np.ndarray | None = None,
) -> Programs:
    """Makes the programs of a configuration. Compiles nothing and puts nothing on a device before a program is called.

    Args:
      config, method, model, mesh: of the run.
      eos_ids, pad_id: of the tokenizer.
      weights, verdict, expert: see `experience.make_experience`.
      probe_token: the token of LaSeR's self-reward, if the method has one.
      legal: bool[T, V], tokens allowed at each position; None: all.
      end_at: for measurements, see `rollout.generate`; of training rollouts.

    Raises:
      ConfigError: the mesh does not divide the prompts of a step or the model.
    """
    schedule, optimizer = make_optimizer(config)
    decoding, shardings, rollout_shardings = _shardings(config, method, model, mesh, optimizer)
    model = for_devices(model, config, mesh)
    needs = requirements(config, method)
    options = update_options(config, method, model, probe_token, mesh)
    by_prompt, by_prompt_decoding = sharding.batch_sharding(mesh), sharding.batch_sharding(decoding)
    whole, whole_decoding = sharding.replicated(mesh), sharding.replicated(decoding)

    def sampler(purpose: int, group_size: int, **options: Any) -> Any:
        common = dict(eos_ids=eos_ids, pad_id=pad_id, legal=legal, probe_token=probe_token, **options)
        common |= dict(zip(("cache_pieces", "halvings"), sampling_sizes(config)))
        sample = _sample_fn(config, model, purpose, group_size, common)
        return jax.jit(sharding.on_mesh(decoding, sample), out_shardings=by_prompt)

    jitted = {
        "reshard": jax.jit(functools.partial(_matrices_for_products, model), out_shardings=rollout_shardings),
        "move": jax.jit(lambda *args: args, out_shardings=(by_prompt_decoding, whole_decoding)),
        "rollout": sampler(
            ROLLOUT,
            config.group_size + needs.greedy,
            with_prompt_logprobs=needs.prompt_logprobs,
            int8=config.sampling.quantize == "int8",
            end_at=end_at,
        ),
        "evaluation": sampler(EVAL, config.eval.samples),
        "join": jax.jit(lambda *parts: scoring.join_prompts(_stack(parts)), out_shardings=by_prompt),
        **_experience_programs(config, method, weights, verdict, expert, by_prompt, whole),
        **_learner_programs(config, method, model, mesh, options, optimizer, legal, shardings),
    }
    state = jax.eval_shape(jitted["init"], SEED)
    abstract_state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    return Programs(config, model, needs, by_prompt, by_prompt_decoding, jitted, abstract_state, schedule)


def _shardings(config: Config, method: Method, model: models.ModelConfig, mesh: jax.sharding.Mesh, optimizer: Any):
    """Returns the mesh that samples, the shardings of the state, and the shardings of the weights while sampling.

    Raises:
      ConfigError: a mesh does not divide the prompts of a step or the model.
    """
    chunk = config.prompts_per_step // config.sampling.parts
    per_microbatch = config.prompts_per_step // (config.update.minibatches * max(config.update.accumulation, 1))
    try:
        decoding = sharding.rollout_mesh(mesh, config.mesh.rollout_tensor or mesh.shape["tensor"])
        sharding.check_batch(mesh, "prompts_per_step", config.prompts_per_step)
        sharding.check_batch(mesh, "prompts_per_step / sampling.parts", chunk)
        sharding.check_batch(
            mesh,
            "prompts_per_step / (update.minibatches x update.accumulation), the prompts of a microbatch,",
            per_microbatch,
        )
        shardings = state_shardings(model, mesh, optimizer, method)
    except ValueError as e:
        raise ConfigError(f"config.{e}") from e
    try:
        sharding.check_batch(decoding, "prompts_per_step / sampling.parts", chunk)
        rollout_shardings = models.param_shardings(model, decoding)
    except ValueError as e:
        raise ConfigError(
            f"With config.mesh.rollout_tensor={config.mesh.rollout_tensor} the mesh that samples is data={decoding.shape['data']}, "
            f"tensor={decoding.shape['tensor']}, and for this mesh {e}"
        ) from e
    return decoding, shardings, rollout_shardings


def sampling_sizes(config: Config) -> tuple[int, int]:
    """Returns the pieces of the completions' cache and the halvings of the decoding loop, as configured or chosen by the length."""
    s, T = config.sampling, config.max_completion_length
    return compaction.loop_sizes(T, s.cache_pieces, s.halvings)


def _sample_fn(config: Config, model: models.ModelConfig, purpose: int, group_size: int, options: dict) -> Callable:
    def generate(params, tokens, mask, prompt_ids, features, step, temperature, seed, top_k=None, top_p=None):
        return rollout.generate(
            model,
            params,
            tokens,
            mask,
            prompt_ids,
            jax.random.fold_in(_key(seed, purpose), step),
            group_size=group_size,
            max_length=config.max_completion_length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            features=features,
            probe_temperature=config.sampling.temperature,
            **options,
        )

    return generate


def _experience_programs(config, method, weights, verdict, expert, by_prompt, whole) -> dict[str, Any]:
    """Returns the programs between rewards and the update."""
    make_experience = functools.partial(
        experience.make_experience,
        method=method,
        weights=weights,
        verdict=verdict,
        mask_truncated=config.sampling.mask_truncated_completions,
        expert=expert,
    )
    sampled_means = lambda groups: {
        "reward": experience.mean_reward(groups, weights, config.group_size),
        "mean_length": experience.mean_length(groups, config.group_size),
    }
    fill = functools.partial(experience.fill, verdict=verdict, group_size=config.group_size)
    return {
        "make_experience": jax.jit(make_experience, out_shardings=Prepared(by_prompt, whole, whole)),
        "sampled_means": jax.jit(sampled_means),
        "fill": jax.jit(fill, donate_argnums=0, out_shardings=(by_prompt, whole, whole)),
    }


def _learner_programs(config, method, model, mesh, options, optimizer, legal, shardings) -> dict[str, Any]:
    """Returns the programs that initialise, score and update."""
    by_prompt: Any = sharding.batch_sharding(mesh)
    whole: Any = sharding.replicated(mesh)

    def fresh(params) -> TrainState:
        trained, frozen = models.lora.split(model, params)
        state = init_opt_state(optimizer, trained)
        return TrainState(jnp.int32(0), trained, frozen, state, method.advantage.init(), jnp.int32(0))

    update = learner.make_update(model, options, optimizer, legal)

    def update_step(state, batch, temperature, seed):
        return update(state, batch, temperature, jax.random.fold_in(_key(seed, UPDATE), state.step))

    parts = options.accumulation * options.minibatches

    def score(params, rollout, temperature):
        return scoring.score(
            model,
            params,
            rollout,
            temperature,
            legal,
            microbatches=sharding.microbatches(mesh, len(rollout.tokens), parts),  # evaluations have other batches
            chunk=options.logprob_chunk,
            probe_token=options.probe_token,
            lengths=options.lengths,
            wave_tokens=options.wave_tokens,
        )

    dropout = config.regression.encoder_dropout
    imitate = learner.make_supervised_update(
        model, make_supervised_optimizer(config), legal, dropout, supervised_microbatches(model, config, mesh)
    )

    def supervised(state, batch, seed):
        return imitate(state, batch, jax.random.fold_in(_key(seed, SUPERVISED), state.step))

    mean = learner.make_cross_entropy(model, legal)
    tokens = lambda batch: batch[3].sum(dtype=jnp.float32)
    cross_entropy = lambda params, *batch: (mean(params, *batch) * tokens(batch), tokens(batch))
    gradient = lambda params, batch, temperature: learner.gradient(model, options, params, batch, temperature, legal)
    init = lambda seed: fresh(models.init_params(model, _key(seed, INIT)))
    on_mesh = functools.partial(sharding.on_mesh, mesh)
    return {
        "init": jax.jit(init, out_shardings=shardings),
        "restart": jax.jit(fresh, donate_argnums=0, out_shardings=shardings),
        "score": jax.jit(on_mesh(score), out_shardings=by_prompt),
        "update": jax.jit(on_mesh(update_step), donate_argnums=0, out_shardings=UpdateResult(shardings, whole, whole)),
        "gradient": jax.jit(on_mesh(gradient)),
        "cross_entropy": jax.jit(on_mesh(cross_entropy), out_shardings=whole),
        "supervised": jax.jit(on_mesh(supervised), donate_argnums=0, out_shardings=(shardings, whole)),
    }


def _key(seed: jax.Array, purpose: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), purpose)


def _stack(parts: tuple[Any, ...]) -> Any:
    return jax.tree.map(lambda *xs: jnp.stack(xs), *parts)


def _matrices_for_products(model: models.ModelConfig, params: models.Params) -> models.Params:
    """Returns the weights with the layers' matrices and the head in the dtype in which products read them, as a rollout does."""
    cast = lambda x: x.astype(model.compute_dtype) if x.ndim == 3 else x
    params = params | {"layers": jax.tree.map(cast, params["layers"])}
    return params | {name: params[name].astype(model.compute_dtype) for name in params.keys() & {"head"}}


def update_options(
    config: Config, method: Method, model: models.ModelConfig, probe_token: int | None, mesh: jax.sharding.Mesh
) -> learner.UpdateOptions:
    cap = config.sampling.importance_cap if config.sampling.quantize else 0.0
    common = dataclasses.asdict(config.update) | update_sizes(model, config, mesh)
    common["accumulation"] = microbatches(model, config, mesh)
    return learner.UpdateOptions(loss=method.loss, probe_token=probe_token, importance_cap=cap, **common)


def state_shardings(
    model: models.ModelConfig, mesh: jax.sharding.Mesh, optimizer: optax.GradientTransformation, method: Method
) -> TrainState:
    """Returns the sharding of every leaf of a TrainState. Optimizer moments are sharded like their weights.

    Raises:
      ValueError: a mesh axis does not divide the dimension it splits.
    """
    whole: Any = sharding.replicated(mesh)
    trained, frozen = models.lora.split(model, models.param_shardings(model, mesh))
    abstract, _ = models.lora.split(model, models.abstract_params(model))
    opt_state = optimizer_shardings(optimizer, abstract, trained, whole)
    advantage_state = jax.tree.map(lambda _: whole, jax.eval_shape(method.advantage.init))
    return TrainState(whole, trained, frozen, opt_state, advantage_state, whole)


def optimizer_shardings(
    optimizer: optax.GradientTransformation, abstract_params: Any, param_shardings: Any, whole: Any
) -> Any:
    """Returns the sharding of every leaf of an optimizer state: that of its weight, or `whole`."""
    abstract = jax.eval_shape(functools.partial(init_opt_state, optimizer), abstract_params)
    return optax.tree_utils.tree_map_params(
        optimizer, lambda _, s: s, abstract, param_shardings, transform_non_params=lambda _: whole
    )
