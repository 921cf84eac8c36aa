"""The docstring of every op says what users ask first."""

import inspect
import re

import pytest

from ztok_fast import ops
from ztok_fast.ops import requirements

PUBLIC = [name for name in requirements.ops() if not name.endswith("_backward")]


@pytest.mark.parametrize("name", PUBLIC)
def test_arguments_shapes_errors_and_complexity_are_said(name):
    function = getattr(ops, name)
    text = inspect.getdoc(function)
    for part in ("Args:", "Returns:", "Raises:\n    ValueError", "O("):
        assert part in text, part
    arguments = text.split("Args:")[1].split("Returns:")[0]
    said = {name for names in re.findall(r"(?m)^    (\w[\w, ]*):", arguments) for name in names.split(", ")}
    assert said == set(inspect.signature(function).parameters)
