"""Checkpoints: orbax's manager around a TrainState, for both phases of a run.

Checkpoints are numbered through the whole run: supervised steps first, RL steps behind them. The RL
phase begins with a checkpoint of its own (its step 0), which is never older than the supervised end.
"""

from collections.abc import Mapping
import contextlib
import itertools
import logging
import pathlib
import sys
import textwrap
import zipfile

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxrl_reason import hub
from jaxrl_reason.learner import Experience, TrainState
from jaxrl_reason.rollout import Rollout

_log = logging.getLogger(__name__)
# What orbax raises on damaged files.
UNREADABLE = (ValueError, KeyError, OSError, TypeError, AttributeError, RecursionError)
_UNWRITABLE = (ValueError, OSError)  # and on full disks


class CheckpointError(ValueError):
    """Weights that cannot be saved or read again; the message is a sentence that names them."""


class Checkpoints:
    """Saves and restores TrainStates under `directory`, keeping the newest `keep`.

    Raises:
      CheckpointError: the directory cannot be made or read.
    """

    def __init__(self, directory: pathlib.Path, keep: int):
        self.directory = directory.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        # Without a handler orbax infers one from the newest checkpoint, and a damaged one misleads it about all.
        handler = ocp.StandardCheckpointHandler()
        with _failing(UNREADABLE, f"Checkpoints cannot be kept in {self.directory}"):
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handler)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, number: int, state: TrainState) -> None:
        """Saves, complete or not at all, and then removes what is more than `keep`.

        Raises:
          CheckpointError: it cannot be written.
        """
        if number == self.latest():
            return
        with _failing(_UNWRITABLE, f"Checkpoint {self.directory / str(number)} cannot be written"):
            self._manager.save(number, args=ocp.args.StandardSave(state._asdict()))

    def restore(self, like: TrainState) -> tuple[int, TrainState] | None:
        """The newest readable checkpoint in the shapes, dtypes and shardings of `like` (arrays or ShapeDtypeStructs), or None.

        Newer ones that cannot be read are renamed to damaged-<number>, with a warning: they no longer count among those
        that are kept, and the run writes their steps again. Several processes do not do this on their own.

        Raises:
          CheckpointError: there are checkpoints, and none can be read; all stay as they are. Of several processes: the newest cannot be read.
        """
        abstract = _abstract(like._asdict())
        faults = {}
        for number in sorted(self._manager.all_steps(), reverse=True):
            try:
                with _failing(UNREADABLE):
                    hub.inside(self.directory, str(number))
                    restored = self._manager.restore(number, args=ocp.args.StandardRestore(abstract))
            except CheckpointError as e:
                faults[number] = str(e)
                if jax.process_count() > 1:  # the others may have read theirs, and wait for this one
                    raise CheckpointError(
                        f"Checkpoint {self.directory / str(number)} cannot be read by process {jax.process_index()}: {faults[number]} Rename "
                        "its directory to fall back to the one before."
                    ) from e
                continue
            for bad, fault in faults.items():
                self._put_aside(bad, fault)
            return number, TrainState(**restored)
        if faults:
            number, fault = next(iter(faults.items()))
            raise CheckpointError(
                f"None of the checkpoints under {self.directory} can be read; the newest ({number}): {fault}"
            )
        return None

    def _put_aside(self, number: int, fault: str) -> None:
        path = self.directory / str(number)
        names = itertools.chain([f"damaged-{number}"], (f"damaged-{number}-{i}" for i in itertools.count(2)))
        aside = next(p for p in map(self.directory.joinpath, names) if not p.exists())
        path.rename(aside)
        self._manager.reload()
        _log.warning("Checkpoint %s cannot be read and is skipped; it is now %s: %s", path, aside.name, fault)

    def close(self) -> None:
        self._manager.close()


def save_params(directory: pathlib.Path, params) -> None:
    """Weights alone, complete or absent; replaces what is there.

    Raises:
      CheckpointError: they cannot be written.
    """
    with _failing(_UNWRITABLE, f"The weights {directory} cannot be written"):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory.resolve(), params, force=True)


def load_params(directory: pathlib.Path, like):
    """Weights in the shapes, dtypes and shardings of `like`.

    Raises:
      CheckpointError: they cannot be read.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            return checkpointer.restore(directory.resolve(), _abstract(like))
        except UNREADABLE as e:
            raise CheckpointError(f"The weights {directory} cannot be read: {_in_short(e)}") from e


def save_batch(file: pathlib.Path, batch: Experience, rewards: Mapping[str, np.ndarray]) -> None:
    """Writes what an update learnt from, and the rewards by name, to a .npz file that is complete or absent.

    Raises:
      CheckpointError: it cannot be written.
    """
    parts = {
        "rollout": batch.rollout._asdict(),
        "experience": batch._replace(rollout=None)._asdict(),
        "rewards": rewards,
    }
    arrays = {f"{part}.{name}": x for part, of in parts.items() for name, x in of.items() if x is not None}
    scratch = file.with_name(f"{file.name}.tmp")
    with _failing(_UNWRITABLE, f"{file} cannot be written"):
        with scratch.open("wb") as out:
            np.savez(out, **arrays)
        scratch.replace(file)


def load_batch(file: pathlib.Path) -> tuple[Experience, dict[str, np.ndarray]]:
    """What `save_batch` has written.

    Raises:
      CheckpointError: it cannot be read.
    """
    parts = {"rollout": {}, "experience": {}, "rewards": {}}
    try:
        with np.load(file, allow_pickle=False) as arrays:
            for key, x in arrays.items():
                part, _, name = key.partition(".")
                parts[part][name] = x
        rollout = Rollout(**parts["rollout"])
        return Experience(**parts["experience"] | {"rollout": rollout}), parts["rewards"]
    except (*UNREADABLE, zipfile.BadZipFile) as e:
        raise CheckpointError(f"The batch {file} cannot be read: {_in_short(e)}") from e


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@contextlib.contextmanager
def _failing(errors: tuple[type[Exception], ...], what: str = ""):
    """Around what orbax does: where it raises one of `errors`, a CheckpointError says so.

    Raises:
      CheckpointError: `what`, and why.
    """
    _silence_echoes()
    try:
        yield
    except errors as e:
        raise CheckpointError(f"{what}: {_in_short(e)}" if what else _in_short(e)) from e


# What orbax raises here its threads also log, and asyncio once it collects them: by logger, how these lines are known.
_ECHOES = {"absl": "_SignalingThread.run() raised an exception", "asyncio": "exception was never retrieved"}
_CLOSED = "Event loop is closed"  # what those raise that finish later


def _silence_echoes() -> None:
    """From now on a checkpoint that cannot be read or written is one sentence, not a page of tracebacks around it."""
    for name in _ECHOES:
        logging.getLogger(name).addFilter(_no_echo)  # which adds the same filter once
    hook = sys.unraisablehook
    if getattr(hook, "__name__", "") != _but_of_closed_loops.__name__:
        sys.unraisablehook = _but_of_closed_loops(hook)


def _no_echo(record: logging.LogRecord) -> bool:
    return _ECHOES[record.name] not in record.getMessage()


def _but_of_closed_loops(hook):
    def told(unraisable):
        if not (isinstance(unraisable.exc_value, RuntimeError) and _CLOSED in str(unraisable.exc_value)):
            hook(unraisable)

    told.__name__ = _but_of_closed_loops.__name__
    return told


def _in_short(error: Exception) -> str:
    """The beginning of a message: those of tensorstore go on with pages of its settings."""
    return textwrap.shorten(str(error), 300, placeholder=" ...") or type(error).__name__
