import importlib.metadata
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import onnxdp

HEAVY = {"numpy", "onnx", "onnx_ir", "onnxruntime", "onnx_graphsurgeon", "rich", "cupy", "sympy"}


@pytest.mark.parametrize("name", onnxdp.__all__)
def test_every_public_name_is_there_and_explained(name):
    value = getattr(onnxdp, name)
    assert name in dir(onnxdp)
    if name != "__version__":
        assert value.__doc__ and value.__module__.startswith("onnxdp.")


def test_all_is_sorted_and_has_no_name_twice():
    assert onnxdp.__all__ == sorted(set(onnxdp.__all__))


def test_version_is_the_installed_one():
    assert onnxdp.__version__ == importlib.metadata.version("onnxdp")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'onnxdp' has no attribute 'compres'"):
        _ = onnxdp.compres


def test_no_module_has_the_name_of_a_public_function():
    modules = {m.name for m in pkgutil.iter_modules([str(Path(onnxdp.__file__).parent)])}
    assert not modules & set(onnxdp.__all__)


def test_the_package_is_typed():
    assert (Path(onnxdp.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize(
    "code",
    [
        "import onnxdp; onnxdp.Settings(ratio=2); onnxdp.ModelError; onnxdp.__version__",
        "import onnxdp.cli; onnxdp.cli.main.name",
    ],
)
def test_the_face_loads_nothing_heavy(code):
    code += "; import sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(json.loads(done.stdout))
