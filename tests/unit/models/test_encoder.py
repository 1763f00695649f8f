"""Texts in, unit vectors out: the end token, pooling, batches, and parity with plain transformers
code.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, LlamaModel

from invar_ray.config import CoarseConfig, Config, ModelConfig
from invar_ray.errors import ModelError, ResourceError
from invar_ray.models.adapters import load_adapter, share_base
from invar_ray.models.base import BaseRef
from invar_ray.models.batching import encode_in_batches, length_batches, pad_right
from invar_ray.models.encoder import (
    BiEncoder,
    Encoder,
    EncoderSpec,
    coarse_spec,
    llm_spec,
    load_projection,
    open_encoder,
    passage_ids,
    query_ids,
)
from invar_ray.models.loading import open_model
from invar_ray.models.minilm import CoarseEncoder
from invar_ray.models.pooling import pool
from invar_ray.models.precision import inference_device, inference_precision
from invar_ray.models.tiny import minilm_folder
from invar_ray.store.artifacts import Artifact, Building, Plan, Store
from tests.support import World, documents, tiny_base, world, write_adapter

TEXTS = [row["text"][: 25 * (number + 1)] for number, row in enumerate(documents())]
PASSAGES = [(row["title"], text) for row, text in zip(documents(), TEXTS, strict=True)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory)


def spec_of(**values: Any) -> EncoderSpec:
    spec = llm_spec(ModelConfig(), BaseRef("artifact:model/tiny-0", None, "0" * 16))
    return replace(spec, **values)


def encoder_of(spec: EncoderSpec, **options: Any) -> Encoder:
    model, tokenizer = tiny_base()
    return Encoder(BiEncoder(model, spec.pooling), tokenizer, spec, **options)


# Token ids


@pytest.mark.parametrize("encode", [query_ids, passage_ids], ids=["query", "passage"])
def test_end_token_is_there_once_and_kept_under_truncation(encode: Any) -> None:
    tokenizer = tiny_base()[1]
    eos = tokenizer.eos_token_id
    long = "seals and otters come down to the pier " * 5
    given_texts = (
        [long, "seals", ""] if encode is query_ids else [("", long), ("", "seals"), ("", "")]
    )
    limits = {
        "query_max_tokens": 8,
        "passage_max_tokens": 8,
        "query_prefix": "",
        "passage_prefix": "",
    }
    cut, short, empty = encode(tokenizer, given_texts, spec_of(**limits))
    whole = tokenizer(long)["input_ids"]
    assert cut == [*whole[:7], eos]
    assert short == [*tokenizer("seals")["input_ids"], eos]
    assert empty == [eos]
    assert encode(tokenizer, [], spec_of()) == []


def test_query_and_passage_have_their_own_limits_and_prefixes() -> None:
    tokenizer = tiny_base()[1]
    spec = spec_of(query_max_tokens=6, passage_max_tokens=11)
    text = "one two three four five six seven eight nine ten eleven twelve"
    assert len(query_ids(tokenizer, [text], spec)[0]) == 6
    assert len(passage_ids(tokenizer, [("title", text)], spec)[0]) == 11
    assert tokenizer.decode(query_ids(tokenizer, ["Who"], spec)[0]) == "query : who [SEP]"
    assert (
        tokenizer.decode(passage_ids(tokenizer, [("Arvon", "an isle")], spec)[0])
        == "passage : arvon an isle [SEP]"
    )


def test_tokenizer_that_appends_the_end_token_itself_does_not_double_it(small: World) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(small.base_artifact.path()))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A [SEP]", pair="$A $B [SEP]", special_tokens=[("[SEP]", tokenizer.eos_token_id)]
    )
    eos = tokenizer.eos_token_id
    spec = spec_of(query_max_tokens=8, query_prefix="")
    short, long = query_ids(tokenizer, ["seals", "seals and otters " * 9], spec)
    assert short.count(eos) == long.count(eos) == 1
    assert short[-1] == long[-1] == eos
    assert len(long) <= 8


# Pooling


def test_pooling_by_hand() -> None:
    hidden = torch.tensor(
        [[[1.0, 2.0], [3.0, 4.0], [50.0, 60.0]], [[70.0, 80.0], [5.0, 6.0], [7.0, 10.0]]]
    )
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert pool(hidden, mask, "last").tolist() == [[3.0, 4.0], [7.0, 10.0]]
    assert pool(hidden, mask, "mean").tolist() == [[2.0, 3.0], [6.0, 8.0]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.sampled_from(["last", "mean"]))
def test_pooling_ignores_padding_on_either_side(lengths: list[int], pooling: Any) -> None:
    width = max(lengths)
    rows = [torch.randn(length, 3) for length in lengths]
    expected = torch.stack([row[-1] if pooling == "last" else row.mean(0) for row in rows])
    for side in ("left", "right"):
        hidden, mask = (
            torch.full((len(rows), width, 3), 1e3),
            torch.zeros(len(rows), width, dtype=torch.long),
        )
        for index, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            hidden[index, place], mask[index, place] = row, 1
        assert torch.allclose(pool(hidden, mask, pooling), expected, atol=1e-5)


def test_last_pooling_takes_the_end_token_s_state_whichever_side_the_padding_is_on() -> None:
    model, tokenizer = tiny_base()
    module = BiEncoder(model, "last").eval()
    rows = query_ids(tokenizer, TEXTS[:3], spec_of())
    ids, mask = pad_right(rows, tokenizer.pad_token_id)
    left, left_mask = torch.full_like(ids, tokenizer.pad_token_id), torch.zeros_like(mask)
    with torch.no_grad():
        for index, row in enumerate(rows):
            left[index, -len(row) :], left_mask[index, -len(row) :] = torch.tensor(row), 1
        alone = torch.cat(
            [model.model(input_ids=torch.tensor([row])).last_hidden_state[:, -1] for row in rows]
        )
        expected = functional.normalize(alone, dim=-1)
        assert torch.allclose(module(ids, mask), expected, atol=1e-5)
        assert torch.allclose(module(left, left_mask), expected, atol=1e-5)
        # Attention is spared the mask where padding stands on the right, and only there.
        seen: list[bool] = []
        model.model.register_forward_pre_hook(
            lambda _, __, options: seen.append(options["attention_mask"] is None),
            with_kwargs=True,
        )
        module(ids, mask), module(left, left_mask)
        assert seen == [True, False]


# Batches


def test_padding_by_hand() -> None:
    ids, mask = pad_right([[5, 6, 7], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches_hold_each_text_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(length_batches(lengths, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
    flat = [lengths[index] for batch in batches for index in batch]
    assert flat == sorted(lengths, reverse=True)


def test_vectors_come_back_in_the_order_given() -> None:
    rows = [[3], [1, 1, 1, 1], [2, 2], [7, 7, 7, 7, 7]]

    def first_id(batch: list[list[int]]) -> torch.Tensor:
        return torch.tensor([[float(row[0])] for row in batch])

    assert encode_in_batches(rows, first_id, 1, tokens_per_batch=5)[:, 0].tolist() == [3, 1, 2, 7]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_batch_composition_does_not_change_vectors(pooling: Any) -> None:
    together = encoder_of(spec_of(pooling=pooling)).encode_passages(PASSAGES)
    alone = encoder_of(spec_of(pooling=pooling), tokens_per_batch=1).encode_passages(PASSAGES)
    few = encoder_of(spec_of(pooling=pooling), tokens_per_batch=100).encode_passages(PASSAGES)
    shuffled = encoder_of(spec_of(pooling=pooling)).encode_passages(PASSAGES[::-1])[::-1]
    for other in (alone, few, shuffled):
        assert np.abs(together - other).max() < 1e-5
    assert np.allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-6)
    assert together.dtype == np.float32
    assert together.shape == (len(PASSAGES), 384)
    apart = together @ together.T - 2 * np.eye(len(PASSAGES))
    assert apart.max() < 1 - 2e-5, "texts differ, so must vectors"


def test_nothing_in_nothing_out() -> None:
    encoder = encoder_of(spec_of())
    assert encoder.encode_queries([]).shape == (0, 384)
    assert encoder.encode_passages([]).shape == (0, 384)


# Parity


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_vectors_equal_a_plain_transformers_forward(small: World, pooling: Any) -> None:
    folder = str(small.base_artifact.path())
    plain, tokenizer = (
        LlamaModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    expected = []
    for text in TEXTS:
        ids = tokenizer(f"query: {text}")["input_ids"][:63] + [tokenizer.eos_token_id]
        with torch.no_grad():
            states = plain(input_ids=torch.tensor([ids])).last_hidden_state[0]
        vector = states[-1] if pooling == "last" else states.mean(0)
        expected.append((vector / vector.norm()).numpy())
    spec = replace(llm_spec(ModelConfig(), small.base), pooling=pooling)
    found = open_encoder(spec, small.store).encode_queries(TEXTS)
    assert np.abs(found - np.stack(expected)).max() < 1e-5


def test_queries_and_passages_share_all_weights(small: World) -> None:
    spec = replace(llm_spec(ModelConfig(), small.base), query_prefix="", passage_prefix="")
    encoder = open_encoder(spec, small.store)
    assert np.array_equal(
        encoder.encode_queries(["seals on ice"]), encoder.encode_passages([("seals", "on ice")])
    )


def coarse(max_tokens: int = 256) -> CoarseEncoder:
    return CoarseEncoder("builtin:minilm", max_tokens, "f")


def test_coarse_encoder_equals_mean_pooling_by_hand() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder()))
    model = AutoModel.from_pretrained(str(minilm_folder())).eval()
    inputs = tokenizer(
        [f"{title} {text}" for title, text in PASSAGES], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].float()
    expected = functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    found = coarse().encode_passages(PASSAGES)
    assert np.abs(found - expected).max() < 1e-5
    assert coarse().dimension == found.shape[1] == 384
    assert coarse().encode_queries([]).shape == (0, 384)


def test_coarse_encoder_cuts_at_its_limit() -> None:
    long = "seals and otters come down to the pier " * 9
    tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder()))
    kept = str(
        tokenizer.decode(
            tokenizer(long, truncation=True, max_length=16)["input_ids"], skip_special_tokens=True
        )
    )
    assert np.abs(coarse(16).encode_queries([long]) - coarse().encode_queries([kept])).max() < 1e-5


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None,
    reason="sentence-transformers is not installed",
)
def test_coarse_encoder_equals_sentence_transformers() -> None:
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(minilm_folder()), device="cpu")
    expected = reference.encode(TEXTS, normalize_embeddings=True)
    assert np.abs(coarse().encode_queries(TEXTS) - expected).max() < 1e-5


def test_coarse_encoder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"cannot load the coarse encoder .*set coarse\.model to builtin:minilm"
    ):
        CoarseEncoder(str(tmp_path), 256, "f")


def test_merged_adapter_equals_the_unmerged_one(small: World) -> None:
    spec = EncoderSpec.from_json(small.adapter.info["encoder"])
    merged = open_encoder(spec, small.store).encode_passages(PASSAGES)
    model, tokenizer = open_model(small.base, small.store)
    unmerged_model = load_adapter(model, small.adapter.path("adapter"))
    unmerged = Encoder(BiEncoder(unmerged_model, spec.pooling), tokenizer, spec).encode_passages(
        PASSAGES
    )
    bare = small.base_encoder.encode_passages(PASSAGES)
    assert (merged * unmerged).sum(1).min() > 1 - 1e-5
    assert (merged * bare).sum(1).max() < 0.99, "the adapter changes vectors at all"


def test_bf16_is_close_to_fp32(small: World) -> None:
    opened = open_encoder(small.base_spec, small.store, precision="bf16")
    assert isinstance(opened, Encoder)
    assert {parameter.dtype for parameter in opened.module.parameters()} == {torch.bfloat16}
    half, full = opened.encode_passages(PASSAGES), small.base_encoder.encode_passages(PASSAGES)
    assert half.dtype == np.float32
    assert np.abs(half - full).max() > 1e-4, "bf16 means bf16, on a CPU too"
    assert (half * full).sum(1).min() > 1 - 1e-3


def test_there_is_no_other_precision(small: World) -> None:
    with pytest.raises(ModelError, match=r"no precision 'fp16'.*fp32 or bf16"):
        open_encoder(small.base_spec, small.store, precision="fp16")


def test_a_run_infers_in_its_models_precision_on_any_device() -> None:
    config = replace(Config(), model=ModelConfig(precision="bf16"))
    on_gpus = replace(config, scale=replace(config.scale, embed_gpus_per_worker=1.0))
    assert (inference_precision(config), inference_device(config.scale)) == ("bf16", "cpu")
    assert (inference_precision(on_gpus), inference_device(on_gpus.scale)) == ("bf16", "cuda")
    assert inference_precision(on_gpus, "coarse") == "fp32"
    assert inference_precision(replace(on_gpus, model=ModelConfig())) == "fp32"
    with pytest.raises(ModelError, match="a Pipeline resolves"):
        inference_precision(replace(config, model=ModelConfig(precision="auto")))


# Descriptions


def test_fingerprint_changes_with_what_decides_vectors() -> None:
    spec = spec_of(adapter="retriever/a-1", adapter_fingerprint="1" * 16)
    changes: list[dict[str, Any]] = [
        {"kind": "coarse"},
        {"pooling": "mean"},
        {"projection_dim": 64},
        {"query_prefix": "ask: "},
        {"passage_prefix": ""},
        {"query_max_tokens": 32},
        {"passage_max_tokens": 32},
        {"adapter_fingerprint": "2" * 16},
        {"adapter_fingerprint": None},
        {"base": replace(spec.base, fingerprint="3" * 16)},
    ]
    fingerprints = [spec.fingerprint, *(replace(spec, **change).fingerprint for change in changes)]
    assert len(set(fingerprints)) == len(fingerprints)


def test_fingerprint_does_not_change_with_places() -> None:
    spec = spec_of(adapter="retriever/a-1", adapter_fingerprint="1" * 16)
    moved = replace(
        spec, adapter="retriever/renamed-1", base=replace(spec.base, location="/elsewhere/model")
    )
    assert moved.fingerprint == spec.fingerprint


def test_coarse_fingerprint_changes_with_model_and_length() -> None:
    config = CoarseConfig()
    spec = coarse_spec(config)
    shorter = replace(spec, query_max_tokens=128, passage_max_tokens=128)
    specs = [spec, coarse_spec(replace(config, model="some/name")), shorter]
    assert len({item.fingerprint for item in specs}) == 3


def test_coarse_fingerprint_of_a_folder_is_by_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "config.json").write_text("{}", encoding="utf-8")
        (folder / "model.safetensors").write_bytes(b"weights")
    config = CoarseConfig()
    first = coarse_spec(replace(config, model=str(one))).fingerprint
    assert coarse_spec(replace(config, model=str(two))).fingerprint == first
    (one / "model.safetensors").write_bytes(b"weighty")
    assert coarse_spec(replace(config, model=str(one))).fingerprint != first


def test_description_survives_json(small: World) -> None:
    for spec in (
        small.base_spec,
        small.coarse_spec,
        EncoderSpec.from_json(small.adapter.info["encoder"]),
    ):
        assert EncoderSpec.from_json(spec.to_json()) == spec
        assert spec.to_json() == asdict(spec)


def test_bare_base_has_no_projection() -> None:
    config = ModelConfig(projection_dim=32)
    base = BaseRef("x", None, "0" * 16)
    assert llm_spec(config, base).projection_dim is None
    assert llm_spec(config, base, ("retriever/a-1", "1" * 16)).projection_dim == 32


def projected(small: World) -> tuple[Artifact, EncoderSpec, torch.Tensor]:
    """A ``retriever`` artifact with a projection, its encoder's spec, and the projection [16,
    384].
    """
    config = replace(small.config.model, projection_dim=16)
    plan = Plan("retriever", "projected", {"projection_dim": 16}, {"base": small.base_artifact})
    weight = torch.randn(16, 384, generator=torch.Generator().manual_seed(0))

    def body(building: Building) -> None:
        write_adapter(building.path / "adapter", small.base, small.store, seed=3)
        save_file({"weight": weight}, str(building.path / "adapter" / "projection.safetensors"))

    artifact, _ = small.store.get_or_build(plan, body)
    return artifact, llm_spec(config, small.base, (artifact.ref, artifact.fingerprint)), weight


@pytest.mark.parametrize("shared", [False, True], ids=["merged", "colocated"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_projection_beside_the_adapter_is_used(small: World, precision: str, shared: bool) -> None:
    artifact, spec, weight = projected(small)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    base = open_model(small.base, small.store, precision)[0]

    def tree(ref: BaseRef, store: Store) -> tuple[Any, Any]:
        return share_base(base), small.tokenizer

    opened = open_encoder(
        spec, small.store, precision=precision, open_base_tree=tree if shared else None
    )
    assert isinstance(opened, Encoder)
    assert opened.dimension == 16
    assert opened.module.base.dtype == dtype
    assert opened.module.projection is not None
    assert torch.equal(load_projection(artifact.path("adapter")), weight)
    assert torch.equal(opened.module.projection.weight, weight), "in fp32, whatever the base is in"

    model = load_adapter(
        open_model(small.base, small.store, precision)[0],
        artifact.path("adapter"),
        merge=not shared,
    )
    tokens, mask = pad_right(passage_ids(small.tokenizer, PASSAGES, spec), 0)
    with torch.no_grad():
        states = model.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        assert states.dtype == dtype
        expected = functional.normalize(
            pool(states, mask, spec.pooling).float() @ weight.T, dim=-1
        ).numpy()
    assert np.abs(opened.encode_passages(PASSAGES) - expected).max() < 1e-5


def test_cut_vectors_are_unit_prefixes_of_the_whole_ones(small: World) -> None:
    spec = EncoderSpec.from_json(small.adapter.info["encoder"])
    whole, cut = (
        open_encoder(spec, small.store),
        open_encoder(replace(spec, dimensions=24), small.store),
    )
    assert (whole.dimension, cut.dimension) == (384, 24)
    prefix = whole.encode_passages(PASSAGES)[:, :24]
    expected = prefix / np.linalg.norm(prefix, axis=1, keepdims=True)
    assert np.abs(cut.encode_passages(PASSAGES) - expected).max() < 1e-6
    assert cut.fingerprint != whole.fingerprint
    with pytest.raises(
        ModelError, match="385 values of each vector are to be kept, and it has 384"
    ):
        open_encoder(replace(spec, dimensions=385), small.store)


def test_fingerprint_is_of_the_vectors_and_not_of_places() -> None:
    spec = EncoderSpec(
        "llm", BaseRef("a", None, "f"), "retriever/x", "y", "mean", None, "q", "p", 8, 9
    )
    assert (
        replace(spec, base=BaseRef("b", None, "f"), adapter="retriever/z").fingerprint
        == spec.fingerprint
    )
    changes = [
        {"dimensions": 24},
        {"num_layers": 2},
        {"adapter_fingerprint": "z"},
        {"base": BaseRef("a", None, "g")},
    ]
    others = {replace(spec, **change).fingerprint for change in changes}  # type: ignore[arg-type]
    assert len(others - {spec.fingerprint}) == len(changes)
    assert EncoderSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


# Memory


def ids_of(count: int) -> list[list[int]]:
    return [[5 + number % 50] * (3 + number % 17) for number in range(count)]


def test_a_batch_that_does_not_fit_is_halved() -> None:
    """torch's own error, raised where the model allocates: the vectors are those of a run with
    enough memory.
    """
    ids = ids_of(40)
    plain, tight = (
        encoder_of(spec_of(), tokens_per_batch=400),
        encoder_of(spec_of(), tokens_per_batch=400),
    )
    seen: list[int] = []

    def allocate(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0].numel())
        if arguments[0].numel() > 120:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = tight.module.base.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, arguments: allocate(module, (arguments[0][..., 0],))
    )
    try:
        found = tight.encode_ids(ids)
    finally:
        handle.remove()
    assert max(seen) > 120
    assert tight.stats.halvings == sum(count > 120 for count in seen) == 2, (
        "once halved it stays so for these rows"
    )
    assert tight.stats.texts == 40
    assert np.abs(found - plain.encode_ids(ids)).max() < 1e-5
    again = tight.encode_ids(ids)
    assert np.array_equal(again, plain.encode_ids(ids)), (
        "the next call starts with the whole budget"
    )


def test_a_text_that_does_not_fit_alone_is_one_error() -> None:
    encoder = encoder_of(spec_of())

    def never(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = encoder.module.base.model.layers[0].register_forward_pre_hook(never)
    try:
        with pytest.raises(
            ResourceError, match=r"a text of 19 tokens does not fit into memory.*passage_max_tokens"
        ):
            encoder.encode_ids(ids_of(40))
    finally:
        handle.remove()


def test_other_errors_of_a_batch_are_not_swallowed() -> None:
    def broken(rows: list[list[int]]) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        encode_in_batches([[1], [2]], broken, 1, 8)


REAL = """
import resource, sys
import torch
from invar_ray.models.batching import EncodeStats, encode_in_batches
torch.set_num_threads(1)
ids, stats = [[1] * 64] * 32, EncodeStats()
def forward(rows):  # 16 MB a row
    return torch.ones(len(rows), 4 * 2**20).sum(dim=1, keepdim=True)
forward(ids[:1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)
vectors = encode_in_batches(ids, forward, 1, 10_000, stats)
assert (vectors == 4 * 2**20).all() and stats.texts == 32
print(stats.halvings)
"""


def test_real_lack_of_memory_is_met() -> None:
    """The operating system refuses: 32 rows want 512 MB where 200 MB are left."""
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert 2 <= int(done.stdout) <= 4


def test_padding_share_is_counted() -> None:
    encoder = encoder_of(spec_of(), tokens_per_batch=30)
    encoder.encode_ids([[1] * 10, [1] * 6, [1] * 5])
    assert (encoder.stats.tokens, encoder.stats.slots) == (21, 30)
    assert encoder.stats.padding_share == pytest.approx(0.3)
