"""Whether this project computes the same on a GPU, and how fast: one call, under eight minutes.

    python -m benchmarks.gpu_check --out gpu.json

Correctness first, against fp32 on this machine's CPU and the same weights; then tokens a second,
share of the matrix rate that was measured here, and peak memory beside what ``invar-ray plan``
predicts, for shapes of 135 M, 1 B and 8 B with random weights made on the device. Every row is
written as soon as it stands; what there is no time for is left out and said so. Exit status 1 where
a check of correctness fails.

Needs torch, transformers, peft, pydantic, pyarrow, pyyaml and regex: no Ray, no FAISS, no hub.
DeepSpeed's row is skipped where it is not installed. ``--device cpu --tiny`` tries the script
itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from invar_ray.config import LoraConfig, RetrieverConfig
from invar_ray.config.experimental import ExperimentalRetriever
from invar_ray.losses.gradcache import RepresentationCache
from invar_ray.models import meta
from invar_ray.models.adapters import new_adapter
from invar_ray.models.batching import EncodeStats, encode_in_batches, pad_right
from invar_ray.models.encoder import BiEncoder
from invar_ray.models.precision import torch_dtype
from invar_ray.training.generator_stage import _CausalLm, answer_loss_at
from invar_ray.training.objective import Rows, objective

SEED = 0
SMALL = LlamaConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
"""Of the checks of correctness: a LLaMA with grouped heads and a head of its own."""
SHAPES = {
    "135M": meta.known_description("builtin:smollm2"),
    "1B": meta.known_description("meta-llama/Llama-3.2-1B"),
    "8B": meta.known_description("meta-llama/Llama-3.1-8B"),
}
COSINE, GRADIENT_COSINE = 0.999, 0.999
"""Least of a bf16 vector, and of bf16 gradients, with those in fp32."""


@dataclass
class Run:
    """What the checks share.

    Attributes:
        device: where they compute. tiny: sizes for a CPU.
        deadline: of ``time.monotonic()``, after which nothing more is begun.
        rate: operations a second of large bf16 products here.
        rows: what came out.
    """

    device: str
    tiny: bool
    out: Path | None
    deadline: float
    rate: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, check: Callable[[Run], dict[str, Any]]) -> bool:
        """Run one check, keep and write its row; whether it passed."""
        if time.monotonic() > self.deadline:
            self._keep({"check": name, "status": "no time"})
            return True
        started = time.monotonic()
        try:
            numbers = check(self)
            status = numbers.pop("status", "ok")
        except Exception as error:  # the next check may still say something
            numbers = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
            status = "failed"
        if self.device == "cuda":
            torch.cuda.empty_cache()
        seconds = round(time.monotonic() - started, 2)
        self._keep({"check": name, "status": status, "seconds": seconds, **numbers})
        return bool(status != "failed")

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.out is not None:
            half = self.out.with_suffix(".part")
            half.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")
            os.replace(half, self.out)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak(self) -> int:
        """Bytes of the device at their highest since :meth:`forget`; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else 0

    def forget(self) -> None:
        """Begin a new measurement of memory."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()


# --- what is compared ---


def random_model(shape: PretrainedConfig, precision: str, device: str) -> Any:
    """A model of random weights, made on its device; the same on each."""
    torch.manual_seed(SEED)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            shape, dtype=torch_dtype(precision), attn_implementation="sdpa"
        )  # type: ignore[no-untyped-call]
    return model.eval()


def twins(run: Run, precision: str, lora: LoraConfig | None = None) -> tuple[Any, Any]:
    """The same small model in fp32 on the CPU, and in a precision on the device."""
    made = []
    for where, what in (("cpu", "fp32"), (run.device, precision)):
        model = random_model(SMALL, "fp32", "cpu")
        if lora is not None:
            adapted = new_adapter(model, lora, SEED)
            torch.manual_seed(SEED)
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:  # zeros would hide what goes through A
                    nn.init.normal_(parameter, std=0.02)
            model = adapted.get_base_model()
        made.append(model.to(torch_dtype(what)).to(where))
    return made[0], made[1]


def texts(rows: int, longest: int, seed: int = 1) -> list[list[int]]:
    """Token ids of unequal lengths."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(longest // 3, longest + 1, (rows,), generator=draw).tolist()
    return [
        torch.randint(3, SMALL.vocab_size, (length,), generator=draw).tolist() for length in lengths
    ]


def cosines(first: Tensor, second: Tensor) -> dict[str, float]:
    """Lowest and median of 1 - cosine over rows."""
    away = 1.0 - functional.cosine_similarity(first.double().cpu(), second.double().cpu())
    return {"highest": float(away.max()), "median": float(away.median())}


def gradients(module: nn.Module) -> Tensor:
    """All gradients of what trains, one after the other, on the CPU."""
    found = [
        p.grad.flatten() for p in module.parameters() if p.requires_grad and p.grad is not None
    ]
    return torch.cat(found).double().cpu()


def refuse(passed: bool, numbers: dict[str, Any]) -> dict[str, Any]:
    """The numbers, marked as failed unless they passed."""
    return numbers | ({} if passed else {"status": "failed"})


def stage1_loss(
    encode: Callable[[Tensor, Tensor], Tensor], device: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Stage 1's whole objective on fixed texts: 4 questions in 3 wordings, 8 slots in 2 windows."""
    b, wordings, slots, windows = 4, 3, 8, 2
    ids, mask = pad_right(texts(b * wordings, 12), 0)
    queries = encode(ids.to(device), mask.to(device)).view(b, wordings, -1)
    ids, mask = pad_right(texts(slots * windows, 48, seed=2), 0)
    candidates = encode(ids.to(device), mask.to(device)).view(slots, windows, -1)
    return _objective(queries.to(dtype), candidates.to(dtype))


def _objective(queries: Tensor, candidates: Tensor) -> Tensor:
    b, slots, device = len(queries), len(candidates), queries.device
    environments = queries.shape[1] * candidates.shape[1]
    draw = torch.Generator().manual_seed(3)
    everything = torch.ones(b, slots, dtype=torch.bool, device=device)
    rows = Rows(
        positive=torch.arange(b, device=device),
        weights=torch.ones(b, device=device, dtype=queries.dtype),
        normaliser=float(b),
        environments=torch.ones(b, environments, dtype=torch.bool, device=device),
        teacher=torch.rand(b, slots, generator=draw, dtype=torch.float64).to(queries),
        no_copies=everything,
        no_answers=everything,
    )
    settings = RetrieverConfig(alignment_decay_steps=100, invariance_ramp_steps=1)
    return objective(queries, candidates, rows, settings, ExperimentalRetriever(), step=10)[0]


# --- correctness ---


def machine(run: Run) -> dict[str, Any]:
    """Versions, card, driver, what attention takes, and the rate of matrix products."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": __import__("transformers").__version__,
        "peft": __import__("peft").__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if run.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
        found |= {
            "card": card.name,
            "bytes": card.total_memory,
            "driver": driver.stdout.strip(),
            "bf16": torch.cuda.is_bf16_supported(),
        }
    found["attention"] = _attention_kernels(run)
    size = 512 if run.tiny else 8192
    left, right = (
        torch.randn(size, size, device=run.device, dtype=torch.bfloat16) for _ in range(2)
    )
    seconds = _timed(run, lambda: left @ right)
    run.rate = 2.0 * size**3 / seconds
    return found | {"bf16_tflops": round(run.rate / 1e12, 3)}


def _attention_kernels(run: Run) -> dict[str, list[str]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = (2, 8, 128, 64)
    query = torch.randn(shape, device=run.device, dtype=torch.bfloat16)
    mask = torch.ones(2, 1, 128, 128, dtype=torch.bool, device=run.device).tril()
    taken: dict[str, list[str]] = {"causal": [], "causal, grouped": [], "mask": []}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        for case in taken:
            groups = case.endswith("grouped")
            key = query[:, :2] if groups else query
            options: dict[str, Any] = (
                {"attn_mask": mask} if case == "mask" else {"is_causal": True, "enable_gqa": groups}
            )
            try:
                with sdpa_kernel(backend):
                    functional.scaled_dot_product_attention(query, key, key, **options)
                taken[case].append(backend.name)
            except RuntimeError:
                pass
    return taken


def vectors(run: Run) -> dict[str, Any]:
    """Vectors in bf16 on the device against fp32 on the CPU; in a padded batch against alone."""
    numbers: dict[str, Any] = {}
    ids, mask = pad_right(texts(8 if run.tiny else 64, 96), 0)
    for precision in ("bf16", "fp32"):
        cpu, other = twins(run, precision)
        torch.manual_seed(SEED)
        one = BiEncoder(cpu, "last", 64).eval()
        two = BiEncoder(other, "last", 64).eval().to(run.device)
        assert one.projection is not None
        assert two.projection is not None
        two.projection.weight.data.copy_(one.projection.weight)
        with torch.inference_mode():
            wanted = one(ids, mask)
            found = two(ids.to(run.device), mask.to(run.device))
            alone = torch.cat(
                [
                    two(ids[[n], :length].to(run.device), mask[[n], :length].to(run.device))
                    for n, length in enumerate(mask.sum(dim=1).tolist())
                ]
            )
        numbers[f"{precision} against fp32 on the CPU"] = cosines(wanted, found)
        numbers[f"{precision}, padded against alone"] = cosines(alone, found)
    worst = numbers["bf16 against fp32 on the CPU"]["highest"]
    same = numbers["fp32 against fp32 on the CPU"]["highest"]
    padded = numbers["bf16, padded against alone"]["highest"]
    return refuse(worst < 1 - COSINE and padded < 1 - COSINE and same < 1e-5, numbers)


def merged(run: Run) -> dict[str, Any]:
    """An adapter merged into bf16 weights on the device gives the vectors of the unmerged one."""
    ids, mask = (part.to(run.device) for part in pad_right(texts(8 if run.tiny else 64, 96), 0))
    lora = LoraConfig(dropout=0.0)
    model = random_model(SMALL, "bf16", run.device)
    adapted = new_adapter(model, lora, SEED).to(torch.bfloat16)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    with torch.inference_mode():
        before = BiEncoder(adapted.get_base_model(), "last").eval()(ids, mask)
        after = BiEncoder(adapted.merge_and_unload().eval(), "last").eval()(ids, mask)
    numbers = cosines(before, after)
    return refuse(numbers["highest"] < 1e-2, numbers)


def losses(run: Run) -> dict[str, Any]:
    """Stage 1's objective and its gradient in fp32 on the device against fp64 on the CPU."""
    draw = torch.Generator().manual_seed(4)
    given = [torch.randn(shape, generator=draw) for shape in ((4, 3, 32), (8, 2, 32))]
    found = []
    for device, dtype in (("cpu", torch.float64), (run.device, torch.float32)):
        rows = [functional.normalize(x, dim=-1).to(device, dtype).requires_grad_() for x in given]
        loss = _objective(*rows)
        loss.backward()
        found.append((float(loss), torch.cat([row.grad.flatten().double().cpu() for row in rows])))  # type: ignore[union-attr]
    off = abs(found[0][0] - found[1][0]) / abs(found[0][0])
    gradient = float((found[0][1] - found[1][1]).norm() / found[0][1].norm())
    return refuse(off < 1e-5 and gradient < 1e-4, {"loss_off": off, "gradient_off": gradient})


def gradcache(run: Run) -> dict[str, Any]:
    """GradCache under dropout: the device's random numbers are replayed. Gradients are those of
    finite parts with equal masks, and the same bits twice.
    """
    found = []
    for _ in range(2):
        _, model = twins(run, "fp32", LoraConfig(dropout=0.2))
        module = BiEncoder(model, "last").train()
        cache = RepresentationCache(module, 96)
        torch.manual_seed(5)
        loss = stage1_loss(cache, run.device)
        cache.backward(loss)
        found.append(gradients(module))
    # Without dropout the parts must add up to the whole.
    whole = []
    for budget in (96, 1_000_000):
        _, model = twins(run, "fp32", LoraConfig(dropout=0.0))
        module = BiEncoder(model, "last").train()
        cache = RepresentationCache(module, budget)
        cache.backward(stage1_loss(cache, run.device))
        whole.append(gradients(module))
    off = float((whole[0] - whole[1]).norm() / whole[1].norm())
    same = bool(torch.equal(found[0], found[1]))
    dropped = float((found[0] - whole[1]).norm() / whole[1].norm())
    numbers = {"parts_off": off, "same_bits_twice": same, "dropout_changes": dropped}
    return refuse(off < 1e-3 and same and dropped > 1e-3, numbers)


def bf16_gradients(run: Run) -> dict[str, Any]:
    """Gradients of both stages in bf16 on the device against fp32 on the CPU."""
    numbers: dict[str, float] = {}
    sequences = texts(6, 64, seed=6)
    for stage in ("stage 1", "stage 2", "stage 2, packed"):
        made = []
        for model, device in zip(
            twins(run, "bf16", LoraConfig(dropout=0.0)), ("cpu", run.device), strict=True
        ):
            if stage == "stage 1":
                module: nn.Module = BiEncoder(model, "last").train()
                loss = stage1_loss(module, device)
            else:
                module = _CausalLm(model).train()
                loss = _answer_loss(module, sequences, device, packed=stage.endswith("packed"))
            loss.backward()
            made.append(gradients(module))
        numbers[stage] = float(functional.cosine_similarity(made[0], made[1], dim=0))
    return refuse(min(numbers.values()) > GRADIENT_COSINE, {"cosine": numbers})


def _answer_loss(
    module: nn.Module, sequences: list[list[int]], device: str, *, packed: bool
) -> Tensor:
    rows = [sequences[n] + sequences[n + 1] for n in range(0, len(sequences), 2)]
    ids, mask = pad_right(rows if packed else sequences, 0)
    segments = mask.clone()
    if packed:
        for row, first in enumerate(sequences[::2]):
            segments[row, len(first) :] *= 2
    labels = torch.where(mask > 0, ids, -100)
    labels[:, :8] = -100
    if packed:  # a sequence's first token is nobody's answer
        for row, first in enumerate(sequences[::2]):
            labels[row, len(first)] = -100
    places = (x.to(device) for x in (ids, segments, labels))
    return answer_loss_at(module, *places, normaliser=100.0).loss


def generation(run: Run) -> dict[str, Any]:
    """Greedy tokens in fp32 on the device: those of the CPU, and the same alone and in a batch."""
    from transformers import GenerationConfig

    cpu, other = twins(run, "fp32")
    rows = texts(4, 24, seed=7)
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    plan = GenerationConfig(do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=1)  # type: ignore[no-untyped-call]

    def new_tokens(model: Any, device: str, chosen: slice, cut: int = 0) -> Tensor:
        found: Tensor = model.generate(
            input_ids=ids[chosen, cut:].to(device),
            attention_mask=mask[chosen, cut:].to(device),
            generation_config=plan,
        )
        return found[:, width - cut :].cpu()

    wanted = new_tokens(cpu, "cpu", slice(None))
    found = new_tokens(other, run.device, slice(None))
    alone = new_tokens(other, run.device, slice(0, 1), width - len(rows[0]))
    share = float((wanted == found).float().mean())
    same = bool((alone[0] == found[0, : alone.shape[1]]).all())
    return refuse(share == 1.0 and same, {"same_as_cpu": share, "alone_as_in_batch": same})


def out_of_memory(run: Run) -> dict[str, Any]:
    """Where a batch does not fit, it is halved and the vectors are the same."""
    if run.device != "cuda":
        return {"status": "skipped", "because": "a CPU has no limit of its own"}
    model = random_model(SHAPES["135M"], "bf16", run.device)
    module = BiEncoder(model, "last").eval()
    rows = [[7] * 256 for _ in range(512)]

    def forward(some: list[list[int]]) -> Tensor:
        ids, mask = (x.to(run.device) for x in pad_right(some, 0))
        found: Tensor = module(ids, mask)
        return found

    plain = encode_in_batches(rows, forward, module.dimension, 8192)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 1.0e9
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        stats = EncodeStats()
        halved = encode_in_batches(rows, forward, module.dimension, 131_072, stats)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    away = cosines(torch.from_numpy(plain), torch.from_numpy(halved))
    numbers = {"halvings": stats.halvings, **away}
    return refuse(stats.halvings > 0 and away["highest"] < 1 - COSINE, numbers)


def zero_stages(run: Run) -> dict[str, Any]:
    """DeepSpeed, one rank: a step under each ZeRO stage, its state taken and put back; in bf16 but
    for stage 0, which the config refuses.
    """
    try:
        from invar_ray.training.engine import Engine, init_distributed
    except ImportError as error:
        return {"status": "skipped", "because": str(error)}
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29541", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"
    )
    init_distributed(run.device == "cuda")
    numbers: dict[str, Any] = {}
    for stage in range(4):
        precision = "bf16" if stage else "fp32"
        _, model = twins(run, precision, LoraConfig(dropout=0.0))
        module = BiEncoder(model, "last").train()
        engine = Engine(
            module, zero_stage=stage, precision=precision, weight_decay=0.0, max_grad_norm=1.0
        )
        engine.backward(stage1_loss(engine, run.device))
        norm = engine.step(1e-3)
        state = engine.state()
        engine.load_state(state)
        again = engine.state()
        same = all(
            torch.equal(state.moments[key][name], again.moments[key][name])
            for key in state.moments
            for name in state.moments[key]
        )
        numbers[f"zero {stage}"] = {"norm": norm, "state_comes_back": same}
        if not (same and math.isfinite(norm) and state.adam_step == 1):
            numbers["status"] = "failed"
    return numbers


CORRECTNESS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "machine": machine,
    "vectors": vectors,
    "merged adapter": merged,
    "losses": losses,
    "GradCache": gradcache,
    "gradients in bf16": bf16_gradients,
    "generation": generation,
    "out of memory": out_of_memory,
    "ZeRO stages": zero_stages,
}


# --- speed ---


def _timed(run: Run, work: Callable[[], object]) -> float:
    """Seconds of one call: the mean of what fits into four seconds, after one that is not
    counted.
    """
    most_s = 0.1 if run.tiny else 4.0
    work()
    run.synchronize()
    started, count = time.perf_counter(), 0
    while count == 0 or (time.perf_counter() - started < most_s and count < 20):
        work()
        run.synchronize()
        count += 1
    return (time.perf_counter() - started) / count


def _flops(shape: PretrainedConfig) -> float:
    """Operations of a token through all layers, forward."""
    found = meta.weigh(shape)
    return 2.0 * found.layer * found.layers


def _row(
    run: Run, tokens: int, seconds: float, flops: float, predicted: float, weights: int
) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "tokens_per_s": round(tokens / seconds),
        "tflops": round(flops / seconds / 1e12, 3),
        "share_of_measured_rate": round(flops / seconds / run.rate, 3) if run.rate else None,
    }
    if run.device == "cuda":
        numbers |= {
            "peak_gb": round(run.peak() / 1e9, 2),
            "ledger_gb": round((predicted + weights) / 1e9, 2),
        }
    return numbers


def encoding(shape: PretrainedConfig, tokens: int, width: int) -> Callable[[Run], dict[str, Any]]:
    """Passages through the bi-encoder in bf16."""

    def check(run: Run) -> dict[str, Any]:
        rows = max(1, tokens // width)
        module = BiEncoder(random_model(shape, "bf16", run.device), "last").eval()
        ids = torch.ones(rows, width, dtype=torch.long, device=run.device)
        run.forget()
        with torch.inference_mode():
            seconds = _timed(run, lambda: module(ids, torch.ones_like(ids)))
        layers = int(shape.num_hidden_layers)
        peak = meta.encoding_peak(shape, rows, width, precision="bf16", layers=layers)
        weights = 2 * meta.weigh(shape).whole
        return _row(run, rows * width, seconds, rows * width * _flops(shape), peak, weights)

    return check


def training(
    shape: PretrainedConfig, tokens: int, width: int, *, recompute: bool
) -> Callable[[Run], dict[str, Any]]:
    """One pass of stage 1 with its graph, forward and backward, in bf16: a part of GradCache."""

    def check(run: Run) -> dict[str, Any]:
        rows, lora = max(1, tokens // width), LoraConfig()
        model = random_model(shape, "bf16", run.device)
        if recompute:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        adapted = new_adapter(model, lora, SEED).to(torch.bfloat16).to(run.device)
        module = BiEncoder(adapted.get_base_model(), "last").train()
        ids = torch.ones(rows, width, dtype=torch.long, device=run.device)
        run.forget()
        seconds = _timed(run, lambda: module(ids, torch.ones_like(ids)).sum().backward())
        # Forward, backward to the inputs of a frozen base, and what is run again.
        flops = rows * width * _flops(shape) * (3 if recompute else 2)
        peak = meta.stage1_peak(
            shape,
            lora,
            rows,
            width,
            precision="bf16",
            layers=int(shape.num_hidden_layers),
            projection=None,
            recompute=recompute,
        )
        return _row(run, rows * width, seconds, flops, peak, 2 * meta.weigh(shape).whole)

    return check


def answering(shape: PretrainedConfig, rows: int, width: int) -> Callable[[Run], dict[str, Any]]:
    """Prompts continued by 32 tokens, greedily, in bf16."""

    def check(run: Run) -> dict[str, Any]:
        new = 4 if run.tiny else 32
        model = random_model(shape, "bf16", run.device)
        ids = torch.ones(rows, width, dtype=torch.long, device=run.device)

        def work() -> None:
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )

        run.forget()
        seconds = _timed(run, work)
        cache = rows * (width + new) * meta.weigh(shape).cache * 2
        layers = int(shape.num_hidden_layers)
        peak = cache + meta.encoding_peak(shape, rows, width, precision="bf16", layers=layers)
        flops = rows * (width + new) * _flops(shape)
        numbers = _row(run, rows * new, seconds, flops, peak, 2 * meta.weigh(shape).whole)
        return numbers | {"answers_per_s": round(rows / seconds, 2)}

    return check


def speed(*, tiny: bool) -> dict[str, Callable[[Run], dict[str, Any]]]:
    """The rows of speed, those that matter most first."""
    found: dict[str, Callable[[Run], dict[str, Any]]] = {}
    shapes = {"tiny": SMALL} if tiny else dict(reversed(SHAPES.items()))
    scale = 64 if tiny else 1
    width = 64 if tiny else 256
    for name, shape in shapes.items():
        for tokens, recompute in ((16_384, True), (8_192, True), (4_096, False)):
            label = f"train {name}, {tokens // scale} tokens{', recomputed' if recompute else ''}"
            found[label] = training(shape, tokens // scale, width, recompute=recompute)
        for tokens in (16_384, 65_536):
            found[f"encode {name}, {tokens // scale} tokens"] = encoding(
                shape, tokens // scale, width
            )
        for rows in (1, 8, 32):
            found[f"answer {name}, batch {rows}"] = answering(shape, rows, 32 if tiny else 1024)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; 1 where one of correctness failed."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file, written after every row")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--seconds", type=float, default=440.0, help="begin nothing after these")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --tiny tries the script itself")
    run = Run(given.device, given.tiny, given.out, time.monotonic() + given.seconds)
    passed = True
    for name, check in (CORRECTNESS | speed(tiny=given.tiny)).items():
        if given.only in name:
            passed = run.add(name, check) and passed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
