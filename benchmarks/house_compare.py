"""What differs between two dumps of `house.py`, and whether each difference has a reason.

Reasons stand in `house_keys.yaml`, a section for each kind of difference; names may hold `*`. A
difference without one is marked `NO REASON` and makes the comparison fail.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

Reasons = Mapping[str, Mapping[str, Any]]
NO_REASON = "**NO REASON**"


def compare(old: Mapping[str, Any], new: Mapping[str, Any], reasons: Reasons) -> tuple[str, int]:
    """Markdown of all differences, and how many of them lack a reason.

    Args:
        old: a dump.
        new: another of the same kind.
        reasons: section -> name -> why (or a mapping with `why`, for `config`).

    Raises:
        ValueError: if the dumps are of different kinds.
    """
    if old["kind"] != new["kind"]:
        raise ValueError(f"a dump of kind {old['kind']} against one of kind {new['kind']}")
    parts: dict[str, Callable[..., list[str]]] = {
        "config": config, "recipes": recipes, "openapi": openapi, "routes": routes,
        "verbs": options, "exits": exits, "tests": tests, "assertions": assertions,
    }  # fmt: skip
    if old["kind"] == "artifacts":
        parts = {"artifacts": artifacts, "rows": rows}
    elif old["kind"] == "hits":
        parts = {"hits": hits}
    told, open_ = [], 0
    for title, part in parts.items():
        found = part(old, new, reasons)
        lacking = sum(NO_REASON in line for line in found)
        told.append(f"## {title}: {len(found)} differ, {lacking} without a reason\n")
        told += [*found, ""] if found else []
        open_ += lacking
    if old["kind"] == "face":
        told += texts(old, new)
    return "\n".join(told), open_


def why(reasons: Reasons, section: str, name: str) -> str:
    """The reason for a difference; the exact name counts before patterns."""
    given = reasons.get(section) or {}
    for pattern in [name, *given]:
        if pattern in given and re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name):
            entry = given[pattern]
            reason = entry.get("why") if isinstance(entry, Mapping) else entry
            return str(reason) if reason else NO_REASON
    return NO_REASON


def new_name(reasons: Reasons, key: str) -> str | None:
    """What an old key is called now; `None` if it is gone."""
    entry = (reasons.get("config") or {}).get(key)
    if not isinstance(entry, Mapping) or "new" not in entry:
        return key
    return entry["new"]


def config(old: Mapping[str, Any], new: Mapping[str, Any], reasons: Reasons) -> list[str]:
    """Settings that moved, went, changed type or default, or are new."""
    found, reached = [], set()
    for key, setting in old["config"].items():
        name = new_name(reasons, key)
        reached.add(name)
        if name not in new["config"]:
            shown = "gone" if name in (None, key) else f"{name}, which does not exist {NO_REASON}"
            found.append(f"- `{key}` -> {shown}: {why(reasons, 'config', key)}")
            continue
        now = new["config"][name]
        parts = [f"-> `{name}`"] if name != key else []
        parts += [
            f"{part} {setting[part]!r} -> {now[part]!r}"
            for part in now
            if now[part] != setting[part]
        ]
        if parts:
            found.append(f"- `{key}` {', '.join(parts)}: {why(reasons, 'config', key)}")
    for key in sorted(set(new["config"]) - reached):
        found.append(f"- new: `{key}`: {why(reasons, 'added', key)}")
    return found


def recipes(old: Mapping[str, Any], new: Mapping[str, Any], reasons: Reasons) -> list[str]:
    """Values of recipes that differ, for settings that exist in both; names are
    `recipe:old.key`.
    """
    found = []
    for recipe, values in old["recipes"].items():
        now = new["recipes"].get(recipe)
        if now is None:
            found.append(f"- `{recipe}` is gone: {why(reasons, 'recipes', recipe)}")
            continue
        for key, value in values.items():
            name = new_name(reasons, key)
            if name in now and now[name] != value:
                reason = why(reasons, "recipes", f"{recipe}:{key}")
                found.append(f"- `{recipe}:{key}` {value!r} -> {now[name]!r}: {reason}")
    return found


def openapi(old: Mapping[str, Any], new: Mapping[str, Any], reasons: Reasons) -> list[str]:
    """Paths and schemas that are gone, new or different."""
    before, after = _openapi_parts(old["openapi"]), _openapi_parts(new["openapi"])
    found = []
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            what = "gone" if name not in after else "new" if name not in before else "changed"
            found.append(f"- `{name}` {what}: {why(reasons, 'openapi', name)}")
            if what == "changed":
                found[-1] += "\n" + diff(name, _pretty(before[name]), _pretty(after[name]))
    return found


def _openapi_parts(schema: Mapping[str, Any]) -> dict[str, Any]:
    parts = {f"info.{name}": value for name, value in schema["info"].items()}
    for path, methods in schema["paths"].items():
        parts |= {f"{method.upper()} {path}": value for method, value in methods.items()}
    for kind, entries in schema.get("components", {}).items():
        parts |= {f"{kind}.{name}": value for name, value in entries.items()}
    return parts


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True)


def routes(old: Mapping[str, Any], new: Mapping[str, Any], reasons: Reasons) -> list[str]:
    """Routes that are gone."""
    gone = sorted(set(old["routes"]) - set(new["routes"]))
    return [f"- `{route}` is gone: {why(reasons, 'routes', route)}" for route in gone]


def options(old: Mapping[str, Any], new: Mapping[str, Any], reasons: Reasons) -> list[str]:
    """Verbs and jobs that are gone, and options that one has lost; texts may differ, see
    `texts`.
    """
    found = []
    for verb, text in {**old["cli"], **old["jobs"]}.items():
        now = {**new["cli"], **new["jobs"]}.get(verb)
        if now is None:
            found.append(f"- `{verb}` is gone: {why(reasons, 'verbs', verb)}")
            continue
        for option in sorted(_options(text) - _options(now)):
            name = f"{verb} {option}"
            found.append(f"- `{name}` is gone: {why(reasons, 'verbs', name)}")
    return found


def _options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))


def exits(old: Mapping[str, Any], new: Mapping[str, Any], reasons: Reasons) -> list[str]:
    """Cases that end with another exit code."""
    return [
        f"- {name}: {case['rc']} -> {new['exits'].get(name, {}).get('rc')}: "
        f"{why(reasons, 'exits', name)}"
        for name, case in old["exits"].items()
        if case["rc"] != new["exits"].get(name, {}).get("rc")
    ]


def tests(old: Mapping[str, Any], new: Mapping[str, Any], reasons: Reasons) -> list[str]:
    """Tests whose name no file has any more; a test that moved to another file is no difference."""
    now = Counter(name for names in new["tests"].values() for name in names)
    found = []
    for file, names in old["tests"].items():
        for name in names:
            if now[name] == 0:
                found.append(f"- `{file}::{name}`: {why(reasons, 'tests', name)}")
            now[name] -= 1
    return found


def assertions(old: Mapping[str, Any], new: Mapping[str, Any], reasons: Reasons) -> list[str]:
    """Test functions that check less often than before; those that went altogether are in
    `tests`.
    """
    before, after = _by_test(old), _by_test(new)
    return [
        f"- `{name}` {count} -> {after[name]}: {why(reasons, 'assertions', name)}"
        for name, count in sorted(before.items())
        if name in after and after[name] < count
    ]


def _by_test(dump: Mapping[str, Any]) -> Counter[str]:
    total: Counter[str] = Counter()
    for counts in dump["assertions"].values():
        total.update(counts)
    return total


def texts(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Help texts and messages that read differently: to be read, no failure."""
    told = ["## texts that read differently (for reading; no reasons asked)\n"]
    for section in ("cli", "jobs"):
        for name, text in old[section].items():
            told.append(diff(name, text, new[section].get(name, text)))
    for name, case in old["exits"].items():
        told.append(diff(name, case["stderr"], new["exits"].get(name, case)["stderr"]))
    return [text for text in told if text]


def diff(name: str, before: str, after: str) -> str:
    """A unified diff as a block of markdown; empty if the texts are equal."""
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), name, name, "old", "new", n=1, lineterm=""
    )
    text = "\n".join(lines)
    return f"```diff\n{text}\n```" if text else ""


def artifacts(old: Mapping[str, Any], new: Mapping[str, Any], reasons: Reasons) -> list[str]:
    """Files of artifacts that hold something else.

    Artifacts are matched by kind and name; of several with one name each is held against the one
    that shares most files with it. Files with other bytes but equal content (Parquet: the table;
    JSON: the values, apart from artifacts' fingerprints) are listed with a reason of their own.
    """
    found = []
    for name, before in old["artifacts"].items():
        left = list(new["artifacts"].get(name, []))
        for files in before:
            if not left:
                found.append(f"- `{name}` is gone: {why(reasons, 'artifacts', name)}")
                continue
            twin = max(left, key=lambda other, files=files: _alike(files, other))
            left.remove(twin)
            for file in sorted(files.keys() | twin.keys()):
                label, one, two = f"{name}/{file}", files.get(file), twin.get(file)
                if one == two:
                    continue
                if one and two and one["content"] == two["content"]:
                    found.append(f"- `{label}`: other bytes, equal content")
                else:
                    what = "gone" if two is None else "new" if one is None else "other content"
                    found.append(f"- `{label}`: {what}: {why(reasons, 'artifacts', label)}")
        found += [f"- `{name}`: one more than before: {why(reasons, 'artifacts', name)}"] * len(
            left
        )
    return found


def _alike(one: Mapping[str, Any], two: Mapping[str, Any]) -> int:
    return sum(one[file]["content"] == two[file]["content"] for file in one.keys() & two.keys())


def rows(old: Mapping[str, Any], new: Mapping[str, Any], reasons: Reasons) -> list[str]:
    """Numbers of report.json that are not exactly equal; names are `file:system:dataset:metric`."""
    found = []
    for name, value in old["rows"].items():
        if name not in new["rows"] or new["rows"][name] != value:
            shown = new["rows"].get(name, "gone")
            found.append(f"- `{name}` {value!r} -> {shown!r}: {why(reasons, 'rows', name)}")
    return found


def hits(old: Mapping[str, Any], new: Mapping[str, Any], reasons: Reasons) -> list[str]:
    """Questions with other hits or other scores (exact)."""
    return [
        f"- {question}: {why(reasons, 'hits', question)}"
        for question, listed in old["hits"].items()
        if new["hits"].get(question) != listed
    ]
