"""Fixtures that every test module may use."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest

REPO = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> pathlib.Path:
    """The root of the checkout."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Real data, vocabularies and golden files beside the checkout; a user's clone has none."""
    path = REPO.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no ../shared/data beside the checkout ({path.parent.name}/ is not there)")
    return path
