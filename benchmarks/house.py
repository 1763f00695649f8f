"""Two checkouts of this project against each other: layout, public face, artifacts, speed.

It is for changes of structure, after which all that others see must be as before. A checkout is
given by its folder; its code runs in processes of its own, with this interpreter.

    git worktree add /tmp/old COMMIT
    python -m benchmarks.house layout --tree /tmp/old --tree .
    python -m benchmarks.house dump --tree /tmp/old --out /tmp/old.json     (about 0.35 MB)
    python -m benchmarks.house dump --tree . --out /tmp/new.json
    python -m benchmarks.house compare /tmp/old.json /tmp/new.json
    python -m benchmarks.house artifacts --store /tmp/old/runs/demo --out /tmp/old-bytes.json
    python -m benchmarks.house hits --tree . --index URI --questions FILE --out /tmp/new-hits.json
    python -m benchmarks.house speed --old /tmp/old --new .

`compare` takes two dumps of one kind (dump, artifacts or hits) and ends with 1 if a difference has
no reason in house_keys.yaml.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks import house_bytes, house_compare, house_speed, house_trees


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    tree = {"type": Path, "required": True}
    verb = verbs.add_parser("layout", help="the table of docs/design/layout.md")
    verb.add_argument("--tree", **tree, action="append", help="give it twice for before and after")
    verb.add_argument("--ways", action="store_true", help="spell out the ways that it counts")
    verb = verbs.add_parser("dump", help="the public face and the tests of a tree")
    verb.add_argument("--tree", **tree)
    verb.add_argument("--out", **tree)
    verb = verbs.add_parser("compare", help="what differs; 1 if a difference has no reason")
    verb.add_argument("old", type=Path)
    verb.add_argument("new", type=Path)
    reasons = Path(__file__).with_name("house_keys.yaml")
    verb.add_argument("--reasons", type=Path, default=reasons)
    verb = verbs.add_parser("artifacts", help="hashes of what a store holds")
    verb.add_argument("--store", **tree)
    verb.add_argument("--out", **tree)
    verb = verbs.add_parser("hits", help="what a tree finds in an index, whoever made it")
    verb.add_argument("--tree", **tree)
    verb.add_argument("--index", required=True)
    verb.add_argument("--questions", **tree, help="a file, a question a line")
    verb.add_argument("--out", **tree)
    verb = verbs.add_parser("speed", help="new over old, alternating on this machine")
    verb.add_argument("--old", **tree)
    verb.add_argument("--new", **tree)
    verb.add_argument("--index", help="whose encoder is timed; without it a small one is made")
    verb.add_argument("--runs", type=int, default=5)
    verb.add_argument("--rows", type=int, default=2000, help="passages that are encoded")
    verb.add_argument("--requests", type=int, default=100)
    given = parser.parse_args(arguments)
    if given.verb == "layout":
        trees = [folder.resolve() for folder in given.tree]
        names = ["before", "after"] if len(trees) == 2 else [folder.name for folder in trees]
        tables = [house_trees.layout(folder) for folder in trees]
        print(house_trees.side_by_side(dict(zip(names, tables, strict=True))))
        for folder in trees if given.ways else ():
            print(f"\n{folder}\n{house_trees.ways(folder)}")
    elif given.verb == "dump":
        write(given.out, house_trees.dump(given.tree.resolve()))
    elif given.verb == "artifacts":
        write(given.out, house_bytes.artifacts(given.store))
    elif given.verb == "hits":
        found = house_trees.probe(
            given.tree.resolve(), "hits", given.index, str(given.questions.resolve())
        )
        write(given.out, {"kind": "hits", "hits": found})
    elif given.verb == "speed":
        with tempfile.TemporaryDirectory(prefix="house", dir="/tmp") as folder:
            print(house_speed.speed(given, Path(folder)))
    elif given.verb == "compare":
        old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (given.old, given.new))
        known = yaml.safe_load(given.reasons.read_text(encoding="utf-8")) or {}
        told, lacking = house_compare.compare(old, new, known)
        print(told)
        return 1 if lacking else 0
    return 0


def write(path: Path, value: Any) -> None:
    """Write a dump."""
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
