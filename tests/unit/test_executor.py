"""Small jobs run in the process that asks (what larger ones do on Ray is tested in tests/ray)."""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa
import pytest
import ray

from invar_ray.config import ScaleConfig
from invar_ray.errors import DataError, ResourceError
from invar_ray.executor import OnRay, Work


class Times:
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"block": row["block"], "product": row["value"] * self.factor, "pid": os.getpid()}


def test_few_questions_start_no_actor() -> None:
    blocks = [{"block": number, "value": number + 1} for number in range(3)]
    schema = pa.schema([("block", pa.int64()), ("value", pa.int64())])
    work = Work("multiply", Times, {"factor": 10}, blocks, texts=3, leaves_from=4, schema=schema)
    found = list(OnRay(ScaleConfig()).run(work))
    assert [row["product"] for row in found] == [10, 20, 30]
    assert {row["pid"] for row in found} == {os.getpid()}
    assert not ray.is_initialized()


class Fails:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        raise self.error


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (
            RuntimeError("context\nnot enough memory"),
            (ResourceError, "RuntimeError: not enough memory"),
        ),
        (DataError("row 3 is empty"), (DataError, "row 3 is empty")),
    ],
)
def test_a_failure_here_is_one_clear_error(
    raised: Exception, expected: tuple[type[Exception], str]
) -> None:
    schema = pa.schema([("block", pa.int64())])
    work = Work("fail", Fails, {"error": raised}, [{"block": 0}], 1, 2, schema=schema)
    with pytest.raises(expected[0], match=expected[1]):
        list(OnRay(ScaleConfig()).run(work))
