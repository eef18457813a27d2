"""A small model directory of a test's own."""

import pytest
from checkpoints import copy_of


@pytest.fixture
def model_dir(tmp_path):
    return copy_of("plain", tmp_path / "model")
