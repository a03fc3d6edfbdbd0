import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.tiny_runs import tiny
from jaxrl_reason import config as config_lib
from jaxrl_reason import models
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.rl import programs as programs_lib
from jaxrl_reason.rl.types import Groups

pytestmark = pytest.mark.usefixtures("quick_compilation")


def build(seed):
    config = tiny("rows.jsonl", seed=seed, update__minibatches=2)
    method, model = config_lib.validate(config), config_lib.model_config(config, 300)
    mesh = programs_lib.make_mesh(config)
    return programs_lib.build(
        config, method, model, mesh, eos_ids=(1,), pad_id=0, weights={"reward": 1.0}, verdict="reward"
    )


def lowered_texts(programs):
    """Returns the lowered text of every program that draws random numbers."""
    P, G, S = programs.config.prompts_per_step, programs.config.group_size, 5
    shape, state = jax.ShapeDtypeStruct, programs.abstract_state
    prompts = shape((P, S), jnp.int32), shape((P, S), bool), shape((P,), jnp.int32), None
    scalar = shape((), jnp.float32)
    sample = lambda name: programs.jitted[name].lower(state.params, *prompts, state.step, scalar, programs_lib.SEED)
    rollout = jax.eval_shape(programs.jitted["rollout"], state.params, *prompts, state.step, scalar, programs_lib.SEED)
    groups = Groups(rollout, {"reward": shape((P, G), jnp.float32)}, {})
    experience, *_ = jax.eval_shape(programs.make_experience, groups, state.advantage_state)
    experience = experience._replace(old_logprobs=rollout.logprobs)
    update = programs.jitted["update"].lower(state, experience, scalar, programs_lib.SEED)
    lowered = sample("rollout"), sample("evaluation"), update, programs.jitted["init"].lower(programs_lib.SEED)
    return [program.as_text() for program in lowered]


def test_programs_are_the_same_for_every_seed():
    assert lowered_texts(build(3)) == lowered_texts(build(4))


def test_weights_and_samples_are_those_of_the_seed():
    prompts = np.arange(20, dtype=np.int32).reshape(4, 5) + 3
    batch = PromptBatch(prompts, np.ones((4, 5), bool), np.arange(4, dtype=np.int32), np.ones(4, np.float32), [{}] * 4)
    rollouts = {}
    for seed in (3, 4):
        programs = build(seed)
        state = programs.init()
        key = jax.random.fold_in(jax.random.key(seed), programs_lib.INIT)
        expected = models.init_params(config_lib.model_config(programs.config, 300), key)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), state.params, expected)
        rollouts[seed] = jax.device_get(programs.generate(state.params, batch, state.step).tokens)
    assert (rollouts[3] != rollouts[4]).any()


def test_the_chosen_microbatches_reach_both_updates(monkeypatch):
    """The update and the supervised update are made with the numbers that suit the devices."""
    made, make = {}, programs_lib.learner.make_supervised_update
    monkeypatch.setattr(programs_lib, "microbatches", lambda *_: 2)
    monkeypatch.setattr(programs_lib, "supervised_microbatches", lambda *_: 4)

    def spy(*arguments):
        made["supervised"] = arguments[-1]
        return make(*arguments)

    def spy_on_update(model, options, *rest):
        made["update"] = options.accumulation
        return make_update(model, options, *rest)

    make_update = programs_lib.learner.make_update
    monkeypatch.setattr(programs_lib.learner, "make_supervised_update", spy)
    monkeypatch.setattr(programs_lib.learner, "make_update", spy_on_update)
    build(3)
    assert made == {"update": 2, "supervised": 4}
