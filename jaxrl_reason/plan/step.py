"""Describes a training step by shapes with shardings. Compiles nothing, and reads only config.json of pretrained models."""

from collections.abc import Sequence
import dataclasses
import functools
import math
import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_reason import config as config_lib
from jaxrl_reason import models
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data import load_tokenizer
from jaxrl_reason.methods import Method
from jaxrl_reason.models import ModelConfig, reward_model, sharding
from jaxrl_reason.plan.lengths import skewed_lengths
from jaxrl_reason.rewards import model_files
from jaxrl_reason.rewards.scorer import LEARNED
from jaxrl_reason.rl import auxiliary
from jaxrl_reason.rl import experience as experience_lib
from jaxrl_reason.rl import programs as programs_lib
from jaxrl_reason.rl.devices import for_devices, microbatches
from jaxrl_reason.rl.types import Experience, Groups, Rollout


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step on given devices, as shapes with shardings."""

    config: Config
    method: Method
    programs: programs_lib.Programs
    model: ModelConfig  # the policy, with the attention that the devices run
    mesh: jax.sharding.Mesh  # of scoring and update
    decoding: jax.sharding.Mesh  # of rollouts
    decoding_params: Any  # the weights as rollouts read them
    rollout: Rollout  # of all prompts of the step, like the experience
    experience: Experience
    reward_config: ModelConfig | None  # None and {} if the run has no reward model
    reward_params: Any
    mean_length: float | None = None  # tokens per completion; None: the most

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """P, G, S, T of an update."""
        c = self.config
        return c.prompts_per_step, c.group_size, c.max_prompt_length, c.max_completion_length

    @property
    def rollout_sizes(self) -> tuple[int, int, int, int]:
        """P, G, S, T of one rollout: a share of the prompts, and a greedy completion if the method needs it."""
        P, _, S, T = self.sizes
        return P // self.config.sampling.parts, self.rollout.tokens.shape[1], S, T

    def completions(self, P: int, G: int) -> np.ndarray | None:
        """Returns tokens per completion, int[P, G]; None: all have the most."""
        mean, T = self.mean_length, self.config.max_completion_length
        return None if mean is None else skewed_lengths(P, G, T, mean)

    @property
    def attention(self) -> str:
        """The attention of the cost formulas, of the policy and of the reward model. They count blockwise attention as plain, which is more."""
        return "splash" if self.model.attention == "splash" else "plain"

    @property
    def probe(self) -> bool:
        """Whether a self-reward token is scored after the end of each completion."""
        return self.programs.needs.probe

    @property
    def pieces(self) -> int:
        """Microbatches per epoch."""
        return microbatches(self.model, self.config, self.mesh) * self.config.update.minibatches

    @functools.cached_property
    def memory(self) -> "Memory":
        state = self.programs.abstract_state
        return Memory(
            weights=bytes_per_device(state.params),
            optimizer=bytes_per_device(state.opt_state),
            reference=bytes_per_device(state.trained) if self.programs.needs.reference else 0.0,
            copy=bytes_per_device(self.decoding_params) if self.programs.moves_weights else 0.0,
            reward_model=bytes_per_device(self.reward_params),
        )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device of the arrays that live longer than a program; 0 for arrays that the run does not need."""

    weights: float  # of the policy as the update reads them
    optimizer: float
    reference: float
    copy: float  # the policy's weights as rollouts read them; 0 if rollouts read `weights`
    reward_model: float


def open_step(config: Config, devices: Sequence[jax.Device]) -> Step:
    """Returns the step of a run on the devices. Raises ConfigError if the configuration cannot run on them."""
    method = config_lib.validate(config)
    if config.regression.tokenizer:
        raise ConfigError(
            "config.regression.tokenizer is set. A plan reads no table, and a regression run's sizes depend on its "
            "table; only runs on text can be planned."
        )
    policy, reward_config = sizes_of(config)
    mesh, programs = _build_programs(config, method, policy, devices)
    model = for_devices(policy, config, mesh)
    if config.supervised.steps:
        try:
            sharding.check_batch(mesh, "config.supervised.batch_size", config.supervised.batch_size)
        except ValueError as e:
            raise ConfigError(str(e)) from e
    decoding = sharding.rollout_mesh(mesh, config.mesh.rollout_tensor or mesh.shape["tensor"])
    reward_params: Any = {}
    if reward_config:
        try:
            shardings = reward_model.param_shardings(reward_config, mesh)
        except ValueError as e:
            raise ConfigError(f"The reward model cannot be split over the mesh: config.{e}") from e
        reward_config = for_devices(reward_config, config, mesh)
        reward_params = _place(reward_model.abstract_params(reward_config), shardings)
    params = programs.abstract_state.params
    if programs.moves_weights:
        moved = jax.eval_shape(programs.jitted["reshard"], _bare(params))
        params = _place(moved, models.param_shardings(model, decoding))
    rollout, learnt = _step_shapes(config, method, programs, model)
    return Step(config, method, programs, model, mesh, decoding, params, rollout, learnt, reward_config, reward_params)


def sizes_of(config: Config) -> tuple[ModelConfig, ModelConfig | None]:
    """Returns the sizes of the policy and of the reward model (None if the run has none).

    Sizes come from config.json or reward_model.json if there is one, else from the configuration and the tokenizer that it
    names. Raises ConfigError if one of them is missing or invalid.
    """
    m = config.model
    try:
        source = models.read_source(m.path) if m.path else None
        vocabulary = models.read_config(source).vocab_size if source else _new_vocabulary(config)
        policy = config_lib.model_config(config, vocabulary, source)
        if not LEARNED.keys() & set(config.reward.functions):
            return policy, None
        if not config.reward_model.path:
            return policy, models.lora.base_of(policy)
        if model_files.is_ours(config.reward_model.path):
            return policy, model_files.described(config.reward_model.path)
        found = models.read_config(models.read_source(config.reward_model.path))
    except ConfigError:
        raise
    except (ValueError, OSError) as e:
        raise ConfigError(f"A plan needs the sizes of the models: {e}") from e
    return policy, dataclasses.replace(found, param_dtype=m.param_dtype, compute_dtype=m.compute_dtype, remat="none")


def _new_vocabulary(config: Config) -> int:
    """Returns the vocabulary of a model that is not pretrained: of a tokenizer with a name, or the one that will be trained."""
    if config.supervised.start_from:
        return load_tokenizer(pathlib.Path(config.supervised.start_from).expanduser() / "tokenizer").vocab_size
    return load_tokenizer(config.data.tokenizer).vocab_size if config.data.tokenizer else config.data.vocab_size


def bytes_per_device(tree: Any) -> float:
    """Returns the bytes of a tree of ShapeDtypeStructs that one device holds."""
    shard = lambda x: math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape)
    return float(sum(shard(x) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def _build_programs(
    config: Config, method: Method, policy: ModelConfig, devices: Sequence[jax.Device]
) -> tuple[jax.sharding.Mesh, programs_lib.Programs]:
    """Returns the mesh and the programs. Token ids are arbitrary: no number of a plan depends on them."""
    verdict = (config.reward.verdict or config.reward.functions[0]).rpartition(":")[2]
    weights, probe = dict.fromkeys(_reward_names(config), 1.0), 2 if auxiliary.needs_probe(method.loss) else None
    try:
        mesh = programs_lib.make_mesh(config, devices)
        return mesh, programs_lib.build(
            config, method, policy, mesh, eos_ids=(1,), pad_id=0, weights=weights, verdict=verdict, probe_token=probe
        )
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(f"config.{e}" if str(e).startswith("mesh.") else str(e)) from e


def _step_shapes(
    config: Config, method: Method, programs: programs_lib.Programs, model: ModelConfig
) -> tuple[Rollout, Experience]:
    """Returns the rollout and the experience of a step, as ShapeDtypeStructs with shardings."""
    P, S, G = config.prompts_per_step, config.max_prompt_length, config.group_size + programs.needs.greedy
    needs, state, shape = programs.needs, programs.abstract_state, jax.ShapeDtypeStruct
    prompts = [shape((P, S), jnp.int32), shape((P, S), bool), shape((P,), jnp.int32)]
    features = shape((P, model.features), jnp.float32) if model.features else None
    step, temperatures = shape((), jnp.int32), shape((G,), jnp.float32)
    scalars = step, temperatures, programs_lib.SEED
    rollout = jax.eval_shape(programs.jitted["rollout"], _bare(state.params), *prompts, features, *scalars)
    rewards = {name: shape((P, G), jnp.float32) for name in _reward_names(config)}
    columns = {name: shape((P,), jnp.float32) for name in needs.columns}
    groups = Groups(rollout, cast(Any, rewards), cast(Any, columns))
    learnt = jax.eval_shape(functools.partial(experience_lib.drop_greedy, method=method), rollout)
    per_token = shape(learnt.mask.shape, jnp.float32)
    kl = per_token if "kl" in method.signals else None
    c_ref = shape((), jnp.float32) if needs.probe else None
    experience, *_ = jax.eval_shape(programs.make_experience, groups, _bare(state.advantage_state), kl, c_ref)
    if needs.old_logprobs:
        experience = experience._replace(old_logprobs=per_token)
    if needs.kl:
        experience = experience._replace(ref_logprobs=per_token)
    place = lambda x: shape(x.shape, x.dtype, sharding=programs.sharding if x.ndim else None)
    return jax.tree.map(place, rollout), jax.tree.map(place, experience)


def _reward_names(config: Config) -> list[str]:
    return [name.rpartition(":")[2] for name in config.reward.functions]


def _bare(tree: Any) -> Any:
    """Returns ShapeDtypeStructs without shardings."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _place(tree: Any, shardings: Any) -> Any:
    """Returns ShapeDtypeStructs with the given shardings, a tree of the same structure."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
