"""A folder of one's own from files to cited answers: indexed on a local Ray, asked without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from invar_ray.answering.current import current_index
from invar_ray.answering.retriever import open_retriever
from invar_ray.cli.main import app
from invar_ray.store.artifacts import Store
from tests.own_documents import QUESTIONS, SOUND_DOCUMENTS, SOUND_FILES, write_faulty, write_sound

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

SMALL = [
    "model.base=builtin:tiny",
    "model.retriever_layers=null",
    "model.precision=fp32",  # in bf16 scores change with the batch by more than is compared here
    "corpus.chunk_tokens=96",
    "corpus.chunk_stride=96",
]


def test_indexed_asked_cited(local_ray: Any, tmp_path: Path) -> None:
    folder, root = tmp_path / "my docs", tmp_path / "runs"
    folder.mkdir()
    write_sound(folder)
    faults = write_faulty(folder)
    # Shards so small that they are embedded on the cluster.
    options = [f"storage.root_uri={root}", "scale.shard_rows=8", "scale.embed_workers=1", *SMALL]
    first = CliRunner().invoke(app, ["index", str(folder), *options])
    assert first.exit_code == 0, first.stderr
    assert f"indexed {SOUND_DOCUMENTS + 1} documents from {SOUND_FILES + 1} files" in first.stderr
    # A file of which rows are malformed is not left out.
    assert f"left out {len(faults) - 1};" in first.stderr
    assert first.stderr.count("left out: ") == len(faults)
    assert f"ask:    invar-ray ask --root {root} " in first.stderr

    # The same documents in this process: the same vectors, hence the same hits.
    at_home = CliRunner().invoke(
        app, ["index", str(folder), f"storage.root_uri={tmp_path / 'home'}", *SMALL]
    )
    assert at_home.exit_code == 0, at_home.stderr
    retriever, home = (
        open_retriever(result.stdout.strip().splitlines()[-1]) for result in (first, at_home)
    )
    for question, (file, place) in QUESTIONS.items():
        [[best]] = retriever.retrieve([question], 1)
        assert best.place.startswith(f"{file}, "), (question, best.place)
        assert place in best.place, (question, best.place)
        [[again]] = home.retrieve([question], 1)
        assert (again.passage_id, again.place) == (best.passage_id, best.place)
        assert again.score == pytest.approx(best.score, abs=1e-5)

    # A second folder in the same store, then the first again, which is re-used: it is the one that
    # is asked.
    other = tmp_path / "other"
    other.mkdir()
    (other / "one.txt").write_text("Dunmore is an island of otters.\n")
    assert CliRunner().invoke(app, ["index", str(other), *options]).exit_code == 0
    store = Store(str(root))
    assert current_index(store).parent("passages").info["source"] == str(other)
    assert current_index(store, str(folder)).uri == first.stdout.strip().splitlines()[-1]
    again = CliRunner().invoke(app, ["index", str(folder), *options])
    assert again.stderr.count("left out: ") == len(faults)
    assert current_index(store).parent("passages").info["source"] == str(folder)

    asked = CliRunner().invoke(
        app, ["ask", "Who built the lighthouse of Arvon?", "--untrained", "--root", str(root)]
    )
    assert asked.exit_code == 0, asked.stderr
    assert f"asking {folder} (" in asked.stderr
    assert "found by the base (not trained); answered by the untrained base" in asked.stderr
    assert (
        "arvon.pdf, page 2" in asked.stdout.splitlines()[2 if "no citation" in asked.stdout else 1]
    )
    elsewhere = CliRunner().invoke(
        app,
        [
            "ask",
            "Which animals live on Dunmore?",
            "--untrained",
            "--root",
            str(root),
            "--corpus",
            str(other),
            "--top-k",
            "1",
        ],
    )
    assert "one.txt, line 1" in elsewhere.stdout


def test_nothing_to_index_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    result = CliRunner().invoke(
        app, ["index", str(tmp_path), f"storage.root_uri={tmp_path / 'runs'}", *SMALL]
    )
    assert result.exit_code == 1
    assert "holds no file to read (1 entries seen)" in result.stderr
    assert "Traceback" not in result.stderr
