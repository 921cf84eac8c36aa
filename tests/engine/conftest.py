"""Tests of the engine write no cache of the user's, and leave threads and instruction set as they were."""

import pytest
import torch

from ztok_fast import native


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def machine():
    """Call it with an instruction set and a number of threads to use them until the end of the test."""
    assert native.status("cpu").available
    isa, threads = torch.ops.ztok.isa_native(-1), torch.get_num_threads()

    def use(wanted: int, count: int) -> None:
        assert torch.ops.ztok.isa_native(wanted) == wanted
        torch.set_num_threads(count)

    yield use
    use(isa, threads)


def instruction_sets() -> list[int]:
    """Numbers of those that this processor has; 0 is plain C++."""
    if not native.status("cpu").available:
        return []
    best = torch.ops.ztok.isa_native(-1)
    found = [isa for isa in range(3) if torch.ops.ztok.isa_native(isa) == isa]
    torch.ops.ztok.isa_native(best)
    return found
