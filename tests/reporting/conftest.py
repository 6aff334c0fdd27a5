import os

import pytest


@pytest.fixture
def require():
    """Return a thing that may be absent: skip without it, or fail where everything is required."""

    def check(thing, name):
        if thing:
            return thing
        if os.environ.get("HONELOOM_REQUIRE_ALL") == "1":
            pytest.fail(f"{name} is not available, and HONELOOM_REQUIRE_ALL is set")
        pytest.skip(f"{name} is not available")

    return check
