"""For all tests: one process of pytest uses one core; where cached models are written."""

import os

import pytest
import session_folder


@pytest.fixture(scope="session", autouse=True)
def _one_core():
    """Stock runtimes take a thread a core, and theirs wait for each other by spinning: beside a second process of
    pytest that takes several times as long as one thread does.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("os.cpu_count", lambda: 1)
        if hasattr(os, "sched_getaffinity"):
            patched.setattr("os.sched_getaffinity", lambda _: {0})
        yield


@pytest.fixture(scope="session", autouse=True)
def _folders(tmp_path_factory):
    session_folder.begin(tmp_path_factory)
