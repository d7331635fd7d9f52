"""The error tree. Every message is one sentence: what, why, what to do.

OnnxdpError              exit code
  UsageError      2      a setting is wrong
  ModelError      2      the file cannot be read or carried
  PlanError       2      a plan of another model, or one edited wrongly
  TargetError     1      out of reach, or nothing to gain: the best reachable is named
  VerifyError     1      outputs differ beyond the tolerance
  MethodError     3      a solver failed, or a plug-in is broken
  SetupError      3      ONNX Runtime, CUDA, memory or disk space is missing
"""

from __future__ import annotations


class OnnxdpError(Exception):
    """Base of every refusal.

    Parameters
    ----------
    message : str
        One sentence: what happened, why, and what to do.
    """

    exit_code: int = 70

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class UsageError(OnnxdpError):
    """A setting is wrong."""

    exit_code = 2


class ModelError(OnnxdpError):
    """The file cannot be read, or holds something that cannot be carried over."""

    exit_code = 2


class PlanError(OnnxdpError):
    """A plan belongs to another model, or was edited into something that has no meaning."""

    exit_code = 2


class TargetError(OnnxdpError):
    """The target is out of reach or nothing can be gained; the best reachable is named."""

    exit_code = 1


class VerifyError(OnnxdpError):
    """Outputs differ beyond the tolerance."""

    exit_code = 1


class MethodError(OnnxdpError):
    """A solver failed, or a plug-in is broken."""

    exit_code = 3


class SetupError(OnnxdpError):
    """The machine lacks what is needed: ONNX Runtime, CUDA, memory, disk space."""

    exit_code = 3


def misfit(weight: str) -> UsageError:
    """Return the refusal of an analysis whose arrays are not of a weight's shapes."""
    return UsageError(
        f"The analysis holds arrays that do not fit {weight}; make it again with --save-analysis."
    )
