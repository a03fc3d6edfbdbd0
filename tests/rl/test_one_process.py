"""Tests a single process: no connections, SIGTERM, and errors that wait until their result is needed."""

import os
import signal
import threading

import jax
import numpy as np
import pytest

from jaxrl_reason.models import sharding
from jaxrl_reason.rl import hosts


def test_half_an_address_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS=''"):
        hosts.initialize(10, 20)


def test_a_tpu_machine_that_jax_knows_no_cluster_of_is_alone_and_one_that_nobody_answers_is_refused(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hosts, "_on_a_tpu_vm", lambda: True)

    def fails(error):
        def initialize(**_):
            raise error

        monkeypatch.setattr(jax.distributed, "initialize", initialize)

    fails(ValueError("coordinator_address should be defined."))
    hosts.initialize(10, 20)
    fails(OSError("no metadata"))
    with pytest.raises(ValueError, match="cannot be connected with the others .*no metadata.*JAX_NUM_PROCESSES=1"):
        hosts.initialize(10, 20)


def test_alone_there_is_nothing_to_connect_and_a_share_is_everything(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    hosts.initialize(10, 20)
    assert jax.process_count() == 1 and hosts.is_first()
    split = sharding.batch_sharding(sharding.make_mesh(devices=jax.devices()[:1]))
    np.testing.assert_array_equal(hosts.local_rows(split, 5), np.arange(5))
    x = np.arange(10.0).reshape(5, 2)
    np.testing.assert_array_equal(hosts.rows_to_host(hosts.put_rows(x, split, 5), split), x)


def test_sigterm_is_told_stays_told_and_ends_nothing_meanwhile():
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("Only the main thread hears signals.")
    before = signal.getsignal(signal.SIGTERM)
    with hosts.preemption() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() and asked()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture
def main_thread():
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("Only the main thread hears signals.")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


def test_ctrl_c_asks_as_sigterm_does_and_a_second_one_interrupts(main_thread):
    press = lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with hosts.preemption() as asked:
            assert not asked()
            press()
            assert asked() and asked()
            press()
    with hosts.preemption() as asked:  # the signal is forgotten
        assert not asked()


def test_ctrl_c_after_sigterm_still_saves(main_thread):
    with hosts.preemption() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()


def test_a_signal_in_one_of_several_runs_is_told_to_all(main_thread):
    with hosts.preemption() as asked:
        with hosts.preemption() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner()
        with hosts.preemption() as inner:
            assert inner()
        assert asked()


def test_in_another_thread_nothing_is_caught():
    found = []

    def work():
        with hosts.leaving_at_once(), hosts.preemption() as asked:
            found.append(asked())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_what_was_attempted_raises_when_it_is_asked_for():
    assert hosts.attempt(lambda: 3, ValueError)() == 3
    failed = hosts.attempt(lambda: int("x"), ValueError)
    with pytest.raises(ValueError, match="invalid literal"):
        hosts.agree(failed, ValueError)
    with pytest.raises(KeyError):  # other errors are raised at once
        hosts.attempt(lambda: {}["x"], ValueError)
