from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from certificates import Certificates
from helpers import client_threads


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Check after each test that clients' threads end, the abandoned ones too, and sockets."""
    before = client_threads()
    yield
    for thread in client_threads():
        if thread not in before:
            thread.join(30)
            assert not thread.is_alive()
    # Warnings of what was not closed belong to this test, and not to a later one.
    gc.collect()


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def certificates(tmp_path: Path, authority: trustme.CA) -> Certificates:
    return Certificates(tmp_path, authority, "127.0.0.1")
