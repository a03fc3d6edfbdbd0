"""Observers return a value that a run with a configuration computes or writes, given (configuration, directory).

`tests/config/test_every_field.py` compares their results, which are arrays, numbers or text, for two configurations.
"""

import contextlib
import dataclasses
import functools
import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from helpers.tiny_runs import ROWS, with_program
from helpers.trackers import Fake
from jaxrl_reason import config as config_lib
from jaxrl_reason import losses, models, train
from jaxrl_reason.config import ConfigError, validate
from jaxrl_reason.rewards import model_training, RewardError
from jaxrl_reason.rl import devices, learner, programs
from jaxrl_reason.rl import optimizer as optimizers
from jaxrl_reason.rl.types import Experience, Groups, Rollout, TrainState
from jaxrl_reason.runs import compilation_cache as cache_lib
from jaxrl_reason.runs.progress import Clock
from jaxrl_reason.runs.trackers import Trackers
from jaxrl_reason.runs.watch import NonFiniteError


def setup(config, tmp_path) -> train.Run:
    return train.setup(config, tmp_path / "run")


def outcome(f):
    """Returns the result of `f`, or its error as text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return f()
    except (ConfigError, RewardError, ValueError, OSError) as error:
        return f"error: {error}"


def prompts(config, tmp_path):
    def read():
        batch = setup(config, tmp_path).prompts.batch(0)
        return batch.tokens, batch.mask, [row["question"] for row in batch.rows]

    return outcome(read)


def compilation_cache(config, tmp_path):
    """Returns the arguments with which a run enables the cache of compiled programs."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_lib, "enable", asked.append)
        setup(config, tmp_path)
    return asked


def tracked(config, tmp_path):
    """Returns the calls of a tracker's `log` for one step."""
    fake = Fake()
    tmp_path.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", fake.wandb)
        with Trackers(config, tmp_path) as trackers:
            trackers.log(1, {"reward": 0.5})
    return [str(call) for call in fake.of("log")]


def held_out(config, tmp_path):
    return outcome(lambda: [(b.tokens, b.weight) for b in setup(config, tmp_path).held_out])


def solutions(config, tmp_path):
    run = setup(config, tmp_path)
    return None if run.solutions is None else run.solutions.batch(0)


def model(config, tmp_path):
    """Returns shapes and dtypes of the weights, and logits of a few tokens under random weights of a fixed seed."""
    shape = config_lib.model_config(config, vocab_size=9)
    abstract = models.abstract_params(shape)
    shapes = [(x.shape, x.dtype.name) for x in jax.tree.leaves(abstract)]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), abstract)
    return shapes, jax.jit(functools.partial(models.apply, shape))(params, np.arange(8)[None] % 7)


def backward_pass(config, tmp_path):
    """Returns the program of a gradient, as text."""
    mesh = programs.make_mesh(config, jax.devices()[:1])
    shape = devices.for_devices(config_lib.model_config(config, vocab_size=9), config, mesh)
    params = models.abstract_params(shape)
    loss = lambda params: models.apply(shape, params, np.arange(8)[None]).sum()
    return str(jax.make_jaxpr(jax.grad(loss))(params))


def optimizer(config, tmp_path, make=lambda c: optimizers.make_optimizer(c)[1]):
    """Returns weights after three steps along gradients of different sizes."""
    transformation, x = make(config), jnp.array([1.0, -2.0])
    state = transformation.init(x)
    for gradient in ([3.0, 0.1], [0.2, -1.0], [1e-3, 1e-3]):
        updates, state = transformation.update(jnp.array(gradient), state, x)
        x = x + updates
    return x


def small_steps(config, tmp_path):
    """Returns bfloat16 weights after many steps, each too small for bfloat16."""
    transformation = optimizers.make_optimizer(
        dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-4))
    )[1]
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    state = optimizers.init_opt_state(transformation, params)
    for _ in range(100):
        params, state, _, _ = optimizers.apply_gradients(transformation, params, state, {"w": jnp.ones(3)}, 0.0)
    return params


supervised_optimizer = functools.partial(optimizer, make=optimizers.make_supervised_optimizer)


def sampled(config, tmp_path):
    run = setup(config, tmp_path)
    state = run.programs.init()
    return run.programs.generate(state.params, run.prompts.batch(0), state.step)


def rollout_program(config, tmp_path):
    """Returns the program of a rollout, as text."""
    ready = setup(config, tmp_path).programs
    prompts = [jax.ShapeDtypeStruct((config.prompts_per_step, config.max_prompt_length), d) for d in (jnp.int32, bool)]
    ids, step, seed = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((config.prompts_per_step,), (), ()))
    temperatures = jax.ShapeDtypeStruct((config.group_size,), jnp.float32)
    inputs = (ready.abstract_state.params, *prompts, ids, None, step, temperatures, seed)
    return ready.jitted["rollout"].lower(*inputs).as_text()


def evaluated(config, tmp_path):
    run = setup(config, tmp_path)
    return run.programs.generate_eval(run.programs.init().params, run.held_out[0])


def rollout_shape(config, tmp_path):
    run = setup(config, tmp_path)
    params = models.abstract_params(run.model)
    return str(
        jax.eval_shape(lambda p, step: run.programs.generate(p, run.prompts.batch(0), step), params, jnp.int32(0))
    )


def eval_shape(config, tmp_path):
    run = setup(config, tmp_path)
    return str(
        jax.eval_shape(lambda p: run.programs.generate_eval(p, run.held_out[0]), models.abstract_params(run.model))
    )


def evaluation_program(config, tmp_path):
    run = setup(config, tmp_path)
    program = jax.make_jaxpr(lambda p: run.programs.generate_eval(p, run.held_out[0]))
    return "pallas_call" in str(program(models.abstract_params(run.model)))


def drawn(config, tmp_path):
    """Returns the number of prompts in each sampled part."""
    run = setup(config, tmp_path)
    calls, state = [], run.programs.init()

    def counted(sample):
        def generate(weights, tokens, *rest):
            calls.append(len(tokens))
            return sample(weights, tokens, *rest)

        return generate

    counting = dataclasses.replace(run, programs=with_program(run.programs, "rollout", counted))
    train.collect(counting, state, state.params, Clock())
    return calls


def connected(config, tmp_path):
    """Returns the arguments of `jax.distributed.initialize`. The run ends afterwards, because its data do not exist."""
    config.data.train = str(tmp_path / "nothing.jsonl")
    recipe, calls = tmp_path / "recipe.py", []
    recipe.parent.mkdir(exist_ok=True, parents=True)
    recipe.write_text(
        f"from jaxrl_reason.config import from_dict\ndef get_config():\n    return from_dict({config_lib.to_dict(config)!r})\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.distributed, "initialize", lambda *_, **keywords: calls.append(keywords))
        for name, value in (("COORDINATOR_ADDRESS", "127.0.0.1:1"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "0")):
            patch.setenv(f"JAX_{name}", value)
        assert train.main([f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]) == 2
    return str(calls)


def made_up_experience(config):
    P, G, S, T = config.prompts_per_step, config.group_size, 3, 5
    rng = np.random.default_rng(0)
    mask = np.ones((P, G, T), bool)
    logprobs = rng.uniform(-3, -1, mask.shape).astype(np.float32)
    rollout = Rollout(
        rng.integers(0, 9, (P, S)),
        np.ones((P, S), bool),
        rng.integers(0, 9, (P, G, T)),
        mask,
        logprobs,
        rng.random((P, G)) < 0.5,
    )
    advantages = rng.normal(size=(P, G)).astype(np.float32)
    return jax.tree.map(jnp.asarray, Experience(rollout, mask, advantages, logprobs, logprobs - 0.5))


def _options(config):
    model, mesh = config_lib.model_config(config, 9), programs.make_mesh(config, jax.devices()[:1])
    return programs.update_options(config, validate(config), model, None, mesh)


def loss(config, tmp_path):
    shape, options = config_lib.model_config(config, 9), _options(config)
    batch = made_up_experience(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), models.abstract_params(shape))
    total = losses.totals(batch.mask)
    return jax.jit(functools.partial(learner.loss_and_metrics, shape, options))(params, batch, total, {}, 1.0)[0]


def update_program(config, tmp_path):
    """Returns the update step as text, which shows its loops and the sizes of its arrays."""
    shape, method = config_lib.model_config(config, 9), validate(config)
    options, (_, optimizer) = _options(config), optimizers.make_optimizer(config)
    params = models.abstract_params(shape)
    state = TrainState(
        jnp.int32(0),
        params,
        {},
        jax.eval_shape(functools.partial(optimizers.init_opt_state, optimizer), params),
        method.advantage.init(),
        jnp.int32(0),
    )
    update = learner.make_update(shape, options, optimizer)
    return str(jax.make_jaxpr(update)(state, made_up_experience(config), 1.0, jax.random.key(0)))


def prepared(config, tmp_path):
    """Prepares made-up completions for the update. Each group has correct and incorrect ones."""
    run = setup(config, tmp_path)
    rollout = made_up_experience(config).rollout
    correct = jnp.broadcast_to(jnp.arange(config.group_size) % 2, rollout.tokens.shape[:2]).astype(jnp.float32)
    groups = Groups(rollout, {name: correct * (1 + i) for i, name in enumerate(run.scorer.names)})
    batch, _, metrics = run.programs.make_experience(groups, run.method.advantage.init())
    return batch.mask, batch.advantages, {k: float(v) for k, v in metrics.items() if not np.isnan(v)}


def scored(config, tmp_path):
    def score():
        run = setup(config, tmp_path)
        batch = run.prompts.batch(0)._replace(rows=ROWS[:4])
        rewards, metrics = run.scorer(made_up_experience(config).rollout, batch)
        rewards = [np.nan_to_num(rewards[name], nan=-9.0) for name in run.scorer.names]
        return run.scorer.names, run.scorer.weights, run.scorer.verdict, rewards, metrics

    return outcome(score)


def workers(config, tmp_path):
    """Returns the number of processes that score four prompts."""
    run = setup(config, tmp_path)
    batch = run.prompts.batch(0)._replace(rows=ROWS[:4])
    rewards, _ = run.scorer(made_up_experience(config).rollout, batch)
    return len(np.unique(rewards["pid"]))


def dynamic_sampling(config, tmp_path):
    """Returns the number of prompt batches drawn when all rewards of every group are equal."""
    run = setup(config, tmp_path)
    state = run.programs.init()
    return train.collect(run, state, state.params, Clock()).metrics["dynamic_sampling/batches"]


def values(config, tmp_path):
    return setup(config, tmp_path).prompts.batch(0).columns["values"]


def numbers(config, tmp_path):
    """Returns vocabulary size, decoder and solutions of a regression run."""

    def read():
        run = setup(config, tmp_path)
        return run.tokenizer.vocab_size, str(run.model), run.solutions.batch(0)

    return outcome(read)


def supervised_update(config, tmp_path):
    """Returns the metrics of the first update of the supervised phase."""
    run = setup(config, tmp_path)
    return run.programs.supervised_update(run.programs.init(), run.solutions.batch(0))[1]


def validation(config, tmp_path):
    """Returns the validation batches of a regression run."""
    return outcome(lambda: setup(config, tmp_path).task.validation)


def validated_steps(config, tmp_path):
    """Returns the steps of the supervised phase that have a validation."""
    train.make_start(setup(config, tmp_path))
    lines = map(json.loads, (tmp_path / "run" / "supervised" / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "validation/loss" in line]


def pairs(config, tmp_path):
    def read():
        phase = setup(config, tmp_path).reward_phase
        return phase.pairs.batch(0), phase.held_out.batch(0)

    return outcome(read)


def reward_model(config, tmp_path):
    """Returns the weights of the trained reward model."""
    run = setup(config, tmp_path)
    console = rich.console.Console(quiet=True)
    return model_training.train_reward_model(run.reward_phase, run.programs.init().params, console)


def judged(config, tmp_path):
    run = setup(config, tmp_path)
    params = run.programs.init().params
    return run.task.evaluate(functools.partial(run.programs.generate_eval, params), run.scorer, None)["eval/accuracy"]


def mesh(config, tmp_path):
    return outcome(
        lambda: dict(programs.make_mesh(config).shape) and setup(config, tmp_path).programs.sharding.mesh.shape
    )


def trained(look, config, tmp_path, compiled_run, capsys, finished, spoilt=False):
    """Trains a whole run.

    Args:
      look: (work directory, printed text) -> observation.
      config, tmp_path: configuration and directory of the run.
      compiled_run, capsys, finished: fixtures of the test.
      spoilt: makes all advantages NaN.
    """
    key = json.dumps(config_lib.to_dict(config)), spoilt
    if key not in finished:
        programs = compiled_run.programs
        if spoilt:
            lost = jax.jit(lambda x: x * jnp.nan)
            spoil = lambda found: found._replace(
                experience=found.experience._replace(advantages=lost(found.experience.advantages))
            )
            programs = with_program(programs, "make_experience", lambda make: lambda *args: spoil(make(*args)))
        run = dataclasses.replace(setup(config, tmp_path), programs=programs)
        capsys.readouterr()
        with contextlib.suppress(NonFiniteError):
            train.train(run)
        finished[key] = run.work.path, capsys.readouterr().out
    return look(*finished[key])


def lines(name):
    return lambda path, _: (path / name).read_text().count("\n")


def evaluated_steps(path, _):
    return [line["step"] for line in map(json.loads, open(path / "metrics.jsonl")) if "eval/accuracy" in line]


def checkpoint_numbers(path, _):
    return sorted(p.name for p in (path / "checkpoints").iterdir())


def metric_steps(path, _):
    return [json.loads(line)["step"] for line in open(path / "metrics.jsonl")]
