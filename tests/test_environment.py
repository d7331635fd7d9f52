import json
import os
import subprocess
import sys

from onnxdp import environment

DIAGNOSE = """
import json
from onnxdp import environment, plain
print(json.dumps(plain.to_plain(environment.diagnose())))
"""


def diagnose(folder):
    """Diagnose in a fresh process in which ``folder`` comes first."""
    env = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-c", DIAGNOSE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout)


def install(folder, name, module):
    info = folder / f"{name.replace('-', '_')}-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    (info / "top_level.txt").write_text(f"{module}\n")


def onnxruntime(folder, package, code):
    """Put files of an onnxruntime there, which shadow the real one."""
    (folder / "onnxruntime" / "capi").mkdir(parents=True)
    (folder / "onnxruntime" / "__init__.py").write_text(code)
    info = folder / "onnxruntime" / "capi" / "build_and_package_info.py"
    info.write_text(f"package_name = '{package}'\n__version__ = '9.9'\n")


def test_40_two_onnxruntimes_are_named_with_the_one_on_disk(tmp_path):
    onnxruntime(
        tmp_path, "onnxruntime", "def get_available_providers():\n    return ['CPUExecutionProvider']\n"
    )
    install(tmp_path, "onnxruntime", "onnxruntime")
    install(tmp_path, "onnxruntime-gpu", "onnxruntime")
    found = diagnose(tmp_path)
    assert found["onnxruntime_packages"] == ["onnxruntime", "onnxruntime-gpu"]
    assert found["providers"] == ["CPUExecutionProvider"] and found["versions"]["onnxruntime-gpu"] == "9.9"
    assert found["notices"] == [
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other (the files on disk are "
        "those of onnxruntime); run 'pip uninstall onnxruntime onnxruntime-gpu', then install one of "
        "onnxdp[cpu] and onnxdp[gpu]."
    ]


def test_40_an_onnxruntime_that_cannot_be_loaded_is_a_notice(tmp_path):
    onnxruntime(
        tmp_path, "onnxruntime-gpu", "raise ImportError('libcudart.so.13: cannot open shared object file')"
    )
    found = diagnose(tmp_path)
    assert found["providers"] == []
    assert any("libcudart.so.13" in n and "onnxdp[cpu]" in n for n in found["notices"])


def test_a_cupy_that_cannot_be_loaded_is_a_reason(tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError('no libcuda')")
    found = diagnose(tmp_path)
    assert found["cupy_device"] is None and "CuPy" in found["cupy_reason"]


def test_this_machine():
    found = environment.diagnose()
    assert found.versions["python"] == sys.version.split()[0] and found.versions["onnx"]
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert found.memory_bytes is None or found.memory_bytes > 10**8
    assert (found.cupy_device is None) != (found.cupy_reason is None)
    assert found.inspection is None
