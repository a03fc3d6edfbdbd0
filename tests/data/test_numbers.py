"""Tests number tokenizers against rational and decimal arithmetic: METHODS' numbers, all spellings, hostile values."""

from decimal import Decimal, localcontext, ROUND_HALF_EVEN
from fractions import Fraction
import functools
import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason.data.numbers import (
    expert_targets,
    IEEETokenizer,
    make_tokenizer,
    NormalizedTokenizer,
    P10Tokenizer,
)
from jaxrl_reason.data.tables import TargetScaler

FINITE = st.floats(allow_nan=False, allow_infinity=False)
LARGEST = float(np.finfo(np.float32).max)
KINDS = [
    NormalizedTokenizer(),
    NormalizedTokenizer(10, 3),
    NormalizedTokenizer(16, 2),
    P10Tokenizer(),
    P10Tokenizer(6, 10),
    P10Tokenizer(1, 0),
    IEEETokenizer(),
    IEEETokenizer(2, 3, 21),
    IEEETokenizer(3, 2, 13),
    IEEETokenizer(12, 1, 3),
]


@functools.partial(jax.jit, static_argnums=0)  # frozen dataclasses are hashable
def decode(tokenizer, ids):
    return tokenizer.decode(ids)


def spell(tokenizer, value):
    (ids,) = tokenizer.encode(np.array([value]))
    return tokenizer.text(ids)


def value_of(tokenizer, text):
    return float(decode(tokenizer, np.array([tokenizer.tokens.index(token) for token in text.split()])))


def exact(tokenizer, ids):
    """Returns the rational number that tokens spell, read from their texts."""
    words = [tokenizer.tokens[i] for i in ids]
    if isinstance(tokenizer, NormalizedTokenizer):
        return sum(Fraction(int(word), tokenizer.base ** (i + 1)) for i, word in enumerate(words))
    sign = {"+": 1, "-": -1}
    if isinstance(tokenizer, P10Tokenizer):
        return sign[words[0]] * int("".join(words[1:-1])) * Fraction(10) ** int(words[-1][1:])
    end = 2 + tokenizer.exponent_digits
    exponent = 0
    for word in words[2:end]:
        exponent = exponent * tokenizer.base + int(word)
    mantissa = sum(Fraction(int(word), tokenizer.base**i) for i, word in enumerate(words[end:]))
    return sign[words[0]] * mantissa * Fraction(tokenizer.base) ** (sign[words[1]] * exponent)


def is_canonical(tokenizer, ids):
    words = [tokenizer.tokens[i] for i in ids]
    if isinstance(tokenizer, NormalizedTokenizer):
        return True
    if isinstance(tokenizer, P10Tokenizer):
        if set(words[1:-1]) == {"0"}:
            return words[0] == "+" and words[-1] == "E0"
        return words[1] != "0" or words[-1] == f"E-{tokenizer.exponent_range}" or tokenizer.exponent_range == 0
    exponent, mantissa = words[2 : 2 + tokenizer.exponent_digits], words[2 + tokenizer.exponent_digits :]
    if set(mantissa) == {"0"}:
        return words[0] == words[1] == "+" and set(exponent) == {"0"}
    smallest = words[1] == "-" and set(exponent) == {str(tokenizer.base - 1)}
    return (mantissa[0] != "0" or smallest) and not (words[1] == "-" and set(exponent) == {"0"})


def random_spellings(tokenizer, count):
    """Returns legal tokens, int[count, L]. The first legal token (+ or 0) is more frequent."""
    rng = np.random.default_rng(0)
    columns = []
    for row in tokenizer.legal:
        choices = np.flatnonzero(row)
        columns.append(np.where(rng.random(count) < 0.2, choices[0], rng.choice(choices, count)))
    return np.stack(columns, axis=-1)


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_normalized_by_hand():
    tokenizer = NormalizedTokenizer(2, 8)
    assert spell(tokenizer, 0.7) == "1 0 1 1 0 0 1 1"  # 179.2 of 256
    assert value_of(tokenizer, "1 0 1 1 0 0 1 1") == 0.69921875
    for value in (1.0, 0.999, 17.0, 1e308):
        assert spell(tokenizer, value) == "1 1 1 1 1 1 1 1"
    assert value_of(tokenizer, "1 1 1 1 1 1 1 1") == 0.99609375
    for value in (0.0, -0.0, -3.0, -1e308, 1 / 512):  # 1/512 is half a step, a tie
        assert spell(tokenizer, value) == "0 0 0 0 0 0 0 0"
    assert spell(tokenizer, 3 / 512) == "0 0 0 0 0 0 1 0"  # 1.5 steps, a tie
    assert spell(NormalizedTokenizer(10, 3), 0.7012) == "7 0 1"
    assert spell(NormalizedTokenizer(16, 2), 0.7) == "11 3"


@pytest.mark.parametrize(
    "value, text, back",
    [
        (1.23456, "+ 1 2 3 5 E-3", 1.235),
        (9.9996, "+ 1 0 0 0 E-2", 10.0),
        (0.0, "+ 0 0 0 0 E0", 0.0),
        (-0.0, "+ 0 0 0 0 E0", 0.0),
        (-27.5, "- 2 7 5 0 E-2", -27.5),
        (1234.5, "+ 1 2 3 4 E0", 1234.0),  # a tie rounds to even
        (1235.5, "+ 1 2 3 6 E0", 1236.0),
        (9999e10, "+ 9 9 9 9 E10", 9999e10),
        (1e300, "+ 9 9 9 9 E10", 9999e10),
        (-99995e9, "- 9 9 9 9 E10", -9999e10),  # rounding up would exceed the largest number
        (1e-7, "+ 1 0 0 0 E-10", 1e-7),
        (5.4e-9, "+ 0 0 5 4 E-10", 5.4e-9),  # numbers below 1e-7 have fewer digits
        (-6e-11, "- 0 0 0 1 E-10", -1e-10),
        (-4e-11, "+ 0 0 0 0 E0", 0.0),
        (5e-324, "+ 0 0 0 0 E0", 0.0),
    ],
)
def test_p10_by_hand(value, text, back):
    assert spell(P10Tokenizer(), value) == text
    assert value_of(P10Tokenizer(), text) == np.float32(back)


@pytest.mark.parametrize(
    "value, text, back",
    [
        (1000.0, "+ + 0 3 1 0 0 0 0 0", 1000.0),
        (-0.001, "- - 0 3 1 0 0 0 0 0", -0.001),
        (1.0, "+ + 0 0 1 0 0 0 0 0", 1.0),
        (0.0, "+ + 0 0 0 0 0 0 0 0", 0.0),
        (-123456.5, "- + 0 5 1 2 3 4 5 6", -123456.0),  # a tie rounds to even
        (9999995.0, "+ + 0 7 1 0 0 0 0 0", 1e7),
        (1e99, "+ + 9 9 1 0 0 0 0 0", LARGEST),
        (1e300, "+ + 9 9 9 9 9 9 9 9", LARGEST),
        (-1e300, "- + 9 9 9 9 9 9 9 9", -LARGEST),
        (1e-101, "+ - 9 9 0 0 1 0 0 0", 0.0),
        (1e-300, "+ + 0 0 0 0 0 0 0 0", 0.0),
    ],
)
def test_ieee_by_hand(value, text, back):
    assert spell(IEEETokenizer(10, 2, 6), value) == text
    assert value_of(IEEETokenizer(10, 2, 6), text) == np.float32(back)


def test_powers_have_exact_exponents():
    """A floating-point logarithm misjudges 1000, and in base 3 also 243."""
    assert [spell(IEEETokenizer(3, 2, 4), 3.0**k) for k in (5, -2)] == ["+ + 1 2 1 0 0 0", "+ - 0 2 1 0 0 0"]
    for k in range(-99, 100):
        text = spell(IEEETokenizer(), float(f"1e{k}")).split()
        assert text[1:4] == ["-" if k < 0 else "+", *f"{abs(k):02}"] and text[4:] == ["1", *"00000"], k
    powers = IEEETokenizer(2, 6, 10)
    for k in range(-63, 64):
        text = spell(powers, 2.0**k).split()
        assert text[1:8] == ["-" if k < 0 else "+", *f"{abs(k):06b}"] and text[8:] == ["1", *"000000000"], k


def test_vocabularies():
    assert NormalizedTokenizer(4, 4).tokens == ("0", "1", "2", "3")
    p10, ieee = P10Tokenizer(), IEEETokenizer()
    assert (len(p10.tokens), p10.tokens[:4], p10.tokens[11:14], p10.tokens[-1]) == (
        33,
        ("+", "-", "0", "1"),
        ("9", "E-10", "E-9"),
        "E10",
    )
    assert ieee.tokens == ("+", "-", *"0123456789")
    assert (NormalizedTokenizer(4, 4).length, p10.length, ieee.length) == (4, 6, 10)
    assert [kind.unit_interval for kind in (NormalizedTokenizer(), p10, ieee)] == [True, False, False]
    digits = {str(digit) for digit in range(10)}
    allowed = [{p10.tokens[i] for i in np.flatnonzero(row)} for row in p10.legal]
    assert allowed == [{"+", "-"}, *[digits] * 4, {f"E{e}" for e in range(-10, 11)}]
    assert [{ieee.tokens[i] for i in np.flatnonzero(row)} for row in ieee.legal] == [*[{"+", "-"}] * 2, *[digits] * 8]


# ---- every value -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base, digits", [(2, 8), (4, 4), (6, 4), (8, 3), (10, 3), (16, 2), (3, 1)])
def test_every_normalized_spelling_is_its_fraction_and_round_trips(base, digits):
    tokenizer = NormalizedTokenizer(base, digits)
    ids = np.array(list(itertools.product(range(base), repeat=digits)))
    values = np.asarray(decode(tokenizer, ids))
    expected = np.array([float(Fraction(k, base**digits)) for k in range(base**digits)], np.float32)
    # XLA divides by a known number through its reciprocal, which is exact for powers of two.
    np.testing.assert_array_max_ulp(values, expected, 0 if base in (2, 4, 8, 16) else 1)
    np.testing.assert_array_equal(tokenizer.encode(values), ids)


@pytest.mark.parametrize("tokenizer", KINDS, ids=repr)
def test_every_legal_spelling_is_read_and_the_canonical_round_trips(tokenizer):
    ids = random_spellings(tokenizer, 1000)
    values = np.asarray(decode(tokenizer, ids))
    assert values.dtype == np.float32 and np.isfinite(values).all()
    again = tokenizer.encode(values)
    round_trips = 0
    for row, value, recoded in zip(ids, values, again, strict=True):
        truth = exact(tokenizer, row)
        if abs(truth) > Fraction(LARGEST):
            assert value == math.copysign(LARGEST, truth)
        elif abs(truth) < Fraction(float(np.finfo(np.float32).tiny)):
            assert abs(Fraction(float(value)) - truth) <= abs(truth)  # may be flushed to zero
        else:
            ulp = Fraction(float(np.spacing(np.float32(abs(value)))))
            assert abs(Fraction(float(value)) - truth) <= 2 * ulp, tokenizer.text(row)
            if is_canonical(tokenizer, row):
                round_trips += 1
                np.testing.assert_array_equal(recoded, row)
    assert round_trips > 200


@given(st.lists(FINITE, min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_p10_is_the_nearest_decimal(values):
    for value, ids in zip(values, P10Tokenizer().encode(np.array(values)), strict=True):
        with localcontext(prec=400):
            size = abs(Decimal(value))
            place = max(size.adjusted() - 3, -10) if size else -10
            rounded = min(size.quantize(Decimal(1).scaleb(place), ROUND_HALF_EVEN), Decimal("9999e10"))
        assert abs(exact(P10Tokenizer(), ids)) == Fraction(rounded), value
        assert (P10Tokenizer().tokens[ids[0]] == "-") == (value < 0 and rounded > 0)
        assert is_canonical(P10Tokenizer(), ids)


@given(st.lists(st.floats(-1e99, 1e99).filter(lambda v: v == 0 or abs(v) > 1e-98), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_ieee_agrees_with_the_print_of_python(values):
    tokenizer = IEEETokenizer(10, 2, 6)
    for value, ids in zip(values, tokenizer.encode(np.array(values)), strict=True):
        mantissa, exponent = f"{abs(value):.5e}".split("e")  # correctly rounded, half to even
        words = ["-" if value < 0 else "+", exponent[0], *exponent[1:], *mantissa.replace(".", "")]
        assert tokenizer.text(ids) == " ".join(words)


@given(st.sampled_from(KINDS), st.lists(FINITE | st.floats(-2, 2), min_size=2, max_size=20))
@settings(max_examples=100, deadline=None)
def test_encoding_keeps_the_order_and_is_idempotent(tokenizer, values):
    ids = tokenizer.encode(np.sort(values))
    read = [exact(tokenizer, row) for row in ids]
    assert read == sorted(read)
    assert tokenizer.legal[np.arange(tokenizer.length), ids].all()
    assert all(is_canonical(tokenizer, row) for row in ids)
    small = np.array([float(value) for value in read if abs(value) < 1e300])
    again = [exact(tokenizer, row) for row in tokenizer.encode(small)]
    assert again == [value for value in read if abs(value) < 1e300]


# ---- on the device ---------------------------------------------------------------------------------------------------


def test_leading_axes_and_integer_types():
    ids = random_spellings(P10Tokenizer(), 12)
    values = decode(P10Tokenizer(), ids)
    np.testing.assert_array_equal(decode(P10Tokenizer(), ids.reshape(3, 4, 6)), values.reshape(3, 4))
    np.testing.assert_array_equal(jax.jit(jax.vmap(P10Tokenizer().decode))(ids.astype(np.int16)), values)


def test_illegal_tokens_decode_to_nan():
    p10 = P10Tokenizer()
    good = p10.encode(np.array([-1.5]))[0]
    for position, token in [(0, 5), (2, 0), (5, 3), (1, 20), (3, -1), (5, 33), (5, 10**6), (5, -1)]:
        bad = good.copy()
        bad[position] = token
        np.testing.assert_array_equal(decode(p10, np.stack([bad, good])), [np.nan, -1.5])
    binary = decode(NormalizedTokenizer(2, 2), np.array([[2, 0], [1, -1], [1, 1]]))
    np.testing.assert_array_equal(binary, [np.nan, np.nan, 0.75])


def test_remax_rewards_of_the_paper_formula():
    """METHODS section 1 has the z-range [-1.5, 2.5], truth .5, samples .5 .75 .25 .4 and the greedy number .6."""
    tokenizer = NormalizedTokenizer(10, 2)
    scaler = TargetScaler(mean=7.0, std=3.0, low=-1.5, high=2.5)

    @jax.jit
    def reward(ids, target):
        return -((scaler.unit_to_z(tokenizer.decode(ids)) - target) ** 2)

    ids = tokenizer.encode(np.array([0.5, 0.75, 0.25, 0.4, 0.6]))
    rewards = reward(ids, scaler.unit_to_z(0.5))
    np.testing.assert_allclose(rewards, [0, -1, -1, -0.16, -0.16], atol=1e-6)
    np.testing.assert_allclose(rewards[:4] - rewards[4], [0.16, -0.84, -0.84, 0], atol=1e-6)


# ---- expert targets --------------------------------------------------------------------------------------------------


def test_expert_targets_by_hand():
    digits = lambda numbers: np.array([[int(d) for d in number] for number in numbers])
    rollouts = digits(["6000", "4999", "5402", "5369", "5371"])
    expected = digits(["5000", "5999", "5300", "5379", "5371"])
    targets_of = jax.jit(expert_targets, static_argnums=2)
    targets = targets_of(rollouts, digits(["5371"] * 5), 10)
    np.testing.assert_array_equal(targets, expected)
    assert targets.dtype == jnp.int32
    np.testing.assert_array_equal(targets_of(rollouts[None], digits(["5371"])[None], 10), expected[None])


def test_expert_targets_lead_nearest_to_the_truth():
    """With 3 digits in base 3, the target is the next digit of the nearest number that begins with the prefix."""
    numbers = list(itertools.product(range(3), repeat=3))
    value = {number: i for i, number in enumerate(numbers)}
    pairs = list(itertools.product(numbers, repeat=2))
    rollouts, truths = (np.array(digits) for digits in zip(*pairs, strict=True))
    targets = np.asarray(jax.jit(expert_targets, static_argnums=2)(rollouts, truths, 3))
    for (rollout, truth), target in zip(pairs, targets.tolist(), strict=True):
        for i in range(3):
            distance = lambda number: abs(value[number] - value[truth])
            reachable = [number for number in numbers if number[:i] == rollout[:i]]
            nearest = min(reachable, key=distance)
            assert sum(distance(n) == distance(nearest) for n in reachable) == 1
            assert target[i] == nearest[i], (rollout, truth, i)


def test_expert_targets_raise_on_other_shapes():
    with pytest.raises(AssertionError):
        expert_targets(jnp.zeros((2, 3, 4), int), jnp.zeros((3, 4), int), 10)
    with pytest.raises(AssertionError):
        expert_targets(jnp.zeros((2, 4), int), jnp.zeros((2, 1), int), 10)
    with pytest.raises(AssertionError):
        expert_targets(jnp.zeros((2, 4)), jnp.zeros((2, 4), int), 10)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", KINDS[::3], ids=repr)
def test_encoding_raises_on_nan_and_infinity(tokenizer):
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(
            ValueError, match=f"Number 1 of the 3 to encode is {value}, which has no digits; correct the data"
        ):
            tokenizer.encode(np.array([0.5, value, 0.5]))
    with pytest.raises(ValueError, match=r"The numbers to encode have the shape \(1, 1\); give one axis of them"):
        tokenizer.encode(np.array([[0.5]]))
    assert tokenizer.encode(np.array([])).shape == (0, tokenizer.length)
    assert tokenizer.encode(np.array([0.5], np.float32)).dtype == np.int32


def test_tokens_of_another_length_raise():
    with pytest.raises(
        ValueError, match=r"the shape \(2, 5\), but this tokenizer writes 6 tokens per number: the last axis has to"
    ):
        P10Tokenizer().decode(jnp.zeros((2, 5), int))
    with pytest.raises(ValueError, match=r"the shape \(\), but"):
        P10Tokenizer().decode(jnp.array(3))
    with pytest.raises(AssertionError):
        P10Tokenizer().decode(jnp.zeros((2, 6)))


def test_made_by_name():
    assert make_tokenizer("normalized") == NormalizedTokenizer(2, 8)
    assert make_tokenizer("normalized", base=10, digits=3) == NormalizedTokenizer(10, 3)
    assert make_tokenizer("p10", digits=3, exponent_range=5) == P10Tokenizer(3, 5)
    assert make_tokenizer("ieee", base=8, exponent_digits=1, mantissa_digits=4) == IEEETokenizer(8, 1, 4)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("normalised", {}, "There is no number tokenizer 'normalised'. Did you mean 'normalized'\\?"),
        ("xyz", {}, "There is no number tokenizer 'xyz'. There are: normalized, p10, ieee."),
        ("p10", {"digit": 3}, "The p10 tokenizer has no option 'digit'. Did you mean 'digits'\\?"),
        ("p10", {"base": 10}, "The p10 tokenizer has no option 'base'. There are: digits, exponent_range."),
        ("normalized", {"base": 1}, "base is 1; it has to be a whole number from 2 to 256."),
        ("normalized", {"base": 2.0}, "base is 2.0; it has"),
        ("normalized", {"digits": 0}, "digits is 0; it has to be a whole number from 1 to 21 in base 2."),
        ("normalized", {"digits": True}, "digits is True; it has"),
        ("normalized", {"base": 10, "digits": 7}, "digits is 7; it has to be a whole number from 1 to 6 in base 10."),
        ("p10", {"exponent_range": -1}, "exponent_range is -1; it has to be a whole number from 0 to 1023."),
        ("ieee", {"exponent_digits": 4}, "exponent_digits is 4; it has to be a whole number from 1 to 3 in base 10."),
        ("ieee", {"mantissa_digits": 7}, "mantissa_digits is 7; it has to be a whole number from 1 to 6 in base 10."),
        ("ieee", {"base": 300}, "base is 300; it has"),
    ],
)
def test_unknown_names_and_values_raise_a_sentence(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_tokenizer(name, **options)
