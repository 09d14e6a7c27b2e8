"""A server for all tests of a module, see `http_fakes.served`."""

import http_fakes
import pytest


@pytest.fixture(scope="module")
def shared():
    """Runs an async test against a server that all tests share which leave it as it was."""
    with http_fakes.serving_in_thread() as run:
        yield run
