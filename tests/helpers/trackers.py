"""Fake packages of trackers, which record their calls, raise, or hang."""

import threading
import types


class Fake:
    """Fake modules wandb, trackio and mlflow. `calls` holds (function, arguments) in order.

    `raises` and `hangs` name functions: "init", "log" or "finish". A hanging function continues when `released` is set.
    """

    def __init__(self, raises="", hangs="", error=RuntimeError):
        self.calls, self.raises, self.hangs, self.error = [], raises, hangs, error
        self.released, self.reached = threading.Event(), threading.Event()
        handle = types.SimpleNamespace(id="given", log=self._log, finish=self._finish)
        self.wandb = types.SimpleNamespace(init=lambda **known: self._init(handle, **known))
        self.trackio = types.SimpleNamespace(init=lambda **known: self._init(handle, **known))
        self.mlflow = types.SimpleNamespace(
            set_experiment=lambda name: self.calls.append(("set_experiment", name)),
            start_run=lambda **known: self._init(
                types.SimpleNamespace(info=types.SimpleNamespace(run_id="given")), **known
            ),
            log_dict=lambda config, name: self.calls.append(("log_dict", {name: config})),
            log_metrics=self._log,
            end_run=self._finish,
        )

    def _call(self, name, known):
        if name == self.hangs:
            self.reached.set()
            self.released.wait(60)
        if name == self.raises:
            raise self.error(f"no {name}\nhere")
        self.calls.append((name, known))

    def _init(self, handle, **known):
        self._call("init", known)
        return handle

    def _log(self, metrics, step):
        self._call("log", {"step": step, **metrics})

    def _finish(self):
        self._call("finish", {})

    def of(self, name):
        """Returns the arguments of all calls of a function."""
        return [known for called, known in self.calls if called == name]
