"""Checkpoints: orbax's manager around a TrainState, for both phases of a run.

Checkpoints are numbered through the whole run: supervised steps first, RL steps behind them. The RL
phase begins with a checkpoint of its own (its step 0), which is never older than the supervised end.
"""

import logging
import pathlib

import jax
import orbax.checkpoint as ocp

from jaxrl_reason.learner import TrainState

_log = logging.getLogger(__name__)


class Checkpoints:
    """Saves and restores TrainStates under `directory`, keeping the newest `keep`."""

    def __init__(self, directory: pathlib.Path, keep: int):
        self.directory = directory.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, number: int, state: TrainState) -> None:
        if number != self.latest():
            self._manager.save(number, args=ocp.args.StandardSave(state._asdict()))

    def restore(self, like: TrainState) -> tuple[int, TrainState] | None:
        """The newest readable checkpoint in the shapes, dtypes and shardings of `like`, or None.

        A damaged checkpoint is skipped with a warning that names it; so is deleting it, which lets the
        run write that step again.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like._asdict())
        steps = sorted(self._manager.all_steps(), reverse=True)
        faults = []
        for number in steps:
            try:
                restored = self._manager.restore(number, args=ocp.args.StandardRestore(abstract))
            except (ValueError, KeyError, OSError, TypeError) as e:
                faults.append((number, e))
                continue
            for bad, e in faults:
                _log.warning(
                    "Checkpoint %s cannot be read and is skipped: %s", self.directory / str(bad), str(e).split("\n")[0]
                )
                self._manager.delete(bad)
            return number, TrainState(**restored)
        if faults:
            number, e = faults[0]
            raise ValueError(
                f"None of the checkpoints under {self.directory} can be read; the newest ({number}): {str(e).splitlines()[0]}"
            )
        return None

    def close(self) -> None:
        self._manager.close()


def save_params(directory: pathlib.Path, params) -> None:
    """Weights alone, complete or absent; replaces what is there."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.resolve(), params, force=True)


def load_params(directory: pathlib.Path, like):
    """Weights in the shapes, dtypes and shardings of `like`."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(directory.resolve(), abstract)
