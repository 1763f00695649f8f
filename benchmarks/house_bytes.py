"""What a store holds, as hashes: for `house.py artifacts`."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_TIMES = re.compile(r"(seconds|_s|_ms|time|created|usage|_mb)$")
_FOLDER = re.compile(r"(.+)-([0-9a-f]{16})")


def artifacts(store: Path) -> dict[str, Any]:
    """Hashes of every artifact's files by `kind/name`, and the numbers of every report.json.

    Raises:
        SystemExit: if the store holds no artifact.
    """
    folders = [path.parent for path in sorted(store.glob("[!.]*/*/manifest.json"))]
    known = [match.group(2) for folder in folders if (match := _FOLDER.fullmatch(folder.name))]
    if not folders:
        raise SystemExit(f"{store} holds no artifact")
    found: dict[str, list[dict[str, Any]]] = {}
    rows: dict[str, Any] = {}
    for folder in folders:
        match = _FOLDER.fullmatch(folder.name)
        name = f"{folder.parent.name}/{match.group(1) if match else folder.name}"
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        hashes = {
            path.relative_to(folder).as_posix(): file_hashes(path, store, known)
            for path in files
            if path.name != "manifest.json"
        }
        found.setdefault(name, []).append(hashes)
    for path in [*store.glob("report.json"), *store.glob("report/*/report.json")]:
        rows |= report_rows(path, path.parent.parent.name if path.parent != store else "")
    return {"kind": "artifacts", "artifacts": found, "rows": rows}


def report_rows(path: Path, place: str) -> dict[str, Any]:
    """Every number of a report's rows, by `place:system:dataset:metric`."""
    found = {}
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        for part in ("metrics", "intervals"):
            for metric, value in row.get(part, {}).items():
                found[f"{place}:{row['system']}:{row['dataset']}:{part}.{metric}"] = value
    return found


def file_hashes(path: Path, store: Path, fingerprints: list[str]) -> dict[str, str]:
    """SHA-256 of a file's bytes, and of what it says: see :func:`content`."""
    given = path.read_bytes()
    said = content(path, given, str(store.resolve()), fingerprints)
    return {"sha256": _digest(given), "content": _digest(said)}


def content(path: Path, given: bytes, store: str, fingerprints: list[str]) -> bytes:
    """A Parquet file's table without metadata; JSON's values without times; else the bytes.

    Fingerprints of the store's own artifacts, and the store's path, are left out of JSON: they
    change with the versions of steps.
    """
    if path.suffix == ".parquet":
        table = pq.read_table(path).replace_schema_metadata(None).combine_chunks()
        plain = pa.schema([field.remove_metadata() for field in table.schema])
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, plain) as writer:
            writer.write_table(table.cast(plain), max_chunksize=max(1, table.num_rows))
        return sink.getvalue()
    if path.suffix in {".json", ".jsonl"}:
        text = given.decode().replace(store, "<store>")
        for fingerprint in fingerprints:
            text = text.replace(fingerprint, "<fingerprint>")
        parts = text.splitlines() if path.suffix == ".jsonl" else [text]
        return json.dumps([_timeless(json.loads(part)) for part in parts], sort_keys=True).encode()
    return given


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if not _TIMES.search(key)}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def _digest(value: bytes) -> str:
    return hashlib.sha256(value).hexdigest()
