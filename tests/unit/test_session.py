"""Whether work finds room on a cluster, by hand."""

from __future__ import annotations

import pytest

from invar_ray.session import Bundle, placed

WORKER: Bundle = {"CPU": 8.0, "GPU": 1.0}
SIXTEEN: Bundle = {"CPU": 16.0, "GPU": 4.0, "memory": 9.0}


@pytest.mark.parametrize(
    ("nodes", "bundles", "fitting"),
    [
        # The CPUs of a worker are too many for nodes that have GPUs enough: 2 on each.
        ([SIXTEEN, SIXTEEN], [WORKER] * 8, 4),
        ([SIXTEEN, SIXTEEN], [{"CPU": 4.0, "GPU": 1.0}] * 8, 8),
        ([{"CPU": 64.0}], [WORKER], 0),
        # In all there are 2 CPUs, but not on one node.
        ([{"CPU": 1.0}, {"CPU": 1.0}], [{"CPU": 2.0}], 0),
        # The small one does not take the place that the large one needs.
        ([{"CPU": 1.0}, {"CPU": 4.0}], [{"CPU": 1.0}, {"CPU": 4.0}], 2),
        ([{"CPU": 4.0, "GPU": 1.0}], [{"CPU": 1.0, "GPU": 0.5}] * 2, 2),
        ([{"CPU": 0.3}], [{"CPU": 0.1}] * 3, 3),
        ([], [{"CPU": 1.0}], 0),
    ],
)
def test_bundles_that_fit_at_the_same_time(
    nodes: list[Bundle], bundles: list[Bundle], fitting: int
) -> None:
    assert placed(nodes, bundles) == fitting
