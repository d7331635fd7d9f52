import os
import signal
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


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
