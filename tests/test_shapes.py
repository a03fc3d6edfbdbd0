"""Tests the annotated shapes and dtypes, and the examples in docstrings, of advantages, losses and metrics."""

import doctest
import inspect
import types

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from helpers.shapes import check_fields, checked_modules
from jaxrl_reason import advantages, losses, metrics

P, G, T = 2, 3, 4
INPUTS = dict(
    rewards=np.eye(P, G, dtype=np.float32),
    completion_mask=np.ones((P, G, T), np.int32),
    verdicts=np.eye(P, G) > 0,
    greedy_rewards=np.ones(P, np.float32),
    model_scores=np.ones((P, G), np.float32),
    values=np.ones(P, np.float32),
    self_rewards=np.ones((P, G), np.float32),
    prompt_confidence=np.ones(P, np.float32),
    answer_confidence=np.ones((P, G), np.float32),
    truncated=np.zeros((P, G), bool),
    kl=np.ones((P, G, T), np.float32),
)
TRANSFORMS = {
    "standardize_by_group": (),
    "center_by_group": (),
    "leave_one_out": (),
    "subtract_greedy": (),
    "whiten_by_token": (0.1,),
    "soft_overlong_penalty": (4, 2),
    "stratify_by_verifier": (),
    "weight_by_score_spread": (),
    "scale_by_value": (),
    "mix_self_reward": (),
    "reweight_by_confidence": (),
}


def checked_inputs(**changes):
    values = {name: None if value is None else jnp.asarray(value) for name, value in (INPUTS | changes).items()}
    return checked_modules()["advantages"].AdvantageInputs(**values)


def checked_transform(name):
    return getattr(checked_modules()["advantages"], name)(*TRANSFORMS[name])


# -- examples --------------------------------------------------------------------------------------


def functions_of(package):
    """Returns the public functions of a module, or of a package by its __all__."""
    names = getattr(package, "__all__", [name for name in vars(package) if not name.startswith("_")])
    functions = {name: getattr(package, name) for name in names if inspect.isfunction(getattr(package, name))}
    return {name: f for name, f in functions.items() if f.__module__.startswith(package.__name__)}


def examples_of(package):
    """Returns the doctests of the public functions, by name."""
    finder = doctest.DocTestFinder(recurse=False)
    names = {"jnp": jnp, "np": np, **vars(package)}
    return {name: finder.find(f, name, globs=names)[0] for name, f in functions_of(package).items()}


@pytest.mark.parametrize("checks", [False, True], ids=["as it is", "with checked annotations"])
@pytest.mark.parametrize("package", [advantages, losses, metrics], ids=lambda package: package.__name__)
def test_the_examples_print_what_they_show(package, checks):
    package = checked_modules()[package.__name__.rpartition(".")[2]] if checks else package
    runner = doctest.DocTestRunner(verbose=False)
    output = []
    for example in examples_of(package).values():
        runner.run(example, out=output.append)
    assert not runner.failures and runner.tries > 8, "".join(output)


STATISTICS = {"group_deviation", "group_tied", "has_reward", "is_correct"}


@pytest.mark.parametrize("package", [advantages, losses, metrics], ids=lambda package: package.__name__)
def test_every_public_function_has_an_example_and_a_typed_signature(package):
    examples = examples_of(package)
    assert len(examples) >= 8
    for name, f in functions_of(package).items():
        assert name in STATISTICS or examples[name].examples, name
        signature = inspect.signature(f)
        untyped = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
        assert not untyped and signature.return_annotation is not signature.empty, name


# -- annotations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transformation_has_the_annotated_shapes(name):
    transform, inputs = checked_transform(name), checked_inputs()
    state = transform.init()
    out, state = jax.eval_shape(transform.update, inputs.rewards, state, inputs)
    assert out.shape == ((P, G, T) if name == "whiten_by_token" else (P, G)) and out.dtype == jnp.float32
    out, _ = jax.jit(checked_modules()["advantages"].chain(transform).update)(None, (transform.init(),), inputs)
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    "name", ["weight_by_score_spread", "scale_by_value", "mix_self_reward", "reweight_by_confidence"]
)
def test_transformations_of_the_advantage_take_advantages_per_token(name):
    transform = checked_transform(name)
    out, _ = transform.update(jnp.ones((P, G, T)), transform.init(), checked_inputs())
    assert out.shape == (P, G, T)


def test_every_field_but_the_first_two_may_be_none():
    transform = checked_transform("center_by_group")
    for name in list(INPUTS)[2:]:
        inputs = checked_inputs(**{name: None})
        check_fields(inputs)
        transform.update(inputs.rewards, (), inputs)
    nothing = checked_inputs(**dict.fromkeys(list(INPUTS)[2:]))
    check_fields(nothing)
    transform.update(nothing.rewards, (), nothing)


@pytest.mark.parametrize("name", INPUTS)
def test_a_wrong_shape_or_dtype_of_a_field_raises(name):
    transform = checked_transform("center_by_group")
    good = INPUTS[name]
    wrong = [good[..., None], good[:1], np.concatenate([good, good])]
    if name != "completion_mask":  # a mask may have any dtype
        wrong.append(good.astype(np.int32))
    for value in wrong:
        inputs = checked_inputs(**{name: value})
        with pytest.raises(TypeError):
            check_fields(inputs)
        with pytest.raises(TypeError):
            transform.update(jnp.ones((P, G)), (), inputs)
    if name in ("rewards", "completion_mask"):
        with pytest.raises(TypeError):
            check_fields(checked_inputs(**{name: None}))


PGT, PG = jnp.zeros((P, G, T)), jnp.zeros((P, G))
MASK = jnp.ones((P, G, T))
COUNT = jnp.float32(3)
CALLS = {  # name: arguments that fit, and for each argument another one that does not fit
    "totals": ((MASK,), (PG,)),
    "drop_nonfinite": ((MASK, PGT, PGT), (PG, PG, PGT[:1])),
    "aggregate": ((PGT, MASK, "token_mean"), (PG, MASK[..., :1], 3)),
    "policy_loss": ((PGT, PGT, PG, MASK), (PG, PGT[:1], jnp.zeros((G, P)), MASK[:, :1])),
    "kl_penalty": ((PGT, PGT, "k1"), (PG, PGT[..., :1], 1)),
    "token_logprobs": ((PGT, jnp.zeros((P, G), int)), (PGT[0], PG)),
    "class_totals": ((PG, PG > 0), (PGT, PG[:1])),
    "self_reward_loss": ((PG, PG > 0, PG), (PGT, PG[:1], PG[:, :1])),
    "token_confidence": ((PGT, MASK, 0.2), (PG, MASK[..., :1], "all")),
    "group_tied": ((PG, PG > 0), (PGT, PG)),
    "group_deviation": ((PG, PG > 0), (PGT, PG[:, :1] > 0)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_shape_or_dtype_of_an_argument_raises(name):
    function = next(getattr(m, name) for m in checked_modules().values() if hasattr(m, name))
    good, wrong = CALLS[name]
    function(*good)
    for i, value in enumerate(wrong):
        with pytest.raises(jaxtyping.TypeCheckError):
            function(*good[:i], value, *good[i + 1 :])


def test_counts_of_a_batch_are_scalars():
    checked = checked_modules()["losses"]
    options = dict(aggregation="constant", constant=2)
    loss, _ = checked.policy_loss(PGT - 1, PGT - 1, PG + 1, MASK, total=checked.Totals(COUNT, COUNT), **options)
    assert loss == pytest.approx(-P * G * T / (3 * 2))
    with pytest.raises(TypeError):
        checked.policy_loss(PGT, PGT, PG, MASK, total=checked.Totals(COUNT, jnp.ones(P)))


def test_the_package_checks_nothing_at_run_time():
    for package in (advantages, losses, metrics):
        for name, f in functions_of(package).items():
            assert isinstance(f, types.FunctionType) and not hasattr(f, "__wrapped__"), name
    assert advantages.has_reward(advantages.AdvantageInputs(np.ones((2, 3), np.int32), None)).all()
    assert losses.totals(np.ones((1, 1, 2))).tokens == 2
