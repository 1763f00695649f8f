"""What ``model.precision: auto`` came to in a store: the ``precision`` artifact.

It is measured by the first run that asks and stays with the store: another machine that goes on
there takes the same, so that names and numbers do not change with the machine.
"""

from __future__ import annotations

from invar_ray.models.precision import Precision, multiplication_rates
from invar_ray.store.artifacts import Artifact, Building, Plan

VERSION = 1
_GAIN = 1.2
"""bf16 must be so much faster than fp32 to be taken on a CPU."""


def plan() -> Plan:
    """One for each store."""
    return Plan(kind="precision", name="auto", config={}, version=VERSION)


def build(building: Building, sizes: tuple[int, int], *, use_gpu: bool) -> None:
    """Measure and decide.

    Args:
        building: gets it.
        sizes: of the base: of its hidden states and inside its MLP.
        use_gpu: training has GPUs (which the driver may not see): they multiply bf16 faster.
    """
    taken: Precision = "bf16"
    if use_gpu:
        building.info["because"] = "training has GPUs"
    else:
        rates = multiplication_rates(*sizes)
        taken = "bf16" if rates["bf16"] > _GAIN * rates["fp32"] else "fp32"
        building.info["because"] = (
            f"a core multiplies {rates['fp32']:.0f} GFLOP/s in fp32, {rates['bf16']:.0f} in bf16 "
            f"({sizes[0]} x {sizes[1]})"
        )
    building.info["precision"] = taken


def taken_in(artifact: Artifact) -> Precision:
    """What it came to."""
    found: Precision = artifact.info["precision"]
    return found
