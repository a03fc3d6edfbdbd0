"""Fixtures of all tests.

Because of this file, pytest puts tests/ on the import path, so that `from helpers import ...` works in every folder.
"""

import gc
import hashlib
import os

os.environ["JAX_COMPILATION_CACHE_DIR"] = (
    ""  # before JAX is imported: tests, and processes they start, keep off the user's cache
)

from huggingface_hub import constants
import hypothesis
import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest

from jaxrl_reason.plan import devices_of

# A busy machine may be slow, so examples have no deadline.
hypothesis.settings.register_profile("ours", deadline=None)
hypothesis.settings.load_profile("ours")


@pytest.fixture(scope="module", autouse=True)
def forgetful():
    """Drops the programs of each module. Later modules need other ones, and thousands make a process slow and large."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def shared_directory(tmp_path_factory):
    """Returns one directory for all workers of a test session."""
    directory = tmp_path_factory.getbasetemp()
    return directory.parent if "PYTEST_XDIST_WORKER" in os.environ else directory


@pytest.fixture(scope="session")
def data_dir(shared_directory):
    """Returns the directory in which TFDS prepares data, once for all tests of all workers."""
    return shared_directory / "tensorflow_datasets"


@pytest.fixture(scope="session")
def shared_programs(shared_directory):
    """Returns JAX settings under which every process of a test session finds the programs that another has compiled."""
    return {
        "jax_compilation_cache_dir": str(shared_directory / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }


@pytest.fixture
def tpu():
    """Returns a function from the name of a slice to its devices, for compiling only."""
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu: pip install jaxrl_reason[tpu]")
    return devices_of


@pytest.fixture(scope="module")
def quick_compilation(shared_programs):
    """Shares programs, and compiles them with few optimizations, for tests that run each program a few times."""
    before = {name: getattr(jax.config, name) for name in shared_programs} | {"jax_disable_most_optimizations": False}
    for name, value in {**shared_programs, "jax_disable_most_optimizations": True}.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX decides once whether there is a cache
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Writes repositories into a cache of the hub, as its client lays it out; there is no network.

    `hub_cache(kind, name, files)` writes one revision, to which "main" points then, and returns its commit; a file of more than 4 KiB
    counts as large.
    """
    directory = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def write(kind: str, name: str, files: dict[str, bytes]) -> str:
        repository = directory / f"{kind}s--{name.replace('/', '--')}"
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        for file, content in files.items():
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            blob = repository / "blobs" / (hashlib.sha256(content).hexdigest() if len(content) > 4096 else git)
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link = repository / "snapshots" / commit / file
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        return commit

    write.directory = directory
    return write
