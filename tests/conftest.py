import os
import signal
from pathlib import Path

import array_api_strict
import numpy as np
import pytest

from onnxdp import arrays

GOLDEN = Path(__file__).parent / "golden"

no_cuda = arrays._missing_cuda()


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/*.txt anew")


def pytest_configure():
    """Hear Ctrl-C in the background, too: a shell's ``&`` ignores it, and what we start inherits that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def golden(request):
    """Compare a text with tests/golden/NAME.txt, or write it there under --update-golden."""

    def compare(name, text):
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8"), f"{path} differs; see pytest --update-golden"

    return compare


@pytest.fixture(scope="session")
def shared():
    """Folder of the data that is too large to commit; what needs it is skipped without it."""
    folder = Path(os.environ.get("ONNXDP_SHARED") or Path(__file__).parents[2] / "shared") / "data"
    if not folder.is_dir():
        pytest.skip(f"no data at {folder} (set ONNXDP_SHARED to the folder that holds data/)")
    return folder


def strict(device):
    return lambda host: array_api_strict.asarray(host, device=array_api_strict.Device(device))


@pytest.fixture(
    params=[
        pytest.param(np.asarray, id="numpy"),
        pytest.param(strict("CPU_DEVICE"), id="strict-cpu"),
        pytest.param(strict("device1"), id="strict-device1"),
        pytest.param(
            lambda host: arrays.to_device(host, "cuda"),
            id="cupy",
            marks=[pytest.mark.gpu, pytest.mark.skipif(no_cuda is not None, reason=f"no CUDA: {no_cuda}")],
        ),
    ]
)
def to(request):
    """Move a host array into the namespace under test."""
    return request.param
