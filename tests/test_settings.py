"""Settings: every value has a meaning or is refused with what to do, in the library as in the command."""

import dataclasses
import math
from pathlib import Path

import pytest
from edges import mlp, onnxdp, refused, save
from hypothesis import given
from hypothesis import strategies as st

from onnxdp.errors import UsageError
from onnxdp.settings import DEFAULT_MAX_ERROR, Settings, help_of, parse_size

NO = "ask for 4 to make a file a quarter."
REFUSED = [
    ("--ratio nan", f"--ratio is original / compressed size and must be above 1, not nan; {NO}"),
    ("--ratio inf", f"--ratio is original / compressed size and must be above 1, not inf; {NO}"),
    ("--ratio 0.5", f"--ratio is original / compressed size and must be above 1, not 0.5; {NO}"),
    ("--ratio 1", f"--ratio is original / compressed size and must be above 1, not 1; {NO}"),
    ("--ratio -3", f"--ratio is original / compressed size and must be above 1, not -3; {NO}"),
    ("--ratio 3 --size 3MB", "--ratio and --size are two targets; give one."),
    ("--size 3MB --max-error 0.1", "--size and --max-error are two targets; give one."),
    ("--max-error 0", "--max-error is a relative error between 0 and 1, not 0; try 0.03."),
    ("--max-error nan", "--max-error is a relative error between 0 and 1, not nan; try 0.03."),
    *(
        (
            f"--size {size}",
            f"--size {size!r} is no size; give bytes (120000, 800kB, 3MB) or a share of the file (30%).",
        )
        for size in ("0", "-3MB", "3XB", "big", "1e6", "0%", "NaN", "٣", 400 * "9")
    ),
    ("--partition 0", "--partition is auto, none or a number of rows, not '0'; the paper uses 288."),
    ("--partition ²", "--partition is auto, none or a number of rows, not '²'; the paper uses 288."),
    ("--solver fast", "--solver is one of exact, randomized, dpl, not 'fast'."),
    ("--device tpu", "--device is one of auto, cpu, cuda, not 'tpu'."),
    ("--factor-dtype int8", "--factor-dtype is one of float16, float32, not 'int8'."),
    ("--atoms 0", "--atoms must be at least 1, not 0."),
    ("--iterations 0", "--iterations must be at least 1, not 0."),
    ("--samples 1", "--samples must be at least 2, not 1."),
    ("--seed -1", "--seed must be at least 0, not -1."),
    (
        "--ratio 2 --include nope*",
        "--include 'nope*' matches no weight; 'onnxdp inspect' lists the names of weights and nodes.",
    ),
    (
        "--ratio 2 --exclude re:^nope$",
        "--exclude 're:^nope$' matches no weight; 'onnxdp inspect' lists the names of weights and nodes.",
    ),
    (
        "--ratio 2 --include re:(",
        "--include 're:(' is no regular expression (missing ), unterminated subpattern at position 0); "
        "correct it.",
    ),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[words[:40] for words, _ in REFUSED])
def test_what_has_no_meaning_is_refused(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(mlp())
    refused(2, message, "compress", "in.onnx", "out.onnx", *words.split(), "-q")


def test_a_method_that_is_not_installed_is_refused_with_those_that_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(mlp())
    done = onnxdp("compress", "in.onnx", "out.onnx", "--ratio", "2", "--method", "magic")
    assert done.exit_code == 2 and done.stderr.startswith(
        "error: There is no method 'magic'; installed are dp, "
    )


def test_patterns_choose_by_weight_node_operator_glob_and_expression(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(mlp())
    for pattern, kept in {"w1": 1, "second": 1, "Gemm": 0, "w*": 0, "re:2$": 1, "re:fir": 1}.items():
        done = onnxdp("inspect", "in.onnx", "--include", pattern)
        assert done.stdout.count("is not named by --include") == kept, pattern


WRONG = [
    {"seed": True}, {"seed": 0.0}, {"seed": None}, {"atoms": 3.0}, {"ratio": "3"}, {"ratio": True},
    {"include": "w1"}, {"include": [1]}, {"unweighted": 1}, {"shared": "yes"}, {"partition": 288},
    {"size": 3}, {"inputs": 3},
]  # fmt: skip


@pytest.mark.parametrize("values", WRONG, ids=str)
def test_values_of_the_wrong_kind_are_refused_by_name(values):
    (name,) = values
    with pytest.raises(UsageError, match=f"^{name} is .* not of the kind .*; correct it\\.$"):
        Settings(**values)


def test_what_a_caller_may_write_otherwise_means_the_same():
    given_ = Settings(ratio=3, include=["a"], exclude=("b",), inputs="x.npz")
    assert given_ == Settings(ratio=3.0, include=("a",), exclude=("b",), inputs=Path("x.npz"))
    assert hash(given_)


@given(st.floats(1.0, 1e6, exclude_min=True), st.integers(1, 10**12))
def test_a_budget_never_allows_more_than_asked(ratio, nbytes):
    budget = Settings(ratio=ratio).budget(nbytes)
    assert budget is not None and budget <= nbytes / ratio < budget + 1 + 1e-9 * nbytes


@given(
    st.integers(1, 10**6),
    st.sampled_from(["", "B", "kB", "MB", "gb", "KiB", "MiB"]),
    st.sampled_from(["", " "]),
)
def test_sizes(number, unit, space):
    factor = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20}[unit.lower()]
    assert parse_size(f"{number}{space}{unit}", 7) == number * factor


@given(st.integers(1, 100), st.integers(1, 10**9))
def test_a_share_is_of_the_whole_file(share, nbytes):
    assert abs(parse_size(f"{share}%", nbytes) - share * nbytes / 100) <= 1


def test_without_a_target_there_is_an_error_to_keep():
    assert Settings().error_target == DEFAULT_MAX_ERROR and Settings().budget(100) is None
    assert Settings(ratio=2).error_target is None and Settings(max_error=0.5).error_target == 0.5
    assert math.isclose(DEFAULT_MAX_ERROR, 0.03)
    assert [s.target for s in (Settings(), Settings(ratio=3), Settings(size="30%"))] == [
        "max-error 0.03",
        "ratio 3",
        "size 30%",
    ]


def test_every_setting_explains_itself():
    for setting in dataclasses.fields(Settings):
        text = help_of(setting.name)
        assert text[0].isupper() and text.endswith("."), setting.name


@pytest.mark.parametrize(
    "given",
    [
        {"atoms": 4}, {"partition": "none"}, {"partition": "288"}, {"solver": "dpl"},
        {"factor_dtype": "float32"}, {"shared": True}, {"shared": False}, {"unweighted": True},
    ],
)  # fmt: skip
def test_an_option_of_dictionary_pairs_makes_auto_mean_them(given):
    assert Settings(**given).method == "dp"
    assert Settings(method="quant", **given).method == "quant"
    assert Settings(method="float16", **given).method == "float16"


def test_without_one_auto_stays_auto():
    assert Settings().method == Settings(ratio=4, refit=True, samples=8, seed=3).method == "auto"
    assert Settings(partition="auto", solver="exact", factor_dtype="float16").method == "auto"
