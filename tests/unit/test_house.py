"""The comparison of two checkouts: what it must not miss, on dumps made by hand and on small
files.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from benchmarks import house


def face() -> dict[str, Any]:
    return {
        "kind": "face",
        "config": {
            "seed": {"type": "int", "default": 0},
            "variants.num": {"type": "int", "default": 2},
        },
        "recipes": {"tiny": {"seed": 0, "variants.num": 3}},
        "openapi": {
            "info": {"title": "invar-ray"},
            "paths": {"/v1/answer": {"post": {"summary": "Answer"}}},
            "components": {"schemas": {"Answer": {"type": "object"}}},
        },
        "routes": ["GET /healthz", "POST /v1/answer"],
        "cli": {"invar-ray index": "Index documents.\n --adapter URI\n --config NAME\n"},
        "jobs": {"jobs.reindex": "Bring the index up to date.\n --config NAME\n"},
        "exits": {"unknown key": {"rc": 1, "stderr": "error: unknown key"}},
        "tests": {
            "tests/unit/test_a.py": ["test_one", "test_two[x]"],
            "tests/unit/test_b.py": ["test_one"],
        },
        "assertions": {"tests/unit/test_a.py": {"test_one": 2, "test_two": 1, "helpers": 0}},
    }


@pytest.fixture
def compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(old: Any, new: Any, reasons: dict[str, Any] | None = None) -> tuple[int, str]:
        for name, value in (("old", old), ("new", new)):
            (tmp_path / name).write_text(json.dumps(value))
        (tmp_path / "reasons.yaml").write_text(yaml.safe_dump(reasons or {}))
        files = [str(tmp_path / name) for name in ("old", "new")]
        code = house.main(["compare", *files, "--reasons", str(tmp_path / "reasons.yaml")])
        return code, capsys.readouterr().out

    return run


def test_equal_dumps_need_no_reason(compared: Any) -> None:
    code, told = compared(face(), face())
    assert code == 0
    assert "NO REASON" not in told


def lose_key(dump: dict[str, Any]) -> None:
    del dump["config"]["variants.num"]


def rename_key(dump: dict[str, Any]) -> None:
    dump["config"]["rewrites.num"] = dump["config"].pop("variants.num")
    dump["recipes"]["tiny"]["rewrites.num"] = dump["recipes"]["tiny"].pop("variants.num")


RENAMED = {"config": {"variants.num": {"new": "rewrites.num", "why": "one word"}}}
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "a key is lost": (
        lose_key,
        {"config": {"variants.num": {"new": None, "why": "nobody sets it"}}},
    ),
    "a key is renamed": (rename_key, RENAMED),
    "a default changes": (
        lambda d: d["config"]["seed"].update(default=1),
        {"config": {"seed": {"why": "ours"}}},
    ),
    "a type changes": (
        lambda d: d["config"]["seed"].update(type="str"),
        {"config": {"seed": {"why": "ours"}}},
    ),
    "a key is new": (
        lambda d: d["config"].update({"new.key": {"type": "int", "default": 0}}),
        {"added": {"new.key": "needed"}},
    ),
    "a recipe's value changes": (
        lambda d: d["recipes"]["tiny"].update(seed=4),
        {"recipes": {"tiny:seed": "why not"}},
    ),
    "a recipe goes": (lambda d: d["recipes"].clear(), {"recipes": {"tiny": "nobody"}}),
    "a test is lost": (
        lambda d: d["tests"]["tests/unit/test_a.py"].remove("test_two[x]"),
        {"tests": {"test_two*": "went with its code"}},
    ),
    "one of two tests of a name is lost": (
        lambda d: d["tests"].pop("tests/unit/test_b.py"),
        {"tests": {"test_one": "twice the same"}},
    ),
    "a test checks less": (
        lambda d: d["assertions"]["tests/unit/test_a.py"].update(test_one=1),
        {"assertions": {"test_one": "the helper checks it"}},
    ),
    "a path goes": (
        lambda d: d["openapi"]["paths"].clear(),
        {"openapi": {"POST /v1/answer": "moved"}},
    ),
    "a schema changes": (
        lambda d: d["openapi"]["components"]["schemas"]["Answer"].update(type="string"),
        {"openapi": {"schemas.*": "shorter"}},
    ),
    "a route goes": (
        lambda d: d["routes"].remove("GET /healthz"),
        {"routes": {"GET /healthz": "no"}},
    ),
    "a job goes": (lambda d: d["jobs"].clear(), {"verbs": {"jobs.reindex": "no"}}),
    "an option goes": (
        lambda d: d["cli"].update({"invar-ray index": " --config NAME"}),
        {"verbs": {"invar-ray index --adapter": "unused"}},
    ),
    "an exit code changes": (
        lambda d: d["exits"]["unknown key"].update(rc=0),
        {"exits": {"unknown key": "kinder"}},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_difference_asks_for_its_reason(compared: Any, name: str) -> None:
    change, reasons = CHANGES[name]
    new = face()
    change(new)
    code, told = compared(face(), new)
    assert code == 1
    assert told.count("NO REASON") >= 1
    assert compared(face(), new, reasons)[0] == 0


def test_an_empty_reason_is_none_and_a_new_name_must_exist(compared: Any) -> None:
    new = face()
    lose_key(new)
    assert compared(face(), new, {"config": {"variants.num": {"new": None, "why": ""}}})[0] == 1
    assert compared(face(), new, RENAMED)[0] == 1


def test_a_renamed_key_keeps_its_default_and_its_recipe(compared: Any) -> None:
    new = face()
    rename_key(new)
    new["recipes"]["tiny"]["rewrites.num"] = 9
    code, told = compared(face(), new, RENAMED)
    assert code == 1
    assert "tiny:variants.num" in told


def test_what_may_change_without_a_reason(compared: Any) -> None:
    new = face()
    new["tests"] = {
        "tests/unit/other/test_c.py": ["test_one", "test_one", "test_two[x]", "test_three"]
    }
    new["assertions"] = {"tests/unit/other/test_c.py": {"test_one": 3, "test_two": 1, "helpers": 4}}
    new["cli"]["invar-ray index"] = "Index your documents.\n --adapter URI\n --config NAME --new\n"
    new["exits"]["unknown key"]["stderr"] = "error: there is no such key"
    new["routes"].append("GET /new")
    code, told = compared(face(), new)
    assert code == 0
    assert "+Index your documents." in told
    assert "+error: there is no such key" in told


def store(folder: Path, fingerprint: str, **changes: Any) -> Path:
    """A store with one artifact: a table, a description that names the artifact, weights, a
    report.
    """
    made = folder / "report" / f"demo-{fingerprint}"
    made.mkdir(parents=True)
    (made / "manifest.json").write_text(json.dumps({"created": fingerprint}))
    table = pa.table({"id": changes.get("ids", ["a", "b"])})
    pq.write_table(table.replace_schema_metadata({"made": fingerprint}), made / "hits.parquet")
    says = {
        "base": f"report/demo-{fingerprint}",
        "wall_s": len(folder.name),
        "rank": changes.get("rank", 8),
    }
    (made / "adapter.json").write_text(json.dumps(says))
    (made / "weights.bin").write_bytes(changes.get("weights", b"1234"))
    row = {
        "system": "base",
        "dataset": "dev",
        "metrics": {"recall_at_5": changes.get("recall", 0.5)},
    }
    (made / "report.json").write_text(
        json.dumps({"rows": [row], "seconds": {"all": len(folder.name)}})
    )
    return folder


def dumped(folder: Path) -> dict[str, Any]:
    out = folder / "out.json"
    assert house.main(["artifacts", "--store", str(folder), "--out", str(out)]) == 0
    return dict(json.loads(out.read_text()))


def test_artifacts_are_equal_whatever_their_fingerprint(tmp_path: Path, compared: Any) -> None:
    one, two = (dumped(store(tmp_path / name, name[0] * 16)) for name in ("a", "b-longer"))
    code, told = compared(one, two)
    assert code == 0
    assert "`report/demo/hits.parquet`: other bytes, equal content" in told
    assert "weights.bin" not in told


@pytest.mark.parametrize(
    "change",
    [{"ids": ["a", "c"]}, {"rank": 4}, {"weights": b"1235"}, {"recall": 0.5 + 1e-16 * 2}],
)
def test_other_content_is_found(tmp_path: Path, compared: Any, change: dict[str, Any]) -> None:
    one = dumped(store(tmp_path / "a", "a" * 16))
    two = dumped(store(tmp_path / "b", "b" * 16, **change))
    assert compared(one, two)[0] == 1


def test_artifacts_of_one_name_are_matched_by_content(tmp_path: Path, compared: Any) -> None:
    for name, prints in (("one", "ab"), ("two", "dc")):
        for letter, weights in zip(prints, (b"first", b"second"), strict=True):
            store(tmp_path / name, letter * 16, weights=weights)
    one, two = dumped(tmp_path / "one"), dumped(tmp_path / "two")
    assert compared(one, two)[0] == 0
    fewer = copy.deepcopy(two)
    fewer["artifacts"]["report/demo"].pop()
    assert compared(one, fewer)[0] == 1
    assert compared(fewer, one)[0] == 1


def test_hits_are_compared_exactly(compared: Any) -> None:
    one = {"kind": "hits", "hits": {"Who?": [["a:0", (0.5).hex()]]}}
    other = {"kind": "hits", "hits": {"Who?": [["a:0", (0.5 + 1e-15).hex()]]}}
    assert compared(one, one)[0] == 0
    assert compared(one, other)[0] == 1


def test_dumps_of_two_kinds_and_empty_stores_are_refused(tmp_path: Path, compared: Any) -> None:
    with pytest.raises(ValueError, match="kind"):
        compared(face(), {"kind": "hits", "hits": {}})
    with pytest.raises(SystemExit, match="no artifact"):
        house.main(["artifacts", "--store", str(tmp_path), "--out", str(tmp_path / "out.json")])
