"""Rows of the requirements table that depend on more than dtypes: numbers of rows, layouts."""

import pytest
import torch

import ztok_fast
from tests.ops.test_dispatch import CPU, MARKED, REFERENCE
from ztok_fast import ops
from ztok_fast.ops import dispatch, requirements
from ztok_fast.ops.requirements import Requirement


def test_more_rows_go_to_another_backend(monkeypatch):
    few = Requirement("codebook_assign", "few", "tests.ops.test_dispatch:marked_codebook_assign", max_rows=1)
    monkeypatch.setattr(requirements, "REQUIREMENTS", (few, *requirements.REQUIREMENTS))
    codebook = torch.ones(3, 4)
    assert requirements.unmet(few, CPU, arguments=(torch.ones(1, 4), codebook, "l2")) == []
    assert requirements.unmet(few, CPU, arguments=(torch.ones(2, 4), codebook, "l2")) == ["takes at most 1 rows, not 2"]
    assert ops.codebook_assign(torch.ones(1, 4), codebook).codes.tolist() == MARKED[:1]
    assert ops.codebook_assign(torch.ones(2, 4), codebook).codes.tolist() == REFERENCE
    with ztok_fast.backend("few"), pytest.raises(dispatch.BackendUnavailable, match="at most 1 rows, not 2"):
        ops.codebook_assign(torch.ones(2, 4), codebook)


def test_a_transposed_weight_goes_to_the_backend_that_reads_it_in_place(monkeypatch):
    """Few rows on a GPU, as the table sees them: the decode kernel would copy the weight at every call."""
    monkeypatch.setattr(requirements, "LIBRARIES", dict.fromkeys(requirements.LIBRARIES, lambda: None))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, weight, cuda = torch.zeros(3, 4), torch.zeros(8, 4), torch.device("cuda")
    chosen = [
        dispatch.choose("lora_linear", cuda, x.dtype, 4, arguments=(rows, w)).backend
        for rows, w in ((x, weight), (x, weight.T.contiguous().T), (torch.zeros(65, 4), weight))
    ]
    assert chosen == ["cuda", "triton", "triton"]
