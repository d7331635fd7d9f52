"""What is installed and what the machine offers; works when half of it is missing or broken."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from onnxdp import arrays, runtime
from onnxdp.errors import SetupError
from onnxdp.findings import Diagnosis

_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def diagnose() -> Diagnosis:
    """Look at the installation and the machine; ``inspection`` is left None."""
    providing = metadata.packages_distributions()
    packages = tuple(sorted(set(providing.get("onnxruntime", ()))))
    providers, broken = _providers()
    device, reason = _cupy_device()
    notices = [clash] if (clash := _clash(packages, _on_disk())) else []
    return Diagnosis(
        versions=_versions(packages, tuple(sorted(set(providing.get("cupy", ()))))),
        providers=providers,
        onnxruntime_packages=packages,
        cupy_device=device,
        cupy_reason=reason,
        cores=_cores(),
        memory_bytes=_memory(),
        notices=(*notices, broken) if broken else tuple(notices),
    )


def _versions(onnxruntime: Sequence[str], cupy: Sequence[str]) -> Mapping[str, str | None]:
    names = ["onnxdp", "onnx", "onnx-ir", "onnx-graphsurgeon", "numpy"]
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in [*names, *(onnxruntime or ["onnxruntime"]), *(cupy or ["cupy"])]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _providers() -> tuple[tuple[str, ...], str | None]:
    """Give the execution providers, and why there are none."""
    try:
        return tuple(runtime.onnxruntime().get_available_providers()), None
    except (SetupError, AttributeError) as e:  # an emptied package imports, and has nothing in it
        return (), f"{e}"


def _on_disk() -> str | None:
    """Name the distribution whose files are really there, read without importing it."""
    spec = importlib.util.find_spec("onnxruntime")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        info = Path(folder) / "capi" / "build_and_package_info.py"
        try:
            found = re.search(
                r"^package_name\s*=\s*['\"]([^'\"]+)", info.read_text(encoding="utf-8"), re.MULTILINE
            )
        except OSError:
            continue
        if found:
            return found[1]
    return None


def _clash(packages: Sequence[str], on_disk: str | None) -> str | None:
    """Say that several distributions overwrite each other's module, if they do."""
    if len(packages) < 2:
        return None
    there = f"the files on disk are those of {on_disk}" if on_disk else "whose files are on disk is unknown"
    return (
        f"{' and '.join(packages)} are both installed and overwrite each other ({there}); run "
        f"'pip uninstall {' '.join(packages)}', then install one of onnxdp[cpu] and onnxdp[gpu]."
    )


def _cupy_device() -> tuple[str | None, str | None]:
    """Give the CUDA device that arrays are solved on, tried for real, or why there is none."""
    try:
        arrays.resolve_device("cuda")
        device = arrays.to_device(np.zeros(1), "cuda").device
        return f"CUDA device {device.id}, compute capability {device.compute_capability}", None
    except SetupError as e:
        return None, e.message
    except Exception as e:  # CuPy and the CUDA loader raise classes of their own
        return None, f"CuPy fails ({type(e).__name__}: {e}); install the CuPy that fits this CUDA."


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int | None:
    """Bytes that this process may use: the machine's, or its container's where that is less."""
    limits = []
    if hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(os.sysconf_names):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _CGROUP:
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return min((n for n in limits if n > 0), default=None)
