"""Memory of one base with two adapters against two copies of it, and what both adapters give at the
same time.

    .venv/bin/python -m benchmarks.shared_base                   # a random base of SmolLM2-135M's
    shape .venv/bin/python -m benchmarks.shared_base --base FOLDER     # or a real one

Each way is measured in a process of its own, after a pass through both adapters: proportional set
size (Linux) less that before loading, and bytes of all distinct tensors.  The shared way also runs
both adapters in two threads at once and compares with one after the other.

The random base is stored in bfloat16, as most are published, and loaded in float32.  Stored as it
is loaded (``--stored fp32``), its tensors stay in the file's memory map, and two copies on a CPU
share the pages all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from invar_ray.config import LoraConfig, ModelConfig
from invar_ray.models.adapters import load_adapter, new_adapter, save_adapter, share_base
from invar_ray.models.base import resolve_base
from invar_ray.models.loading import open_model

WAYS = ("bare", "shared", "copies")
NAMES = {
    "bare": "one base, no adapter",
    "shared": "one base, two adapters",
    "copies": "two copies, an adapter each",
}
INPUTS, LENGTH = 6, 128


def _loaded(source: str | Path) -> PreTrainedModel:
    return open_model(resolve_base(ModelConfig(base=str(source)), None), None)[0]


def prepare(folder: Path, base: str | None, dtype: torch.dtype) -> Path:
    """A base (a random one, where none is given) and two adapters with random weights below
    ``folder``.
    """
    source = Path(base) if base else folder / "base"
    if not base:
        torch.manual_seed(0)
        shape = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(shape).to(dtype).save_pretrained(source)
    for seed, name in enumerate(("retriever", "generator"), start=1):
        model = new_adapter(_loaded(str(source)), LoraConfig(), seed)
        draw = torch.Generator().manual_seed(seed)
        state = {
            n: 0.05 * torch.randn(p.shape, generator=draw)
            for n, p in model.named_parameters()
            if p.requires_grad
        }
        save_adapter(model, state, folder / name, str(source))
    return source


def memory() -> int:
    """Proportional set size of this process in bytes."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8")
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None, "smaps_rollup without Pss"
    return 1024 * int(found.group(1))


@torch.inference_mode()
def states(model: Any, ids: Tensor) -> Tensor:
    """What an adapter makes of a text: its last token's state [H]."""
    found: Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
    return found


def measure(way: str, source: str, folder: Path) -> dict[str, Any]:
    """Load in one way, run both adapters, and say what it took."""
    before = memory()
    base = _loaded(source)
    if way == "bare":
        trees = [base]
    elif way == "shared":
        trees = [
            load_adapter(share_base(base), folder / name) for name in ("retriever", "generator")
        ]
    else:
        trees = [
            load_adapter(base, folder / "retriever"),
            load_adapter(_loaded(source), folder / "generator"),
        ]
    draw = torch.Generator().manual_seed(0)
    texts = [
        torch.randint(10, base.config.vocab_size, (1, LENGTH), generator=draw)
        for _ in range(INPUTS)
    ]
    start = time.perf_counter()
    serial = [[states(tree, ids) for ids in texts] for tree in trees]
    result: dict[str, Any] = {
        "memory_mb": round((memory() - before) / 1e6, 1),
        "tensors_mb": round(
            sum(
                {
                    t.data_ptr(): t.nbytes for tree in trees for t in tree.state_dict().values()
                }.values()
            )
            / 1e6,
            1,
        ),
        "serial_s": round(time.perf_counter() - start, 2),
    }
    if way == "shared":
        found: list[list[Tensor]] = [[], []]
        barrier = threading.Barrier(2)

        def work(number: int) -> None:
            barrier.wait()
            found[number] = [states(trees[number], ids) for ids in texts]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        result["concurrent_s"] = round(time.perf_counter() - start, 2)
        pairs = [
            (a, b)
            for one, other in zip(serial, found, strict=True)
            for a, b in zip(one, other, strict=True)
        ]
        result["largest_difference"] = max(float((a - b).abs().max()) for a, b in pairs)
        result["between_adapters"] = min(
            float((a - b).abs().max()) for a, b in zip(*serial, strict=True)
        )
    return result


def main() -> None:
    """Measure each way in its own process and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="folder of a LLaMA-family model")
    parser.add_argument(
        "--stored",
        choices=("bf16", "fp32"),
        default="bf16",
        help="precision of the random base's file",
    )
    parser.add_argument("--out", default="runs/benchmarks/shared_base.json")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.base, options.folder)))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="shared-base-") as name:
        source = prepare(
            Path(name), options.base, torch.bfloat16 if options.stored == "bf16" else torch.float32
        )
        for way in WAYS:
            command = [
                sys.executable,
                "-m",
                "benchmarks.shared_base",
                "--way",
                way,
                "--folder",
                name,
            ]
            output = subprocess.run(
                [*command, "--base", str(source)], check=True, capture_output=True, text=True
            ).stdout
            results[NAMES[way]] = json.loads(output.splitlines()[-1])
    for way, numbers in results.items():
        print(f"{way:30}" + "  ".join(f"{key} {value:g}" for key, value in numbers.items()))
    shared, copies = (results[NAMES[way]]["memory_mb"] for way in ("shared", "copies"))
    print(f"saved: {copies - shared:.0f} MB of {copies:.0f} ({1 - shared / copies:.1%})")
    results |= {
        "load_average": os.getloadavg(),
        "torch": torch.__version__,
        "settings": vars(options),
    }
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(results, indent=1, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
