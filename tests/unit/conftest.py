"""Unit tests run without a cluster: starting one here is an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import pytest


def _forbidden(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        "a unit test started Ray. Expected: tests/unit runs without a cluster. "
        "To do: move the test to tests/ray and use the fixture local_ray."
    )


# One patch a module, not one a test: hypothesis objects to function-scoped fixtures.
@pytest.fixture(scope="module", autouse=True)
def no_cluster() -> Iterator[None]:
    """Make ``ray.init`` raise, also where Ray would call it by itself."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", _forbidden)
        yield
