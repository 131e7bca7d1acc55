"""The command line: one line and a status for a user's mistake, never a traceback."""

import os
import subprocess
import sys

import pytest

from defgan_fast import commands


def run(capsys, *words):
    """Exit status, stdout, stderr."""
    try:
        status = commands.main(words)
    except SystemExit as end:  # argparse's way
        status = end.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_lists_every_command(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for name in commands.COMMANDS:
        assert f"\n    {name} " in out


def test_version(capsys):
    from defgan_fast._version import __version__

    assert run(capsys, "--version")[:2] == (0, f"defgan-fast {__version__}\n")


def test_module_entry_point():
    result = subprocess.run(
        [sys.executable, "-m", "defgan_fast", "demo", "--generator", "absent.safetensors"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == "defgan-fast: no such file: absent.safetensors\n"


def test_unknown_command_is_wrong_use(capsys):
    status, _, errors = run(capsys, "defend")
    assert status == 2
    assert "invalid choice: 'defend'" in errors
    assert errors.count("\n") == 1


MISTAKES = {
    "no data": (
        ["train", "gan", "--dataset", "mnist", "--root", "absent"],
        "(or unpacked, or mnist.npz) of mnist; looked in absent, absent/mnist",
    ),
    "settings": (
        ["train", "gan", "--dataset", "digits", "--steps", "0"],
        "steps must be at least 1, got 0",
    ),
    "architecture": (["train", "classifier", "--dataset", "digits", "--arch", "Z"], "invalid choice: 'Z'"),
    "unwritable": (
        ["train", "classifier", "--dataset", "digits", "--out", "file/out"],
        "Not a directory: file/out",
    ),
    "truncated checkpoint": (
        ["train", "classifier", "--dataset", "digits", "--out", "damaged", "--resume"],
        "checkpoint.pt is truncated or not a checkpoint",
    ),
    "device": (
        ["train", "gan", "--dataset", "digits", "--device", "toaster"],
        "--device must be cpu or cuda, got 'toaster'",
    ),
    "no cuda": (["train", "gan", "--dataset", "digits", "--device", "cuda:99"], "CUDA devices in sight"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, capsys, tmp_path, monkeypatch):
    words, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "checkpoint.pt").write_bytes(b"PK\x03\x04 half of it")
    status, _, errors = run(capsys, *words)
    assert status == 2
    assert message in errors
    assert "Traceback" not in errors
    assert errors.count("\n") == 1


def test_interruption(capsys, monkeypatch):
    from defgan_fast.training import loop

    def stop(*_, **__):
        raise loop.Interrupted("interrupted at step 3 of 9; continue with --resume")

    monkeypatch.setattr(loop, "run", stop)
    status, _, errors = run(capsys, "train", "classifier", "--dataset", "digits", "--arch", "E")
    assert status == 130
    assert errors == "defgan-fast: interrupted at step 3 of 9; continue with --resume\n"


def test_a_reader_that_has_enough_ends_it_quietly():
    """As head does, which closes the pipe after its lines."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        result = subprocess.run(
            [sys.executable, "-m", "defgan_fast", "info"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.stderr == ""
    assert result.returncode == commands.BROKEN_PIPE


def test_only_the_command_that_was_asked_for_is_imported():
    """`--help` and a command pay for nothing but themselves."""
    program = (
        "import sys; from defgan_fast import commands; commands.build_parser({words!r}); "
        "print(sorted(name for name in sys.modules if name.startswith('defgan_fast.commands.')))"
    )
    for words, expected in ((["--help"], "[]"), (["info"], "['defgan_fast.commands.info']")):
        result = subprocess.run(
            [sys.executable, "-c", program.format(words=words)], capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == expected


def test_every_command_has_its_file():
    for name in commands.COMMANDS:
        args = commands.build_parser().parse_args(["train", "curve", "x"] if name == "train" else [name])
        assert callable(args.run)


def test_a_bug_is_not_taken_for_a_mistake(monkeypatch):
    from defgan_fast.commands import demo

    def bug(args):
        raise KeyError("a bug")

    monkeypatch.setattr(demo, "run", bug)
    with pytest.raises(KeyError):
        commands.main(["demo"])
