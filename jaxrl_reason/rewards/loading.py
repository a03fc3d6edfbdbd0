"""Reward functions by their names in the configuration: built in, or a user's own in a file or module."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
from pathlib import Path
import sys
from types import ModuleType
import zlib

from jaxrl_reason.rewards.host import BUILT_IN, name_of, place_of, RewardError, RewardFunction
from jaxrl_reason.rewards.math import require_math_verify


def load_reward(spec: str, other_names: Sequence[str] = ()) -> RewardFunction:
    """Returns the function of a name: built in ("accuracy"), "package.module:function", or "path/to/file.py:function".

    A file can import the modules next to it, as a script can. It is run once per process, until its text changes.
    `other_names` are built-in names that the caller handles itself.

    Raises RewardError if nothing has that name, or if a package is missing. The message gives the nearest existing names.
    """
    place, colon, attribute = spec.rpartition(":")
    if not colon:
        if spec == "math_verify":
            try:
                require_math_verify()
            except ImportError as error:
                raise RewardError(str(error)) from None
        if spec in BUILT_IN:
            return BUILT_IN[spec]
        known = [*BUILT_IN, *other_names]
        raise RewardError(
            f"There is no built-in reward {spec!r}{_nearest(spec, known)}. Built in are {', '.join(known)}; "
            'name a function of your own as "package.module:function" or "path/to/file.py:function".'
        )
    module = _import_file(Path(place), spec) if place.endswith(".py") else _import_module(place, spec)
    function = getattr(module, attribute, None)
    if not callable(function):
        problem = f"has no function {attribute!r}" if function is None else f"has {attribute!r}, which cannot be called"
        valid = [name for name, value in vars(module).items() if callable(value)]
        raise RewardError(f"Reward {spec!r}: {place} {problem}{_nearest(attribute, valid)}.")
    if inspect.isclass(function):
        raise RewardError(f"Reward {spec!r} is a class; make an instance of it in {place}, and name the instance.")
    return function


def file_digest(spec: str) -> str | None:
    """Returns the start of the SHA-256 of the file of "path/to/file.py:function", in hex; None for other names."""
    place = spec.rpartition(":")[0]
    return hashlib.sha256(Path(place).expanduser().read_bytes()).hexdigest()[:16] if place.endswith(".py") else None


def distinct_names(functions: dict[str, Callable], taken: Iterable[str]) -> dict[str, str]:
    """Returns the names in the metrics of a user's own functions, by spec.

    A function has its own name, and an object the name of its class. Functions of equal names get the text after the
    colon; if it is equal too, the name of the file or module comes before it. `taken` are the names of built-in rewards;
    a function whose text after the colon is taken gets it nevertheless.
    """
    taken = set(taken)
    names = {spec: name_of(function) for spec, function in functions.items()}
    for longer in (lambda _, name: name, lambda place, name: f"{Path(place.removesuffix('.py')).name}.{name}"):
        used = [*names.values(), *taken]
        for spec, name in names.items():
            if used.count(name) > 1:
                place, _, attribute = spec.rpartition(":")
                names[spec] = attribute if attribute in taken else longer(place, attribute)
    return names


def _nearest(name: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(valid), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _import_module(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"Reward {spec!r}: importing {name!r} failed with {type(error).__name__}: {error}. Install the module or start "
            'the run in its directory; name a file anywhere else as "path/to/file.py:function".'
        ) from error


_files: dict[Path, tuple[bytes, ModuleType]] = {}  # the files that were run, their texts, and the results


def _import_file(path: Path, spec: str) -> ModuleType:
    file = path.expanduser().absolute()
    if not file.is_file():
        nearby = _nearest(file.name, [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else [])
        raise RewardError(f"Reward {spec!r}: there is no file {path}{nearby} (in {file.parent.resolve()}).")
    text = file.read_bytes()
    if file in _files and _files[file][0] == text:
        return _files[file][1]
    name = f"jaxrl_reason_reward_{file.stem}_{zlib.crc32(bytes(file)):08x}"  # other files may have the same stem
    module_spec = importlib.util.spec_from_file_location(name, file)
    assert module_spec is not None and module_spec.loader is not None  # true of every .py file
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses look up their module there
    try:
        with _found_first(file.parent):
            module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        fault = f"{type(error).__name__}: {error} {place_of(error, file.parent)}".strip()
        raise RewardError(f"Reward {spec!r}: running {path} failed with {fault}.") from error
    _files[file] = text, module
    return module


@contextlib.contextmanager
def _found_first(folder: Path) -> Iterator[None]:
    """Makes imports find the modules of a folder: before all others in this context, after all others later."""
    # Functions may import when they are called. By then these modules must not hide the imports of the run itself.
    siblings = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    siblings -= {*sys.stdlib_module_names, "jaxrl_reason"}
    elsewhere = {
        name: module
        for name, module in sys.modules.items()
        if name.partition(".")[0] in siblings and not _is_from(folder, module)
    }
    for name in elsewhere:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()  # a file may be newer than the known list of the folder
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        hidden = {name.partition(".")[0] for name in elsewhere}
        for name in [name for name in sys.modules if name.partition(".")[0] in hidden]:
            del sys.modules[name]
        sys.modules.update(elsewhere)


def _is_from(folder: Path, module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).is_relative_to(folder)
