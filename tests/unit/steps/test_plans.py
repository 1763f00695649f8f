"""Which setting changes which artifact: what is computed does, what it is computed on does not.

The pipeline itself puts the plans together; its steps make nothing, as fingerprints do not depend
on content.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from invar_ray.config import Config, ExperimentalScale, ScaleConfig, ServeConfig, StorageConfig
from invar_ray.models.encoder import llm_spec
from invar_ray.pipeline import Pipeline
from invar_ray.steps import rows
from invar_ray.store.artifacts import Artifact, Building, Manifest, Plan, Store
from tests.support import (
    save_bert,
    save_cross_encoder,
    small_config,
    tiny_base,
    write_lines,
)

Fingerprints = dict[str, str]


class NotedStore(Store):
    """A store that also knows artifacts which were planned only."""

    def __init__(self, root_uri: str) -> None:
        super().__init__(root_uri)
        self.noted: dict[str, Artifact] = {}

    def note(self, plan: Plan, info: dict[str, Any]) -> Artifact:
        parents = {role: parent.ref for role, parent in plan.parents.items()}
        manifest = Manifest(
            plan.kind,
            plan.name,
            plan.fingerprint,
            plan.version,
            dict(plan.config),
            parents,
            {},
            info,
            created="",
        )
        return self.noted.setdefault(plan.ref, Artifact(self, plan.ref, manifest))

    def open(self, ref: str, kind: str | None = None) -> Artifact:
        return self.noted.get(ref) or super().open(ref, kind)


class Planner(Pipeline):
    """Plans a whole run and notes every fingerprint, by kind and name."""

    def __init__(self, config: Config, store: NotedStore) -> None:
        super().__init__(config, quiet=True)
        self.store: NotedStore = store
        self.fingerprints: Fingerprints = {}

    def check_questions(self) -> None:
        """Planned passages hold no documents to look questions up in."""

    def step(
        self,
        label: str,
        plan: Plan,
        body: Callable[[Building], None],
        *,
        resumable: bool = False,
    ) -> Artifact:
        key = plan.kind
        if plan.kind in {"vectors", "index", "hits"}:
            key = f"{plan.kind} {plan.name}"
        if plan.kind == "hits":
            how = (
                "rewrites" if plan.config.get("num_rewrites") else "",
                "exact" if plan.config.get("exact") else "",
                mode if (mode := plan.config.get("mode", "dense")) != "dense" else "",
                "reranked" if plan.config.get("reranker") else "",
            )
            key = " ".join([key, *filter(None, (*how, plan.config.get("precision")))])
        if (
            plan.kind == "passages"
            and self.config.corpus.chunk_tokens != plan.config["chunk_tokens"]
        ):
            key = f"passages {plan.config['chunk_tokens']}"
        assert self.fingerprints.setdefault(key, plan.fingerprint) == plan.fingerprint
        if plan.kind == "model":  # the passages' step opens its tokenizer
            return self.store.get_or_build(plan, lambda building: save_tokenizer(building.path))[0]
        info: dict[str, Any] = {}
        if plan.kind == "retriever":
            info["encoder"] = llm_spec(
                self.config.model, self.retriever_base, (plan.ref, plan.fingerprint)
            ).to_json()
        if plan.kind in {"vectors", "index"} and plan.name != "minilm":
            info["precision"] = self.config.model.precision
        return self.store.note(plan, info)


def save_tokenizer(folder: Path) -> None:
    tiny_base()[1].save_pretrained(folder)


class Plans:
    """Fingerprints of all artifacts of a config, over one store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = small_config(folder)
        self.store = NotedStore(str(folder / "store"))
        self.first = self(self.config)

    def __call__(self, config: Config) -> Fingerprints:
        planner = Planner(config, self.store)
        _ = planner.report
        return planner.fingerprints

    def changed_by(self, **values: Any) -> set[str]:
        """What differs from the first config's; keys are dotted, with ``__`` for the dot."""
        config = self.config
        for key, value in values.items():
            config = changed(config, key.split("__"), value)
        after = self(config)
        assert after.keys() >= self.first.keys()
        return {key for key in self.first if after[key] != self.first[key]}


def changed(section: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    return replace(
        section, **{name: changed(getattr(section, name), rest, value) if rest else value}
    )


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Plans:
    return Plans(tmp_path_factory.mktemp("plans"))


ALL = {
    "model",
    "questions",
    "passages",
    "vectors base",
    "vectors minilm",
    "vectors retriever",
    "index base",
    "index minilm",
    "index retriever",
    "trainset",
    "retriever",
    "hits retriever-train hybrid",
    "hits retriever-dev",
    "hits base-dev",
    "hits minilm-dev",
    "hits bm25-dev",
    "hits minilm-dev hybrid",
    "hits retriever-dev hybrid",
    "hits retriever-dev rewrites",
    "readings",
    "generator",
    "report",
}
REWRITES = {"hits retriever-dev rewrites"}
FUSED = {"hits minilm-dev hybrid", "hits retriever-dev hybrid"}
AFTER_RETRIEVER = {
    "retriever",
    "vectors retriever",
    "index retriever",
    "hits retriever-train hybrid",
    "hits retriever-dev",
    "hits retriever-dev hybrid",
    "hits retriever-dev rewrites",
    "readings",
    "generator",
    "report",
}
AFTER_TRAINSET = AFTER_RETRIEVER | {"trainset"}
AFTER_QUESTIONS = AFTER_TRAINSET | {
    "questions",
    "hits base-dev",
    "hits minilm-dev",
    "hits bm25-dev",
    *FUSED,
}
AFTER_PASSAGES = ALL - {"model", "questions"}
BASE_ENCODER = AFTER_TRAINSET | {"vectors base", "index base", "hits base-dev"}
COARSE_ENCODER = AFTER_TRAINSET | {
    "vectors minilm",
    "index minilm",
    "hits minilm-dev",
    "hits minilm-dev hybrid",
}


def test_a_run_makes_these_artifacts(plans: Plans) -> None:
    assert set(plans.first) == ALL
    assert len(set(plans.first.values())) == len(ALL)


CHANGES: list[tuple[str, Any, set[str]]] = [
    ("name", "other", set()),
    ("seed", 1, ALL),
    ("experimental.model.tiny.intermediate_size", 128, ALL - {"questions"}),
    ("corpus.chunk_tokens", 64, AFTER_PASSAGES),
    ("corpus.limit", 5, AFTER_PASSAGES),
    ("questions.train_limit", 4, AFTER_QUESTIONS),
    ("questions.dev_limit", 4, AFTER_QUESTIONS),
    ("questions.near_duplicates", 0.8, AFTER_QUESTIONS),
    ("rewrites.num_rewrites", 1, AFTER_QUESTIONS),
    ("rewrites.provider", "rules", AFTER_QUESTIONS),
    ("rewrites.num_windows", 2, AFTER_TRAINSET),
    ("evaluation.num_rewrites", 1, AFTER_QUESTIONS),
    ("model.pooling", "last", BASE_ENCODER),
    ("model.retriever_layers", 1, BASE_ENCODER),
    ("model.query_prefix", "query: ", BASE_ENCODER),
    ("model.passage_max_tokens", 64, BASE_ENCODER),
    ("model.projection_dim", 32, AFTER_RETRIEVER),
    ("model.precision", "bf16", BASE_ENCODER),
    ("experimental.coarse.document_weight", 0.5, AFTER_TRAINSET),
    ("retriever.num_hard_negatives", 3, AFTER_TRAINSET),
    ("experimental.retriever.mining_depth", 9, AFTER_TRAINSET),
    ("experimental.retriever.mining_bm25", True, AFTER_TRAINSET),
    ("experimental.retriever.mining_first_rank", 2, AFTER_TRAINSET),
    ("experimental.retriever.refresh_every", 5, AFTER_RETRIEVER),
    ("experimental.retriever.matryoshka_dims", (64,), AFTER_RETRIEVER),
    ("experimental.model.quantize", "nf4", AFTER_RETRIEVER),
    ("experimental.index.dimensions", 64, AFTER_RETRIEVER - {"retriever"}),
    ("retriever.steps", 61, AFTER_RETRIEVER),
    ("retriever.lora.rank", 4, AFTER_RETRIEVER),
    ("generator.first_layer", 1, {"generator", "report"}),
    ("retriever.optimizer.learning_rate", 0.1, AFTER_RETRIEVER),
    ("retriever.invariance_weight", 0.0, AFTER_RETRIEVER),
    ("generator.steps", 31, {"generator", "report"}),
    ("generator.lora.rank", 4, {"generator", "report"}),
    ("generator.optimizer.learning_rate", 0.1, {"generator", "report"}),
    ("generator.distractor_share", 0.3, {"generator", "report"}),
    ("experimental.generator.vary_windows", False, {"generator", "report"}),
    ("generator.max_new_tokens", 8, {"generator", "report"}),
    ("generator.top_k", 2, {"hits retriever-train hybrid", "readings", "generator", "report"}),
    ("index.num_lists_searched", 5, set()),  # Flat has no lists
    (
        "evaluation.top_k",
        10,
        {
            "hits retriever-dev",
            "hits base-dev",
            "hits minilm-dev",
            "hits bm25-dev",
            *FUSED,
            *REWRITES,
            "report",
        },
    ),
    ("evaluation.num_answers", 31, {"report"}),
    ("evaluation.answer_wordings", 2, {"report"}),
    ("evaluation.answer_batch_size", 3, set()),
    ("evaluation.num_reworded_answers", 3, {"report"}),
    ("evaluation.answer_rule", "triviaqa", {"report"}),
]


@pytest.mark.parametrize("key, value, expected", CHANGES, ids=[key for key, _, _ in CHANGES])
def test_setting_changes_exactly_what_follows_from_it(
    plans: Plans, key: str, value: Any, expected: set[str]
) -> None:
    assert plans.changed_by(**{key.replace(".", "__"): value}) == expected


def test_index_factory_changes_the_indexes_and_what_is_searched_in_them(plans: Plans) -> None:
    found = plans.changed_by(index__factory="IVF4,Flat")
    assert {"index base", "index minilm", "index retriever", "hits base-dev", "report"} <= found
    assert not found & {"model", "questions", "passages", "vectors base", "vectors minilm"}


def test_edited_input_file_changes_what_was_made_from_it(plans: Plans, tmp_path: Path) -> None:
    copy = write_lines(
        tmp_path / "corpus.jsonl", [{"id": "a", "title": "A", "text": "Another corpus."}]
    )
    assert plans.changed_by(corpus__uri=str(copy)) == AFTER_PASSAGES
    rows = [{"id": "q", "question": "Why?", "answers": ["so"], "positive_ids": ["a"]}]
    train = write_lines(tmp_path / "train.jsonl", rows)
    assert plans.changed_by(questions__train_uri=str(train)) == AFTER_QUESTIONS


def test_moved_input_file_changes_nothing(plans: Plans, tmp_path: Path) -> None:
    for key in ("corpus.uri", "questions.train_uri", "questions.dev_uri"):
        section, name = key.split(".")
        source = Path(getattr(getattr(plans.config, section), name))
        copy = tmp_path / f"moved-{source.name}"
        copy.write_bytes(source.read_bytes())
        assert plans.changed_by(**{f"{section}__{name}": str(copy)}) == set()


def other(value: Any, kind: Any) -> Any:
    """Another value of the same type."""
    if value is None and int in getattr(kind, "__args__", ()):
        return 1
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        options = [option for option in getattr(kind, "__args__", ()) if isinstance(option, str)]
        # auto is resolved before anything is named.
        return next((o for o in options if o not in {value, "auto"}), f"{value}-other")
    if isinstance(value, tuple):
        return (*value[:-1], other(value[-1], None)) if value else (1,)
    return "other"


def leaves(section: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted key and another value, for every field below a section."""
    hints = get_type_hints(type(section))
    found: list[tuple[str, Any]] = []
    for entry in fields(section):
        value = getattr(section, entry.name)
        if is_dataclass(value):
            found += leaves(value, f"{prefix}{entry.name}.")
        else:
            found.append((f"{prefix}{entry.name}", other(value, hints[entry.name])))
    return found


def test_where_and_on_what_it_runs_is_in_no_fingerprint(plans: Plans) -> None:
    changes = [
        *leaves(ScaleConfig(), "scale."),
        *leaves(ServeConfig(), "serve."),
        *leaves(StorageConfig(str(plans.folder)), "storage."),
        *leaves(ExperimentalScale(), "experimental.scale."),
    ]
    assert len(changes) >= 20
    for key, value in changes:
        assert plans.changed_by(**{key.replace(".", "__"): value}) == set(), key


# Fields that need another field to count, or that another test covers.
CONDITIONAL = {
    "name": "for people",
    "corpus.uri": "content counts, above",
    "questions.train_uri": "content counts, above",
    "questions.dev_uri": "content counts, above",
    "rewrites.uri": "for providers file and endpoint",
    "rewrites.endpoint_model": "for provider endpoint",
    "evaluation.answer_batch_size": "speed",
    "evaluation.systems": "adds rows, below",
    "experimental.evaluation.causes": "adds searches, below",
    "model.base": "a name or a folder, below",
    "model.retriever_base": "a folder, below",
    "search.mode": "searches of its own, below",
    "search.reranker": "searches of its own, below",
    "search.rerank_depth": "with a reranker, below",
    "retriever.init": "an adapter, in test_starter",
    "evaluation.arms": "adds rows, in test_arms",
    "corpus.distractors": "needs the questions, below",
    "corpus.max_malformed_share": "whether there is a result, never which",
    "index.encoder": "which of the indexes jobs.reindex makes; each has its own encoder",
    "index.factory": "above",
    "index.num_lists_searched": "for IVF factories, below",
    "index.max_memory_mb": "for the factory auto, below",
    "index.shards": "cuts what jobs.reindex makes, in test_shards",
    "index.max_latency_ms": "for the factory auto, below",
}


def test_every_science_field_is_in_some_fingerprint(plans: Plans) -> None:
    forgotten = [
        key
        for key, value in leaves(plans.config)
        if not key.startswith(("scale.", "serve.", "storage.", "experimental.scale."))
        and key not in CONDITIONAL
        and not plans.changed_by(**{key.replace(".", "__"): value})
    ]
    assert not forgotten, f"no fingerprint depends on {', '.join(forgotten)}"


def test_a_base_of_the_retriever_s_own_changes_what_the_retriever_makes(
    plans: Plans, tmp_path: Path
) -> None:
    # The mined negatives and the readings follow from the retriever; what is cut does not.
    after = plans.changed_by(model__retriever_base=str(save_bert(tmp_path / "bert")))
    assert {"vectors base", "trainset", "retriever", "vectors retriever", "generator"} <= after
    untouched = {"model", "passages", "questions", "vectors minilm", "hits minilm-dev"}
    assert not after & untouched
    assert untouched <= plans.first.keys()


def test_distractors_tie_the_passages_to_the_questions(plans: Plans) -> None:
    assert plans.changed_by(corpus__distractors=3) == AFTER_PASSAGES
    both = changed(
        changed(plans.config, ["corpus", "distractors"], 3), ["questions", "dev_limit"], 4
    )
    one = changed(plans.config, ["corpus", "distractors"], 3)
    assert plans(both)["passages"] != plans(one)["passages"]


def test_causes_of_variance_are_searches_of_their_own(
    plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(
        plans.config, ["experimental", "evaluation", "causes"], ("window", "index", "precision")
    )
    after = plans(config)
    made = {"passages 64", "vectors recut-base", "index recut-base", "vectors recut-retriever"}
    made |= {"index recut-retriever", "hits recut-base-dev", "hits recut-retriever-dev"}
    # Nothing for the cause index: a Flat index is exact.
    assert after.keys() - plans.first.keys() == made | {
        "hits base-dev bf16",
        "hits retriever-dev bf16",
    }
    # The other precision of a bf16 run is fp32.
    assert {"hits base-dev fp32", "hits retriever-dev fp32"} <= plans(
        changed(config, ["model", "precision"], "bf16")
    ).keys()
    monkeypatch.setattr(rows, "WINDOW_TOKENS", 32)
    other = plans(config)
    assert {key for key in after if other.get(key) != after[key]} == made | {"report"}
    approximate = plans(
        changed(
            changed(plans.config, ["index", "factory"], "IVF4,Flat"),
            ["experimental", "evaluation", "causes"],
            ("index",),
        )
    )
    assert {"hits base-dev exact", "hits retriever-dev exact"} <= approximate.keys()


def test_the_mode_of_search_decides_what_stage_2_reads(plans: Plans) -> None:
    after = plans(changed(plans.config, ["search", "mode"], "dense"))
    assert "hits retriever-train" in after.keys() - plans.first.keys()
    other = {key for key in plans.first if key in after and after[key] != plans.first[key]}
    assert other == {"readings", "generator", "report"}


def test_a_reranker_and_its_depth_decide_what_stage_2_reads(plans: Plans, tmp_path: Path) -> None:
    cross = save_cross_encoder(tmp_path / "cross")
    config = changed(plans.config, ["search", "reranker"], str(cross))
    after = plans(config)
    made = {"hits retriever-train hybrid reranked", "hits retriever-dev hybrid reranked"}
    assert after.keys() - plans.first.keys() == made
    rest = {"readings", "generator", "report"}
    assert {key for key in plans.first if after.get(key, plans.first[key]) != plans.first[key]} == (
        rest
    )
    deeper = plans(changed(config, ["search", "rerank_depth"], 7))
    assert {key for key in after if deeper[key] != after[key]} == made | rest
    moved = cross.rename(tmp_path / "moved")
    assert plans(changed(plans.config, ["search", "reranker"], str(moved))) == after
    save_cross_encoder(moved, seed=1)
    other = plans(changed(plans.config, ["search", "reranker"], str(moved)))
    assert {key for key in after if other[key] != after[key]} == made | rest


def test_without_a_system_the_report_is_another(plans: Plans) -> None:
    config = changed(plans.config, ["evaluation", "systems"], ("base", "stage1", "both"))
    after = plans(config)
    assert not {"hits minilm-dev", "hits bm25-dev", "hits minilm-dev hybrid"} & after.keys()
    assert after["report"] != plans.first["report"]
    assert after["generator"] == plans.first["generator"]


def test_without_answers_no_generator_is_trained(plans: Plans) -> None:
    after = plans(changed(plans.config, ["evaluation", "num_answers"], 0))
    assert not {"generator", "readings", "hits retriever-train hybrid"} & after.keys()
    assert after["retriever"] == plans.first["retriever"]


def test_lists_searched_count_for_ivf_only(plans: Plans) -> None:
    searched = plans.changed_by(index__factory="IVF4,Flat", index__num_lists_searched=2)
    assert "index base" in searched
    assert plans.changed_by(index__num_lists_searched=2) == set()


def test_limits_count_for_a_planned_index_only(plans: Plans) -> None:
    config = changed(plans.config, ["index", "factory"], "auto")
    planned = plans(config)
    for field, value in {
        "max_memory_mb": 5.0,
        "max_latency_ms": 5.0,
        "recall_target": 0.8,
    }.items():
        assert (
            plans(changed(config, ["index", field], value))["index base"] != planned["index base"]
        ), field
    named = plans(changed(plans.config, ["index", "recall_target"], 0.8))
    assert named["index base"] != plans.first["index base"], (
        "an explicit factory is measured where a target is set"
    )
