"""Compiled stage programs kept on disk, where a later start finds them without tracing.

JAX's compilation cache is asked by a program's text, and to have that a 7B model's stage is traced for half a second,
program after program under the interpreter's lock. Here programs are found by what their text is made from: the stage
and the shapes, this package's sources, the libraries, JAX's settings and XLA's options, the devices. They lie in a
folder of JAX's cache, and like its own are kept where XLA took long enough over them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import logging
import os
import pickle
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.extend.backend import get_compile_options
from jaxlib import xla_client

from lobra_jax.out_of_memory import is_out_of_memory

FOLDER = "stages"
CACHE_READ = "/jax/compilation_cache/cache_hits"
"""JAX's event of a program that it read from its cache, on the thread that asked for it."""

COMPILED_OR_READ = "/jax/core/compile/backend_compile_duration"
"""JAX's event of how long that took, or compiling."""

KEPT_READ = "/lobra_jax/kept_programs/read"
"""The event, of `jax.monitoring`, of a program that was read and neither traced nor compiled."""

SOURCES = ("lobra_jax", "planner")
LIBRARIES = ("jax", "jaxlib", "flax", "numpy")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
COMPRESSION = 1
"""zlib's quickest, by which programs take an eighth of the room."""

UNUSED_S = 30 * 24 * 3600.0
"""Files that nobody has read for so long are removed."""

Programs = dict[str, jax.stages.Compiled]

_log = logging.getLogger(__name__)


def kept(made_of: Sequence[str], devices: Sequence[Any], make: Callable[[], Programs]) -> Programs:
    """The programs that `make` compiles, or those that an earlier process kept of it.

    Thread-safe, as `make` is. Without a compilation cache nothing is kept.

    Args:
      made_of: tells these programs from any other of the same sources, libraries, settings and devices.
      devices: those that they run on.
    """
    folder = programs_folder()
    if folder is None:
        return make()
    path = folder / _digest([*_surroundings(devices), *made_of])
    programs = _read(path, devices)
    if programs is not None:
        return programs
    seconds_before, reads_before = _mine.seconds, _mine.reads
    programs = make()
    is_long = _mine.seconds - seconds_before >= jax.config.jax_persistent_cache_min_compile_time_secs
    # XLA writes what it read of a CPU's program without its functions.
    is_whole = devices[0].platform != "cpu" or _mine.reads == reads_before
    # Where sources were changed since, what is in memory may be of either.
    if is_long and is_whole and sources() == _SOURCES:
        _write(path, programs)
    return programs


class _Counts(threading.local):
    """Of this thread: programs that JAX read from its cache, and seconds that it took to read or compile."""

    reads = 0
    seconds = 0.0


_mine = _Counts()


def _on_event(name: str, **_: Any) -> None:
    _mine.reads += name == CACHE_READ


def _on_duration(name: str, seconds: float, **_: Any) -> None:
    _mine.seconds += seconds if name == COMPILED_OR_READ else 0.0


jax.monitoring.register_event_listener(_on_event)
jax.monitoring.register_event_duration_secs_listener(_on_duration)


def programs_folder() -> Path | None:
    """Where programs are kept; None where JAX's compilation cache is off."""
    cache = jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None
    return None if cache is None else Path(cache) / FOLDER


def describe(tree: Any) -> str:
    """A pytree of abstract arrays in words: structure, shapes, dtypes, placements."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [f"{leaf.dtype}{leaf.shape}{leaf.sharding.spec}" for leaf in leaves]
    return f"{structure} {' '.join(arrays)}"


def sources() -> str:
    """A digest of the Python files that programs are traced from, as they are now."""
    files = []
    for package in SOURCES:
        for place in importlib.util.find_spec(package).submodule_search_locations:
            root = Path(place)
            files += [(f"{package}/{path.relative_to(root)}", path) for path in root.rglob("*.py")]
    return _digest([f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for name, path in sorted(files)])


def _read(path: Path, devices: Sequence[Any]) -> Programs | None:
    """What was kept there, loaded onto the devices; None if nothing was, or if it cannot be read, which is said."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("kept programs %s cannot be read: %s; made anew", path, error.strerror)
        return None
    try:
        parts = pickle.loads(zlib.decompress(content))
        client = devices[0].client
        programs = {
            name: serialize_executable.deserialize_and_load(*part, backend=client, execution_devices=devices)
            for name, part in parts.items()
        }
    except Exception as error:  # whatever a damaged pickle or an executable of other devices raises
        if is_out_of_memory(error):
            raise
        _log.warning("kept programs %s cannot be read: %.200r; made anew", path, error)
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # in use
    for _ in programs:
        jax.monitoring.record_event(KEPT_READ)
    return programs


def _write(path: Path, programs: Programs) -> None:
    folder, new = path.parent, None
    try:
        parts = {name: serialize_executable.serialize(program) for name, program in programs.items()}
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unused(folder)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".new", delete=False) as file:
            new = Path(file.name)
            file.write(zlib.compress(pickle.dumps(parts), COMPRESSION))
        new.replace(path)
    except Exception as error:  # a full disk, or programs that JAX cannot take apart: they are at hand all the same
        if new is not None:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
        _log.warning("programs are not kept in %s: %s", folder, error)


def _remove_unused(folder: Path) -> None:
    """Those of sources before, of other versions, and what a process that was killed left half written."""
    for file in folder.iterdir():
        with contextlib.suppress(OSError):  # another process was quicker
            if time.time() - file.stat().st_mtime > UNUSED_S:
                file.unlink()


def _surroundings(devices: Sequence[Any]) -> Iterator[str]:
    """All that a program depends on beside what it is made of: as in the key of JAX's cache, and which devices."""
    yield _SOURCES
    for name in LIBRARIES:
        module = importlib.import_module(name)  # not its metadata: another may come first on the path
        yield f"{name} {module.__version__} {module.__file__}"
    client = devices[0].client
    yield f"{client.platform} {client.platform_version} {_fingerprint(devices)}"
    yield " ".join(f"{device.id}:{device.device_kind}" for device in devices)
    yield from (f"{name}={os.environ.get(name, '')}" for name in FLAGS)
    # What XLA goes by: flags that are set after it first read them do not count.
    yield get_compile_options(num_replicas=1, num_partitions=len(devices)).SerializeAsString().hex()
    # Settings such as the matmuls' precision go into a trace; those of the cache itself do not.
    settings: Mapping[str, Any] = jax.config.values
    yield repr(sorted((name, repr(value)) for name, value in settings.items() if "cache" not in name))


def _fingerprint(devices: Sequence[Any]) -> str:
    """What a compiler knows of the devices: a CPU's instructions, say. JAX's cache goes without where none tells."""
    try:
        return str(xla_client.get_topology_for_devices(list(devices)).fingerprint())
    except jax.errors.JaxRuntimeError:
        return ""


def _digest(parts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} {part}\n".encode())
    return digest.hexdigest()


_SOURCES = sources()
"""When this module was imported: what is imported is not changed by an edit after it."""
