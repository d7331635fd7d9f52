import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from onnxdp.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def section(title):
    return re.split(r"^#+ ", README.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


LINES = [line for block in blocks("console") for line in block.splitlines() if line]
PARTS = [shlex.split(part) for line in LINES for part in line.split(" && ")]
OURS = [words[1:] for words in PARTS if Path(words[0]).name == "onnxdp"]
SCRIPTS = [words[1:] for words in PARTS if Path(words[0]).name == "python" and words[1].endswith(".py")]
FIRST = next(line for line in LINES if "onnxdp compress" in line)


def options_of(command):
    return {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)} | {"-h", "--help"}


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_a_command_shown_exists_with_its_options_and_arguments(words):
    command = main.commands[words[0]]
    assert {w for w in words[1:] if w.startswith("-")} <= options_of(command)
    # Click's own parser says whether values and arguments fit, without running anything.
    # Beneath its group: Click keeps the first --help that it makes, and -h comes from there.
    command.make_context(words[0], words[1:], parent=click.Context(main, **main.context_settings))


def test_every_command_is_shown():
    assert {words[0] for words in OURS} == set(main.commands)


@pytest.mark.parametrize("words", SCRIPTS, ids=lambda w: w[0])
def test_a_script_shown_exists_with_its_options(words):
    told = subprocess.run(
        [sys.executable, ROOT / words[0], "--help"], capture_output=True, text=True, check=True
    )
    assert {w for w in words if w.startswith("-")} <= set(re.findall(r"--?[\w-]+", told.stdout))


@pytest.mark.parametrize(
    "name",
    sorted(
        p.name for p in (ROOT / "tools").glob("*.py") if 'if __name__ == "__main__"' in p.read_text("utf-8")
    ),
)
def test_every_tool_explains_itself(name):
    told = subprocess.run([sys.executable, ROOT / "tools" / name, "--help"], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "usage:" in told.stdout


@pytest.mark.parametrize("name", ["onnxdp", *main.commands])
def test_every_command_and_option_has_a_help_text(name):
    command = main if name == "onnxdp" else main.commands[name]
    assert command.help
    assert [p.name for p in command.params if isinstance(p, click.Option) and not p.help] == []


def test_what_follows_from_the_sources_does():
    told = subprocess.run(
        [sys.executable, ROOT / "tools" / "readme.py", "--check"], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr


def test_the_map_of_the_house_is_the_tree():
    shown = re.findall(r"^\| `([^`]+)` \|", section("The map of the house"), re.MULTILINE)
    tree = [
        p
        for pattern in ("onnxdp/*.py", "onnxdp/*/*.py", "passes/*.py", "tools/*.py")
        for p in ROOT.glob(pattern)
        if p.parts[-3:-1] != ("onnxdp", "passes")  # a link to the folder at the top
    ]
    assert len(shown) == len(set(shown))
    assert {s for s in shown if s.endswith(".py")} == {p.relative_to(ROOT).as_posix() for p in tree}
    assert all((ROOT / s).is_dir() for s in shown if s.endswith("/"))


def test_every_room_says_what_it_is_for():
    rows = re.findall(r"^\| `([^`]+)` \| *(.*?) *\|$", section("The map of the house"), re.MULTILINE)
    assert rows and [room for room, what in rows if len(what) < 15] == []


def test_every_extra_named_exists():
    extras = PROJECT["project"]["optional-dependencies"]
    asked = {e for line in LINES for group in re.findall(r"\.\[([\w,]+)\]", line) for e in group.split(",")}
    assert {"cpu", "test"} <= asked <= set(extras)
    assert set(re.findall(r"`(\w+)`", README.split("Extras:", 1)[1].split("\n\n", 1)[0])) >= set(extras)


def test_ci_runs_the_command_that_the_readme_gives():
    (block,) = re.findall(r"^```console\n(.*?)^```$", section("Run the tests"), re.MULTILINE | re.DOTALL)
    (line,) = block.splitlines()
    assert "pip install" in line and "pytest" in line
    assert "README.md" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_gaps_for_tables_are_where_the_tools_look():
    asked = {
        name
        for path in (ROOT / "tools").glob("*.py")
        for name in re.findall(r'tell\(\s*asked, "(\w+)"', path.read_text(encoding="utf-8"))
    }
    assert asked == set(re.findall(r"<!-- table: (\w+) -->(?=.*?<!-- end -->)", README, re.DOTALL))


def test_exit_codes_are_those_of_the_errors():
    from onnxdp import errors

    codes = {int(c) for row in re.findall(r"^\| ([\d, ]+) \|", README, re.MULTILINE) for c in row.split(",")}
    raised = {e.exit_code for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)}
    assert raised <= codes
    assert {0, 130, 143} <= codes


def test_the_first_command_does_what_it_says(tmp_path):
    parts = [shlex.split(p) for p in FIRST.split(" && ")]
    compress, evaluate = (words for words in parts if words[0].endswith(("onnxdp", "python")))
    (tmp_path / "models").symlink_to(ROOT / "models")
    subprocess.run(
        [sys.executable, "-m", "onnxdp", *compress[1:]], cwd=tmp_path, check=True, capture_output=True
    )
    told = subprocess.run(
        [sys.executable, *evaluate[1:]], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    small = tmp_path / compress[3]
    assert 4 * small.stat().st_size <= (ROOT / compress[2]).stat().st_size
    before, after = (float(p) for p in re.findall(r"([\d.]+) %", told.stdout))
    assert abs(before - after) <= 1


def test_the_python_shown_runs(tmp_path):
    if importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("onnxruntime is missing: install onnxdp[cpu]")
    (tmp_path / "models").symlink_to(ROOT / "models")
    for code in blocks("python"):
        told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
        assert float(told.stdout.split()[0]) >= 4
