"""Fixtures that every test module may use."""

import os
import pathlib
import sys
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest

jax.devices()  # JAX begins here, with one device, whatever a command asks for that a test runs

# The processes that tests start compile much and compute little: the first without what makes the
# second faster takes half the time. This process has read its flags and does as a user's would.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

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


@pytest.fixture(autouse=True, scope="module")
def default_configuration() -> Iterator[None]:
    """What a module's tests have compiled, and told `tasks` about files, is forgotten after it."""
    yield
    jax.clear_caches()
    if "tasks" in sys.modules:
        import seqio

        from tasks import mixing, sources, text_files, vocabularies

        vocabularies.set_default_file(vocabularies.T5_VOCABULARY_FILE)
        seqio.set_tfds_data_dir_override(None)
        text_files._configured = None
        sources.set_tfds_versions({})
        mixing.set_rates(mixing.Rates())
