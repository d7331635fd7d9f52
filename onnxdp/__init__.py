"""onnxdp: trained ONNX models made much smaller, run by stock ONNX Runtime.

>>> import onnxdp
>>> result = onnxdp.compress("in.onnx", "out.onnx", ratio=3)  # doctest: +SKIP
>>> result.report.ratio  # doctest: +SKIP
3.01

The names below are loaded on first use, because reading and solving need libraries that take most of a second
to import, and ``onnxdp --help`` needs none of them.
"""

from typing import TYPE_CHECKING

__all__ = [
    "Frontier",
    "MethodError",
    "ModelError",
    "OnnxdpError",
    "Plan",
    "PlanError",
    "Report",
    "Result",
    "Settings",
    "SetupError",
    "TargetError",
    "UsageError",
    "VerifyError",
    "__version__",
    "apply",
    "bench",
    "compress",
    "doctor",
    "inspect",
    "plan",
    "sweep",
    "verify",
]

if TYPE_CHECKING:
    from onnxdp.api import Result, apply, bench, compress, doctor, inspect, plan, sweep, verify
    from onnxdp.errors import (
        MethodError,
        ModelError,
        OnnxdpError,
        PlanError,
        SetupError,
        TargetError,
        UsageError,
        VerifyError,
    )
    from onnxdp.findings import Frontier
    from onnxdp.records import Plan, Report
    from onnxdp.settings import Settings

    __version__: str
else:
    _HOMES = {"Frontier": "findings", "Plan": "records", "Report": "records", "Settings": "settings"}

    def __getattr__(name):
        """Load a public name on first use."""
        import importlib

        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name == "__version__":
            from importlib.metadata import version

            value = version("onnxdp")
        else:
            home = "errors" if name.endswith("Error") else _HOMES.get(name, "api")
            value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
        globals()[name] = value
        return value

    def __dir__():
        """Name what is public, loaded or not."""
        return sorted({*globals(), *__all__})
