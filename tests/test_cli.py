"""The command line: what it says, where it says it, and the exit code, with ``api`` replaced by a stub."""

import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import onnxdp
from onnxdp import errors, findings, records, settings, tables
from onnxdp.cli import main

COMMANDS = ["compress", "plan", "sweep", "apply", "inspect", "verify", "bench", "doctor"]
WEIGHT = "layer3.0.conv1.weight"


def the_plan(**changes):
    choice = records.Candidate(
        WEIGHT,
        "dp",
        {"axis": "rows", "parts": 4, "atoms": 24, "dtype": "float16", "run": "split"},
        98_400,
        0.0071,
    )
    kept = records.Kept("fc.bias", "it is no matrix", 40)
    values = {"model_sha256": "0" * 64, "target": "ratio 3", "budget": 15_000_000, "settings": {"seed": 0}}
    return records.Plan(**{**values, "choices": (choice,), "kept": (kept,), **changes})


def the_report(**changes):
    lines = (
        records.Line(
            WEIGHT,
            "Conv",
            (128, 128, 3, 3),
            "dp",
            the_plan().choices[0].params,
            576_000,
            98_400,
            0.0071,
            None,
            "",
        ),
        records.Line(
            "fc.weight", "Gemm", (10, 64), "float16", {}, 2560, 1280, 0.0002, None, "no pair is smaller"
        ),
        records.Line("a\n\x1b[31mb", "MatMul", (), "kept", {}, 40, 40, 0.0, None, "it is no matrix"),
    )
    values = {
        "source": records.File("in.onnx", "0" * 64, 44_600_000),
        "target": records.File("out.onnx", "1" * 64, 14_980_000),
        "plan": the_plan(),
        "lines": lines,
        "verification": the_verification(),
        "latency_ratio": 0.93,
        "seconds": {"read": 0.3, "solve": 12.0},
        "versions": {"onnxdp": "0.1.0"},
        "device": "cpu",
        "notices": ("IR version raised from 3 to 4",),
    }
    return records.Report(**{**values, **changes})


def the_verification(passed=True, relative=0.021):
    return records.Verification(
        32, 0, (records.OutputDifference("logits", 0.5, 0.01, relative, 0.97),), 0.03, passed
    )


def the_frontier(**changes):
    points = (
        findings.FrontierPoint(2, 22_300_000, 22_290_000, "1" * 64, 2.0009, 1.2e-6, 0.0011, None, 2.5),
        findings.FrontierPoint(16, 2_787_500, 2_787_000, "2" * 64, 16.003, 0.0042, 0.052, None, 3.5),
        findings.FrontierPoint(99, 450_505, None, None, None, None, None, "Out of reach; ask for less.", 0.1),
    )
    source, seconds = records.File("in.onnx", "0" * 64, 44_600_000), {"solving": 9.0, "total": 17.25}
    values = {"source": source, "points": points, "settings": {"seed": 0}, "seconds": seconds}
    values |= {"versions": {"onnxdp": "0.1.0"}, "device": "cpu", "notices": ("IR version raised",)}
    return findings.Frontier(**{**values, **changes})


def the_inspection():
    rows = (
        findings.InspectedWeight(
            WEIGHT, "Conv", ("c1",), (128, 128, 3, 3), "float32", 589_824, 0.9, 0.45, None
        ),
        findings.InspectedWeight(
            "h", "LSTM", ("l",), (4, 2), "float32", 32, 0.0, None, "LSTM is not supported"
        ),
    )
    return findings.Inspection(records.File("in.onnx", "0" * 64, 655_360), rows, 65_504, "pytorch 2.1", 13, 7)


@pytest.fixture
def api(monkeypatch):
    """Stand in for the library; records how it was called."""
    stub = types.ModuleType("onnxdp.api")
    stub.calls = {}

    def answering(name, value):
        def call(*args, **options):
            stub.calls[name] = (args, options)
            if isinstance(value, BaseException):
                raise value
            return value

        setattr(stub, name, call)

    stub.answering = answering
    answering("compress", types.SimpleNamespace(report=the_report()))
    answering("apply", types.SimpleNamespace(report=the_report()))
    answering("plan", the_plan())
    answering("sweep", the_frontier())
    answering("inspect", the_inspection())
    answering("verify", the_verification())
    rows = (
        findings.BenchRow("a.onnx", 44_600_000, 0.05, (0.01, 0.011, 0.02), 200_000_000, 1.0, 1.0, 1.0, 1.0),
        findings.BenchRow("b.onnx", 15_000_000, 0.06, (0.009, 0.0102, 0.03), None, 0.336, 1.2, 0.93, None),
    )
    answering("bench", rows)
    diagnosis = findings.Diagnosis(
        {"python": "3.11.7", "onnxruntime": None}, (), (), None, "CuPy is not installed", 2, 8 * 10**9
    )
    answering("doctor", diagnosis)
    monkeypatch.setitem(sys.modules, "onnxdp.api", stub)
    monkeypatch.setattr(onnxdp, "api", stub, raising=False)
    return stub


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in.onnx").write_bytes(b"in")
    return lambda *words: CliRunner(catch_exceptions=False).invoke(main, words)


def files():
    return sorted(p.name for p in Path().iterdir())


# help and documentation


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_golden(command, run, golden):
    done = run(*command.split(), "--help")
    assert done.exit_code == 0 and done.stderr == ""
    golden(f"help_{command or 'onnxdp'}", done.stdout)


def test_every_command_and_option_is_documented():
    assert list(main.commands) == COMMANDS
    for name, command in main.commands.items():
        assert command.help and command.help[0].isupper(), name
        for option in command.params:
            assert not isinstance(option, click.Option) or option.help, f"{name} {option.name}"


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_every_setting_is_an_option_with_its_default(command, run, api):
    options = ["--dry-run"] if command == "compress" else []
    assert run(command, "in.onnx", *options).exit_code == 0
    given = api.calls[command][1]
    assert settings.Settings() == settings.Settings(
        **{k: v for k, v in given.items() if k in vars_of(settings.Settings)}
    )
    assert set(vars_of(settings.Settings)) <= set(given)


def vars_of(cls):
    return cls.__dataclass_fields__


def test_help_starts_in_well_under_a_second_and_imports_nothing_heavy():
    took, command = [], [sys.executable, "-X", "importtime", "-m", "onnxdp", "--help"]
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        took.append(time.perf_counter() - start)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "click" in imported and not imported & {"numpy", "onnx", "onnx_ir", "onnxruntime", "rich"}
    assert min(took) < 1


def test_version(run):
    assert run("--version").stdout == f"onnxdp {onnxdp.__version__}\n"


def test_no_command_shows_the_help_and_is_unusable(run):
    done = run()
    assert done.exit_code == 2 and done.stdout == "" and "Usage: onnxdp" in done.stderr


# arguments -> api


def test_compress_hands_everything_over(run, api):
    words = (
        "--ratio 3 --method dp --solver dpl --partition 288 --atoms 9 --iterations 7 --factor-dtype float32"
    )
    words += " --no-shared --unweighted --include a* --include Conv --exclude re:b --inputs x.npz --samples 8"
    words += " --freeze-initializers --device cpu --seed 5"
    assert run("compress", "in.onnx", "out.onnx", *words.split()).exit_code == 0
    args, options = api.calls["compress"]
    options.pop("progress")
    assert args == (Path("in.onnx"), Path("out.onnx"))
    assert options.pop("overwrite") is False and options.pop("dry_run") is False
    assert settings.Settings(**options) == settings.Settings(
        ratio=3.0,
        method="dp",
        solver="dpl",
        partition="288",
        atoms=9,
        iterations=7,
        factor_dtype="float32",
        shared=False,
        unweighted=True,
        include=("a*", "Conv"),
        exclude=("re:b",),
        inputs=Path("x.npz"),
        samples=8,
        freeze_initializers=True,
        device="cpu",
        seed=5,
    )


def test_without_a_target_it_says_which_one_it_takes(run, api):
    said = "no target given: keeping the output error within 0.03 (--max-error)\n"
    assert run("compress", "in.onnx", "out.onnx").stderr == said
    assert run("plan", "in.onnx").stderr == said
    assert run("compress", "in.onnx", "out.onnx", "--size", "30%").stderr == ""
    assert run("compress", "in.onnx", "out.onnx", "--quiet").stderr == ""


def test_plan_writes_what_apply_reads(run, api):
    assert run("plan", "in.onnx", "-o", "p.json", "--ratio", "3").exit_code == 0
    assert run("apply", "in.onnx", "p.json", "out.onnx", "--device", "cpu").exit_code == 0
    args, options = api.calls["apply"]
    assert args == (Path("in.onnx"), the_plan(), Path("out.onnx"))
    assert options["device"] == "cpu" and options["inputs"] is None and options["calibrate"] is None


def test_sweep_hands_everything_over_but_targets(run, api):
    assert run("sweep", "in.onnx", "--ratios", "2,4.5", "--method", "dp", "--seed", "3").exit_code == 0
    args, options = api.calls["sweep"]
    options.pop("progress")
    assert args == (Path("in.onnx"), (2.0, 4.5))
    assert settings.Settings(**options) == settings.Settings(method="dp", seed=3)
    assert set(vars_of(settings.Settings)) - set(options) == set(settings.TARGETS)


def test_a_sweep_that_reaches_nothing_exits_1_with_its_table(run, api):
    api.answering("sweep", the_frontier(points=the_frontier().points[2:]))
    done = run("sweep", "in.onnx")
    assert done.exit_code == 1 and "Out of reach; ask for less." in done.stdout
    assert done.stdout.splitlines()[-1] == "SWEPT 0 of 1 ratios  44.6 MB  17.2 s"


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("--ratios", "2,x"), 2, "--ratios is numbers above 1"),
        (("--ratios", "1"), 2, "--ratios is numbers above 1"),
        (("--ratios", ","), 2, "with commas between, not ','; try 2,4,8,12."),
        (("--ratio", "2"), 2, "No such option"),
        (("--plot", "p.gif"), 2, "--plot draws .png, .svg, .pdf, not p.gif"),
        (("--plot", "in.onnx"), 2, f"{Path('in.onnx')} is named twice"),
        (("--plot", "old.png"), 2, "old.png exists"),
    ],
)
def test_a_sweep_that_cannot_be_answered_is_refused_before_any_work(words, code, sentence, run, api):
    Path("old.png").write_bytes(b"old")
    done = run("sweep", "in.onnx", *words)
    assert done.exit_code == code and "sweep" not in api.calls and sentence in done.stderr
    assert files() == ["in.onnx", "old.png"] and Path("old.png").read_bytes() == b"old"


def test_a_picture_without_matplotlib_names_the_extra(run, api, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run("sweep", "in.onnx", "--plot", "p.png")
    assert done.exit_code == 3 and "sweep" not in api.calls
    assert "pip install 'onnxdp[plots]'" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_sweep_draws_its_picture_whole(ending, run, api):
    pytest.importorskip("matplotlib")
    name = f"p.{ending}"
    Path(name).write_bytes(b"old")
    assert run("sweep", "in.onnx", "--plot", name).exit_code == 2
    done = run("sweep", "in.onnx", "--plot", name, "--overwrite")
    assert done.exit_code == 0 and done.stdout.endswith(f"17.2 s -> {name}\n")
    begins = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert Path(name).read_bytes().startswith(begins) and files() == sorted(["in.onnx", name])


def test_verify_bench_and_doctor_hand_over(run, api):
    run(
        "verify",
        "a.onnx",
        "b.onnx",
        "--tolerance",
        "0.1",
        "--samples",
        "4",
        "--seed",
        "2",
        "--inputs",
        "x.npz",
    )
    assert api.calls["verify"] == (
        (Path("a.onnx"), Path("b.onnx")),
        {"tolerance": 0.1, "samples": 4, "seed": 2, "inputs": Path("x.npz")},
    )
    run("bench", "a.onnx", "b.onnx", "--repeat", "3", "--threads", "1")
    args, options = api.calls["bench"]
    assert args == ((Path("a.onnx"), Path("b.onnx")),) and options["repeat"] == 3 and options["threads"] == 1
    run("doctor")
    assert api.calls["doctor"] == ((None,), {})
    run("inspect", "in.onnx", "--include", "fc*")
    assert api.calls["inspect"] == (
        (Path("in.onnx"),),
        {"include": ("fc*",), "exclude": (), "freeze_initializers": False},
    )


# what it says


ANSWERS = {
    "compress": ("compress", "in.onnx", "out.onnx", "--ratio", "3"),
    "plan": ("plan", "in.onnx", "-o", "p.json", "--ratio", "3"),
    "sweep": ("sweep", "in.onnx", "--ratios", "2,16,99"),
    "inspect": ("inspect", "in.onnx"),
    "verify": ("verify", "in.onnx", "in.onnx"),
    "bench": ("bench", "a.onnx", "b.onnx"),
    "doctor": ("doctor",),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_golden_and_on_stdout_only(name, run, api, golden):
    done = run(*ANSWERS[name])
    assert done.exit_code == 0 and done.stderr == ""
    golden(name, done.stdout)


@pytest.mark.parametrize("name", ANSWERS)
def test_json_is_one_versioned_object_and_all_of_stdout(name, run, api):
    done = run(*ANSWERS[name], "--json")
    assert json.loads(done.stdout)["schema"] == records.SCHEMA


def test_json_has_no_word_that_json_has_not(run, api):
    api.answering("verify", the_verification(passed=False, relative=float("nan")))
    done = run("verify", "a", "b", "--json")
    found = json.loads(done.stdout, parse_constant=pytest.fail)
    assert done.exit_code == 1 and found["outputs"][0]["relative"] is None


def test_doctor_says_what_would_be_skipped_and_what_clashes(run, api):
    diagnosis = findings.Diagnosis({}, ("CPUExecutionProvider",), ("a", "b"), "CUDA device 0", None, 2, None)
    changed = {"notices": ("a and b clash",), "inspection": the_inspection()}
    api.answering("doctor", replace(diagnosis, **changed))
    done = run("doctor", "in.onnx")
    assert (
        "notice: a and b clash\nskip  h  LSTM 4x2  LSTM is not supported\nREADY  1 notices  1 of 2 weights"
        in done.stdout
    )


def test_quiet_says_the_last_line_only(run, api):
    done = run("compress", "in.onnx", "out.onnx", "-q")
    assert done.stdout == (
        "PASSED 44.6 MB -> 15.0 MB (2.98x)  output error 0.021  latency x0.93  12.3 s -> out.onnx\n"
    )


def test_a_dry_run_says_so_with_the_exact_bytes_and_needs_no_output(run, api):
    api.answering("compress", types.SimpleNamespace(report=the_report(dry_run=True)))
    lines = run("compress", "in.onnx", "--dry-run", "--ratio", "3").stdout.splitlines()
    assert lines[-1].startswith("DRY RUN 44.6 MB -> 15.0 MB (2.98x)") and "->" not in lines[-1][30:]
    assert lines[-2] == "asked ratio 3, reached 2.977x: 14980000 bytes"
    assert api.calls["compress"][0] == (Path("in.onnx"), None)


def test_verbose_logs_to_stderr_and_quiet_does_not(run, api):
    def compress(*args, progress, **options):
        progress("solving", 1, 2, WEIGHT)
        logging.getLogger("onnxdp.planner").warning("odd")
        return types.SimpleNamespace(report=the_report())

    api.compress = compress
    words = ("compress", "in.onnx", "out.onnx", "--ratio", "3")
    loud = run(*words, "-v")
    assert loud.stderr == f"INFO onnxdp.show: solving 1/2 {WEIGHT}\nWARNING onnxdp.planner: odd\n"
    assert run(*words).stderr == "WARNING onnxdp.planner: odd\n"
    assert run(*words, "-q").stderr == ""
    assert run(*words).stdout == loud.stdout


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (2_500_000_000, "2.5 GB"),
    ],
)
def test_sizes_are_in_units_of_a_thousand(nbytes, text):
    assert tables._bytes(nbytes) == text


# exit codes


class SurpriseError(Exception):
    pass


ENDINGS = [
    (errors.TargetError("No."), 1, "No."),
    (errors.VerifyError("Differs."), 1, "Differs."),
    (errors.UsageError("Wrong."), 2, "Wrong."),
    (errors.ModelError("Empty."), 2, "Empty."),
    (errors.PlanError("Other."), 2, "Other."),
    (errors.MethodError("Broken."), 3, "Broken."),
    (errors.SetupError("Missing."), 3, "Missing."),
    (MemoryError(), 3, "The memory of this machine is too small"),
    (OSError(errno.ENOSPC, "No space left on device", "out.onnx"), 3, "No space left on device: out.onnx;"),
    (PermissionError(errno.EACCES, "Permission denied", "in.onnx"), 2, "Permission denied: in.onnx;"),
    (
        SurpriseError("odd\nthing"),
        70,
        "This is a bug in onnxdp (SurpriseError: odd\\nthing); please report it with",
    ),
    (AssertionError(), 70, "This is a bug in onnxdp (AssertionError); please report it with"),
    (KeyboardInterrupt(), 130, "Interrupted."),
]


@pytest.mark.parametrize(("error", "code", "sentence"), ENDINGS, ids=lambda e: type(e).__name__)
def test_39_every_error_is_one_line_with_its_exit_code(error, code, sentence, run, api):
    for name in ("compress", "apply", "plan", "sweep", "inspect", "verify", "bench", "doctor"):
        api.answering(name, error)
    Path("p.json").write_text(the_plan().to_json())
    for words in [*ANSWERS.values(), ("apply", "in.onnx", "p.json", "out.onnx")]:
        done = run(*words, *(["--overwrite"] if words[0] == "plan" else []))
        assert done.exit_code == code and done.stdout == ""
        message = done.stderr.lstrip("\n")  # click ends the line of ^C
        assert message.startswith(f"error: {sentence}") and message.count("\n") == 1
    assert files() == ["in.onnx", "p.json"]


def test_debug_shows_the_traceback_and_json_gives_the_error_as_an_object(run, api):
    api.answering("compress", SurpriseError("odd"))
    done = run("compress", "in.onnx", "out.onnx", "--ratio", "3", "--debug", "--json")
    assert (
        done.stderr.startswith("Traceback (most recent call last)")
        and "\nerror: This is a bug" in done.stderr
    )
    found = json.loads(done.stdout)
    assert (
        found == {"schema": 1, "error": found["error"], "exit_code": 70}
        and "SurpriseError: odd" in found["error"]
    )


def test_a_failed_verification_exits_1_with_its_table(run, api):
    api.answering("verify", the_verification(passed=False, relative=0.5))
    done = run("verify", "a.onnx", "b.onnx")
    assert done.exit_code == 1
    assert done.stdout.splitlines()[-1] == "FAILED output error 0.5 > 0.03  32 samples, seed 0"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("compres", "No such command 'compres'"),
        ("compress", "Missing argument 'IN'"),
        ("compress in.onnx", "OUT is missing; name the file to write, or give --dry-run"),
        ("compress in.onnx out.onnx --ratoi 3", "No such option"),
        ("compress in.onnx out.onnx --ratio big", "Invalid value for '--ratio'"),
        ("compress in.onnx out.onnx --ratio 0.25", "--ratio is original / compressed size"),
        ("compress in.onnx out.onnx --ratio 3 --size 3MB", "--ratio and --size are two targets"),
        ("compress in.onnx in.onnx", "in.onnx exists; give another name, or --overwrite"),
        ("compress in.onnx .", ". is not a regular file"),
        (f"compress in.onnx {'x' * 300}", "File name too long"),
        ("compress in.onnx no/out.onnx", "no/out.onnx cannot be written (No such file or directory)"),
        ("compress in.onnx out.onnx --report no/r.json", "no/r.json cannot be written (No such file or"),
        ("compress in.onnx out.onnx --report in.onnx --overwrite", "is named twice on this command line"),
        ("compress in.onnx out.onnx --report ./out.onnx", "is named twice on this command line"),
        ("plan in.onnx -o in.onnx --overwrite", "is named twice on this command line"),
        ("apply in.onnx no.json out.onnx", "no.json cannot be read (No such file or directory)"),
        ("apply in.onnx in.onnx out.onnx", "The plan is not JSON"),
        ("apply in.onnx binary out.onnx", "binary is not text"),
        ("apply in.onnx binary binary --overwrite", "is named twice on this command line"),
        ("bench", "Missing argument 'A [B ...]'"),
        ("bench in.onnx --repeat 0", "Invalid value for '--repeat'"),
    ],
)
def test_unusable_requests_exit_2_before_any_work(words, sentence, run, api):
    Path("binary").write_bytes(b"\xff\xfe\x00")
    before = files()
    done = run(*words.split())
    assert done.exit_code == 2 and done.stdout == "" and not api.calls
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and sentence in last and files() == before


def test_an_error_in_the_words_is_json_too(run):
    done = run("compress", "--json", "--nonsense")
    found = json.loads(done.stdout)
    assert found["exit_code"] == done.exit_code == 2 and "--nonsense" in found["error"]


# files


def test_the_report_is_written_whole_and_equals_what_json_prints(run, api):
    done = run("compress", "in.onnx", "out.onnx", "--ratio", "3", "--report", "r.json", "--json")
    assert Path("r.json").read_text() == done.stdout
    umask = os.umask(0)
    os.umask(umask)
    assert Path("r.json").stat().st_mode & 0o777 == 0o666 & ~umask
    assert files() == ["in.onnx", "r.json"]


def test_a_report_that_cannot_be_finished_leaves_the_older_one(run, api, monkeypatch):
    Path("r.json").write_text("old")

    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "replace", full)
    done = run("compress", "in.onnx", "out.onnx", "--ratio", "3", "--report", "r.json", "--overwrite")
    assert done.exit_code == 3 and Path("r.json").read_text() == "old" and files() == ["in.onnx", "r.json"]


@pytest.mark.parametrize(
    "words", ["compress in.onnx old", "compress in.onnx o --report old", "plan in.onnx -o old"]
)
def test_existing_files_are_replaced_only_with_overwrite(words, run, api):
    Path("old").write_text("old")
    assert run(*words.split()).exit_code == 2 and Path("old").read_text() == "old" and not api.calls
    assert run(*words.split(), "--overwrite").exit_code == 0 and api.calls


# real processes

STUB = """
import sys, types, time, pathlib
sys.path.insert(0, {tests!r})
import test_cli
from onnxdp.cli import main
api = types.ModuleType("onnxdp.api")
def compress(source, target, *, progress, **options):
    half = pathlib.Path("half")
    half.touch()
    try:
        {body}
    finally:
        half.unlink()
    return types.SimpleNamespace(report=test_cli.the_report())
api.compress = compress
sys.modules["onnxdp.api"] = api
main()
"""


def wake():
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(body, *words, **options):
    code = STUB.format(tests=str(Path(__file__).parent), body=body)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    if sys.platform != "win32":  # nohup has SIGHUP ignored, and a shell SIGINT in what it runs behind
        pipes["preexec_fn"] = wake
    return subprocess.Popen(
        [sys.executable, "-c", code, "compress", "in.onnx", *words], **{**pipes, **options}
    )


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_38_a_signal_ends_it_with_a_line_and_leaves_nothing(number, code, tmp_path):
    with start("time.sleep(60)", "out.onnx", "-q", cwd=tmp_path) as process:
        wait_for(tmp_path / "half")
        process.send_signal(getattr(signal, number))
        out, err = process.communicate(timeout=60)
    assert process.returncode == code and out == "" and list(tmp_path.iterdir()) == []
    assert err.strip().startswith("error: ") and "Traceback" not in err


def wait_for(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    pytest.fail(f"{path} did not appear")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_a_reader_who_leaves_is_no_error(tmp_path):
    read, write = os.pipe()
    os.close(read)
    with start("pass", "out.onnx", "-q", cwd=tmp_path, stdout=write) as process:
        os.close(write)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_answer_that_cannot_be_written_exits_3(tmp_path):
    with Path("/dev/full").open("w") as full, start("pass", "o", "-q", cwd=tmp_path, stdout=full) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 3 and err == "error: No space left on device; make room and run again.\n"


def test_names_of_any_alphabet_survive_a_terminal_that_lacks_it(tmp_path):
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONIOENCODING": "ascii"}}
    with start("pass", "größe.onnx", "-q", **options) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and out.rstrip().endswith("-> gr\\xf6\\xdfe.onnx")


@pytest.mark.skipif(sys.platform == "win32", reason="no pty")
def test_38_a_terminal_gets_a_bar_with_time_left_and_at_once(tmp_path):
    """The command waits for what has been seen, or half a minute: how fast a bar is drawn is not tested."""
    shown = {"starting": tmp_path / "go", "w[7]": tmp_path / "seven"}
    body = "[time.sleep(0.05) for _ in range(600) if not pathlib.Path({!r}).exists()]"
    steps = "[progress('solving', i, 40, f'w[{{i}}]') for i in range({}, {})]"
    body = "; ".join(
        [body.format("go"), steps.format(0, 8), body.format("seven"), steps.format(8, 41), "time.sleep(0.3)"]
    )
    master, slave = os.openpty()
    with start(body, "out.onnx", cwd=tmp_path, stderr=slave, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(slave)
        seen = b""
        while chunk := read(master):
            seen += chunk
            for word, mark in shown.items():
                if word.encode() in seen:
                    mark.touch()
        out, _ = process.communicate(timeout=60)
    os.close(master)
    text = seen.decode()
    assert process.returncode == 0 and all(mark.exists() for mark in shown.values())
    assert "solving" in text and "40/40" in text
    assert re.search(r"7/40\D+\d:\d\d:\d\d\D+w\[7\]", re.sub("\x1b\\[[0-9;]*m", "", text))  # time left
    assert "\x1b" not in out.replace("\\x1b", "")


def read(master):
    try:
        return os.read(master, 65536)
    except OSError:  # EIO: the other end is closed
        return b""


def test_no_terminal_gets_no_bar(tmp_path):
    body = "progress('solving', 1, 2, 'w')"
    options = {"cwd": tmp_path, "env": {**os.environ, "FORCE_COLOR": "1"}}
    with start(body, "out.onnx", "--ratio", "3", **options) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == "" and "\x1b" not in out
