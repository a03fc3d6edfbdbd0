"""Numbers as tokens: three alphabets of fixed length, encoded exactly on the host and decoded on the device.

A policy that does regression writes its prediction as L digit tokens (GenRe2, arXiv 2512.06533), and the compiled step
decodes them for the reward. Values are rounded to the nearest number that has a spelling, half to even, in exact
rational arithmetic: with a floating-point logarithm, the exponent of 1000 would be 2.
"""

import abc
import bisect
from collections.abc import Iterable
import dataclasses
import difflib
from fractions import Fraction
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

# The number of mantissas that stay distinct in float32 after the rounding of a power and of a product.
_MAX_MANTISSAS = 2**21
_MAX_BASE = 256
_MAX_EXPONENTS = 1024  # of one sign; float32 ends at 2**128
_SIGNS = ("+", "-")


class NumberTokenizer(abc.ABC):
    """Encodes numbers as tokens and decodes them; the base of the three alphabets."""

    unit_interval: ClassVar[bool] = False  # whether all numbers are in [0, 1]; otherwise any real number can be written

    @property
    @abc.abstractmethod
    def tokens(self) -> tuple[str, ...]:
        """The V tokens as text."""

    @property
    @abc.abstractmethod
    def legal(self) -> np.ndarray:
        """bool[L, V]: the tokens that are allowed at each position."""

    @property
    def length(self) -> int:
        """L, tokens per number."""
        return len(self.legal)

    @abc.abstractmethod
    def _spell(self, value: Fraction) -> list[int]:
        """Returns the L canonical tokens of the nearest number that has a spelling."""

    @abc.abstractmethod
    def _read(self, ids: jax.Array) -> jax.Array:
        """Returns the numbers float32[...] of legal tokens int32[..., L]."""

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Returns the canonical tokens int32[N, L] of float[N], each rounded to the nearest number that has a spelling.

        Numbers beyond the largest spelling take that spelling. Raises ValueError if a number is NaN or infinite, or the
        values do not have one axis.
        """
        values = np.asarray(values, np.float64)
        if values.ndim != 1:
            raise ValueError(f"The numbers to encode have the shape {values.shape}; give one axis of them.")
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            number = f"Number {bad[0]} of the {len(values)} to encode is {values[bad[0]]}"
            raise ValueError(f"{number}, which has no digits; correct the data, or leave that row out.")
        codes = [self._spell(Fraction(value)) for value in values.tolist()]
        return np.array(codes, np.int32).reshape(len(values), self.length)

    def decode(self, ids: jax.Array) -> jax.Array:
        """Returns the numbers float32[...] that tokens int[..., L] spell, within two units in the last place.

        Traceable, so that a reward computes it on the device. Finite for every legal spelling, canonical or not: a
        number beyond float32 becomes the largest float32, or 0. NaN if a token is not legal at its position. Raises
        AssertionError if ids are not integers, and ValueError if the last axis does not have L tokens.
        """
        ids = jnp.asarray(ids)
        chex.assert_type(ids, int)
        if ids.ndim == 0 or ids.shape[-1] != self.length:
            expected = f"this tokenizer writes {self.length} tokens per number: the last axis has to have that length"
            raise ValueError(f"The tokens to decode have the shape {ids.shape}, but {expected}.")
        known = (ids >= 0) & (ids < len(self.tokens))
        ids = jnp.where(known, ids, 0).astype(jnp.int32)
        legal = known & jnp.asarray(self.legal)[np.arange(self.length), ids]
        return jnp.where(legal.all(axis=-1), self._read(ids), jnp.nan)

    def text(self, ids: Iterable[int]) -> str:
        """Returns the tokens of one number as text: "+ 1 2 3 5 E-3"."""
        return " ".join(self.tokens[i] for i in ids)


@dataclasses.dataclass(frozen=True)
class NormalizedTokenizer(NumberTokenizer):
    """k / base**digits in [0, 1): the digits of k, most significant first. The token ids are the digits.

    0.7 -> 1 0 1 1 0 0 1 1. 1 has no spelling and is written as the largest number, 1 - base**-digits.
    """

    base: int = 2
    digits: int = 8
    unit_interval: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_whole("base", self.base, 2, _MAX_BASE)
        _check_digits("digits", self.digits, self.base, _MAX_MANTISSAS)

    @property
    def tokens(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.base)))

    @property
    def legal(self) -> np.ndarray:
        return np.ones((self.digits, self.base), bool)

    def _spell(self, value: Fraction) -> list[int]:
        steps = self.base**self.digits
        return _digits_of(min(round(max(value, 0) * steps), steps - 1), self.base, self.digits)

    def _read(self, ids: jax.Array) -> jax.Array:
        return _integer(ids, self.base).astype(jnp.float32) / self.base**self.digits


@dataclasses.dataclass(frozen=True)
class P10Tokenizer(NumberTokenizer):
    """Sign, decimal digits of an integer, and one token for the power of ten that multiplies it (arXiv 2112.01898).

    1.23456 -> + 1 2 3 5 E-3. The first digit is 0 only in 0, which is "+ 0 0 0 0 E0", and at the smallest exponent,
    where small numbers lose digits gradually.
    """

    digits: int = 4
    exponent_range: int = 10

    def __post_init__(self) -> None:
        _check_digits("digits", self.digits, 10, _MAX_MANTISSAS)
        _check_whole("exponent_range", self.exponent_range, 0, _MAX_EXPONENTS - 1)

    @property
    def tokens(self) -> tuple[str, ...]:
        exponents = range(-self.exponent_range, self.exponent_range + 1)
        return (*_SIGNS, *map(str, range(10)), *(f"E{exponent}" for exponent in exponents))

    @property
    def legal(self) -> np.ndarray:
        kinds = np.array([0] * 2 + [1] * 10 + [2] * (2 * self.exponent_range + 1))
        return kinds == np.array([0] + [1] * self.digits + [2])[:, None]

    def _spell(self, value: Fraction) -> list[int]:
        mantissa, exponent = _nearest(abs(value), 10, self.digits, -self.exponent_range, self.exponent_range)
        digits = [2 + digit for digit in _digits_of(mantissa, 10, self.digits)]
        return [int(value < 0 < mantissa), *digits, 12 + self.exponent_range + (exponent if mantissa else 0)]

    def _read(self, ids: jax.Array) -> jax.Array:
        size = _scaled(_integer(ids[..., 1:-1] - 2, 10), ids[..., -1] - 12 - self.exponent_range, 10)
        return jnp.where(ids[..., 0] == 1, -size, size)


@dataclasses.dataclass(frozen=True)
class IEEETokenizer(NumberTokenizer):
    """Sign, sign and digits of the exponent, digits d1 d2 ... of the mantissa: sign * d1.d2d3... * base**exponent.

    1000 -> + + 0 3 1 0 0 0 0 0. d1 is 0 only in 0, which is "+ + 0 0 0 0 ...", and at the smallest exponent. Exponents
    of two decimal digits exceed float32: `decode` gives its largest number for 1e99.
    """

    base: int = 10
    exponent_digits: int = 2
    mantissa_digits: int = 6

    def __post_init__(self) -> None:
        _check_whole("base", self.base, 2, _MAX_BASE)
        _check_digits("exponent_digits", self.exponent_digits, self.base, _MAX_EXPONENTS)
        _check_digits("mantissa_digits", self.mantissa_digits, self.base, _MAX_MANTISSAS)

    @property
    def tokens(self) -> tuple[str, ...]:
        return (*_SIGNS, *map(str, range(self.base)))

    @property
    def legal(self) -> np.ndarray:
        is_sign = np.arange(2 + self.base) < 2
        positions = np.arange(2 + self.exponent_digits + self.mantissa_digits)
        return is_sign == (positions < 2)[:, None]

    def _spell(self, value: Fraction) -> list[int]:
        largest = self.base**self.exponent_digits - 1
        shift = self.mantissa_digits - 1  # between the exponent of the first digit and that of the last
        mantissa, last = _nearest(abs(value), self.base, self.mantissa_digits, -largest - shift, largest - shift)
        exponent = last + shift if mantissa else 0
        digits = _digits_of(abs(exponent), self.base, self.exponent_digits)
        digits += _digits_of(mantissa, self.base, self.mantissa_digits)
        return [int(value < 0 < mantissa), int(exponent < 0), *(2 + digit for digit in digits)]

    def _read(self, ids: jax.Array) -> jax.Array:
        digits = ids[..., 2:] - 2
        exponent = _integer(digits[..., : self.exponent_digits], self.base)
        exponent = jnp.where(ids[..., 1] == 1, -exponent, exponent) - (self.mantissa_digits - 1)
        size = _scaled(_integer(digits[..., self.exponent_digits :], self.base), exponent, self.base)
        return jnp.where(ids[..., 0] == 1, -size, size)


_Kind = type[NormalizedTokenizer | P10Tokenizer | IEEETokenizer]
_TOKENIZERS: dict[str, _Kind] = {"normalized": NormalizedTokenizer, "p10": P10Tokenizer, "ieee": IEEETokenizer}


def make_tokenizer(name: str, **options: int) -> NumberTokenizer:
    """Returns the number tokenizer "normalized", "p10" or "ieee"; `options` are the fields of its class.

    Raises ValueError if the name or an option is unknown, or a value is out of range.
    """
    if name not in _TOKENIZERS:
        raise ValueError(f"There is no number tokenizer {name!r}.{_suggestion(name, _TOKENIZERS)}")
    kind = _TOKENIZERS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    for option in options:
        if option not in known:
            raise ValueError(f"The {name} tokenizer has no option {option!r}.{_suggestion(option, known)}")
    return kind(**options)


def expert_targets(tokens: jax.Array, truth: jax.Array, base: int) -> jax.Array:
    """Returns the digit that an expert would write next, at every position of a number (GenRe2, arXiv 2512.06533).

    After the prefix of the truth, the expert writes the true digit; after a greater prefix the lowest digit, and after
    a smaller prefix the highest. Each brings the number as near to the truth as the prefix allows. For
    `NormalizedTokenizer`, whose ids are digits without a sign.

    `tokens` and `truth` are int[..., L], digits in `base`, most significant first. [P, 1, L] broadcasts to [P, G, L].
    The result is int32[..., L]. Raises AssertionError if ranks or lengths differ, or the digits are not integers.
    """
    chex.assert_type([tokens, truth], int)
    chex.assert_equal_rank([tokens, truth])
    chex.assert_equal_shape_suffix([tokens, truth], 1)
    # The first difference decides. A target does not depend on its own token: only differences before a position count.
    differs = (tokens != truth).astype(jnp.int32)
    differences_before = jnp.cumsum(differs, axis=-1) - differs
    first = jnp.where((differs == 1) & (differences_before == 0), jnp.where(tokens > truth, 1, -1), 0)
    greater = jnp.sum(first, axis=-1, keepdims=True) > 0
    return jnp.where(differences_before == 0, truth, jnp.where(greater, 0, base - 1)).astype(jnp.int32)


def _nearest(value: Fraction, base: int, digits: int, lowest: int, highest: int) -> tuple[int, int]:
    """Returns (mantissa, exponent) of the mantissa * base**exponent nearest to a value >= 0; ties go to even."""
    mantissa = lambda exponent: round(value / Fraction(base) ** exponent)
    exponent = lowest + bisect.bisect_left(range(lowest, highest), True, key=lambda e: mantissa(e) < base**digits)
    return min(mantissa(exponent), base**digits - 1), exponent  # the smallest exponent at which the mantissa fits


def _digits_of(value: int, base: int, digits: int) -> list[int]:
    return [value // base**place % base for place in reversed(range(digits))]


def _integer(digits: jax.Array, base: int) -> jax.Array:
    """Returns the whole numbers int32[...] of digits int32[..., n], most significant first."""
    places = np.array([base**place for place in reversed(range(digits.shape[-1]))], np.int32)
    return jnp.sum(digits * places, axis=-1)


def _scaled(mantissa: jax.Array, exponent: jax.Array, base: int) -> jax.Array:
    """Returns mantissa * base**exponent, saturating. Negative exponents divide: 10**2 is a float32, 10**-2 is not."""
    largest = float(np.finfo(np.float32).max)
    powers = [1]
    while powers[-1] * base <= largest:
        powers.append(powers[-1] * base)
    table = jnp.asarray(np.array([float(power) for power in powers], np.float32))
    most = len(powers) - 1
    value = mantissa.astype(jnp.float32)
    once = jnp.clip(exponent, -most, most)
    for part in (once, jnp.clip(exponent - once, -most, most)):  # two parts if the power exceeds float32
        power = table[jnp.abs(part)]
        value = jnp.where(part < 0, value / power, value * power)
    return jnp.minimum(value, largest)


def _check_whole(name: str, value: Any, low: int, high: int, condition: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; it has to be a whole number from {low} to {high}{condition}.")


def _check_digits(name: str, value: Any, base: int, most: int) -> None:
    # So many digits that they make at most `most` numbers.
    _check_whole(name, value, 1, next(n for n in range(32) if base ** (n + 1) > most), f" in base {base}")


def _suggestion(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" There are: {', '.join(known)}."
