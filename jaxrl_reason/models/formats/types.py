"""Types that the formats share: an opened model, its weights, the place of one weight in them, and the error of all formats."""

from collections.abc import Mapping
import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxrl_reason.data.tokenizer import Tokenizer
from jaxrl_reason.models.config import ModelConfig


class PretrainedError(ValueError):
    """A model cannot be read or written. The message is a sentence that names the file, the field or the tensor."""


@runtime_checkable
class Weights(Protocol):
    """A readable source of named tensors.

    Attributes:
      where: the source's name in messages.
      shapes: shape by name; known before any tensor is read.
    """

    @property
    def where(self) -> str: ...
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The tensors of a file that hold one weight of the decoder.

    Attributes:
      names: one tensor, or one per layer if the weight is stacked.
      stacked: whether the weight has a leading axis of layers.
      transposed: whether the file has [out, in]; weights of the decoder are [in, out].
      shape: shape of each tensor in the file.
    """

    names: tuple[str, ...]
    stacked: bool
    transposed: bool
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """A model that is opened: everything about it but the values of its weights.

    Attributes:
      config: in float32; the caller chooses dtypes.
      weights: the source of its tensors.
      tokenizer, source, files: see `pretrained.Policy`.
    """

    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer | None
    source: Mapping[str, Any]
    files: Mapping[str, bytes]
