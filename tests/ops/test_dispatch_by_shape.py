"""Rows of the requirements table that depend on more than dtypes: numbers of rows."""

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
