"""Every test of quantizers computes in one thread."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Nothing but `one_thread`, for all tests of this folder."""
