"""The vocabulary of a regression run: digits of numbers, and the text tokenizer of the rows."""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np

from jaxrl_reason.data import numbers, Tokenizer
from jaxrl_reason.data.tables import TargetScaler


@dataclasses.dataclass(frozen=True)
class Digits:
    """The tokenizer of a regression run."""

    number: numbers.NumberTokenizer  # alphabet and spelling of numbers
    target: TargetScaler  # scales targets to the range of the alphabet: z-scores, or the unit interval
    text: Tokenizer | None = None  # of rows that enter as text, or None
    # The number of ids of the pretrained model, at least as many as its tokenizer has; 0: the size of `text`.
    text_size: int = 0

    @property
    def pad_id(self) -> int:
        """The id that begins every prompt and fills unused positions."""
        return len(self.number.tokens)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """No id: every number has the same length."""
        return ()

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        return self.pad_id + 1 + (self.text_size or (self.text.vocab_size if self.text else 0))

    @property
    def legal(self) -> np.ndarray:
        """bool[L, V], the tokens that are allowed at each position of a number."""
        legal = self.number.legal
        return np.pad(legal, [(0, 0), (0, self.vocab_size - legal.shape[1])])

    def encode(self, targets: np.ndarray) -> np.ndarray:
        """Encodes targets float[N] as int32[N, L]."""
        scale = self.target.to_unit if self.number.unit_interval else self.target.to_z
        return self.number.encode(scale(np.asarray(targets, np.float64)))

    def decode(self, tokens: jax.Array) -> jax.Array:
        """Decodes int[..., L] to z-scores f32[...], NaN if the tokens are no number. Traceable."""
        value = self.number.decode(tokens)
        return self.target.unit_to_z(value) if self.number.unit_interval else value

    def decode_batch(self, sequences: Sequence[Sequence[int]], skip_special: bool = True) -> list[str]:
        """Returns numbers or prompts as text, for people."""
        del skip_special  # digits have no special tokens
        return [self._text(list(ids)) for ids in sequences]

    completions = decode_batch

    def pieces(self, ids: Sequence[int], skip_special: bool = True) -> list[str]:
        """Returns the text of each id of a number, with the space before it."""
        del skip_special
        return [" " * (n > 0) + self.number.text([i]) for n, i in enumerate(ids)]

    def prompts(self, texts: Sequence[str] | None, rows: int) -> list[list[int]]:
        """Returns the prompts of a table's rows as ids. Without texts, rows are features: a prompt is one token."""
        if texts is None:
            return [[self.pad_id]] * rows
        if self.text is None:
            raise ValueError("These digits have no text tokenizer, so rows cannot enter as text.")
        return [[self.pad_id, *(i + self.pad_id + 1 for i in ids)] for ids in self.text.encode_batch(list(texts))]

    def description(self) -> dict[str, Any]:
        """Returns spelling and scale of numbers, as JSON."""
        number = {"kind": type(self.number).__name__, **dataclasses.asdict(self.number)}  # type: ignore[call-overload] # subclasses are dataclasses
        return {"number": number, "target": dataclasses.asdict(self.target)}

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes the description to digits.json, and the text tokenizer, if any, to the folder text/."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True)
        (directory / "digits.json").write_text(json.dumps(self.description(), indent=2) + "\n", encoding="utf-8")
        if self.text:
            self.text.save(directory / "text")

    def _text(self, ids: list[int]) -> str:
        if ids and ids[0] == self.pad_id:
            return self.text.decode_batch([[i - self.pad_id - 1 for i in ids[1:]]])[0] if self.text else "(features)"
        return self.number.text(ids)
