"""Small jobs run in the process that asks (what larger ones do on Ray is tested in tests/ray)."""

from __future__ import annotations

import os
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.exceptions import RayTaskError

from invar_ray.config import ScaleConfig
from invar_ray.errors import DataError, ResourceError
from invar_ray.executor import Here, OnRay, Work, one_error


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


def test_what_ray_makes_of_an_error_comes_out_as_the_error() -> None:
    """Ray raises a class of its own that is the user's error too; its text is a traceback."""
    double = RayTaskError("work", "a traceback", DataError("row 3 is empty")).as_instanceof_cause()
    assert isinstance(double, DataError)
    with pytest.raises(DataError) as caught, one_error("work"):
        raise double
    assert type(caught.value) is DataError
    assert str(caught.value) == "row 3 is empty."


def test_a_mistake_in_the_program_stays_one() -> None:
    with pytest.raises(NotImplementedError), one_error("work"):
        raise NotImplementedError
    double = RayTaskError("work", "a traceback", NotImplementedError("no")).as_instanceof_cause()
    with pytest.raises(ResourceError, match=r"^work failed: "), one_error("work"):
        raise double


def test_no_rows_open_no_worker() -> None:
    assert list(Here().run(Work("fail", Fails, {}, [], 0, 1))) == []


def test_an_address_without_a_cluster_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nMore of it")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ResourceError, match=r"^cannot join Ray at auto \(Could not find any .*\)"):
        OnRay(ScaleConfig(ray_address="auto")).connect()
