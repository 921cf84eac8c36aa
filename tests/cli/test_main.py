"""What all commands share: help, exit statuses, errors that are defects, pipes."""

import os
import re
import subprocess
import sys

import pytest

import ztok_fast
from tests.cli.conftest import TEXT
from ztok_fast.cli import common
from ztok_fast.cli.main import main

COMMANDS = ("compress", "decompress", "generate", "answer", "train", "pretrain", "eval", "info", "bench", "doctor")


def raising(error):
    def command():
        raise error

    return command


def test_help_names_every_command(ztok):
    result = ztok("--help")
    assert result.status == 0
    for command in COMMANDS:
        assert re.search(rf"^    {command}\s", result.out, re.MULTILINE)


def test_version(ztok):
    assert ztok("--version").out == f"ztok {ztok_fast.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(ztok, command):
    result = ztok(command, "--help")
    assert result.status == 0 and result.out.startswith(f"usage: ztok {command}")


@pytest.mark.parametrize("arguments", [[], ["fly"], ["compress"], ["compress", "a", "--ratio", "much"]], ids=str)
def test_wrong_arguments_give_usage_and_status_2(ztok, arguments):
    result = ztok(*arguments)
    assert result.status == 2 and result.err.startswith("usage: ztok") and result.bytes == b""


def test_ctrl_c_is_a_short_line_and_status_130(tiny, compressed, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("ztok_fast.codec.exact.decompress_documents", interrupt)
    result = tiny("decompress", compressed)
    assert (result.status, result.err, result.bytes) == (130, "ztok: interrupted\n", b"")


def test_defects_keep_their_traceback():
    for error in (RuntimeError("boom"), TypeError("boom"), KeyError("boom")):
        with pytest.raises(type(error)):
            common.run_plainly(raising(error))
    with pytest.raises(ValueError, match="boom"):  # not raised by the package, so not made for its users
        common.run_plainly(raising(ValueError("boom")))


def test_traceback_option_raises_what_was_refused(tmp_path):
    with pytest.raises(common.UsageError, match="no such file"):
        main(["--traceback", "decompress", str(tmp_path / "none.ztok")])


def test_a_process_prints_plain_errors_starts_light_and_survives_a_closed_pipe(tmp_path, codec_folder):
    environment = dict(os.environ, PYTHONPATH=os.getcwd(), PYTHONWARNINGS="default")
    script = (
        "import sys; from ztok_fast.cli.main import main; main(['--help']); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True).returncode == 0

    done = subprocess.run(
        [sys.executable, "-m", "ztok_fast.cli", "info", str(tmp_path / "none.ztok")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"ztok: error: {tmp_path / 'none.ztok'}: there is no such file\n"

    (tmp_path / "a.txt").write_text(TEXT)
    command = [sys.executable, "-m", "ztok_fast.cli", "info", str(tmp_path / "a.txt"), "--codec", str(codec_folder)]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    # No traceback, and no library's warning although PYTHONWARNINGS asks for them.
    assert (done.returncode, done.stderr) == (141, "")
