"""The compiled functions of a run, and where their arrays live: what `train`, `evaluate` and `bench` share."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_reason import models
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.methods import Method
from jaxrl_reason.models import sharding
from jaxrl_reason.rl import experience, hosts, learner, rollout
from jaxrl_reason.rl.learner import TrainState

# What the keys of randomness are for: folded into the seed before anything else.
INIT, ROLLOUT, UPDATE, EVAL = range(4)


@dataclasses.dataclass(frozen=True)
class Programs:
    """Jitted functions. P prompts, G completions (one more, greedy, where the method asks), T tokens.

    Attributes:
      sharding: of arrays with a leading prompt axis.
      jitted: the functions below before their constants are bound, by name: for compiling ahead of time.
      abstract_state: the TrainState's shapes, dtypes and shardings; nothing is allocated.
      init: () -> TrainState with random weights.
      restart: (params) -> TrainState at step 0 with these weights, which are donated.
      for_rollouts: (params) -> the weights as rollouts read them, see `sharding.rollout_mesh`; None where they lie so already.
      generate: (these, batch or one of its config.sampling.parts, step int32 array) -> Rollout for training.
      join: (*parts) -> one tree out of those of a batch's parts.
      generate_eval: (these, whole batch) -> Rollout for evaluation; its keys never change.
      prepare: (Groups, advantage_state, kl or None, LaSeR's c_ref or None) -> (Experience, advantage_state, metrics).
      mean_reward: (Groups) -> f32 scalar, whatever the update will learn from.
      fill: (buffer, filled, Groups) -> (buffer, filled, share kept), for dynamic sampling.
      score: (params, Rollout) -> Scored, under any weights.
      update: (TrainState, Experience) -> (TrainState, metrics, Mismatch); the state is donated.
      gradient: (params, Experience) -> (gradients, metrics, mismatches), of the whole batch as one minibatch.
      supervised_update: (TrainState, SolutionBatch) -> (TrainState, metrics); the state is donated.
      learning_rate: (training step) -> float.
    """

    sharding: jax.sharding.NamedSharding
    jitted: Mapping[str, Callable]
    abstract_state: TrainState
    init: Callable
    restart: Callable
    for_rollouts: Callable | None
    generate: Callable
    join: Callable
    generate_eval: Callable
    prepare: Callable
    mean_reward: Callable
    fill: Callable
    score: Callable
    update: Callable
    gradient: Callable
    supervised_update: Callable
    learning_rate: Callable[[int], float]


def mesh_of(config: Config, devices=None) -> jax.sharding.Mesh:
    """The mesh of a configuration over these devices; None: all."""
    m = config.mesh
    return sharding.make_mesh(m.data, m.fsdp, m.tensor, m.slice, devices=devices)


def with_attention(model: models.ModelConfig, config: Config, mesh: jax.sharding.Mesh) -> models.ModelConfig:
    """The decoder with the attention that config.model.attention means on these devices.

    Raises:
      ConfigError: the devices cannot run it.
    """
    chosen, device = config.model.attention, mesh.devices.flat[0]
    unable = device.device_kind in ("TPU v2", "TPU v3")  # they multiply no bfloat16 inside kernels
    if chosen == "auto":
        chosen = "splash" if device.platform == "tpu" and not unable else "plain"
    if chosen == "splash" and unable:
        raise ConfigError(
            f"config.model.attention is 'splash', whose kernels a {device.device_kind} cannot run; 'auto' is 'plain' there."
        )
    return dataclasses.replace(model, attention=chosen)


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
) -> Programs:
    """The programs of a configuration; nothing is compiled, and nothing put on a device, before it is called.

    Args:
      config, method, model: what to run.
      mesh: where.
      eos_ids, pad_id: of the tokenizer.
      weights, verdict: of the rewards, see `experience.make_prepare`.
      probe_token: the token of LaSeR's self-reward, where the method has one.
      legal: bool[T, V], tokens allowed at each position; None: all.
      expert: see `experience.make_prepare`.

    Raises:
      ConfigError: the mesh does not divide the prompts of a step or the model.
    """
    schedule, optimizer = make_optimizer(config)
    try:
        decoding = sharding.rollout_mesh(mesh, config.mesh.rollout_tensor or mesh.shape["tensor"])
        part = config.prompts_per_step // config.sampling.parts
        sharding.check_batch(mesh, "prompts_per_step", config.prompts_per_step)
        sharding.check_batch(mesh, "prompts_per_step / sampling.parts", part)
        sharding.check_batch(
            mesh,
            "prompts_per_step / (update.minibatches x update.accumulation), the prompts of a microbatch,",
            config.prompts_per_step // (config.update.minibatches * config.update.accumulation),
        )
        shardings = state_shardings(model, mesh, optimizer, method)
    except ValueError as e:
        raise ConfigError(f"config.{e}") from e
    try:
        sharding.check_batch(decoding, "prompts_per_step / sampling.parts", part)
        rollout_shardings = models.param_shardings(model, decoding)
    except ValueError as e:
        raise ConfigError(
            f"While sampling the mesh is data={decoding.shape['data']}, tensor={decoding.shape['tensor']}, as "
            f"config.mesh.rollout_tensor={config.mesh.rollout_tensor} asks for, and there {e}"
        ) from e
    model = with_attention(model, config, mesh)
    batch_sharding = sharding.batch_sharding(mesh)
    whole = sharding.replicated(mesh)
    place = lambda tree, size: jax.tree.map(lambda x: hosts.put_share(x, batch_sharding, size), tree)
    constant = functools.cache(lambda value, dtype=np.float32: hosts.put(np.asarray(value, dtype), whole))
    root = jax.random.key(config.seed)
    greedy = int("greedy_rewards" in method.signals)  # the greedy completion rides along with its group
    temperature = lambda: constant(config.sampling.temperature)
    temperatures = lambda: constant((config.sampling.temperature,) * config.group_size + (0.0,) * greedy)

    supervised_optimizer = make_supervised_optimizer(config)
    options = update_options(config, method, probe_token)

    def fresh(params):
        opt_state = learner.init_opt_state(optimizer, models.lora.split(model, params)[0])
        return TrainState(jnp.int32(0), params, opt_state, method.advantage.init(), jnp.int32(0))

    def sampler(group_size, purpose, **extra):
        def generate(params, tokens, mask, prompt_ids, features, step, temperature):
            key = jax.random.fold_in(jax.random.fold_in(root, purpose), step)
            return rollout.generate(
                model,
                params,
                tokens,
                mask,
                prompt_ids,
                key,
                group_size=group_size,
                max_length=config.max_completion_length,
                eos_ids=eos_ids,
                pad_id=pad_id,
                temperature=temperature,
                legal=legal,
                features=features,
                probe_token=probe_token,
                probe_temperature=config.sampling.temperature,
                **extra,
            )

        return jax.jit(sharding.on_mesh(decoding, generate), out_shardings=batch_sharding)

    update = learner.make_update(model, options, optimizer, legal)
    gradient = learner.make_gradient(model, options, legal)

    def update_step(state, batch, temperature):
        return update(state, batch, temperature, jax.random.fold_in(jax.random.fold_in(root, UPDATE), state.step))

    init = jax.jit(lambda: fresh(models.init_params(model, jax.random.fold_in(root, INIT))), out_shardings=shardings)
    abstract_state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(init), shardings
    )
    score = functools.partial(
        learner.score,
        model,
        legal=legal,
        parts=options.accumulation * options.minibatches,
        chunk=options.logprob_chunk,
        probe_token=probe_token,
    )
    jitted = {
        "reshard": jax.jit(functools.partial(_matrices_for_products, model), out_shardings=rollout_shardings),
        "rollout": sampler(
            config.group_size + greedy,
            ROLLOUT,
            with_prompt_logprobs="prompt_confidence" in method.signals,
            int8=config.sampling.quantize == "int8",
        ),
        "evaluation": sampler(config.eval.samples, EVAL),
        "score": jax.jit(sharding.on_mesh(mesh, score), out_shardings=batch_sharding),
        "update": jax.jit(
            sharding.on_mesh(mesh, update_step), donate_argnums=0, out_shardings=(shardings, whole, whole)
        ),
        "gradient": jax.jit(sharding.on_mesh(mesh, gradient)),
        "supervised": jax.jit(
            sharding.on_mesh(mesh, learner.make_supervised_update(model, supervised_optimizer, legal)),
            donate_argnums=0,
            out_shardings=(shardings, whole),
        ),
    }
    # What a rollout reads has to lie on its mesh.
    on_decoding = sharding.batch_sharding(decoding), sharding.replicated(decoding), sharding.replicated(decoding)
    move = (lambda *args: args) if decoding is mesh else jax.jit(lambda *args: args, out_shardings=on_decoding)

    def sampled(name, size, params, batch, step, temperature):
        prompts = batch.tokens, batch.mask, batch.prompt_ids, batch.features
        prompts, *rest = move(place(prompts, size), step, temperature)
        return jitted[name](params, *prompts, *rest)

    return Programs(
        sharding=batch_sharding,
        jitted=jitted,
        abstract_state=abstract_state,
        init=init,
        restart=jax.jit(fresh, donate_argnums=0, out_shardings=shardings),
        for_rollouts=None if decoding is mesh else jitted["reshard"],
        generate=lambda params, part, step: sampled(
            "rollout", config.prompts_per_step // config.sampling.parts, params, part, step, temperatures()
        ),
        join=jax.jit(lambda *parts: learner.join(parts), out_shardings=batch_sharding),
        generate_eval=lambda params, batch: sampled(
            "evaluation",
            len(batch.rows),
            params,
            batch.take(hosts.places(batch_sharding, len(batch.rows))),
            constant(0, np.int32),
            constant(config.eval.temperature),
        ),
        prepare=jax.jit(
            experience.make_prepare(
                method, weights, verdict, mask_truncated=config.sampling.mask_truncated_completions, expert=expert
            ),
            out_shardings=(batch_sharding, whole, whole),
        ),
        mean_reward=jax.jit(functools.partial(experience.mean_reward, weights=weights, group_size=config.group_size)),
        fill=jax.jit(
            functools.partial(experience.fill, verdict=verdict, group_size=config.group_size),
            donate_argnums=0,
            out_shardings=(batch_sharding, whole, whole),
        ),
        score=lambda params, rollout: jitted["score"](params, rollout, temperature()),
        update=lambda state, batch: jitted["update"](state, batch, temperature()),
        gradient=lambda params, batch: jitted["gradient"](params, batch, temperature()),
        supervised_update=lambda state, batch: jitted["supervised"](
            state, *place(tuple(batch), config.supervised.batch_size)
        ),
        learning_rate=lambda step: float(schedule(step * options.epochs * options.minibatches)),
    )


def _matrices_for_products(model: models.ModelConfig, params):
    """The weights with the layers' matrices and the head in the dtype in which products read them, which is what a rollout does."""
    cast = lambda x: x.astype(model.compute_dtype) if x.ndim == 3 else x
    params = params | {"layers": jax.tree.map(cast, params["layers"])}
    return params | {name: params[name].astype(model.compute_dtype) for name in params.keys() & {"head"}}


def needs_kl(config: Config, method: Method) -> bool:
    """Whether a step measures the KL divergence from the reference policy."""
    return config.update.kl_coefficient > 0 or "kl" in method.signals


def needs_reference(config: Config, method: Method) -> bool:
    """Whether a step scores its completions under the reference policy."""
    self_reward = method.loss.self_reward
    return needs_kl(config, method) or bool(self_reward and self_reward.reference == "exact")


def needs_old_logprobs(config: Config, method: Method) -> bool:
    """Whether a step's updates need the log-probabilities of the policy before the first of them."""
    rounded = bool(config.sampling.quantize)
    return config.update.epochs * config.update.minibatches > 1 or (rounded and "kl" in method.signals)


def sampler_is_exact(config: Config) -> bool:
    """Whether these are the sampler's own: the float32 one agrees with the trainer to 1e-5, others are scored again."""
    return config.model.compute_dtype == config.model.param_dtype == "float32" and not config.sampling.quantize


def columns_of(method: Method) -> tuple[str, ...]:
    """The arrays of the data that go with each group."""
    values = ("values",) if "values" in method.signals else ()
    return values + (("digits",) if method.loss.expert_coefficient else ())


def update_options(config: Config, method: Method, probe_token: int | None = None) -> learner.UpdateOptions:
    cap = config.sampling.importance_cap if config.sampling.quantize else 0.0
    return learner.UpdateOptions(
        loss=method.loss, probe_token=probe_token, importance_cap=cap, **dataclasses.asdict(config.update)
    )


def _schedule(peak: float, kind: str, warmup: int, steps: int, per_step: int):
    """Learning rate by optimizer update, with `per_step` of them a training step."""
    rest = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[kind]
    # The first update already moves: warm-up goes from peak / warmup to peak.
    ramp = lambda step: peak * jnp.minimum((step + 1) / max(warmup, 1), 1.0)
    return lambda count: jnp.where(
        count // per_step < warmup, ramp(count // per_step), after(count // per_step - warmup)
    )


def make_optimizer(config: Config) -> tuple[Callable, optax.GradientTransformation]:
    """(learning rate by optimizer update, gradient clipping + AdamW)."""
    o = config.optimizer
    schedule = _schedule(
        o.learning_rate,
        o.schedule,
        o.warmup_steps,
        config.steps,
        config.update.epochs * config.update.minibatches,
    )
    return schedule, _optimizer(config, schedule)


def make_supervised_optimizer(config: Config) -> optax.GradientTransformation:
    """The same chain, so that both phases share one checkpoint format; cosine to 0 after 5 % warm-up."""
    s = config.supervised
    return _optimizer(config, _schedule(s.learning_rate, "cosine", s.steps // 20, s.steps, 1))


def _optimizer(config: Config, schedule) -> optax.GradientTransformation:
    o = config.optimizer
    adamw = optax.adamw(schedule, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay)
    chain = optax.chain(optax.clip_by_global_norm(o.max_grad_norm), adamw)
    return with_float32_master(chain) if o.float32_master else chain


class MasterState(NamedTuple):
    """State of `with_float32_master`: the weights in float32, and the wrapped optimizer's state."""

    master: Any
    inner: Any


def with_float32_master(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` applied to a float32 copy of the weights, which the weights follow rounded.

    bfloat16 has 8 bits: an update below 1/256 of a weight is lost there, and adds up in the copy. Its updates lead from the weights
    (widened to float32) to the new copy.
    """

    def update(grads, state, params):
        updates, inner_state = inner.update(grads, state.inner, state.master)
        master = optax.apply_updates(state.master, updates)
        return jax.tree.map(jnp.subtract, master, params), MasterState(master, inner_state)

    return optax.GradientTransformation(lambda params: MasterState(params, inner.init(params)), update)


def state_shardings(model: models.ModelConfig, mesh: jax.sharding.Mesh, optimizer, method: Method) -> TrainState:
    """A sharding for every leaf of a TrainState: optimizer moments lie where their weights lie.

    Raises:
      ValueError: a mesh axis does not divide the dimension it splits.
    """
    whole, params = sharding.replicated(mesh), models.param_shardings(model, mesh)
    trained, _ = models.lora.split(model, models.abstract_params(model))
    abstract = jax.eval_shape(functools.partial(learner.init_opt_state, optimizer), trained)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer, lambda _, s: s, abstract, models.lora.split(model, params)[0], transform_non_params=lambda _: whole
    )
    advantage_state = jax.tree.map(lambda _: whole, jax.eval_shape(method.advantage.init))
    return TrainState(whole, params, opt_state, advantage_state, whole)
