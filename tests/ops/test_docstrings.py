"""The docstring of every op says what users ask first."""

import inspect
import re

import pytest

from ztok_fast import ops
from ztok_fast.ops.op import OPS

PUBLIC = [name for name, op in OPS.items() if op.spec is not None]


@pytest.mark.parametrize("name", PUBLIC)
def test_arguments_shapes_errors_and_complexity_are_said(name):
    function = getattr(ops, name)
    text = inspect.getdoc(function)
    for part in ("Args:", "Returns:", "Raises:\n    ValueError", "O("):
        assert part in text, part
    arguments = text.split("Args:")[1].split("Returns:")[0]
    said = {name for names in re.findall(r"(?m)^    (\w[\w, ]*):", arguments) for name in names.split(", ")}
    assert said == set(inspect.signature(function).parameters)
