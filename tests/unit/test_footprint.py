"""The ledger: what cannot fit is refused before anything runs, with what would fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from invar_ray.config import load_config
from invar_ray.footprint import GB, Corpus, Machines, Step, faults, footprint, host_bytes, remedies

WIKI = Corpus(passages=21_000_000)
SMALL = Corpus(passages=100_000, train=10_000, dev=1_000)
H100S = Machines(nodes=1, gpus=8, gpu_bytes=80 * GB, host_bytes=2000 * GB, cpus=192)


@pytest.fixture(scope="module")
def ledger() -> dict[str, Step]:
    return {step.label: step for step in footprint(load_config("llama3_8b"), WIKI)}


def test_llama3_8b_on_eight_gpus_is_what_arithmetic_says(ledger: dict[str, Step]) -> None:
    trained, answers = ledger["stage 1: retriever"].actors[1], ledger["report"].actors[1]
    assert (trained.count, trained.gpus) == (8, 1.0)
    # 16.1 GB of weights, 0.8 of CUDA, 1.0 of ZeRO's bucket, some 4.6 of layers' inputs and 4.4 of
    # the layer that is recomputed.
    assert 26 * GB < trained.gpu < 29 * GB
    assert trained.host > 16.1 * GB  # it passes through the host
    # 16.1 of weights; 16 prompts of 1,536 tokens leave 65,536 values of 2 bytes a token
    cache = 16 * 1536 * 65_536 * 2
    assert 16.1 * GB + cache < answers.gpu < 80 * GB
    assert answers.host < 5 * GB  # weights go straight to the GPU
    assert ledger["embed passages (base)"].written == 21e6 * 4096 * 2
    assert ledger["embed passages (retriever)"].written == 21e6 * 768 * 2
    assert ledger["embed passages (base)"].seconds == pytest.approx(4 * 3600, rel=0.25)
    assert ledger["stage 1: retriever"].seconds == pytest.approx(11 * 3600, rel=0.25)


def test_zero_3_counts_a_share_of_the_weights_and_what_is_gathered(
    ledger: dict[str, Step],
) -> None:
    steps = footprint(load_config("llama3_8b", ["scale.zero_stage=3"]), WIKI)
    sharded = {step.label: step for step in steps}
    for label in ("stage 1: retriever", "stage 2: generator"):
        one, other = ledger[label].actors[1], sharded[label].actors[1]
        whole = one.host - other.host
        assert 16 * GB < whole < 16.2 * GB  # 8.03 G values in bf16
        assert other.mapped == pytest.approx(whole)
        # An eighth stays, and 1 G values are whole at a time.
        assert one.gpu - other.gpu == pytest.approx(whole * 7 / 8 - 2 * GB)


def test_a_mapped_index_counts_once_a_node(ledger: dict[str, Step]) -> None:
    step = ledger["hits of dev questions in the base index"]
    assert step.actors[1].mapped > 21e6 * 4096  # IVF on 8-bit values
    one, two = host_bytes(step, H100S), host_bytes(step, replace(H100S, nodes=2))
    assert one - two == pytest.approx(4 * step.actors[1].host)


def test_what_fits_is_not_refused() -> None:
    on_gpu = ["scale.use_gpu=true", "scale.embed_gpus_per_worker=0.5"]
    one = Machines(gpus=1, gpu_bytes=8 * GB, host_bytes=32 * GB, cpus=8)
    small = load_config("smollm2_135m", on_gpu)  # "one GPU with 8 GB", says the recipe
    assert faults(footprint(small, SMALL), one) == []
    whole = load_config("smollm2_135m", [*on_gpu, "scale.train_tokens_per_chunk=null"])
    assert {fault.what for fault in faults(footprint(whole, SMALL), one)} == {"gpu"}
    assert faults(footprint(load_config("llama3_8b"), SMALL), H100S) == []
    demo = load_config("demo", ["model.precision=fp32"])
    laptop = Machines(gpus=0, host_bytes=16 * GB, cpus=4)
    assert faults(footprint(demo, Corpus(1_000, 80, 1_000, 400)), laptop) == []


@pytest.mark.parametrize(
    ("machines", "corpus", "what", "change"),
    [
        (replace(H100S, gpu_bytes=24 * GB), SMALL, "gpu", "scale.train_tokens_per_chunk="),
        (replace(H100S, gpus=4), SMALL, "gpus", "scale.num_workers=4"),
        (replace(H100S, cpus=32), SMALL, "cpus", "scale.cpus_per_worker=1"),
    ],
)
def test_what_does_not_fit_is_named_with_what_would(
    machines: Machines, corpus: Corpus, what: str, change: str
) -> None:
    found = remedies("llama3_8b", [], corpus, machines)
    lacking = [(fault, mended) for fault, mended in found if fault.what == what]
    assert lacking
    assert any(change in mended for _, mended in lacking)
    fault, mended = next((one, said) for one, said in lacking if change in said)
    assert fault.step in fault.text
    better = footprint(load_config("llama3_8b", mended.split()), corpus)
    left = {(one.step, one.what) for one in faults(better, machines)}
    assert (fault.step, fault.what) not in left


def test_nothing_mends_a_gpu_that_is_smaller_than_the_weights() -> None:
    tiny = replace(H100S, gpu_bytes=12 * GB)
    found = remedies("llama3_8b", [], SMALL, tiny)
    assert {fault.what for fault, _ in found} == {"gpu"}
    assert all(mended == "" for _, mended in found)


def test_a_job_on_a_head_that_is_too_small_is_refused() -> None:
    head = replace(H100S, job_bytes=16 * GB)
    said = faults(footprint(load_config("llama3_8b"), WIKI), head)
    assert "training set" in {fault.step for fault in said if fault.what == "job"}
    assert not [f for f in faults(footprint(load_config("llama3_8b"), SMALL), head)]
