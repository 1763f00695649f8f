"""What ``precision: auto`` comes to, and that bf16 means bf16: in training, vectors and answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from invar_ray.answering.retriever import open_retriever
from invar_ray.config import Config, load_config
from invar_ray.errors import ConfigError
from invar_ray.executor import Here
from invar_ray.models.encoder import Encoder, llm_spec
from invar_ray.models.precision import made_in, multiplication_rates
from invar_ray.pipeline import Pipeline
from invar_ray.steps import precision as step
from invar_ray.training.retriever_stage import RetrieverStage
from invar_ray.training.stage import Chunking
from tests.support import World, save_bert, small_config, world


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory)


def run_of(config: Config) -> Pipeline:
    return Pipeline(config, quiet=True, executor=Here())


def test_rates_are_numbers_of_one_core_and_leave_the_threads_alone() -> None:
    threads = torch.get_num_threads()
    rates = multiplication_rates(96, 256)
    assert set(rates) == {"fp32", "bf16"}
    assert all(0.01 < rate < 1e5 for rate in rates.values())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    "rates, use_gpu, taken",
    [
        ({"fp32": 30.0, "bf16": 120.0}, False, "bf16"),
        ({"fp32": 30.0, "bf16": 5.0}, False, "fp32"),
        ({"fp32": 30.0, "bf16": 31.0}, False, "fp32"),
        ({"fp32": 30.0, "bf16": 5.0}, True, "bf16"),
    ],
)
def test_auto_is_decided_once_for_a_store_and_is_in_what_it_names(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rates: dict[str, float],
    use_gpu: bool,
    taken: str,
) -> None:
    monkeypatch.setattr(step, "multiplication_rates", lambda *sizes: rates)
    use = f"scale.use_gpu={str(use_gpu).lower()}"
    config = small_config(tmp_path, "model.precision=auto", use)
    decided = run_of(config)
    assert decided.config.model.precision == taken
    assert decided.config == replace(config, model=replace(config.model, precision=taken))
    # Another machine, which would decide otherwise, keeps what the store has.
    other = {"fp32": rates["bf16"], "bf16": rates["fp32"]}
    monkeypatch.setattr(step, "multiplication_rates", lambda *sizes: other)
    assert run_of(config).config.model.precision == taken
    # Whoever names a precision gets it, under another name.
    named = [
        run_of(replace(config, model=replace(config.model, precision=name)))
        for name in ("fp32", "bf16")
    ]
    names = {each.config.model.precision: each.base_index.ref for each in named}
    assert decided.base_index.ref == names[taken]
    assert len(set(names.values())) == 2


def test_a_bf16_run_is_bf16_on_a_cpu(tmp_path: Path, small: World) -> None:
    config = small_config(tmp_path, "model.precision=bf16")
    run = run_of(config)
    index = run.base_index
    assert made_in(index) == "bf16"
    opened, full = open_retriever(index.uri), open_retriever(small.base_index.uri)
    assert isinstance(opened.encoder, Encoder)
    assert {weight.dtype for weight in opened.encoder.module.parameters()} == {torch.bfloat16}
    # The teacher stays as it is.
    assert made_in(run.coarse_index) == "fp32"
    assert run.coarse_index.fingerprint == small.coarse_index.fingerprint
    # Nearly the same passages are found.
    questions = [f"Who built the lighthouse of {name}?" for name in ("Arvon", "Garsa", "Lunna")]
    for half, whole in zip(opened.retrieve(questions, 5), full.retrieve(questions, 5), strict=True):
        assert len({h.passage_id for h in half} & {h.passage_id for h in whole}) >= 4


@pytest.mark.parametrize("base", ["llama", "bert"])
def test_gradients_in_bf16_are_those_of_fp32_nearly_and_of_parts_exactly_enough(
    tmp_path: Path, base: str
) -> None:
    own = [f"model.retriever_base={save_bert(tmp_path / 'bert')}"] if base == "bert" else []
    own += ["retriever.lora.target_modules=null", "retriever.global_batch_size=6"]
    config = small_config(tmp_path, *own)
    full = run_of(config)
    inputs = {
        "trainset": full.trainset.ref,
        "encoder": llm_spec(config.model, full.retriever_base, ("retriever/x", "x")).to_json(),
    }

    def gradients(precision: Any, *, parts: bool) -> Tensor:
        settings = replace(config, model=replace(config.model, precision=precision))
        stage = RetrieverStage(settings, full.store, inputs, 0, 1)
        # As the engine does: weights in the precision, the master copy elsewhere.
        stage.module.to(torch.bfloat16 if precision == "bf16" else torch.float32).train()
        draw = torch.Generator().manual_seed(5)
        weights = [p for _, p in sorted(stage.module.named_parameters()) if p.requires_grad]
        for weight in weights:
            weight.data.add_(torch.randn(weight.shape, generator=draw) * 0.05)
        if parts:
            chunking = Chunking(200, lambda count: count, lambda loss: loss.backward())
            stage.accumulate(stage.module, 0, chunking)
        else:
            stage.loss(stage.module, 0)[0].backward()
        return torch.cat([p.grad.float().flatten() for p in weights if p.grad is not None])

    whole, half = gradients("fp32", parts=False), gradients("bf16", parts=False)
    assert not torch.equal(whole, half)
    assert cosine_similarity(half, whole, dim=0) > 0.99
    assert cosine_similarity(gradients("bf16", parts=True), half, dim=0) > 0.999


def test_zero_stage_0_is_refused_in_bf16(tmp_path: Path) -> None:
    for precision in ("bf16", "auto"):
        with pytest.raises(ConfigError, match=r"scale\.zero_stage: 0 keeps no moments"):
            load_config("tiny", [f"model.precision={precision}", "scale.zero_stage=0"])
    load_config("tiny", ["scale.zero_stage=0"])
