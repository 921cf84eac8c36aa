"""Codecs shared by the tests of this folder; a test that changes weights makes its own."""

from functools import cache

import pytest

from tests.codec.tiny_codec import FAMILIES, tiny_codec

shared_codec = cache(tiny_codec)


@pytest.fixture
def codec():
    """The Llama-shaped codec."""
    return shared_codec("llama")


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def family_codec(family):
    """One codec for each family."""
    return shared_codec(family)
