"""The two LoRA adapters.  The only file that imports PEFT.

Adapters are plain PEFT folders (``adapter_config.json``, ``adapter_model.safetensors``).  A model
tree carries one adapter and is never switched: switching is not thread-safe.  :func:`share_base`
gives a second tree over the same base tensors.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora.layer import Linear as PeftLinear
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from invar_ray.config import LoraConfig
from invar_ray.errors import ModelError
from invar_ray.models.trunk import is_causal, layer_list, lora_targets

_NAME = "default"


def new_adapter(
    base: PreTrainedModel,
    config: LoraConfig,
    seed: int,
    *,
    num_layers: int | None = None,
    first_layer: int = 0,
) -> PeftModel:
    """Put a fresh LoRA adapter on ``base`` (in place) and freeze everything else.

    Args:
        base: the model.
        config: rank, scale and target modules.
        seed: of the weights.
        num_layers: where ``base`` is only the first layers of its model: how many, so that the
            folder fits the whole model, too.
        first_layer: layers below this one (counted from 0) get none.

    Raises:
        ModelError: if the base has none of the target modules, or no layer ``first_layer``.
    """
    usual = lora_targets(base)
    targets = usual if config.target_modules is None else config.target_modules
    layers, causal = _layers(base, first_layer, num_layers), is_causal(base)
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(targets),
        task_type="CAUSAL_LM" if causal else "FEATURE_EXTRACTION",
        layers_to_transform=layers,
        # PEFT finds a layer's number by itself, unless the list of layers stands at the very top.
        layers_pattern=None if causal or layers is None else layer_list(base)[1],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return _fused(get_peft_model(base, peft_config, adapter_name=_NAME))
        except ValueError as error:
            raise ModelError(
                f"no LoRA adapter fits {type(base).__name__}: {str(error).splitlines()[0]}",
                expected=f"names of its linear layers, such as {', '.join(usual)}",
                action="set lora.target_modules to null, or to such names",
            ) from error


def _layers(base: PreTrainedModel, first: int, count: int | None) -> list[int] | None:
    """Numbers of the adapted layers; ``None`` for all."""
    if first == 0 and count is None:
        return None
    last = int(base.config.num_hidden_layers) if count is None else count
    if not 0 <= first < last:
        raise ModelError(
            f"first_layer is {first}",
            expected=f"0 to {last - 1}: {type(base).__name__} has {last} layers",
            action="lower generator.first_layer",
        )
    return list(range(first, last))


def copy_adapter(model: PeftModel, folder: Path) -> None:
    """Give a fresh adapter the weights of a PEFT folder, to be trained on.

    Raises:
        ModelError: if the folder is no PEFT folder, or its adapter has another rank, scale or other
            layers.
    """
    _check_folder(folder)
    values = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    wanted = model.peft_config[_NAME]
    pairs = {
        "rank": (values.get("r"), wanted.r),
        "alpha": (values.get("lora_alpha"), wanted.lora_alpha),
        "target_modules": (sorted(values.get("target_modules", ())), sorted(wanted.target_modules)),
    }
    other = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if other:
        raise ModelError(
            f"the adapter in {folder} has another shape than the one to be trained: "
            + ", ".join(f"lora.{name} is {pair[1]}" for name, pair in other.items()),
            expected=", ".join(f"lora.{name}={pair[0]}" for name, pair in other.items()),
            action="set retriever.lora as it was when the adapter was trained",
        )
    _same_names(model, folder)
    state = load_file(folder / "adapter_model.safetensors")
    set_peft_model_state_dict(model, state, adapter_name=_NAME)


def load_adapter(base: PreTrainedModel, folder: Path, *, merge: bool = False) -> PreTrainedModel:
    """``base`` with the adapter of ``folder``, for inference.

    Args:
        base: taken over: with ``merge`` its tensors change.
        folder: a PEFT folder.
        merge: fold the update into the weights (faster; equal up to rounding). Only on a copy that
            nothing else uses.

    Raises:
        ModelError: if the folder is no PEFT folder or does not fit the base.
    """
    model = _with_adapter(base, folder)
    plain = _merged(model, folder) if merge else model.get_base_model()
    return plain.eval()


def load_merged(
    base: PreTrainedModel,
    folder: Path,
    sample: Callable[[PreTrainedModel], Tensor],
    tolerance: float,
) -> tuple[PreTrainedModel, float]:
    """As :func:`load_adapter` with ``merge``, and proves that merging has not changed what the
    model gives.  There is one copy of the weights all the time.

    Args:
        base: taken over; nothing else may use it.
        folder: a PEFT folder.
        sample: unit rows [N, H] of some texts under a model.
        tolerance: most that the cosine of a row before with the same row after merging may fall
            below 1.

    Returns:
        The model, and the lowest of those cosines.

    Raises:
        ModelError: as :func:`load_adapter`, and if a row differs by more.
    """
    model = _with_adapter(base, folder)
    before = sample(model.get_base_model().eval())
    plain = _merged(model, folder).eval()
    lowest = float((before * sample(plain)).sum(dim=-1).min())
    if not lowest >= 1.0 - tolerance:
        raise ModelError(
            f"merging the adapter in {folder} into its base in {base.dtype} changes its outputs "
            "(lowest cosine "
            f"{lowest:.7f})",
            expected=f"cosines of at least {1.0 - tolerance:.7g}",
            action="set model.precision to fp32, or use the adapter beside its base",
        )
    return plain, lowest


def _merged(model: PeftModel, folder: Path) -> PreTrainedModel:
    """Raises :class:`ModelError` where PEFT cannot merge, or would merge shared layers twice."""
    why = "its layers are shared (layer_replication)"
    if not getattr(model.peft_config[_NAME], "layer_replication", None):
        try:
            merged: PreTrainedModel = model.merge_and_unload()
            return merged
        except (RuntimeError, NotImplementedError) as error:
            why = _brief(error)
    raise ModelError(
        f"the adapter in {folder} cannot be merged into its base: {why}",
        action="use it beside its base, in fp32 (model.precision=fp32)",
    )


def _with_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    _check_folder(folder)
    try:
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=False)
        _same_names(model, folder)
        _check_numbers(model, folder)
    except ModelError:
        raise
    except UnicodeDecodeError as error:
        raise ModelError(
            f"the adapter in {folder} cannot be read ({error})",
            action="download or export it again",
        ) from error
    except (ValueError, RuntimeError) as error:
        raise ModelError(
            f"the adapter in {folder} does not fit the base ({_brief(error)})",
            action="use the base that its adapter_config.json names",
        ) from error
    except Exception as error:  # damaged files and unknown kinds make PEFT raise nearly anything
        raise ModelError(
            f"the adapter in {folder} cannot be read ({type(error).__name__}: {_brief(error)})",
            expected="a LoRA adapter in PEFT's format, whole",
            action="download or export it again",
        ) from error
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return _fused(model)


def _check_numbers(model: PeftModel, folder: Path) -> None:
    """The adapter's weights and scales must be numbers that a model can use."""
    stored = load_file(folder / "adapter_model.safetensors")
    odd = [name for name, weight in stored.items() if not weight.is_floating_point()]
    bad = [name for name, weight in stored.items() if not bool(torch.isfinite(weight).all())]
    scales = [module.scaling for module in model.modules() if isinstance(module, PeftLinear)]
    if odd or bad or not all(math.isfinite(one) for scale in scales for one in scale.values()):
        what = f"{odd[0]} is {stored[odd[0]].dtype}" if odd else "a scale is not finite"
        raise ModelError(
            f"the adapter in {folder} is damaged: "
            + (f"{len(bad)} of its weights are not finite{_first(bad)}" if bad else what),
            expected="finite floating-point numbers",
            action="train or download it again",
        )


def _check_folder(folder: Path) -> None:
    # Never adapter_model.bin: it is a pickle.
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(
                f"{folder} has no {name}", expected="a PEFT folder with safetensors weights"
            )


class _FusedLinear(PeftLinear):
    """PEFT's linear layer with the same update in two passes less over its output.

    W x + s B (A x) becomes addmm(W x, s A x, B^T): the scale falls on the r values of A x instead
    of the layer's whole output, and the sum is part of the product.  Equal up to rounding.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = not (args or kwargs or self.disable_adapters or self.merged or self.lora_variant)
        # A bias on B is scaled like the rest of the update: PEFT's own way.
        biased = _NAME in self.lora_B and self.lora_B[_NAME].bias is not None
        if not plain or biased or list(self.active_adapters) != [_NAME]:
            found: Tensor = super().forward(x, *args, **kwargs)
            return found
        result: Tensor = self.base_layer(x)
        down, up = self.lora_A[_NAME], self.lora_B[_NAME]
        inner: Tensor = (
            down(self.lora_dropout[_NAME](x.to(down.weight.dtype))) * self.scaling[_NAME]
        )
        # ZeRO 3 gathers a weight in its own module's hooks: there the module has to be called.
        if hasattr(up.weight, "ds_id") or not result.dtype == inner.dtype == up.weight.dtype:
            return (result + up(inner)).to(result.dtype)
        rows, update = result.flatten(0, -2), inner.flatten(0, -2)
        if torch.is_grad_enabled():
            return torch.addmm(rows, update, up.weight.T).view_as(result)
        return rows.addmm_(update, up.weight.T).view_as(result)


def _fused(model: PeftModel) -> PeftModel:
    for module in model.modules():
        if type(module) is PeftLinear:  # not its kin: quantised layers keep PEFT's own way
            # PEFT makes the layers, with weights in them; it can be told another class for a new
            # adapter, but not for one that it loads.
            module.__class__ = _FusedLinear
    return model


def save_adapter(model: PeftModel, state: dict[str, Tensor], folder: Path, base_name: str) -> None:
    """Write a plain PEFT folder.

    Args:
        model: carries the adapter's configuration.
        state: the adapter's weights, complete, named as in ``model``.
        folder: created.
        base_name: recorded as ``base_model_name_or_path``.
    """
    model.peft_config[_NAME].base_model_name_or_path = base_name
    folder.mkdir(parents=True, exist_ok=True)
    # False: "auto" would look the base up on a hub, to see whether its vocabulary was resized.
    model.save_pretrained(
        str(folder), selected_adapters=[_NAME], state_dict=state, save_embedding_layers=False
    )
    nested = folder / _NAME
    if nested.is_dir():
        for path in nested.iterdir():
            shutil.move(str(path), folder / path.name)
        nested.rmdir()
    # PEFT holds the target modules as a set, whose order differs from process to process: equal
    # runs, equal files.
    description = folder / "adapter_config.json"
    values = json.loads(description.read_text(encoding="utf-8"))
    if isinstance(values.get("target_modules"), list):
        values["target_modules"].sort()
    description.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card template is empty of content


def _same_names(model: PeftModel, folder: Path) -> None:
    # PEFT loads what fits and passes over the rest in silence.
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as stored:
        given = set(stored.keys())
    wanted = set(get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False))
    # Where embeddings are adapted PEFT stores the base's own, too.
    given -= set(get_peft_model_state_dict(model, save_embedding_layers=True)) - wanted
    if given != wanted:
        missing, extra = sorted(wanted - given), sorted(given - wanted)
        raise ModelError(
            f"the adapter in {folder} does not fit the base: it lacks {len(missing)} of its weights"
            f"{_first(missing)} and brings {len(extra)} others{_first(extra)}",
            action="use the base that its adapter_config.json names",
        )


def _brief(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _first(names: list[str]) -> str:
    return f" (first: {names[0]})" if names else ""


def share_base(base: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same tensors: memory for one base, one adapter on each tree,
    served concurrently.
    """
    memo: dict[int, Tensor] = {id(parameter): parameter for parameter in base.parameters()}
    memo |= {id(buffer): buffer for buffer in base.buffers()}
    return copy.deepcopy(base, memo)
