"""What sweep, inspect, bench and doctor find, as records like those of :mod:`onnxdp.records`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnxdp.records import SCHEMA, File, Macs


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """What one ratio gives; all None but ``reason`` where it is out of reach.

    Attributes
    ----------
    asked : float
        Bytes before over bytes after, as asked for.
    budget : int
        Bytes that the whole file may have.
    nbytes : int or None
        Bytes of the whole file, exactly.
    sha256 : str or None
        Of that file, as ``compress --ratio`` writes it.
    macs : Macs or None
        Operations, where they were asked about.
    damage : float or None
        Relative squared error at the outputs, as foreseen for all weights together.
    error : float or None
        Relative error of the outputs, measured on held-out probes.
    reason : str or None
        Why there is no such file; None where there is.
    seconds : float
        Time for this ratio, beyond what all share.
    """

    asked: float
    budget: int
    nbytes: int | None
    sha256: str | None
    ratio: float | None
    damage: float | None
    error: float | None
    reason: str | None
    seconds: float
    macs: Macs | None = None


@dataclass(frozen=True, slots=True)
class Frontier:
    """Size against damage of one model, from one analysis.

    Attributes
    ----------
    points : tuple of FrontierPoint
        In the order asked.
    settings : mapping
        The settings that encoding depends on.
    seconds : mapping of str to float
        Per stage, all ratios together, and ``total``.
    """

    source: File
    points: tuple[FrontierPoint, ...]
    settings: Mapping[str, Any]
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    device: str
    notices: tuple[str, ...] = ()
    schema: int = SCHEMA


@dataclass(frozen=True, slots=True)
class InspectedWeight:
    """One weight of a file, as :func:`onnxdp.inspect` sees it.

    Attributes
    ----------
    share : float
        Its bytes over the bytes of the whole file.
    compressible : float or None
        Share of the bytes that hold 99 % of its energy as factors, 1 where factors do not pay; None where it
        was not looked at.
    reason : str or None
        Why it is left alone; None where it can be compressed.
    """

    name: str
    op: str
    nodes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    share: float
    compressible: float | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a model file consists of; ``other_bytes`` is all that is no weight."""

    file: File
    rows: tuple[InspectedWeight, ...]
    other_bytes: int
    producer: str
    opset: int
    ir_version: int


@dataclass(frozen=True, slots=True)
class BenchRow:
    """What one model costs to store, load and run; every ratio is to the first model's figure.

    Attributes
    ----------
    nbytes : int
        Stored bytes, external data included.
    load_seconds : float
        Making the session in a fresh process, median.
    latency : tuple of float
        Least, median and largest seconds of one run, models taking turns.
    latency_ratio : float
        Median of the ratios within each turn, which is steadier than the ratio of the medians.
    peak_memory_bytes : int or None
        Of a process that loads the model and runs it once; None where the system does not tell.
    """

    path: str
    nbytes: int
    load_seconds: float
    latency: tuple[float, float, float]
    peak_memory_bytes: int | None
    nbytes_ratio: float
    load_ratio: float
    latency_ratio: float
    peak_memory_ratio: float | None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is installed, on which machine, and what of one model would be skipped.

    Attributes
    ----------
    versions : mapping of str to str or None
        By distribution; None where it is not installed.
    providers : tuple of str
        Execution providers of ONNX Runtime, best first; empty without it.
    onnxruntime_packages : tuple of str
        Distributions that provide the module ``onnxruntime``; two of them overwrite each other.
    cupy_device : str or None
        Name of the CUDA device that CuPy works on.
    cupy_reason : str or None
        Why there is none.
    memory_bytes : int or None
        Memory that this process may use.
    """

    versions: Mapping[str, str | None]
    providers: tuple[str, ...]
    onnxruntime_packages: tuple[str, ...]
    cupy_device: str | None
    cupy_reason: str | None
    cores: int
    memory_bytes: int | None
    notices: tuple[str, ...] = ()
    inspection: Inspection | None = None
