"""Where pre-training starts: MiniLM's token embeddings, and attention heads that can already look back and copy.

A small model needs millions of tokens to find out that it can attend to the token before, and to what followed the
last time ("induction heads", arXiv 2209.11895).  Here both are written into the weights, so that training starts from
a model that copies badly instead of one that does not copy.  The idea is that of mimetic initialisation (arXiv
2305.09828), the construction is the project's own [ours]:

- After the first normalisation, one direction of MiniLM's embeddings is nearly the same for every token.  Least
  squares finds it: ``x @ constant`` is 1.00 +- 0.01 at MiniLM's width, +- 0.10 on 256 principal directions.  Queries
  and keys made from it alone depend on positions only, through RoPE, so a head can attend to the token ``n`` back
  (weight 0.73 on average), or softly to some ten tokens back (a *bag*).
- What such heads read they write into a subspace of their own.  Later heads compare with it: *induction* heads look
  for the place whose preceding token is the current one, *bag* heads for the place whose surroundings resemble the
  present ones, *same* heads for the same token.  They copy a quarter of the embedding each, unchanged, so that what
  they find can be said by the tied output layer.

Shapes: H hidden size, D size of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

ROPE_THETA = 100_000.0
"""Slower rotations than LLaMA's 10,000, so that more pairs of a head's dimensions can compare over 150 tokens."""
_NORM = 11.0  # mean norm of an embedding, near MiniLM's own
_PEAK = 80.0  # nats by which an exact look-back prefers its place, times 8 / sqrt(D)
_BAG_PEAK = 9.0
_MATCH = 30.0  # nats of a perfect match
_OWN_LOGIT = 16.0

Head = tuple[str, int, int]
"""Kind (``back``, ``bag``, ``induction``, ``alike``, ``same``), what it looks at (tokens back), which quarter it
copies."""

PLAN: tuple[tuple[Head, ...], ...] = (
    (("back", 1, 0), ("back", 2, 0), ("bag", 4, 0), ("bag", 9, 0)),
    (("induction", 1, 0), ("alike", 4, 1), ("alike", 9, 2), ("same", 0, 3)),
    (("induction", 1, 1), ("alike", 9, 3), ("same", 0, 2), ("back", 1, 0)),
    (("induction", 1, 2), ("induction", 1, 3), ("alike", 9, 0), ("same", 0, 1)),
    (("induction", 1, 3), ("induction", 1, 0), ("alike", 4, 2), ("same", 0, 3)),
    (("induction", 1, 1), ("induction", 1, 2), ("induction", 1, 3), ("same", 0, 0)),
)


@dataclass(frozen=True)
class Shape:
    """Of the base; the number of layers and heads is the plan's."""

    width: int = 256
    intermediate_size: int = 384
    max_positions: int = 2048


def start_model(
    embeddings: Tensor, pad_token_id: int, eos_token_id: int, *, seed: int, shape: Shape | None = None
) -> LlamaForCausalLM:
    """A LLaMA that copies.

    Args:
        embeddings: [V, H0] of the kept tokens; they are rotated onto their first ``shape.width`` principal directions.
        pad_token_id: row of the padding token.
        eos_token_id: row of the end token.
        seed: of the random subspaces.
        shape: by default :class:`Shape`.
    """
    shape = shape or Shape()
    directions = torch.linalg.svd(embeddings, full_matrices=False)[2]
    table = embeddings @ directions[: shape.width].T
    table = table * (_NORM / table.norm(dim=1).mean())  # [V, H]
    model_config = LlamaConfig(
        vocab_size=table.shape[0],
        hidden_size=shape.width,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=len(PLAN),
        num_attention_heads=len(PLAN[0]),
        num_key_value_heads=len(PLAN[0]),
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(model_config).float()
        model.model.embed_tokens.weight.copy_(table)
        writer = _HeadWriter(table, shape.width // len(PLAN[0]))
        for layer, heads in zip(model.model.layers, PLAN, strict=True):
            attention = layer.self_attn
            query, key, value, output = writer.layer(heads, first=layer is model.model.layers[0])
            attention.q_proj.weight.copy_(query)
            attention.k_proj.weight.copy_(key)
            attention.v_proj.weight.copy_(value)
            attention.o_proj.weight.copy_(output)
            layer.mlp.gate_proj.weight.normal_(0, 0.04)
            layer.mlp.up_proj.weight.normal_(0, 0.04)
            layer.mlp.down_proj.weight.normal_(0, 0.003)
        # The last gain scales the tied head's logits: a token's own logit would otherwise be in the hundreds.
        model.model.norm.weight.fill_(_OWN_LOGIT / (math.sqrt(shape.width) * _NORM))
    return model


class _HeadWriter:
    """Makes the four projections of a layer, head by head."""

    def __init__(self, table: Tensor, head_size: int) -> None:
        width = table.shape[1]
        self.width, self.size = width, head_size
        normed = table / table.pow(2).mean(dim=1, keepdim=True).sqrt()
        self.constant = torch.linalg.lstsq(normed, torch.ones(len(normed), 1)).solution[:, 0]  # [H]
        mean = normed.mean(dim=0)
        self.mean = mean / mean.norm()
        self.scale = _NORM / math.sqrt(width)  # what a normalised vector is multiplied by to be like an embedding
        self.angles = 1.0 / (ROPE_THETA ** (torch.arange(0, head_size, 2).float() / head_size))  # [D / 2] per token
        slow = [pair for pair in range(head_size // 2) if self.angles[pair] < 1 / 150]
        # Dimensions that hardly turn over a prompt: what is compared in them is compared at any distance.
        self.still = slow + [pair + head_size // 2 for pair in slow]
        self.quarters = _orthonormal(width, width)
        self.spaces = {back: (self._reader(head_size), _orthonormal(width, head_size)) for back in (1, 2, 4, 9)}
        self.token = self._reader(len(self.still))

    def layer(self, heads: tuple[Head, ...], *, first: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value [H, H] (rows are heads' dimensions) and output [H, H] of one layer."""
        query, key = 0.02 * torch.randn(self.width, self.width), 0.02 * torch.randn(self.width, self.width)
        value, output = torch.zeros(self.width, self.width), torch.zeros(self.width, self.width)
        for number, (kind, back, quarter) in enumerate(heads):
            rows = slice(number * self.size, (number + 1) * self.size)
            if kind in ("back", "bag"):
                looks_from, looks_at = self._positional(kind, back)
                query[rows] += looks_from
                key[rows] += looks_at
                fresh = (_orthonormal(self.size, self.width), _orthonormal(self.width, self.size))
                value[rows], written = self.spaces[back] if first else fresh
                # The mean of ten unlike vectors is short.
                output[:, rows] = written * self.scale * ((2.2 if kind == "bag" else 1.0) if first else 0.3)
                continue
            asks, offers = self._content(kind, back)
            query[rows] += asks
            key[rows] += offers
            value[rows] = self.quarters[quarter * self.size : (quarter + 1) * self.size]
            strength = {"induction": 2.0, "alike": 1.0, "same": 0.5}[kind]
            output[:, rows] = value[rows].T * self.scale * strength
        return query, key, value, output

    def _positional(self, kind: str, back: int) -> tuple[Tensor, Tensor]:
        """[D, H] twice: the attention peaks ``back`` tokens back, whatever the tokens are."""
        # Fast pairs tell neighbours apart; slower ones alone make a broad peak.
        pairs = list(range(8)) if kind == "back" else [2, 3, 4] if back < 6 else [4, 5, 6]
        weight = torch.zeros(self.size // 2)
        weight[pairs] = 1.0
        turn = -back * self.angles
        key = torch.cat([weight, torch.zeros_like(weight)])
        query = torch.cat([weight * torch.cos(turn), weight * torch.sin(turn)])
        peak = _PEAK if kind == "back" else _BAG_PEAK
        amplitude = math.sqrt(peak * math.sqrt(self.size) / len(pairs))
        return torch.outer(query, self.constant) * amplitude, torch.outer(key, self.constant) * amplitude

    def _content(self, kind: str, back: int) -> tuple[Tensor, Tensor]:
        """[D, H] twice: query and key agree where what they read is alike."""
        asks, offers = torch.zeros(self.size, self.width), torch.zeros(self.size, self.width)
        match = _MATCH * math.sqrt(self.size) / len(self.still)
        if kind == "same":
            asks[self.still] = offers[self.still] = self.token
            return asks * math.sqrt(match / 2), offers * math.sqrt(match / 2)
        mixed = _orthonormal(len(self.still), self.size)
        read, written = self.spaces[back]
        offers[self.still] = mixed @ written.T
        asks[self.still] = mixed @ (read if kind == "induction" else written.T)
        return asks * math.sqrt(match), offers * math.sqrt(match)

    def _reader(self, rows: int) -> Tensor:
        """[rows, H] orthonormal, blind to the direction that all tokens share."""
        matrix = _orthonormal(rows, self.width)
        return matrix - torch.outer(matrix @ self.mean, self.mean)


def _orthonormal(rows: int, columns: int) -> Tensor:
    matrix = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns)))[0]
    return matrix if rows >= columns else matrix.T
