"""A profile of some steps, written by jax for TensorBoard and Perfetto (config.log.profile)."""

from collections.abc import Iterator, Sequence
import contextlib
import pathlib
from typing import Self

import jax


class Profile(contextlib.AbstractContextManager):
    """Profiles the steps from `bounds[0]` to `bounds[1]` into a directory; a context manager. No bounds: no profile.

    Steps that were done before this process began are left out.
    """

    def __init__(self, directory: pathlib.Path, bounds: Sequence[int], *, enabled: bool = True):
        self._directory, self._bounds, self._on = directory, bounds if enabled else (), False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Surrounds step `number`, which must end synchronised with the device."""
        inside = bool(self._bounds) and self._bounds[0] <= number <= self._bounds[1]
        if inside and not self._on:
            jax.profiler.start_trace(self._directory)
            self._on = True
        yield
        if inside and number == self._bounds[1]:
            self._stop()

    def _stop(self) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Writes the profile if the run ends within its steps."""
        self._stop()
