"""Small real things that unit tests share: a one-layer base, a corpus in files, and the artifacts
of every step.

Everything is made by the package's own code, without a cluster, once a session and only when a test
asks for it.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from invar_ray.answering.retriever import Passages
from invar_ray.config import (
    Config,
    ExperimentalRetriever,
    LoraConfig,
    ModelConfig,
    TinyConfig,
    load_config,
)
from invar_ray.executor import Here
from invar_ray.index.probes import write_probes
from invar_ray.index.shards import EmbedShard, ShardTask
from invar_ray.index.vectors import SHARDS
from invar_ray.models.adapters import new_adapter, save_adapter
from invar_ray.models.base import (
    BaseRef,
    load_tokenizer,
    resolve_base,
)
from invar_ray.models.encoder import (
    Encoder,
    EncoderSpec,
    coarse_spec,
    keep_first_layers,
    llm_spec,
    open_encoder,
)
from invar_ray.models.loading import open_model
from invar_ray.models.tiny import build_tiny, minilm_folder
from invar_ray.pipeline import Pipeline
from invar_ray.steps import base as base_step
from invar_ray.steps import index, vectors
from invar_ray.store.artifacts import Artifact, Building, Plan, Store

TINY = TinyConfig(num_layers=1, intermediate_size=64)
ISLANDS = "Arvon Belisk Corrie Dunmore Elvay Fenholm Garsa Hestray Ivore Jorsay Kelda Lunna".split()
_BUILDERS = "Ada Morvane|Bram Tolliver|Cora Fisk|Dag Oram|Edda Pell|Finn Arkle".split("|")
_CROPS = "barley rye turnips flax oats kale".split()
_ANIMALS = "seals otters foxes geese hares deer".split()


@cache
def tiny_base() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The shared one-layer base and its tokenizer; do not change them."""
    return build_tiny(TINY, seed=0)


def documents() -> list[dict[str, str]]:
    """A corpus of invented islands, some 90 words each."""
    rows = []
    for number, name in enumerate(ISLANDS):
        builder, crop, animal = _BUILDERS[number % 6], _CROPS[number // 2 % 6], _ANIMALS[number % 5]
        text = (
            f"{name} is a small island in the northern sound, some {number + 3} miles from the "
            "mainland. "
            f"Its lighthouse was built by {builder} after the great storm, and its lamp burned oil "
            "for a century. "
            f"Farmers there grow {crop} on the terraces above the bay, and they carry it down to "
            "the harbour by cart. "
            f"The ferry leaves at {number + 5} in the morning. When the harbour freezes in winter, "
            f"{animal} come to "
            f"the pier, and the children of {name} feed them with bread until the ice breaks and "
            "the boats return."
        )
        rows.append({"id": f"doc-{name.lower()}", "title": name, "text": text})
    return rows


def questions(split: str) -> list[dict[str, Any]]:
    """Train: who built the lighthouse; dev: what farmers grow."""
    rows = []
    for number, name in enumerate(ISLANDS):
        if split == "train":
            question, answer = f"Who built the lighthouse of {name}?", _BUILDERS[number % 6]
            rewrites = [
                f"Which person put up the lighthouse on {name}?",
                f"The lighthouse on {name} is whose work?",
            ]
        else:
            question, answer = f"What do farmers grow on {name}?", _CROPS[number // 2 % 6]
            rewrites = [f"Which crop comes from {name}?", f"What grows on the terraces of {name}?"]
        rows.append(
            {
                "id": f"{split}-{number}",
                "question": question,
                "answers": [answer],
                "positive_ids": [f"doc-{name.lower()}"],
                "rewrites": rewrites,
            }
        )
    return rows


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines, gzipped where the name says so."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode()
    )
    return path


def write_inputs(folder: Path) -> list[str]:
    """Corpus and question files in ``folder``; returns the overrides that make a config of them."""
    return [
        f"corpus.uri={write_lines(folder / 'corpus.jsonl', documents())}",
        f"questions.train_uri={write_lines(folder / 'train.jsonl', questions('train'))}",
        f"questions.dev_uri={write_lines(folder / 'dev.jsonl', questions('dev'))}",
    ]


def small_config(folder: Path, *overrides: str) -> Config:
    """The tiny recipe over the islands: one layer, passages of some two sentences, a store in
    ``folder``.
    """
    return load_config(
        "tiny",
        [
            *write_inputs(folder),
            f"storage.root_uri={folder / 'runs'}",
            "corpus.chunk_tokens=48",
            "corpus.chunk_stride=48",
            f"experimental.model.tiny.num_layers={TINY.num_layers}",
            f"experimental.model.tiny.intermediate_size={TINY.intermediate_size}",
            "scale.shard_rows=18",
            "retriever.num_hard_negatives=2",
            "experimental.retriever.mining_depth=8",
            *overrides,
        ],
    )


def with_retriever(config: Config, **settings: Any) -> Config:
    """The config with some of stage 1's settings changed, each in the section that it stands in."""
    of_extra = {entry.name for entry in fields(ExperimentalRetriever)} & settings.keys()
    plain = {key: value for key, value in settings.items() if key not in of_extra}
    extra = {key: settings[key] for key in of_extra}
    retriever = replace(config.experimental.retriever, **extra)
    return replace(
        config,
        retriever=replace(config.retriever, **plain),
        experimental=replace(config.experimental, retriever=retriever),
    )


def changed_windows(config: Config, count: int) -> Config:
    """The same run with another number of windows."""
    return replace(config, rewrites=replace(config.rewrites, num_windows=count))


class World(Pipeline):
    """A small run in this process, and two adapters with random weights."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        super().__init__(small_config(folder, *overrides), quiet=True, executor=Here())
        self.folder = folder

    @cached_property
    def base_artifact(self) -> Artifact:
        return self.store.open(self.base.location.removeprefix("artifact:"), "model")

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base.folder_or_name(self.store))

    @cached_property
    def base_spec(self) -> EncoderSpec:
        return llm_spec(self.config.model, self.base)

    @cached_property
    def coarse_spec(self) -> EncoderSpec:
        return coarse_spec(self.config.coarse)

    @cached_property
    def base_encoder(self) -> Encoder:
        encoder = open_encoder(self.base_spec, self.store)
        assert isinstance(encoder, Encoder)
        return encoder

    @cached_property
    def adapter(self) -> Artifact:
        """A ``retriever`` artifact with random weights, large enough to be another encoder than the
        base.
        """
        return self.make_adapter("adapter", seed=1)

    @cached_property
    def other_adapter(self) -> Artifact:
        return self.make_adapter("other", seed=2)

    def make_adapter(self, name: str, *, seed: int, projection_dim: int | None = None) -> Artifact:
        plan = Plan(
            "retriever",
            name,
            {"seed": seed, "projection_dim": projection_dim},
            {"base": self.base_artifact},
        )

        def body(building: Building) -> None:
            layers = self.config.model.retriever_layers
            write_adapter(building.path / "adapter", self.base, self.store, seed, num_layers=layers)
            spec = llm_spec(self.config.model, self.base, (plan.ref, plan.fingerprint))
            building.info["encoder"] = spec.to_json()

        return self.store.get_or_build(plan, body)[0]

    @cached_property
    def adapter_index(self) -> Artifact:
        return self.index_with(self.adapter)

    @cached_property
    def half_index(self) -> Artifact:
        """The base's index, its vectors made in bf16 as on a GPU."""

        def body(building: Building) -> None:
            (building.path / SHARDS).mkdir()
            store, spec = self.store, self.base_spec
            actor = EmbedShard(
                store.root_uri,
                self.passages.ref,
                spec.to_json(),
                store.root_uri,
                f"{building.prefix}/{SHARDS}",
                self.config.scale,
                "bf16",
            )
            rows = np.arange(self.passages.info["passages"])
            actor(ShardTask(0, rows, np.full(len(rows), -1), "").to_row())
            texts = [(row.title, row.text) for row in Passages(self.passages).rows([0, 5, 9])]
            encoder = open_encoder(spec, store, precision="bf16")
            write_probes(building.path / "probes.parquet", texts, encoder.encode_passages(texts))
            building.info |= {"encoder": spec.to_json(), "precision": "bf16", "rows": len(rows)}

        plan = vectors.plan(self.config, self.passages, self.base_spec, "base-bf16", None)
        made = self.get(plan, body)
        return self.get(
            index.plan(self.config, made, self.passages, "base-bf16"),
            lambda building: index.build(building, self.config, made, self.passages),
        )

    def get(self, plan: Plan, body: Callable[[Building], None]) -> Artifact:
        return self.store.get_or_build(plan, body)[0]

    def with_factory(self, factory: str) -> Pipeline:
        """The same run, its indexes of another kind."""
        config = replace(self.config, index=replace(self.config.index, factory=factory))
        return Pipeline(config, quiet=True, executor=Here())


class Smollm2:
    """SmolLM2 out of its package: its artifact in a store of its own, and the model; made when
    first asked for.  Do not change the model.
    """

    def __init__(self, folder: Path) -> None:
        self.config = replace(Config(), model=ModelConfig(base="builtin:smollm2"))
        self.store = Store(str(folder))

    @cached_property
    def artifact(self) -> Artifact:
        plan = base_step.plan(self.config)
        return self.store.get_or_build(plan, lambda made: base_step.build(made, self.config))[0]

    @cached_property
    def base(self) -> BaseRef:
        return resolve_base(self.config.model, self.artifact)

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Model and tokenizer."""
        return open_model(self.base, self.store)


def open_folder(folder: Path | str, **options: Any) -> PreTrainedModel:
    """The causal LM in a folder, or of a hub's name."""
    return open_model(resolve_base(ModelConfig(base=str(folder)), None), None, **options)[0]


def write_adapter(
    folder: Path, base: BaseRef, store: Store, seed: int, *, num_layers: int | None = None
) -> None:
    """A PEFT folder for ``base`` with random weights (a fresh LoRA adapter alone would change
    nothing).
    """
    plain = open_model(base, store)[0]
    keep_first_layers(plain, num_layers)
    model = new_adapter(plain, LoraConfig(), seed, num_layers=num_layers)
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(value.shape, generator=generator) * 0.2
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    save_adapter(model, state, folder, base.location)


def save_word_tokenizer(folder: Path) -> int:
    """Words of the islands in BERT's frame; the number of tokens."""
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = [row["text"] for row in documents()]
    backend.train_from_iterator(
        texts, trainers.WordLevelTrainer(special_tokens="[PAD] [CLS] [SEP] [UNK]".split())
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=160,
    ).save_pretrained(folder)
    return backend.get_vocab_size()


def save_bert(folder: Path, seed: int = 0) -> Path:
    """A BERT of two layers with large random weights, its dropout as published (0.1)."""
    folder.mkdir()
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(
        vocab_size=save_word_tokenizer(folder),
        num_attention_heads=4,
        max_position_embeddings=160,
        initializer_range=0.2,
        pad_token_id=0,
        **shape,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def save_llama(folder: Path, **shape: Any) -> Path:
    """A random LLaMA in bf16 with a byte-level tokenizer that starts texts and has no
    padding token, as such checkpoints are published.

    Args:
        folder: gets it.
        shape: of ``LlamaConfig``, where it is not grouped queries (4 on 2) and a head of its own.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [row["text"] for row in documents()],
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=0,
        eos_token_id=1,
        **({"num_hidden_layers": 2} | sizes | heads | shape),
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_cross_encoder(folder: Path, labels: int = 1, seed: int = 0) -> Path:
    """A BERT with large random weights that reads pairs in MiniLM's tokens, 96 at most."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=96,
        initializer_range=0.5,
        num_labels=labels,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


_WORLDS: list[World] = []


def world(factory: pytest.TempPathFactory) -> World:
    """The session's one shared world."""
    if not _WORLDS:
        _WORLDS.append(World(factory.mktemp("world")))
    return _WORLDS[0]
