"""An error of an atomic write names the file that was asked for, and the reason."""

import errno
import os
import resource
import signal

import pytest

from ztok_fast.files import replace_atomically

as_root = pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@as_root
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError) as caught, replace_atomically(tmp_path / "file") as temporary:
        temporary.write_bytes(b"x")
    assert caught.value.filename == str(tmp_path / "file")


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES, errno.EIO], ids=errno.errorcode.get)
def test_a_folder_that_cannot_hold_the_temporary_file(tmp_path, reason):
    with pytest.raises(OSError) as caught, replace_atomically(tmp_path / "file") as temporary:
        raise OSError(reason, os.strerror(reason), str(temporary))
    assert (caught.value.errno, caught.value.filename) == (reason, str(tmp_path / "file"))
    assert ".tmp" not in str(caught.value)


def test_a_missing_folder_that_cannot_be_made(tmp_path, monkeypatch):
    parent = tmp_path / "missing"
    monkeypatch.setattr("os.mkdir", failing(PermissionError(errno.EACCES, "Permission denied", str(parent))))
    with pytest.raises(PermissionError) as caught, replace_atomically(parent / "file"):
        pass
    assert caught.value.filename == str(parent / "file")


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "parent").write_text("x")
    with pytest.raises(NotADirectoryError) as caught, replace_atomically(tmp_path / "parent" / "file"):
        pass
    assert caught.value.filename == str(tmp_path / "parent" / "file")


@pytest.fixture
def small_files():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_no_space_left(tmp_path, small_files):
    target = tmp_path / "file"
    target.write_text("older")
    with pytest.raises(OSError) as caught, replace_atomically(target) as temporary:
        temporary.write_bytes(bytes(4096))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(target))
    assert target.read_text() == "older" and os.listdir(tmp_path) == ["file"]


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, replace_atomically(tmp_path / "file"):
        (tmp_path / "input").read_bytes()
    assert os.fspath(caught.value.filename) == str(tmp_path / "input")


def test_a_name_of_the_greatest_length(tmp_path):
    name = "n" * 255
    with replace_atomically(tmp_path / name) as temporary:
        temporary.write_text("x")
    assert os.listdir(tmp_path) == [name]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    for text in ("first", "second"):
        with replace_atomically(tmp_path / "link") as temporary:
            temporary.write_text(text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "file").read_text() == text


def test_a_pipe_is_written_to_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with replace_atomically(tmp_path / "pipe") as temporary:
        temporary.write_bytes(b"through")
    assert os.read(reader, 100) == b"through" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
