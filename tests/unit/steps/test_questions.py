"""The ``questions`` artifact: two splits that share nothing, seeded samples, and families of
wordings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from invar_ray.config import Config
from invar_ray.corpus.sources import source_digest
from invar_ray.errors import DataError
from invar_ray.schema import Example
from invar_ray.steps.questions import build as build_questions
from invar_ray.steps.questions import load_examples, load_rewrites, refuse_unanswerable
from invar_ray.steps.questions import plan as questions_plan
from invar_ray.store.artifacts import Artifact, Store
from tests.support import questions, small_config, write_lines


def build(config: Config) -> Artifact:
    store = Store(config.storage.root_uri)
    return store.get_or_build(
        questions_plan(config), lambda building: build_questions(building, config)
    )[0]


def ids(artifact: Artifact, split: Any = "train") -> list[str]:
    return [example.id for example in load_examples(artifact, split)]


def test_examples_come_back_as_they_were(tmp_path: Path) -> None:
    artifact = build(small_config(tmp_path))
    for split in ("train", "dev"):
        rows = questions(split)
        found = load_examples(artifact, split)
        assert [
            (e.id, e.question, list(e.answers), list(e.positive_ids), list(e.rewrites))
            for e in found
        ] == [
            tuple(row[key] for key in ("id", "question", "answers", "positive_ids", "rewrites"))
            for row in rows
        ]
    assert artifact.info == {
        "train_questions": 12,
        "train_wordings": 36,
        "dev_questions": 12,
        "dev_wordings": 36,
        "dropped_for_leaking": 0,
    }


def test_families_have_the_anchor_first_and_then_numbered_rewordings(tmp_path: Path) -> None:
    artifact = build(small_config(tmp_path, "rewrites.num_rewrites=3", "rewrites.provider=given"))
    families = load_rewrites(artifact, "train")
    assert list(families) == ids(artifact)
    for example in load_examples(artifact, "train"):
        family = families[example.id]
        assert (family[0].text, family[0].kind, family[0].rewrite) == (
            example.question,
            "anchor",
            0,
        )
        assert [rewrite.rewrite for rewrite in family] == list(range(len(family)))
        assert [rewrite.text for rewrite in family[1:3]] == list(example.rewrites), (
            "those of the data come first"
        )
        texts = [rewrite.text.casefold() for rewrite in family]
        assert len(set(texts)) == len(texts)
    assert all(len(family) == 3 for family in load_rewrites(artifact, "dev").values())


def test_no_rewordings_leaves_the_anchors(tmp_path: Path) -> None:
    artifact = build(small_config(tmp_path, "rewrites.num_rewrites=0"))
    assert all(len(family) == 1 for family in load_rewrites(artifact, "train").values())


def test_same_config_same_content_other_seed_other_rewordings(tmp_path: Path) -> None:
    rules = ["rewrites.provider=rules"]
    first = build(small_config(tmp_path / "one", *rules))
    again = build(small_config(tmp_path / "two", *rules))
    other = build(small_config(tmp_path / "three", *rules, "seed=1"))
    assert first.fingerprint == again.fingerprint
    assert first.manifest.files == again.manifest.files
    assert other.fingerprint != first.fingerprint
    assert load_rewrites(other, "train") != load_rewrites(first, "train")


@pytest.mark.parametrize(
    "question",
    [
        "Who built the lighthouse of Arvon?",
        "  who built the LIGHTHOUSE of arvon ",
        "Which person put up the lighthouse on Arvon?",
    ],
    ids=["equal", "spelling", "rewrite of train"],
)
def test_training_question_with_a_wording_of_a_dev_question_is_dropped(
    tmp_path: Path, question: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(tmp_path)
    shared = {**questions("dev")[0], "id": "shared", "question": question}
    write_lines(Path(config.questions.dev_uri), [*questions("dev"), shared])
    artifact = build(config)
    assert ids(artifact) == [f"train-{number}" for number in range(1, 12)]
    assert "shared" in ids(artifact, "dev")
    assert "train-0" not in load_rewrites(artifact, "train")
    assert artifact.info["dropped_for_leaking"] == 1
    assert "dropped 1 of 12 training questions" in capsys.readouterr().err


def test_same_file_for_both_splits_is_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path, f"questions.dev_uri={tmp_path / 'train.jsonl'}")
    with pytest.raises(DataError, match="all 12 questions of"):
        build(config)


@pytest.mark.parametrize(
    "gold, split", [((), "train"), (("doc-gone",), "train"), (("doc-gone",), "dev")]
)
def test_question_that_the_corpus_cannot_answer_is_refused(
    gold: tuple[str, ...], split: str
) -> None:
    fine = Example("a", "who?", ("x",), ("doc-gone", "doc-here"))
    refuse_unanswerable([fine], {"doc-here"}, split)
    with pytest.raises(
        DataError,
        match=rf"1 of 2 {split} questions have no positive document in the corpus \(first: b",
    ):
        refuse_unanswerable([fine, Example("b", "who else?", ("x",), gold)], {"doc-here"}, split)


def test_dev_questions_that_name_no_gold_document_are_measured_by_their_answers() -> None:
    refuse_unanswerable([Example("b", "who else?", ("x",), ())], {"doc-here"}, "dev")


def test_limit_takes_a_seeded_sample_in_file_order(tmp_path: Path) -> None:
    order = [row["id"] for row in questions("train")]
    samples = set()
    for seed in range(6):
        sample = ids(build(small_config(tmp_path, "questions.train_limit=5", f"seed={seed}")))
        assert len(sample) == 5
        assert sample == [id for id in order if id in sample]
        samples.add(tuple(sample))
    assert len(samples) > 3
    assert any(list(sample) != order[:5] for sample in samples)
    again = small_config(tmp_path / "elsewhere", "questions.train_limit=5", "seed=3")
    assert tuple(ids(build(again))) in samples


def test_limits_are_per_split_and_large_ones_keep_all(tmp_path: Path) -> None:
    artifact = build(small_config(tmp_path, "questions.dev_limit=4", "questions.train_limit=1000"))
    assert (len(ids(artifact)), len(ids(artifact, "dev"))) == (12, 4)


def test_unanswered_and_repeated_rows_are_left_out(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    rows = questions("train")
    write_lines(
        Path(config.questions.train_uri),
        [*rows, {**rows[0], "question": "?"}, {**rows[1], "id": "x", "answers": []}],
    )
    assert ids(build(config)) == [row["id"] for row in rows]


def test_compressed_file_gives_the_same_questions(tmp_path: Path) -> None:
    place = write_lines(tmp_path / "zipped.jsonl.gz", questions("train"))
    assert ids(build(small_config(tmp_path, f"questions.train_uri={place}"))) == [
        r["id"] for r in questions("train")
    ]


def test_rewordings_from_a_file(tmp_path: Path) -> None:
    place = write_lines(
        tmp_path / "rewrites.jsonl",
        [{"question_id": "train-0", "text": "Whose is the tower of Arvon?"}],
    )
    config = small_config(
        tmp_path, "rewrites.provider=file", f"rewrites.uri={place}", "rewrites.num_rewrites=1"
    )
    artifact = build(config)
    assert [rewrite.text for rewrite in load_rewrites(artifact, "train")["train-0"]][1:] == [
        "Whose is the tower of Arvon?"
    ]
    write_lines(place, [{"question_id": "train-0", "text": "Who is behind the tower of Arvon?"}])
    assert questions_plan(config).fingerprint != artifact.fingerprint, (
        "an edited file is another artifact"
    )


def test_builtin_questions_are_used_by_their_split(tmp_path: Path) -> None:
    overrides = [f"questions.{key}=4" for key in ("train_limit", "dev_limit")]
    uris = [f"questions.{key}=builtin:facts" for key in ("train_uri", "dev_uri")]
    artifact = build(small_config(tmp_path, *overrides, *uris))
    train, dev = load_examples(artifact, "train"), load_examples(artifact, "dev")
    assert len(train) == len(dev) == 4
    assert not {example.question for example in train} & {example.question for example in dev}


# What the inputs are


def test_source_digest_is_by_content(tmp_path: Path) -> None:
    one = write_lines(tmp_path / "one.jsonl", questions("train"))
    two = write_lines(tmp_path / "two.jsonl", questions("train"))
    assert source_digest(str(one)) == source_digest(str(two)) == source_digest(f"file://{one}")
    before = source_digest(str(one))
    one.write_bytes(one.read_bytes().replace(b"Arvon", b"Arvin"))
    assert source_digest(str(one)) != before


def test_source_digest_of_a_folder_sees_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("alpha", encoding="utf-8")
    (folder / "deep" / "b.txt").write_text("beta", encoding="utf-8")
    digests = [source_digest(str(folder))]
    assert source_digest(f"{folder}/") == digests[0]
    (folder / "deep" / "b.txt").write_text("gamma", encoding="utf-8")
    digests.append(source_digest(str(folder)))
    (folder / "deep" / "b.txt").rename(folder / "c.txt")
    digests.append(source_digest(str(folder)))
    (folder / "d.txt").write_text("delta", encoding="utf-8")
    digests.append(source_digest(str(folder)))
    assert len(set(digests)) == 4


def test_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file or folder .*check the path"):
        source_digest(str(tmp_path / "missing.jsonl"))


def test_questions_in_another_language_are_warned_of_and_not_framed_in_english(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rows(split: str, places: list[str]) -> list[dict[str, Any]]:
        return [
            {
                "id": f"{split}{number}",
                "question": f"{place}的灯塔有多高？",
                "answers": ["三十米"],
                "positive_ids": ["d"],
            }
            for number, place in enumerate(places)
        ]

    write_lines(tmp_path / "zh.jsonl", rows("t", ["青岛", "大连", "厦门"]))
    write_lines(tmp_path / "zh-dev.jsonl", rows("e", ["烟台", "威海"]))
    artifact = build(
        small_config(
            tmp_path,
            f"questions.train_uri={tmp_path / 'zh.jsonl'}",
            f"questions.dev_uri={tmp_path / 'zh-dev.jsonl'}",
        )
    )
    assert all(len(family) == 1 for family in load_rewrites(artifact, "train").values())
    said = capsys.readouterr().err
    assert said.count("warning: 100% of the questions do not look English") == 1
    assert "rewrites.provider=endpoint" in said
