"""Tests of README.md: its quick commands run as they stand, the long ones have options that exist,
the files that it names are there, and what it says of lengths is true."""
import ast
import contextlib
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import pytest
import losses
import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS, INLINE = FENCED.findall(README), re.findall(r"`([^`]+)`", FENCED.sub("", README))


def commands():
    """Every command of the code blocks, without comments, its lines joined."""
    lines = "\n".join(BLOCKS).replace("\\\n", " ").split("\n")
    parts = [part for line in lines for part in re.split(r" && ", line.split("  #")[0].strip())]
    return [part for part in parts if part.startswith(("python ", "torchrun ", "grep "))]


def run(command, folder):
    """A command of the README in another folder, and with this Python -> what it prints."""
    command = re.sub(r"\bpython ", f"{shlex.quote(sys.executable)} ", command, count=1)
    command = re.sub(r"(?<= )((tests/)?\w+\.py)", rf"{ROOT}/\1", command, count=1)
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_are_found():
    found = commands()
    assert "torchrun train.py --loss sparc" in found and "python -m pytest -q" in found
    assert "python losses.py sparc > sparc.py" in found and len(found) > 30


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("grep ")])
def test_an_equation_has_its_line(command):
    """The greps find what they promise: an equation's tag stands once, in losses.py."""
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "losses.py" in command + done.stdout
    assert " eq" not in command or len(done.stdout.splitlines()) == 1


def test_a_loss_is_taken_along(tmp_path):
    run("python losses.py sparc > sparc.py", tmp_path)
    tree = ast.parse((tmp_path / "sparc.py").read_text())
    assert "sparc_loss" in [getattr(node, "name", None) for node in tree.body]
    assert run("python -c 'import sparc; print(sparc.sparc_loss.__name__)'", tmp_path)


def test_lengths_of_the_losses():
    lengths = [len(losses.cut_out(name).splitlines()) for name in losses.OBJECTIVES]
    assert f"({min(lengths)} to {max(lengths)} lines)" in README


def test_samples_are_drawn(tmp_path):
    assert run("python data.py", tmp_path) == "drawn into samples.png\n"
    assert (tmp_path / "samples.png").stat().st_size > 10_000


@pytest.mark.parametrize("command", [c for c in commands() if "train.py" in c])
def test_options_of_train_exist(command):
    words = shlex.split(command[command.index("train.py") + len("train.py"):])
    words = ["1000" if word in ("N", "W") else "clip" if word == "VOCAB" else word
             for word in words if word != "..."]
    with contextlib.redirect_stderr(None):
        args = train.flags().parse_args(words)
    assert args.loss in losses.OBJECTIVES


@pytest.mark.parametrize("script", ["eval.py", "visualize.py", "data.py", "tests/bench.py",
                                    "tests/transfer.py"])
def test_options_of_the_others_exist(script, monkeypatch, capsys):
    """Each option in a command of the script is in its --help."""
    spans = [c for c in commands() + INLINE if c.startswith(f"python {script}")]
    for kind in {c.split()[2] for c in spans} if script == "tests/bench.py" else {"--help"}:
        monkeypatch.setattr(sys, "argv", [script, kind, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    helps = capsys.readouterr().out
    options = {word for c in spans for word in c.split(" -- ")[0].split() if word[:2] == "--"}
    assert spans and [option for option in sorted(options) if option not in helps] == []


def test_the_files_that_it_names_are_there():
    tree = next(block for block in BLOCKS if block.startswith("losses.py"))
    names = set(re.findall(r"^([\w/]+\.?\w*)  ", tree, re.MULTILINE)) | set(
        re.findall(r"\(?(assets/[\w.]+|tests/\w+\.py)", README))
    assert len(names) > 8 and [name for name in names if not (ROOT / name).exists()] == []
