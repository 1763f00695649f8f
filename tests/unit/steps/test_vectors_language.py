"""A teacher that does not know the corpus's language is said once, with what to set."""

from __future__ import annotations

from pathlib import Path

import pytest

from invar_ray.executor import Here
from invar_ray.pipeline import Pipeline
from tests.support import small_config, write_lines


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Der Leuchtturm steht auf der Insel, und im Winter brennt er die ganze Nacht.", "English"),
        ("ประภาคารตั้งอยู่บนเกาะกลางทะเล", "tokens are unknown to it"),
    ],
)
def test_a_language_that_the_teacher_does_not_know_is_warned_of_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, why: str
) -> None:
    rows = [{"id": f"d{n}", "title": f"T{n}", "text": f"{text} {n}"} for n in range(6)]
    config = small_config(tmp_path, f"corpus.uri={write_lines(tmp_path / 'c.jsonl', rows)}")
    Pipeline(config, quiet=True, executor=Here()).coarse_index.parent("vectors")
    said = capsys.readouterr().err
    assert said.count("warning: the teacher (coarse.model=builtin:minilm) cannot judge") == 1
    assert why in said
    assert "To do: set coarse.model" in said
