"""Recipes and overrides: every fault at once, with its key; every field explained."""

from __future__ import annotations

import ast
import inspect
import json
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from invar_ray import config as config_module
from invar_ray.config import Config, config_keys, load_config, recipe_names, to_dict
from invar_ray.errors import ConfigError


def faults(recipe: str = "tiny", *overrides: str) -> list[str]:
    """The faults that a recipe with overrides is refused for."""
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    lines = [
        line.removeprefix("  - ")
        for line in str(caught.value).splitlines()
        if line.startswith("  - ")
    ]
    assert str(caught.value).startswith(f"{len(lines)} fault")
    return lines


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_of_the_package_loads(name: str) -> None:
    config = load_config(name)
    assert json.loads(json.dumps(to_dict(config)))["name"]


def test_recipe_names_are_the_files() -> None:
    folder = Path(config_module.__file__).parent / "recipes"
    assert recipe_names() == sorted(path.stem for path in folder.glob("*.yaml"))
    assert "tiny" in recipe_names()


@pytest.mark.parametrize("name", recipe_names())
def test_recipe_says_purpose_hardware_and_command(name: str) -> None:
    text = (Path(config_module.__file__).parent / "recipes" / f"{name}.yaml").read_text(
        encoding="utf-8"
    )
    for word in ("Purpose:", "Hardware:", "Command:"):
        assert word in text.split("\nname:")[0]


def test_recipe_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nretriever:\n  steps: 7\n", encoding="utf-8")
    config = load_config(str(path), ["retriever.optimizer.warmup_steps=3"])
    assert (config.name, config.retriever.steps, config.retriever.optimizer.warmup_steps) == (
        "mine",
        7,
        3,
    )
    path.write_text("", encoding="utf-8")
    assert load_config(str(path)) == Config()


@pytest.mark.parametrize(
    "text, message",
    [("- a\n- b\n", "holds a list"), ("a: [1\n", "is not YAML"), ("just words", "holds a str")],
)
def test_file_that_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(str(path))


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"no recipe 'tinny'; did you mean 'tiny'.*Expected: one of .*llama2_7b"
    ):
        load_config("tinny")


# Overrides


@pytest.mark.parametrize(
    "override, read, value",
    [
        ("seed=3", lambda c: c.seed, 3),
        ("corpus.uri=x y", lambda c: c.corpus.uri, "x y"),
        ("corpus.limit=null", lambda c: c.corpus.limit, None),
        ("corpus.limit=12", lambda c: c.corpus.limit, 12),
        ("corpus.uri=a=b", lambda c: c.corpus.uri, "a=b"),
        (
            "retriever.optimizer.learning_rate=1e-4",
            lambda c: c.retriever.optimizer.learning_rate,
            1e-4,
        ),
        (
            "retriever.optimizer.learning_rate=0.25",
            lambda c: c.retriever.optimizer.learning_rate,
            0.25,
        ),
        ("scale.use_gpu=true", lambda c: c.scale.use_gpu, True),
        (
            "generator.lora.target_modules=[q_proj, v_proj]",
            lambda c: c.generator.lora.target_modules,
            None,
        ),
        ("serve.retriever_replicas=[2, 3]", lambda c: c.serve.retriever_replicas, (2, 3)),
        ("model.query_prefix='ask: '", lambda c: c.model.query_prefix, "ask: "),
        (" model.pooling =last", lambda c: c.model.pooling, "last"),
        ("index={factory: 'IVF4,Flat', num_probes: 3}", lambda c: c.index.factory, "IVF4,Flat"),
    ],
)
def test_override_values_are_yaml(override: str, read: Any, value: Any) -> None:
    found = read(load_config("tiny", [override]))
    assert found == (("q_proj", "v_proj") if value is None and found else value)


def test_overrides_win_over_the_recipe_and_the_last_one_over_earlier_ones() -> None:
    config = load_config("tiny", ["retriever.steps=5", "retriever.steps=6"])
    assert config.retriever.steps == 6
    assert config.retriever.num_hard_negatives == load_config("tiny").retriever.num_hard_negatives


def test_config_is_frozen() -> None:
    config = load_config("tiny")
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


# Faults


def test_all_faults_are_listed_at_once() -> None:
    found = faults(
        "tiny",
        "retriver.steps=5",
        "retriever.stepz=5",
        "model.pooling=max",
        "scale.num_workers=many",
        "seed",
        "generator.lora.rank={",
    )
    text = "\n".join(found)
    assert len(found) == 6, text
    assert "retriver: unknown key; did you mean retriever?" in text
    assert "retriever.stepz: unknown key; did you mean retriever.steps?" in text
    assert "model.pooling: " in text
    assert "'max'" in text
    assert "scale.num_workers: " in text
    assert "'many'" in text
    assert "override 'seed': expected key=value" in text
    assert "generator.lora.rank: value '{' is not YAML" in text


def test_cross_checks_are_listed_beside_unknown_keys() -> None:
    text = "\n".join(faults("tiny", "retriver.steps=5", "retriever.steps=0"))
    assert "retriver: unknown key" in text
    assert "retriever.steps: must be above 0 (got 0)" in text


def test_key_without_its_section_is_found() -> None:
    (fault,) = faults("tiny", "chunk_stride=5")
    assert fault == "chunk_stride: unknown key; did you mean corpus.chunk_stride?"


def test_section_that_is_a_value_and_value_that_is_a_section() -> None:
    assert "retriever.lora: " in "\n".join(faults("tiny", "retriever.lora=8"))
    assert "name.x: name is not a section" in "\n".join(faults("tiny", "name.x=8"))


def test_message_says_what_to_do() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", ["seed=x", "name=[]"])
    assert "2 faults in recipe 'tiny' and its overrides" in str(caught.value)
    assert "\nTo do: correct them all" in str(caught.value), "what to do is a line of its own"
    assert "correct them all and run again" in str(caught.value)


@pytest.mark.parametrize(
    "overrides, fault",
    [
        (
            ["variants.provider=file"],
            "variants.file_uri: needed because variants.provider is 'file'",
        ),
        (
            ["evaluation.provider=file"],
            "evaluation.file_uri: needed because evaluation.provider is 'file'",
        ),
        (
            ["variants.provider=endpoint", "variants.endpoint_url=http://x"],
            "needed because variants.provider is",
        ),
        (
            ["corpus.chunk_tokens=10", "corpus.chunk_stride=11"],
            "corpus.chunk_stride: larger than corpus.chunk_tokens",
        ),
        (["evaluation.overlap_k=21"], "evaluation.overlap_k: larger than evaluation.top_k"),
        (["coarse.document_weight=1.5"], r"coarse.document_weight: must be in [0, 1] (got 1.5)"),
        (
            ["generator.distractor_share=0.6", "generator.oracle_free_share=0.5"],
            "generator.distractor_share, generator.oracle_free_share: together at most 1 (got 1.1)",
        ),
        (
            ["generator.distractor_share=-0.1"],
            "generator.distractor_share: must be in [0, 1] (got -0.1)",
        ),
        (
            ["retriever.contrastive_temperature=0"],
            "retriever.contrastive_temperature: must be above 0 (got 0.0)",
        ),
        (["scale.num_workers=0"], "scale.num_workers: must be above 0 (got 0)"),
        (
            ["generator.global_batch_size=-1"],
            "generator.global_batch_size: must be above 0 (got -1)",
        ),
        (["index.num_probes=0"], "index.num_probes: must be above 0 (got 0)"),
        (["retriever.mining_depth=0"], "retriever.mining_depth: must be above 0 (got 0)"),
        (["generator.top_k=0"], "generator.top_k: must be above 0 (got 0)"),
        (["name=a/b"], "name: "),
        (
            ["scale.num_workers=[3, 2]"],
            "scale.num_workers: expected [fewest, most] with 1 <= fewest <= most",
        ),
        (["questions.near_duplicates=0"], "questions.near_duplicates: must be in (0, 1] (got 0.0)"),
        (["scale.keep_checkpoints=1"], "scale.keep_checkpoints: must be 2 or more (got 1)"),
        (
            ["retriever.matryoshka_dims=[8, 8]"],
            "matryoshka_dims: expected different sizes of 1 or more (got [8, 8])",
        ),
        (
            ["retriever.matryoshka_dims=[8]", "retriever.matryoshka_weights=[1, 2]"],
            "weights: 2 for 1 sizes",
        ),
        (
            ["retriever.matryoshka_dims=[8]", "retriever.matryoshka_weights=[0]"],
            "weights: must be above 0 (got [0.0])",
        ),
        (
            ["retriever.mining_first_rank=99"],
            "retriever.mining_first_rank: below retriever.mining_depth",
        ),
        (["retriever.refresh_share=0"], "retriever.refresh_share: must be in (0, 1] (got 0.0)"),
        (
            ["retriever.refresh_every=5", "retriever.refresh_delay=5"],
            "refresh_delay: must be below retriever.refresh_",
        ),
        (
            ["generator.lora.first_layer=-1"],
            "generator.lora.first_layer: must be 0 or more (got -1)",
        ),
        (["scale.in_process_below=-3"], "scale.in_process_below: must be 0 or more (got -3)"),
        (
            ["model.retriever_layers=4", "retriever.lora.first_layer=4"],
            "retriever.lora.first_layer: model.retriever_layers keeps layers 0 to 3 (got 4)",
        ),
        (["retriever.refresh_every=0"], "retriever.refresh_every: must be 1 or more (got 0)"),
        (["model.quantize=nf4"], "model.quantize: needs GPUs; set scale.use_gpu to true"),
        (
            ["model.quantize=nf4", "scale.zero_stage=3"],
            "scale.zero_stage: 3 cannot shard a base in 4 bits",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_before_a_run(
    overrides: list[str], fault: str
) -> None:
    assert fault in "\n".join(faults("tiny", *overrides))


def test_workers_are_a_number_or_a_range() -> None:
    assert load_config("tiny", ["scale.num_workers=3"]).scale.num_workers == 3
    assert load_config("tiny", ["scale.num_workers=[1, 3]"]).scale.num_workers == (1, 3)


# Documentation


def sections(section: type[Any] = Config) -> list[type[Any]]:
    hints = get_type_hints(section)
    inner = [hints[entry.name] for entry in fields(section) if is_dataclass(hints[entry.name])]
    return list(dict.fromkeys([section, *(deeper for part in inner for deeper in sections(part))]))


def test_every_field_has_a_docstring_under_it() -> None:
    tree = ast.parse(inspect.getsource(config_module))
    documented: dict[str, set[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for field, following in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and isinstance(following, ast.Expr)
                    and isinstance(following.value, ast.Constant)
                    and str(following.value.value).strip()
                ):
                    documented.setdefault(node.name, set()).add(field.target.id)
    assert len(sections()) > 12
    for section in sections():
        undocumented = {entry.name for entry in fields(section)} - documented.get(
            section.__name__, set()
        )
        assert not undocumented, (
            f"{section.__name__}: no docstring under {', '.join(sorted(undocumented))}"
        )


def test_config_keys_are_all_keys_of_all_sections() -> None:
    keys = config_keys()
    values = to_dict(Config())
    assert keys == sorted(set(keys))
    for key in keys:
        inner: Any = values
        for name in key.split("."):
            inner = inner[name]
    assert sum(len(fields(section)) for section in sections()) <= len(keys)
    assert {
        "seed",
        "retriever",
        "retriever.lora.rank",
        "generator.lora.rank",
        "model.tiny.num_layers",
    } <= set(keys)


def test_to_dict_is_what_json_gives_back() -> None:
    values = to_dict(Config())
    assert json.loads(json.dumps(values)) == values
    assert to_dict(Config().retriever.lora)["target_modules"] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]
