"""An encoder as the retriever's base: a small random BERT, and a ModernBERT, folder to hits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, ModernBertConfig, ModernBertModel

from invar_ray.answering.current import newest_generator
from invar_ray.answering.retriever import open_retriever
from invar_ray.config import LoraConfig
from invar_ray.errors import ModelError
from invar_ray.executor import Here
from invar_ray.models.adapters import load_adapter, new_adapter
from invar_ray.models.base import describe, resolve_retriever_base
from invar_ray.models.batching import pad_right
from invar_ray.models.encoder import EncoderSpec, llm_spec, open_encoder, query_ids
from invar_ray.models.loading import open_model
from invar_ray.models.meta import weigh
from invar_ray.outline import outline
from invar_ray.pipeline import Pipeline
from invar_ray.steps import retriever as retriever_step
from invar_ray.store.artifacts import Artifact, Building, Plan
from invar_ray.training.export import export_adapter
from invar_ray.training.retriever_stage import RetrieverStage
from invar_ray.training.stage import Chunking
from tests import support
from tests.support import save_bert, save_word_tokenizer, small_config


def save_modernbert(folder: Path) -> Path:
    """A ModernBERT of three layers, of which one sees everything."""
    folder.mkdir()
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=save_word_tokenizer(folder),
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=160,
        local_attention=16,
        initializer_range=0.2,
        pad_token_id=0,
        cls_token_id=1,
        sep_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    ModernBertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bases") / "bert")


@pytest.fixture(scope="module")
def modernbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_modernbert(tmp_path_factory.mktemp("bases") / "modernbert")


class Run(Pipeline):
    """A run whose retriever has a base of its own; stage 1 is trained by plain torch."""

    def __init__(self, folder: Path, base: Path | str, *overrides: str) -> None:
        config = small_config(
            folder,
            f"model.retriever_base={base}",
            "retriever.lora.target_modules=null",
            "retriever.global_batch_size=6",
            *overrides,
        )
        super().__init__(config, quiet=True, executor=Here())

    def stage(self) -> RetrieverStage:
        spec = llm_spec(self.config.model, self.retriever_base, ("retriever/x", "x"))
        inputs = {"trainset": self.trainset.ref, "encoder": spec.to_json()}
        return RetrieverStage(self.config, self.store, inputs, 0, 1)

    def trained(self, steps: int) -> tuple[Artifact, list[float]]:
        """An adapter after some steps, and the loss of each."""
        losses: list[float] = []

        def body(building: Building) -> None:
            stage = self.stage()
            stage.module.train()
            weights = {n: p for n, p in stage.module.named_parameters() if p.requires_grad}
            optimizer = torch.optim.AdamW(weights.values(), lr=5e-3)
            for _ in range(steps):
                optimizer.zero_grad()
                loss, _ = stage.loss(stage.module, 0)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            stage.save({n: p.detach() for n, p in weights.items()}, building.path / "adapter")
            ref = building.plan.ref, building.plan.fingerprint
            spec = llm_spec(self.config.model, self.retriever_base, ref)
            building.info |= {"encoder": spec.to_json()}

        plan = retriever_step.plan(self.config, self.retriever_base, self.trainset)
        return self.store.get_or_build(plan, body)[0], losses


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Run:
    return Run(tmp_path_factory.mktemp("run"), bert)


@pytest.fixture(scope="module")
def trained(run: Run) -> tuple[Artifact, list[float]]:
    return run.trained(12)


def opened(folder: Path) -> Any:
    return open_model(resolve_retriever_base(str(folder), None), None)[0]


def pooled(model: Any, tokenizer: Any, texts: list[str], pooling: str) -> Tensor:
    """[N, H] unit rows by transformers alone."""
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]
        ).last_hidden_state
    if pooling == "cls":
        return normalize(hidden[:, 0], dim=-1)
    mask = encoded["attention_mask"][..., None]
    return normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_from_training_to_the_same_vectors_and_hits(
    run: Run, trained: tuple[Artifact, list[float]]
) -> None:
    adapter, losses = trained
    assert losses[-1] < losses[0] - 0.1
    spec = EncoderSpec.from_json(adapter.info["encoder"])
    assert (spec.kind, spec.pooling, spec.query_prefix) == ("encoder", "mean", "")
    assert spec.base == run.retriever_base != run.base

    # Plain PEFT on a plain AutoModel is what encodes here.
    from peft import PeftModel

    base, tokenizer = open_model(run.retriever_base, run.store)
    plain = PeftModel.from_pretrained(base, str(adapter.path("adapter"))).eval()
    questions = ["Who built the lighthouse of Arvon?", "who"]
    encoder = open_encoder(spec, run.store)
    found = encoder.encode_queries(questions)
    np.testing.assert_allclose(found, pooled(plain, tokenizer, questions, "mean"), atol=1e-5)
    untrained = open_encoder(llm_spec(run.config.model, run.retriever_base), run.store)
    assert (found * untrained.encode_queries(questions)).sum(axis=1).max() < 0.999

    # An index of it gives each passage back for its own vector.
    retriever = open_retriever(run.index_with(adapter).uri)
    passages = retriever.passages.rows([0, 7])
    vectors = encoder.encode_passages([(p.title, p.text) for p in passages])
    hits = [hit for (hit,) in retriever.search(["", ""], vectors, 1)]
    assert [hit.passage_id for hit in hits] == [p.id for p in passages]
    np.testing.assert_allclose([hit.score for hit in hits], 1.0, atol=1e-5)
    again = open_encoder(EncoderSpec.from_json(json.loads(json.dumps(spec.to_json()))), run.store)
    assert again.fingerprint == retriever.encoder.fingerprint


def test_all_linear_layers_get_an_adapter_and_the_pooler_is_gone(
    run: Run, trained: tuple[Artifact, list[float]]
) -> None:
    weights = load_file(trained[0].path("adapter") / "adapter_model.safetensors")
    layers = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in weights}
    inner = "attention.self.query attention.self.key attention.self.value attention.output.dense"
    names = [*inner.split(), "intermediate.dense", "output.dense"]
    assert layers == {f"encoder.layer.{n}.{name}" for n in range(2) for name in names}


def test_the_base_s_own_dropout_is_off_in_training(run: Run) -> None:
    stage = run.stage()
    stage.module.train()
    first, second = stage.loss(stage.module, 0)[0], stage.loss(stage.module, 0)[0]
    assert torch.equal(first, second)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_equal_in_parts_and_at_once(
    tmp_path: Path, bert: Path, recompute: bool
) -> None:
    run = Run(tmp_path, bert, f"scale.gradient_checkpointing={str(recompute).lower()}")
    stage = run.stage()
    stage.module.train()
    draw = torch.Generator().manual_seed(5)
    weights = {n: p for n, p in stage.module.named_parameters() if p.requires_grad}
    for weight in weights.values():  # a fresh adapter's B is 0, and with it A's gradient
        weight.data.add_(torch.randn(weight.shape, generator=draw) * 0.05)

    def gradients() -> Tensor:
        found = torch.cat([p.grad.flatten() for p in weights.values() if p.grad is not None])
        stage.module.zero_grad(set_to_none=True)
        return found

    stage.loss(stage.module, 0)[0].backward()
    whole = gradients()
    chunking = Chunking(200, lambda count: count, lambda loss: loss.backward())
    stage.accumulate(stage.module, 0, chunking)
    parts = gradients()
    assert whole.norm() > 1e-3
    assert (parts - whole).norm() < 1e-5 * whole.norm()


def test_padding_and_neighbours_do_not_change_a_vector(run: Run) -> None:
    encoder = open_encoder(llm_spec(run.config.model, run.retriever_base), run.store)
    long = "which crop do the farmers grow on the terraces above the bay of the island?"
    together, alone = encoder.encode_queries(["who?", long]), encoder.encode_queries(["who?"])
    np.testing.assert_allclose(together[0], alone[0], atol=1e-5)


def test_texts_are_framed_as_the_encoder_s_tokenizer_does(run: Run) -> None:
    tokenizer = open_model(run.retriever_base, run.store)[1]
    spec = replace(llm_spec(run.config.model, run.retriever_base), query_max_tokens=6)
    short, cut = query_ids(tokenizer, ["the ferry", "the ferry leaves in the morning"], spec)
    assert (short[0], short[-1], len(short)) == (1, 2, 4)
    assert (cut[0], cut[-1], len(cut)) == (1, 2, 6)
    (written,) = query_ids(tokenizer, ["[SEP] [CLS]"], spec)
    assert written.count(1) == written.count(2) == 1  # control tokens of the text stay text


@pytest.mark.parametrize("described", [None, "cls", "mean", "max"])
def test_an_encoder_pools_and_prefixes_as_it_was_made_to(
    bert: Path, run: Run, tmp_path: Path, described: str | None
) -> None:
    folder = save_bert(tmp_path / "bert")
    before = resolve_retriever_base(str(folder), None)
    if described is not None:
        (folder / "1_Pooling").mkdir()
        modes = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
        values = {f"pooling_mode_{name}": mode == described for mode, name in modes.items()}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(values))
        entry = {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
        (folder / "modules.json").write_text(json.dumps([entry]))
        prompts = {"prompts": {"query": "ask: ", "document": "text: "}}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    if described == "max":
        with pytest.raises(ModelError, match="mean, cls or lasttoken"):
            resolve_retriever_base(str(folder), None)
        return
    base = resolve_retriever_base(str(folder), None)
    assert base.pooling == (described or "mean")
    assert (base.fingerprint == before.fingerprint) == (described is None)
    model = replace(run.config.model, query_prefix=None, passage_prefix=None)
    spec = llm_spec(model, base)
    prefixes = ("", "") if described is None else ("ask: ", "text: ")
    assert (spec.query_prefix, spec.passage_prefix) == prefixes
    plain, tokenizer = open_model(base, run.store)
    found = open_encoder(spec, run.store).encode_queries(["the ferry", "the harbour freezes"])
    texts = [f"{prefixes[0]}{text}" for text in ("the ferry", "the harbour freezes")]
    expected = pooled(plain, tokenizer, texts, described or "mean")
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_first_layers_of_an_encoder(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(kind)
    run = Run(tmp_path, folder, "model.retriever_layers=1")
    stage = run.stage()
    names = {n for n, p in stage.module.named_parameters() if p.requires_grad}
    stem = "base.encoder.layer." if kind == "bert" else "base.layers."
    assert names
    assert all(name.startswith(f"{stem}0.") for name in names)
    # Its adapter fits the whole model, too.
    stage.save({n: p.detach() for n, p in stage.module.named_parameters() if n in names}, tmp_path)
    load_adapter(opened(folder), tmp_path)
    whole = AutoModel.from_pretrained(folder)
    ids, mask = pad_right([[1, 7, 9, 2]], 0)
    with torch.no_grad():
        first = whole(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        spec = llm_spec(run.config.model, run.retriever_base)
        hidden = first.hidden_states[1]
        hidden = whole.final_norm(hidden) if kind == "modernbert" else hidden
        found = open_encoder(spec, run.store).module(ids, mask)  # type: ignore[attr-defined]
    np.testing.assert_allclose(found, normalize(hidden.mean(1), dim=-1), atol=1e-5)
    with pytest.raises(ModelError, match=r"between 1 and the base's \d layers"):
        open_encoder(replace(spec, num_layers=9), run.store)


def test_texts_longer_than_its_positions_are_refused(run: Run) -> None:
    spec = replace(llm_spec(run.config.model, run.retriever_base), passage_max_tokens=161)
    with pytest.raises(ModelError, match="BertModel has 160 positions"):
        open_encoder(spec, run.store)


def test_an_adapter_on_the_wrong_base_is_refused(
    run: Run, trained: tuple[Artifact, list[float]], tmp_path: Path
) -> None:
    spec = EncoderSpec.from_json(trained[0].info["encoder"])
    causal = replace(spec, kind="llm", base=run.base)
    with pytest.raises(ModelError, match="does not fit the base"):
        open_encoder(causal, run.store)
    folder = save_bert(tmp_path / "bert", seed=1)  # same shape, other weights
    moved = replace(spec, base=replace(spec.base, location=str(folder)))
    with pytest.raises(ModelError, match="has changed since it was used"):
        open_encoder(moved, run.store)


def test_layers_that_an_encoder_lacks_are_named(bert: Path) -> None:
    wrong = LoraConfig(target_modules=("q_proj",))
    with pytest.raises(ModelError, match="dense, key, query, value"):
        new_adapter(opened(bert), wrong, 0)


def test_what_depends_on_whose_base(run: Run, tmp_path: Path, bert: Path) -> None:
    """Another retriever's base changes what the retriever makes, and nothing before it."""
    other = Run(tmp_path, save_bert(tmp_path / "other", seed=1))
    same = Run(tmp_path, bert)
    none = Pipeline(
        replace(same.config, model=replace(same.config.model, retriever_base=None)),
        quiet=True,
        executor=Here(),
    )
    assert none.retriever_base == none.base
    assert none.passages.ref == same.passages.ref == other.passages.ref
    plans = [
        retriever_step.plan(p.config, p.retriever_base, run.trainset) for p in (none, same, other)
    ]
    assert len({plan.fingerprint for plan in plans}) == 3
    assert len({p.base_index.fingerprint for p in (none, same, other)}) == 3


def test_a_generator_goes_with_the_index_of_an_encoder_by_the_cut(
    run: Run, trained: tuple[Artifact, list[float]]
) -> None:
    index = run.index_with(trained[0])
    assert newest_generator(index) is None

    def generator(name: str, fingerprint: str) -> Artifact:
        def body(building: Building) -> None:
            building.info["base"] = {"fingerprint": fingerprint}

        return run.store.get_or_build(Plan("generator", name, {}), body)[0]

    generator("other", run.retriever_base.fingerprint)
    assert newest_generator(index) is None
    right = generator("right", run.base.fingerprint)
    generator("another", "0" * 16)
    found = newest_generator(index)
    assert found is not None
    assert found.ref == right.ref


def test_merged_weights_are_a_sentence_transformers_folder(
    run: Run, trained: tuple[Artifact, list[float]], tmp_path: Path
) -> None:
    adapter = trained[0]
    exported = export_adapter(adapter, tmp_path / "out", merged=True)
    assert exported.merged is not None
    base = resolve_retriever_base(str(exported.merged), None)
    spec = EncoderSpec.from_json(adapter.info["encoder"])
    texts = ["the ferry", "who built it?"]
    merged = open_encoder(replace(llm_spec(run.config.model, base)), run.store)
    np.testing.assert_allclose(
        merged.encode_queries(texts), open_encoder(spec, run.store).encode_queries(texts), atol=1e-5
    )
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "mean of the token states, L2 norm 1" in card


def test_minilm_is_a_base_that_every_node_can_open(tmp_path: Path, minilm_path: Path) -> None:
    run = Run(tmp_path, "builtin:minilm")
    base = run.retriever_base
    assert (base.pooling, base.location.startswith("artifact:model/minilm-")) == ("mean", True)
    spec = llm_spec(run.config.model, base)
    questions = ["Who built the lighthouse of Arvon?"]
    ours, theirs = (
        open_encoder(one, run.store).encode_queries(questions)
        for one in (spec, support.coarse_spec(run.config.coarse))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    with pytest.raises(ModelError, match="there is no base"):
        _ = Pipeline(
            replace(run.config, model=replace(run.config.model, base="builtin:minilm")),
            quiet=True,
            executor=Here(),
        ).base


def test_a_base_that_is_its_own_teacher_is_embedded_once(bert: Path, tmp_path: Path) -> None:
    """Negatives come from the teacher's index; the plan that is printed says so, too."""
    run = Run(tmp_path, bert, f"coarse.model={bert}")
    assert run.trainset.parent("index").ref == run.coarse_index.ref
    assert run.trainset.info["mining"]["kept"] > 0
    assert not [label for label in run.seconds if "(base)" in label]
    shapes = (weigh(describe(run.retriever_base, run.store)), weigh(describe(run.base, run.store)))
    said = dict(outline(run.config, shapes, "retriever", 24, 12, 12))
    assert not [label for label in said if "(base)" in label]
    started = support.with_retriever(run.config, init="of/an/adapter")
    assert "embed passages (base)" in dict(outline(started, shapes, "retriever", 24, 12, 12))
    other = Run(tmp_path, bert, "model.retriever_layers=1", f"coarse.model={bert}")
    assert other.mined_index.ref == other.base_index.ref
