"""The recipes for pretrained models: checked, set up and traced (slow: compiled) with the real dimensions, as shapes only.

The hub is not reached: config.json of each model stands in recipes/models.json, the tensors are shapes, the data a few rows in the
columns of the real ones, the tokenizer a small one that knows the tokens which a recipe names.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers

from jaxrl_reason import config as config_lib
from jaxrl_reason import data, experience, models, programs, reward_training, tasks
from jaxrl_reason.data import sources
from jaxrl_reason.models import families, reward_model, sharding

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
MODELS = json.loads((pathlib.Path(__file__).parent / "recipes" / "models.json").read_text())
RECIPES = sorted(p.stem for p in CONFIGS.glob("*_qwen*.py"))
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "nvidia/AceMath-7B-RM")
ROWS = {
    "nvidia/OpenMathReasoning": {
        "problem": "1 + 1?",
        "expected_answer": "2",
        "generated_solution": "It is \\boxed{2}.",
    },
    "zwhe99/DeepMath-103K": {"question": "1 + 1?", "final_answer": "\\frac{4}{2}", "difficulty": 5.0, "topic": "x"},
    "open-r1/DAPO-Math-17k-Processed": {"prompt": "1 + 1?", "solution": "2", "data_source": "x"},
    "HuggingFaceH4/MATH-500": {"problem": "1 + 1?", "answer": "2", "solution": "\\boxed{2}", "level": 1},
    "sarosavo/RLEV": {"question": "1 + 1?", "answer": "Two.", "score": 5, "exam": "a"},
}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Tensors that are not there, see `weights.Weights`."""

    where: str
    shapes: dict

    def read(self, name, part):
        raise AssertionError("a weight was read")


@pytest.fixture(scope="module")
def tokenizer():
    found = data.train_tokenizer(["1 + 1?", "It is 2."], 300)
    names = ("<|endoftext|>", "<|vision_start|>", "<|im_start|>", "<|im_end|>")
    found.backend.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in names])
    return dataclasses.replace(found, eos_ids=(found.backend.token_to_id("<|endoftext|>"),), chat_template=CHATML)


@pytest.fixture
def hub(monkeypatch, tmp_path, tokenizer):
    """The models and data sets that the recipes name."""

    def open_model(name):
        source = MODELS[name]
        config = families.read_config(source, name)
        module = reward_model if "Classification" in source["architectures"][0] else models
        table = families.tensors_of(config, module.abstract_params(config))
        leaves = jax.tree.leaves(table, is_leaf=lambda x: isinstance(x, families.Tensor))
        own = tokenizer
        if name in CHATS:  # models that were tuned to end their turn
            own = dataclasses.replace(own, eos_ids=(own.backend.token_to_id("<|im_end|>"), *own.eos_ids))
        return models.Opened(config, Shapes(name, {n: t.shape for t in leaves for n in t.names}), own, source, {})

    def download(address):
        owner, name, pattern = address.removeprefix("hf://datasets/").split("/", 2)
        rows = [ROWS[f"{owner}/{name}"]] * 1100
        file = tmp_path / pattern.replace("*", "0").replace("/", "_")
        if file.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [file]

    def gsm8k(name, split, **_):
        rows = [{"question": "1 + 1?", "solution": "#### 2", "answer": "2"}] * 600
        return data.Source(name, "0", 0, lambda indices: [rows[i] for i in indices], len(rows))

    monkeypatch.setattr(models, "open_model", open_model)
    monkeypatch.setattr(sources, "_download", download)
    monkeypatch.setattr(
        data, "load_source", lambda name, *a, **k: (gsm8k if name == "gsm8k" else sources.load_source)(name, *a, **k)
    )


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def opened(recipe, tmp_path):
    """(configuration, method, task, programs) of a recipe, its weights as shapes."""
    config = config_lib.load(CONFIGS / f"{recipe}.py")
    method = config_lib.validate(config)
    mesh = sharding.make_mesh()
    task = tasks.open_task(config, method, mesh, tmp_path / "run")
    weights, verdict = task.scorer.weights, task.scorer.verdict
    built = programs.build(
        config,
        method,
        task.model,
        mesh,
        eos_ids=task.tokenizer.eos_ids,
        pad_id=task.tokenizer.pad_id,
        weights=weights,
        verdict=verdict,
        probe_token=tasks.probe_token(method, task.tokenizer),
        legal=task.legal,
    )
    return config, method, task, built


def step_shapes(config, method, task, built):
    """What goes into each program of a step, as shapes; every program is traced on the way."""
    state = abstract(built.abstract_state)
    batch = task.prompts.batch(0)
    rollout = jax.eval_shape(lambda params, step: built.generate(params, batch, step), state.params, state.step)
    P, G = config.prompts_per_step, rollout.tokens.shape[1]
    shape = lambda *s, dtype="float32": jax.ShapeDtypeStruct(s, dtype)
    rewards = {name: shape(P, G) for name in task.scorer.names}
    columns = {name: abstract(batch.columns[name]) for name in programs.columns_of(method)}
    groups = experience.Groups(rollout, rewards, columns)
    c_ref = shape() if method.loss.self_reward else None
    learnt, _, _ = jax.eval_shape(built.prepare, groups, state.advantage_state, None, c_ref)
    if config.update.epochs * config.update.minibatches > 1:
        learnt = learnt._replace(old_logprobs=jax.eval_shape(built.score, state.params, learnt.rollout).logprobs)
    return state, batch, learnt


def test_there_is_a_recipe_for_every_method():
    names = [config_lib.load(CONFIGS / f"{recipe}.py").method["name"] for recipe in RECIPES]
    assert sorted(names) == ["genre2", "grpo", "hero", "laser", "progrpo", "rlev"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_set_up_and_traced_with_the_real_dimensions(recipe, hub, tmp_path):
    config, method, task, built = opened(recipe, tmp_path)
    source = MODELS[config.model.path]
    assert task.model.width == source["hidden_size"] and task.model.vocab_size >= source["vocab_size"]
    assert models.param_count(task.model) > 5e8 and not (tmp_path / "run").exists()
    state, _, learnt = step_shapes(config, method, task, built)
    P, G, T = config.prompts_per_step, config.group_size, config.max_completion_length
    assert learnt.mask.shape == (P, G, T)
    if config.data.chat:  # what ends a turn ends a completion
        assert task.tokenizer.backend.token_to_id("<|im_end|>") in task.tokenizer.eos_ids
    new_state, metrics = jax.eval_shape(built.update, state, learnt)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()
    masters = [x for x in jax.tree.leaves(state.opt_state) if x.shape == state.params["embedding"].shape]
    assert len(masters) == 3 and {x.dtype for x in masters} == {jnp.dtype("float32")}  # a copy and two moments
    if "reward_model" in config.reward.functions:
        phase = reward_training.setup(
            config, model=task.model, work=task.work, tokenizer=task.tokenizer, mesh=sharding.make_mesh()
        )
        judge = phase.pretrained.config
        scores = jax.eval_shape(
            functools.partial(reward_model.scores, judge),
            reward_model.abstract_params(judge),
            jax.ShapeDtypeStruct((8, config.reward_model.max_length), "int32"),
        )
        assert scores.shape == (8,)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_compiles_with_the_real_dimensions(recipe, hub, tmp_path):
    config, method, task, built = opened(recipe, tmp_path)
    state, batch, learnt = step_shapes(config, method, task, built)
    quick = {"xla_backend_optimization_level": 0}
    update = jax.jit(built.update).lower(state, learnt).compile(compiler_options=quick)
    if config.supervised.steps:
        solutions = abstract(tuple(task.solutions.batch(0)))
        jax.eval_shape(built.supervised_update, state, solutions)
    rollout = jax.jit(lambda params, step: built.generate(params, batch, step))
    rollout.lower(state.params, state.step).compile(compiler_options=quick)
    held = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert update.memory_analysis().argument_size_in_bytes >= held
