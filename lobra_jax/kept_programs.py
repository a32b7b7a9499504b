"""Compiled stage programs kept on disk, where a later start finds them without tracing.

JAX's compilation cache is asked by a program's text, and to have that a 7B model's stage is traced for half a second,
program after program under the interpreter's lock. Here programs are found by what their text is made from: the stage
and the shapes, this package's sources, the versions and flags. They lie in a folder of JAX's cache, and both follow
its settings: where it is, and how long a program takes to make that is worth a file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pickle
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

FOLDER = "stages"
CACHE_READ = "/jax/compilation_cache/cache_hits"
"""JAX's event of a program that it read from its cache, on the thread that asked for it."""

KEPT_READ = "/lobra_jax/kept_programs/read"
"""The event, of `jax.monitoring`, of a program that was read and neither traced nor compiled."""

SOURCES = ("lobra_jax", "planner")
LIBRARIES = ("jax", "jaxlib", "flax", "numpy")
FLAGS = ("XLA_FLAGS",)
COMPRESSION = 1
"""zlib's quickest, by which programs take an eighth of the room."""

Programs = dict[str, jax.stages.Compiled]


def kept(made_of: Sequence[str], devices: Sequence[Any], make: Callable[[], Programs]) -> Programs:
    """The programs that `make` compiles, or those that an earlier process kept of it.

    Thread-safe, as `make` is. Without a compilation cache nothing is kept.

    Args:
      made_of: tells these programs from any other of the same sources, versions, flags and devices.
      devices: those that they run on.
    """
    folder = programs_folder()
    if folder is None:
        return make()
    path = folder / _digest([*_surroundings(devices), *made_of])
    programs = _read(path, devices)
    if programs is not None:
        return programs
    started, reads_before = time.perf_counter(), _reads.count
    programs = make()
    is_long = time.perf_counter() - started >= jax.config.jax_persistent_cache_min_compile_time_secs
    # XLA writes what it read of a CPU's program without its functions.
    is_whole = devices[0].platform != "cpu" or _reads.count == reads_before
    if is_long and is_whole:
        _write(path, programs)
    return programs


class _Reads(threading.local):
    """Programs that this thread read from JAX's cache."""

    count = 0


_reads = _Reads()


def _on_event(name: str, **_: Any) -> None:
    _reads.count += name == CACHE_READ


jax.monitoring.register_event_listener(_on_event)


def programs_folder() -> Path | None:
    """Where programs are kept; None where JAX's compilation cache is off."""
    cache = jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None
    return None if cache is None else Path(cache) / FOLDER


def describe(tree: Any) -> str:
    """A pytree of abstract arrays in words: structure, shapes, dtypes, placements."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [f"{leaf.dtype}{leaf.shape}{leaf.sharding.spec}" for leaf in leaves]
    return f"{structure} {' '.join(arrays)}"


def _read(path: Path, devices: Sequence[Any]) -> Programs | None:
    """What was kept there, loaded onto the devices; None if nothing was, or if it cannot be read, which is said."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        warnings.warn(f"kept programs {path}: {error.strerror}; compiled anew", stacklevel=2)
        return None
    try:
        parts = pickle.loads(zlib.decompress(content))
        client = devices[0].client
        programs = {
            name: serialize_executable.deserialize_and_load(*part, backend=client, execution_devices=devices)
            for name, part in parts.items()
        }
    except Exception as error:  # whatever a damaged pickle or an executable of other devices raises
        warnings.warn(f"kept programs {path} cannot be read: {error!r:.200}; compiled anew", stacklevel=2)
        return None
    for _ in programs:
        jax.monitoring.record_event(KEPT_READ)
    return programs


def _write(path: Path, programs: Programs) -> None:
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        parts = {name: serialize_executable.serialize(program) for name, program in programs.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(zlib.compress(pickle.dumps(parts), COMPRESSION))
        new.replace(path)
    except (OSError, jax.errors.JaxRuntimeError) as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        warnings.warn(f"programs are not kept in {path.parent}: {error}", stacklevel=2)


def _surroundings(devices: Sequence[Any]) -> Iterator[str]:
    """All that a program depends on beside what it is made of."""
    yield _sources()
    client = devices[0].client
    yield f"{client.platform} {client.platform_version}"
    yield " ".join(f"{device.id}:{device.device_kind}" for device in devices)
    yield from (f"{name}={os.environ.get(name, '')}" for name in FLAGS)
    # Settings such as the matmuls' precision go into a trace; those of the cache itself do not.
    settings: Mapping[str, Any] = jax.config.values
    yield repr(sorted((name, repr(value)) for name, value in settings.items() if "cache" not in name))


@functools.cache
def _sources() -> str:
    """A digest of the Python files that programs are traced from, and of the libraries' versions."""
    files = []
    for package in SOURCES:
        for place in importlib.util.find_spec(package).submodule_search_locations:
            root = Path(place)
            files += [(f"{package}/{path.relative_to(root)}", path) for path in root.rglob("*.py")]
    texts = [f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for name, path in sorted(files)]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    return _digest([*texts, *versions])


def _digest(parts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} {part}\n".encode())
    return digest.hexdigest()
