"""The documents agree with the code."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from ztok_fast.codec.config import ZTokConfig
from ztok_fast.train.objective import LossWeights
from ztok_fast.train.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("settings", [ZTokConfig, TrainSettings, LossWeights], ids=lambda c: c.__name__)
def test_training_explains_every_setting(settings):
    text = (ROOT / "docs" / "training.md").read_text()
    explained = set(re.findall(r"`(\w+)`", text))
    assert {f.name for f in fields(settings)} - explained == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_to_files(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_scripts_that_documents_name_exist(path):
    for module in re.findall(r"python -m (bench[.\w]*\w)", path.read_text()):
        folder = ROOT / module.replace(".", "/")
        assert folder.with_suffix(".py").is_file() or (folder / "__main__.py").is_file(), module
    for config in re.findall(r"configs/\w+\.yaml", path.read_text()):
        assert (ROOT / config).is_file(), config
