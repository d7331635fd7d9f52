import array_api_strict
import numpy as np
import pytest
from threadpoolctl import threadpool_info

from onnxdp import arrays
from onnxdp.errors import SetupError


def without_cuda():
    return arrays._missing_cuda() is not None


def test_cuda_without_cupy_names_the_extra(monkeypatch):
    def absent():
        raise ImportError("cupy")

    monkeypatch.setattr(arrays, "_cupy", absent)
    assert arrays.resolve_device("auto") == "cpu"
    with pytest.raises(SetupError) as caught:
        arrays.resolve_device("cuda")
    assert caught.value.message == (
        "--device cuda cannot be used because CuPy is not installed; install the gpu extra "
        "(pip install 'onnxdp[gpu]') on a machine with a CUDA device, or use --device cpu."
    )


@pytest.mark.parametrize("count, device", [(0, "cpu"), (1, "cuda")])
def test_auto_follows_the_number_of_devices(monkeypatch, count, device):
    class Cupy:
        class cuda:  # noqa: N801  CuPy's own name
            class runtime:  # noqa: N801  CuPy's own name
                getDeviceCount = staticmethod(lambda: count)  # noqa: N815  CuPy's own name

    monkeypatch.setattr(arrays, "_cupy", lambda: Cupy)
    assert arrays.resolve_device("auto") == device


def test_an_unknown_device_is_refused():
    with pytest.raises(SetupError, match=r"device 'tpu' is unknown; use one of auto, cpu, cuda\."):
        arrays.resolve_device("tpu")


def test_the_cpu_copies_nothing():
    host = np.ones((2, 3), dtype=np.float32)
    assert arrays.to_device(host, "cpu") is host
    assert arrays.to_host(host) is host


@pytest.mark.parametrize("name", ["CPU_DEVICE", "device1"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_seeded_numbers_are_the_same_on_every_device(name, dtype):
    device = array_api_strict.Device(name)
    like = array_api_strict.zeros(1, dtype=getattr(array_api_strict, dtype), device=device)
    drawn = arrays.normal((4, 5), 7, like)
    assert drawn.device == device and drawn.dtype == like.dtype
    expected = np.random.default_rng(7).standard_normal((4, 5)).astype(dtype)
    assert np.array_equal(arrays.to_host(drawn), expected)
    assert not np.array_equal(arrays.to_host(arrays.normal((4, 5), 8, like)), expected)


@pytest.mark.gpu
@pytest.mark.skipif(without_cuda(), reason="CuPy or a CUDA device is missing")
def test_cuda_gives_back_what_it_was_given():
    host = np.arange(6, dtype=np.float32).reshape(2, 3)
    there = arrays.to_device(host, arrays.resolve_device("cuda"))
    assert np.array_equal(arrays.to_host(there), host)
    assert np.array_equal(arrays.to_host(arrays.normal((3,), 1, there)), arrays.normal((3,), 1, host))


def test_a_matrix_without_a_root_is_said_to_have_none():
    assert arrays.try_cholesky(np.array([[1.0, 2.0], [2.0, 1.0]])) is None
    assert np.array_equal(arrays.try_cholesky(np.eye(2) * 4), np.eye(2) * 2)


def test_blas_is_held_to_one_thread_and_let_go():
    def threads():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    before = threads()
    assert before
    with arrays.one_blas_thread():
        assert set(threads()) == {1}
    assert threads() == before
