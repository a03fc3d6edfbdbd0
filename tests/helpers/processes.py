"""Runs commands of the package in several processes, which jax connects like hosts."""

import os
import socket
import subprocess
import sys


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(command, processes=1, devices=1, env=()):
    """Starts Python with arguments in processes with simulated devices. {process} is the number of the process."""
    common = os.environ | dict(env)
    common |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    if processes > 1:
        common |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, *(str(argument).replace("{process}", str(i)) for argument in command)],
            env=common | ({"JAX_PROCESS_ID": str(i)} if processes > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def finish(started, limit=240):
    """Waits for all processes and returns [(exit code, stdout, stderr)]."""
    try:
        return [(p.returncode, *out) for p in started for out in [p.communicate(timeout=limit)]]
    finally:
        for p in started:
            p.kill()


def run_command(name, flags, shared_programs, processes=1):
    """Runs a command in processes with one device each, asserts success, and returns [(stdout, stderr)]."""
    env = {k.upper(): str(v) for k, v in shared_programs.items()}
    ended = finish(launch(["-m", f"jaxrl_reason.{name}", *flags], processes, env=env))
    assert [code for code, _, _ in ended] == [0] * processes, "\n".join(err[-2000:] for *_, err in ended)
    return [out for _, *out in ended]
