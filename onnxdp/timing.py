"""What models cost to load and run, measured so that one cannot be favoured by chance.

Runs are interleaved (A B, B A, A B, ...): whatever else the machine does meets all models alike, and none
always runs on what the other left in the caches. Load time and memory are taken in fresh processes, one model
each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxdp import archives, model, probes, runtime, sizes
from onnxdp.errors import ModelError, SetupError
from onnxdp.findings import BenchRow
from onnxdp.records import Array
from onnxdp.settings import Progress, silent

_LOADS = 3
_WARM = 2


def bench(
    paths: Sequence[str | os.PathLike[str]],
    *,
    repeat: int = 20,
    threads: int | None = None,
    inputs: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[BenchRow, ...]:
    """Measure models on one sample: bytes, load time, latency, peak memory.

    Parameters
    ----------
    paths : sequence of paths
        The first is what the others are compared with; all take the same inputs.
    repeat : int
        Runs of each model that count; a few more warm it up.
    threads : int, optional
        Threads of ONNX Runtime; default: its own choice.
    inputs : Path, optional
        Sample inputs (``.npz``), of which the first is used; default: a made-up probe input.
    seed : int
        Of the probe input.

    Returns
    -------
    tuple of BenchRow
        In the order of the paths.

    Raises
    ------
    ModelError
        A model cannot be read or run, or takes an input that the first does not.
    SetupError
        There is no ONNX Runtime, or a measuring process died.
    """
    files = [Path(p) for p in paths]
    nbytes = [model.read(f).nbytes for f in files]
    sessions = [runtime.session(files[0], threads=threads)]
    feed = _feed(files[0], sessions[0], inputs, seed)
    for file in files[1:]:
        _check_inputs(file, feed)
        sessions.append(runtime.session(file, threads=threads))
    fresh = _fresh(files, feed, threads, progress)
    times = take_turns(sessions, feed, repeat, progress)
    ratios = np.median(times / times[:, :1], axis=0)
    return tuple(
        BenchRow(
            path=str(paths[i]),
            nbytes=nbytes[i],
            load_seconds=fresh[i][0],
            latency=(float(times[:, i].min()), float(np.median(times[:, i])), float(times[:, i].max())),
            peak_memory_bytes=fresh[i][1],
            nbytes_ratio=nbytes[i] / nbytes[0],
            load_ratio=fresh[i][0] / fresh[0][0],
            latency_ratio=float(ratios[i]),
            peak_memory_ratio=_ratio(fresh[i][1], fresh[0][1]),
        )
        for i in range(len(files))
    )


def latency_ratio(a: Any, b: Any, feed: Mapping[str, Array], repeat: int = 20) -> float:
    """Median over ``repeat`` turns of (seconds of session b) / (seconds of session a)."""
    times = take_turns([a, b], feed, repeat)
    return float(np.median(times[:, 1] / times[:, 0]))


def take_turns(
    sessions: Sequence[Any], feed: Mapping[str, Array], repeat: int, progress: Progress = silent
) -> Array:
    """Time interleaved runs of sessions that take (some of) the same inputs.

    Returns
    -------
    ndarray of shape (repeat, sessions), float64
        Seconds; row ``i`` holds one turn of all sessions, in forward order for even ``i``, backward for odd.
    """
    feeds = [{i.name: feed[i.name] for i in s.get_inputs()} for s in sessions]
    times = np.empty((_WARM + repeat, len(sessions)))
    for turn in range(len(times)):
        order = range(len(sessions))
        for i in order if turn % 2 == 0 else reversed(order):
            start = time.perf_counter()
            runtime.run(sessions[i], feeds[i])
            times[turn, i] = time.perf_counter() - start
        progress("running", turn + 1, len(times), "")
    return times[_WARM:]


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where the system does not tell.

    On Linux ``getrusage`` will not do: a child starts with its parent's peak, as the count survives exec.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _feed(file: Path, session: Any, inputs: Path | None, seed: int) -> Mapping[str, Array]:
    """Give one sample for the model in ``file``, which ``session`` runs."""
    specs = runtime.input_specs(onnx.load(file, load_external_data=False))
    if inputs is not None:
        return probes.load(inputs, specs).rebatch(1).feeds[0]
    fitted = sizes.fitted(specs, partial(runtime.run, session))
    return probes.make(fitted, samples=1, seed=seed, batch=1).feeds[0]


def _check_inputs(file: Path, feed: Mapping[str, Array]) -> None:
    """Refuse a model that cannot take the sample of the first."""
    for spec in runtime.input_specs(onnx.load(file, load_external_data=False)):
        if spec.name not in feed:
            raise ModelError(
                f"{file} takes the input {spec.name!r}, which the first model does not; bench compares "
                "models that take the same inputs."
            )
        x = feed[spec.name]
        alike = len(spec.shape) == x.ndim and all(
            d == n for d, n in zip(spec.shape, x.shape, strict=True) if isinstance(d, int)
        )
        if not alike or (spec.dtype != x.dtype.name and x.dtype.kind not in "USO"):
            raise ModelError(
                f"{file} takes {spec.name!r} as {spec.dtype} {archives.shown(spec.shape)} and the first "
                f"model as {x.dtype.name} {archives.shown(x.shape)}; bench compares models that take the "
                "same inputs."
            )


def _ratio(value: int | None, first: int | None) -> float | None:
    return value / first if value is not None and first else None


# Fresh processes


def _fresh(
    files: Sequence[Path], feed: Mapping[str, Array], threads: int | None, progress: Progress
) -> list[tuple[float, int | None]]:
    """Median load seconds and largest peak memory of each model; models take turns here, too."""
    found: list[list[tuple[float, int | None]]] = [[] for _ in files]
    with tempfile.TemporaryDirectory(prefix="onnxdp-") as folder:
        sample = Path(folder) / "feed.npz"
        # By number: an input may have the name of a parameter of savez.
        stored: dict[str, Any] = {f"a{i}": x for i, x in enumerate(feed.values())}
        np.savez(sample, **stored)
        for turn in range(_LOADS):
            for i, file in enumerate(files):
                found[i].append(_spawn(file, sample, list(feed), threads))
                progress("loading", turn * len(files) + i + 1, _LOADS * len(files), file.name)
    return [
        (float(np.median([s for s, _ in f])), max((p for _, p in f if p is not None), default=None))
        for f in found
    ]


def _spawn(file: Path, sample: Path, names: list[str], threads: int | None) -> tuple[float, int | None]:
    """Load and run one model in a process of its own."""
    task = json.dumps({"model": str(file), "sample": str(sample), "names": names, "threads": threads})
    # -P: the current folder may hold anything; what this process can import, the other can.
    command = [sys.executable, "-P", "-m", "onnxdp.timing", task]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise SetupError(f"The process that measures {file} died ({last}); free some memory and try again.")
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def _worker(task: Mapping[str, Any]) -> tuple[float, int | None]:
    """Be the fresh process."""
    runtime.onnxruntime()  # its own import is not the model's doing
    with np.load(task["sample"], allow_pickle=False) as stored:
        feed = {name: stored[f"a{i}"] for i, name in enumerate(task["names"])}
    start = time.perf_counter()
    made = runtime.session(Path(task["model"]), threads=task["threads"])
    seconds = time.perf_counter() - start
    runtime.run(made, {i.name: feed[i.name] for i in made.get_inputs()})
    return seconds, peak_memory()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_worker(json.loads(sys.argv[1]))) + "\n")
