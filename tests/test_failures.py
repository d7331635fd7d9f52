"""What goes wrong, through the command line: one sentence, the exit code, no file left, nothing harmed."""

import contextlib
import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from edges import conv, decaying, listing, mlp, onnxdp, parsed, refused, save, save_external
from onnx import numpy_helper

from onnxdp import guard

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals, limits and permissions of Unix")
FAST = ("--ratio", "2", "--samples", "8")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def process(*words, **options):
    """Start the command in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    return subprocess.Popen([sys.executable, "-m", "onnxdp", *map(str, words)], **pipes | options)


def finished(*words, **options):
    """Run the command in a process of its own to its end: (exit code, stdout, stderr)."""
    with process(*words, **options) as running:
        out, err = running.communicate(timeout=60)
    return running.returncode, out, err


def edited(**weights):
    """Return the model with other weights."""
    model = mlp()
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    return model


def poisoned(name, value):
    values = {t.name: numpy_helper.to_array(t).copy() for t in mlp().graph.initializer}
    values[name].flat[5] = value
    return edited(**{name: values[name]})


def external(edit):
    """Write in.onnx and in.data, then let ``edit`` change what each tensor says of its data."""
    save_external(mlp())
    model = onnx.load("in.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        edit(tensor)
    save(model)


def moved_to(location):
    def edit(tensor):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location

    return lambda: external(edit)


def missing_data():
    save_external(mlp())
    Path("in.data").unlink()


def outside_data():
    save_external(mlp())
    Path("sub").mkdir()
    Path("in.data").rename("outside.data")
    Path("in.onnx").rename("sub/in.onnx")
    Path("sub/in.data").symlink_to("../outside.data")
    Path("in.onnx").symlink_to("sub/in.onnx")


def impossible_dims():
    model = mlp()
    model.graph.initializer[0].dims[:] = [2**40, 2**40]
    save(model)


def bomb():
    """24 functions, each calling the one before it twice: 2^24 nodes."""
    model = mlp()
    model.opset_import.add(domain="boom", version=1)
    for depth in range(24):
        op = f"boom.f{depth - 1}" if depth else "Relu"
        domain, _, name = op.rpartition(".")
        nodes = [
            onnx.helper.make_node(name, ["a"], ["b"], domain=domain),
            onnx.helper.make_node(name, ["b"], ["c"], domain=domain),
        ]
        opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("boom", 1)]
        model.functions.append(onnx.helper.make_function("boom", f"f{depth}", ["a"], ["c"], nodes, opsets))
    model.graph.node[1].op_type, model.graph.node[1].domain = "f23", "boom"
    save(model)


def cut():
    save(mlp())
    os.truncate("in.onnx", 20_000)


MISSHAPED = "in.onnx: the external data {0!r} of 'w1' is not a path inside the model's folder; "
BAD_INPUTS = {
    "empty": (lambda: Path("in.onnx").touch(), "in.onnx is empty; export or download the model again."),
    "missing": (lambda: None, "in.onnx does not exist; check the path."),
    "folder": (lambda: Path("in.onnx").mkdir(), "in.onnx is a folder; name the .onnx file in it."),
    "pipe": (lambda: os.mkfifo("in.onnx"), "in.onnx is not a regular file; copy the model into one."),
    "text": (
        lambda: Path("in.onnx").write_text("this is a letter, not a model\n"),
        "in.onnx is not an ONNX model, or only a part of one; export or download it again.",
    ),
    "truncated": (cut, "in.onnx is not an ONNX model, or only a part of one; export or download it again."),
    "no data file": (
        missing_data,
        "in.onnx: the external data 'in.data' of 'w1' is not in .; put the data file beside the model.",
    ),
    "data above": (
        moved_to("../in.data"),
        MISSHAPED.format("../in.data") + "put the data file beside the model.",
    ),
    "data elsewhere": (
        moved_to("/etc/passwd"),
        MISSHAPED.format("/etc/passwd") + "put the data file beside the model.",
    ),
    "dims": (
        impossible_dims,
        f"in.onnx: tensor 'w1' of shape [{2**40}, {2**40}] needs {4 * 2**80} bytes and has 18432; "
        "export or download the model again.",
    ),
    "bomb": (
        bomb,
        f"in.onnx: its functions expand to {2**25 + 1} nodes, over {guard.MAX_NODES}; export it inlined.",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_a_bad_input_is_one_sentence_in_every_command(case):
    make, message = BAD_INPUTS[case]
    make()
    Path("p.json").write_text("{}")
    for words in (
        ("compress", "in.onnx", "out.onnx", "--ratio", "2"),
        ("plan", "in.onnx", "--ratio", "2"),
        ("inspect", "in.onnx"),
        ("verify", "in.onnx", "in.onnx"),
        ("bench", "in.onnx"),
        ("doctor", "in.onnx"),
    ):
        refused(2, message, *words)


def test_external_data_behind_a_link_out_of_the_folder_is_refused():
    outside_data()
    done = onnxdp("compress", "in.onnx", "out.onnx", *FAST)
    assert done.exit_code == 2 and "is a link that leads out of the folder" in done.stderr
    assert not Path("out.onnx").exists()


@pytest.mark.parametrize("name", ["w1", "b1"])
def test_nan_weights_are_refused_by_name(name):
    save(poisoned(name, np.nan))
    message = f"{name} holds NaN or infinity, with which no model computes; export or train it again."
    refused(2, message, "compress", "in.onnx", "out.onnx", *FAST)
    refused(2, message, "compress", "in.onnx", "out.onnx", *FAST, "--exclude", "w1")
    refused(2, message, "plan", "in.onnx", *FAST)
    shown = onnxdp("inspect", "in.onnx")
    remark = "left alone: holds NaN or infinity, with which no model computes"
    assert shown.exit_code == 0 and shown.stdout.count(remark) == (name == "w1")


def test_infinity_is_refused_in_a_weight_and_carried_in_a_mask():
    save(poisoned("w1", np.inf))
    message = "w1 holds NaN or infinity, with which no model computes; export or train it again."
    refused(2, message, "compress", "in.onnx", "out.onnx", *FAST)
    save(poisoned("b2", -np.inf))  # a class that is never chosen
    assert onnxdp("compress", "in.onnx", "out.onnx", *FAST).exit_code == 0


def test_a_model_without_weights_has_nothing_to_gain():
    save(
        parsed(
            """<ir_version: 8, opset_import: ["" : 17]>
            g (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }"""
        )
    )
    message = "Nothing to gain: the model has no Conv, Gemm or MatMul weight of 1 kB or more."
    refused(1, message, "compress", "in.onnx", "out.onnx", "--ratio", "2")
    refused(1, message, "plan", "in.onnx", "--ratio", "2")
    assert onnxdp("inspect", "in.onnx").exit_code == 0


def test_a_method_that_gains_nothing_is_named():
    halves = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float16[N, 64] x) => (float16[N, 64] y) { y = MatMul (x, W) }""",
        W=decaying(64, 64, 1).astype(np.float16),
    )
    save(halves)
    message = "Nothing to gain: its weights are as small as method float16 makes them; leave --method out."
    refused(1, message, "compress", "in.onnx", "out.onnx", "--method", "float16", "--ratio", "2")


@pytest.mark.parametrize("edit", ["inputs", "opset", "ir", "operator"])
def test_what_onnx_runtime_refuses_is_one_sentence(edit):
    model = mlp()
    if edit == "inputs":
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 47
    elif edit == "opset":
        model.opset_import[0].version = 99
    elif edit == "ir":
        model.ir_version = 99
    else:
        model.graph.node[0].op_type = "Gemmm"
    save(model)
    before = listing()
    done = onnxdp("compress", "in.onnx", "out.onnx", *FAST)
    assert done.exit_code == 2 and listing() == before
    assert done.stderr.startswith("error: ONNX Runtime cannot load the model (")
    assert done.stderr.count("\n") == 1 and "onnxruntime_src" not in done.stderr


# targets


def test_an_unreachable_target_names_the_best_and_the_best_is_reachable():
    save(mlp())
    done = onnxdp("compress", "in.onnx", "out.onnx", "--ratio", "1000", "--samples", "8")
    found = done.stderr.removesuffix(") or less.\n").split()[-1]
    size, before = int(found), Path("in.onnx").stat().st_size
    message = (
        f"The target (ratio 1000) is out of reach: the best reachable is {size:,} bytes "
        f"({before / size:.2f}x); ask for that (--size {size}) or less."
    )
    refused(1, message, "compress", "in.onnx", "out.onnx", "--ratio", "1000", "--samples", "8")
    assert onnxdp("compress", "in.onnx", "out.onnx", "--size", size, "--samples", "8").exit_code == 0
    assert Path("out.onnx").stat().st_size == size
    refused(
        1,
        message.replace("ratio 1000", f"size {size - 1}"),
        *("compress", "in.onnx", "o.onnx", "--size", size - 1, "--samples", "8"),
    )


def test_fixed_atoms_that_cannot_reach_the_target_say_so():
    save(conv())
    done = onnxdp("compress", "in.onnx", "out.onnx", "--ratio", "50", "--atoms", "20", "--samples", "8")
    assert done.exit_code == 1 and "is out of reach: the best reachable is " in done.stderr


def test_a_tiny_error_has_nothing_to_gain():
    save(mlp())
    done = onnxdp("compress", "in.onnx", "out.onnx", "--max-error", "1e-9", "--samples", "8")
    start = "error: Nothing to gain within an output error of 1e-09: changing every weight as little as can "
    assert done.exit_code == 1 and done.stderr.startswith(start) and done.stderr.count("\n") == 1
    assert list(listing()) == ["in.onnx"]


@pytest.mark.parametrize("size", ["150%", "5GB"])
def test_a_target_above_the_file_is_refused_rather_than_copied(size):
    save(mlp())
    nbytes = Path("in.onnx").stat().st_size
    refused(
        1,
        f"Nothing to gain: the target (size {size}) lets the file stay as it is, {nbytes:,} bytes; "
        "ask for a smaller one.",
        *("compress", "in.onnx", "out.onnx", "--size", size, "--samples", "8"),
    )


# OUT


def test_an_existing_out_needs_overwrite():
    save(mlp())
    Path("out.onnx").write_text("old")
    refused(
        2,
        "out.onnx exists; give another name, or --overwrite to replace it.",
        *("compress", "in.onnx", "out.onnx", *FAST),
    )
    assert onnxdp("compress", "in.onnx", "out.onnx", *FAST, "--overwrite").exit_code == 0
    assert onnxdp("verify", "in.onnx", "out.onnx").exit_code == 0


def test_out_in_a_missing_folder():
    save(mlp())
    refused(
        2,
        "no/out.onnx cannot be written (No such file or directory); give a folder that can.",
        *("compress", "in.onnx", "no/out.onnx", *FAST),
    )


@pytest.fixture
def someone(folder):
    """Give a folder that an ordinary user may not write to, and be that user."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    save(mlp(), place / "in.onnx")
    (place / "closed").mkdir(mode=0o555)
    os.chdir(place)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield place
    if root:
        os.seteuid(0)
    os.chdir(folder)
    (place / "closed").chmod(0o755)
    shutil.rmtree(place)


def test_an_output_folder_that_cannot_be_written(someone):
    refused(
        2,
        "closed/out.onnx cannot be written (Permission denied); give a folder that can.",
        *("compress", "in.onnx", "closed/out.onnx", *FAST),
    )


def test_a_symlinked_out_is_replaced_and_what_it_led_to_untouched():
    save(mlp())
    save(conv(), "other.onnx")
    Path("out.onnx").symlink_to("other.onnx")
    refused(
        2,
        "out.onnx exists; give another name, or --overwrite to replace it.",
        *("compress", "in.onnx", "out.onnx", *FAST),
    )
    other = Path("other.onnx").read_bytes()
    assert onnxdp("compress", "in.onnx", "out.onnx", *FAST, "--overwrite").exit_code == 0
    assert not Path("out.onnx").is_symlink() and Path("other.onnx").read_bytes() == other
    Path("dangling.onnx").symlink_to("nowhere.onnx")
    refused(
        2,
        "dangling.onnx exists; give another name, or --overwrite to replace it.",
        *("compress", "in.onnx", "dangling.onnx", *FAST),
    )


def test_names_with_spaces_and_umlauts():
    Path("Größe und Maß").mkdir()
    save_external(mlp(), "Größe und Maß/ein Ü.onnx", "dät a.bin")
    before = listing()
    words = ("Größe und Maß/ein Ü.onnx", "Größe und Maß/aus é.onnx", "--report", "Größe und Maß/r é.json")
    done = onnxdp("compress", *words, *FAST)
    assert done.exit_code == 0 and done.stdout.endswith("-> Größe und Maß/aus é.onnx\n")
    after = listing()
    assert {k: after[k] for k in before} == before
    new = sorted(Path(k).name for k in after.keys() - before.keys())
    assert len(new) == 3 and new[1].startswith("aus é.onnx.") and new[1].endswith(".data")
    assert onnxdp("verify", *words[:2]).exit_code == 0
    assert json.loads(Path(words[3]).read_text("utf-8"))["target"]["path"] == words[1]


def test_report_and_out_must_differ():
    save(mlp())
    words = ("compress", "in.onnx", "out.onnx", *FAST, "--report", "out.onnx")
    named = Path("out.onnx").resolve()
    refused(2, f"{named} is named twice on this command line; give two different files.", *words)


# inputs


def arrays(**given):
    np.savez("x.npz", **given)


GOOD = np.linspace(-1, 1, 8 * 48, dtype=np.float32).reshape(8, 48)
BAD_ARRAYS = {
    "missing": (lambda: None, "x.npz is not there; write it with numpy.savez(FILE, **{input name: array})."),
    "text": (
        lambda: Path("x.npz").write_text("no archive"),
        "x.npz is no .npz archive; write it with numpy.savez(FILE, **{input name: array}).",
    ),
    "pickle": (
        lambda: arrays(x=np.array([{}] * 8, dtype=object)),
        "x.npz holds pickled objects or a damaged array, which is not read; write it with "
        "numpy.savez(FILE, **{input name: array}).",
    ),
    "other key": (
        lambda: arrays(q=GOOD),
        "x.npz lacks the input 'x' (it has 'q'); save one array per input.",
    ),
    "extra key": (
        lambda: arrays(x=GOOD, q=GOOD),
        "x.npz holds 'q', which is no input of the model; its inputs are 'x'.",
    ),
    "shape": (
        lambda: arrays(x=GOOD[:, 1:]),
        "'x' in x.npz has the shape [8, 47] and the model takes [N, 48]; make axis 1 48 long.",
    ),
    "type": (
        lambda: arrays(x=GOOD.astype(np.float64)),
        "'x' in x.npz is float64 and the model takes float32; save it with .astype('float32').",
    ),
    "nan": (
        lambda: arrays(x=GOOD * np.float32(np.nan)),
        "'x' in x.npz holds NaN or infinity; give inputs that the model can use.",
    ),
    "none": (lambda: arrays(x=GOOD[:0]), "'x' in x.npz holds no sample; give at least two."),
    "one": (
        lambda: arrays(x=GOOD[:1]),
        "x.npz holds a single sample and a part must be held out to measure damage on; give at least two.",
    ),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_sample_inputs(case):
    make, message = BAD_ARRAYS[case]
    save(mlp())
    make()
    refused(2, message, "compress", "in.onnx", "out.onnx", "--ratio", "2", "--inputs", "x.npz")


# a full disk


def limited(nbytes):
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))}


FULL = "error: The disk is full or at its quota, so {} was not written; free space.\n"


@pytest.mark.parametrize("data", [False, True], ids=["inline", "external"])
def test_a_file_size_limit_leaves_the_old_file_and_nothing_else(data):
    """33, its rlimit half: others replace the good old file by garbage here."""
    (save_external if data else save)(mlp())
    assert onnxdp("compress", "in.onnx", "out.onnx", *FAST).exit_code == 0
    before = listing()
    done = finished("compress", "in.onnx", "out.onnx", *FAST, "--overwrite", **limited(6000))
    assert done == (3, "", FULL.format("out.onnx"))
    assert listing() == before
    done = finished("compress", "in.onnx", "in.onnx", *FAST, "--overwrite", **limited(6000))
    assert done == (3, "", FULL.format("in.onnx"))
    assert listing() == before


def test_a_report_that_does_not_fit_is_an_error_of_the_machine():
    save(mlp())
    done = onnxdp("plan", "in.onnx", *FAST, "-o", "p.json")
    limit = Path("p.json").stat().st_size - 1
    Path("p.json").unlink()
    code, _, err = finished("plan", "in.onnx", *FAST, "-o", "p.json", **limited(limit))
    assert done.exit_code == 0 and code == 3 and err.startswith("error: ") and err.count("\n") == 1
    assert list(listing()) == ["in.onnx"]


@pytest.fixture
def small_disk(folder):
    """Mount a file system of 40 kB, where this user may."""
    place = folder / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_leaves_the_old_file(small_disk):
    save(mlp(), small_disk / "out.onnx")  # 24 of 40 kB: the new 12 kB do not fit beside it
    Path(small_disk / "rest").write_bytes(b"\0" * 8000)
    save(mlp())
    before = listing()
    done = onnxdp("compress", "in.onnx", "disk/out.onnx", *FAST, "--overwrite")
    assert (done.exit_code, done.stdout, done.stderr) == (3, "", FULL.format("disk/out.onnx"))
    assert listing() == before


# signals


@contextlib.contextmanager
def at(moment, *words):
    """Run the command up to a stage that -v names, or to ``room``: the files are being made and checked."""
    with process(*words, "-v", start_new_session=True) as running:
        try:
            if moment == "room":
                wait(lambda: list(Path().glob(".onnxdp-*")) or running.poll() is not None)
            else:
                for line in running.stderr:
                    if moment in line:
                        break
            yield running
        finally:
            running.kill()


def wait(condition):
    for _ in range(12000):
        if condition():
            return
        time.sleep(0.005)
    pytest.fail("it did not come to that")


MOMENTS = ("reading", "making probe inputs", "solving", "measuring damage", "room")


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interruption_leaves_nothing_and_one_sentence(moment):
    """IN = OUT: the one case where an interruption could cost the only copy."""
    save(conv())
    before = listing()
    with at(moment, "compress", "in.onnx", "in.onnx", *FAST, "--overwrite") as running:
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    if running.returncode == 0:
        pytest.skip("it was done before the signal came")
    assert (running.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "error: Interrupted." and "Traceback" not in err
    assert listing() == before


@pytest.mark.parametrize(("moment", "data"), [("solving", False), ("room", False), ("room", True)])
def test_a_kill_leaves_old_files_whole_and_the_next_run_clears_up(moment, data):
    (save_external if data else save)(conv())
    assert onnxdp("compress", "in.onnx", "out.onnx", *FAST).exit_code == 0
    before = listing()
    with at(
        moment, "compress", "in.onnx", "out.onnx", "--ratio", "3", "--samples", "8", "--overwrite"
    ) as running:
        running.kill()
        running.wait()
    after = listing()
    left = after.keys() - before.keys()
    assert {k: after.get(k) for k in before} == before
    assert all(name.startswith(".onnxdp-") for name in left)
    assert onnxdp("verify", "in.onnx", "out.onnx").exit_code == 0
    assert onnxdp("compress", "in.onnx", "out.onnx", *FAST, "--overwrite").exit_code == 0
    assert listing() == before  # the same options as the first run: the same bytes, and nothing beside them


def test_killed_at_any_time_in_becomes_old_or_new(folder):
    """33, its SIGKILL half, with IN = OUT: the file is the original or the result, whole."""
    save(conv())
    old = hashlib.sha256(Path("in.onnx").read_bytes()).hexdigest()
    assert onnxdp("compress", "in.onnx", "new.onnx", *FAST).exit_code == 0
    new = hashlib.sha256(Path("new.onnx").read_bytes()).hexdigest()
    for delay in (0.0, 0.01, 0.03, 0.1):
        save(conv())
        with at("room", "compress", "in.onnx", "in.onnx", *FAST, "--overwrite") as running:
            time.sleep(delay)
            running.kill()
            running.wait()
        assert hashlib.sha256(Path("in.onnx").read_bytes()).hexdigest() in (old, new)
    save(conv())
    assert onnxdp("compress", "in.onnx", "in.onnx", *FAST, "--overwrite").exit_code == 0
    assert sorted(listing()) == ["in.onnx", "new.onnx"]


# through a process, once each: what the terminal of a user shows


@pytest.mark.parametrize(
    ("words", "code"),
    [("compress in.onnx out.onnx", 2), ("compress small.onnx out.onnx --ratio 900", 1)],
)
def test_a_real_process_ends_with_one_sentence(words, code):
    Path("in.onnx").touch()
    save(mlp(), "small.onnx")
    done = finished(*words.split(), "-q")
    assert done[:2] == (code, "") and done[2].startswith("error: ") and done[2].count("\n") == 1
    assert sorted(listing()) == ["in.onnx", "small.onnx"]


def test_python_m_onnxdp_without_a_word_is_unusable():
    code, out, err = finished()
    assert (code, out) == (2, "") and "Usage: python -m onnxdp" in err


# bytes nobody wrote


@pytest.mark.parametrize("seed", range(3))
def test_damaged_bytes_end_in_a_model_or_a_sentence(seed):
    good, draw = mlp().SerializeToString(), np.random.default_rng(seed)
    for place, junk in itertools.product(draw.integers(0, 400, 8), draw.integers(0, 256, 4)):
        content = bytearray(good)
        content[place] = junk
        Path("in.onnx").write_bytes(content)
        done = onnxdp("inspect", "in.onnx")
        assert done.exit_code in (0, 2), done.stderr
