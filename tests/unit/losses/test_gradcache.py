"""GradCache: the gradients of the whole batch from chunks of it, dropout included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from invar_ray.losses.gradcache import RepresentationCache
from invar_ray.models.batching import pad_right

LENGTHS = [3, 9, 1, 5, 9, 2, 7]


class Encoder(nn.Module):
    """Embedding, dropout, a layer, masked mean; notes what it encoded."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words, self.layer, self.dropout = (
            nn.Embedding(30, 6),
            nn.Linear(6, 4),
            nn.Dropout(dropout),
        )
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = torch.tanh(self.layer(self.dropout(self.words(ids))))
        found = nn.functional.normalize(
            (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1
        )
        self.seen.append((ids, found.detach().clone()))
        return found

    def gradient(self) -> Tensor:
        found = torch.cat(
            [
                p.grad.flatten() if p.grad is not None else torch.zeros(p.numel())
                for p in self.parameters()
            ]
        )
        self.zero_grad()
        return found


def batch(lengths: list[int] = LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return pad_right([torch.randint(30, (n,), generator=generator).tolist() for n in lengths], 0)


def loss_of(forward: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Couples all rows of two calls, as in-batch negatives do."""
    queries, passages = forward(*batch()), forward(*batch(seed=1))
    return nn.functional.cross_entropy(queries @ passages.T / 0.1, torch.arange(len(LENGTHS)))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("tokens", [1, 9, 18, 30, 63])
@pytest.mark.parametrize("more", [0, 3])
def test_gradients_equal_those_without_it(tokens: int, more: int) -> None:
    encoder = Encoder()
    plain = loss_of(encoder)
    plain.backward()
    wanted = encoder.gradient()
    # other ranks have more chunks
    cache = RepresentationCache(encoder, tokens, agree=lambda count: count + more)
    loss = loss_of(cache)
    cache.backward(loss)
    torch.testing.assert_close(loss, plain)
    assert relative(encoder.gradient(), wanted) < 2e-6
    assert wanted.abs().max() > 1e-2


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(1, 40))
def test_any_lengths_and_budget(lengths: list[int], tokens: int) -> None:
    encoder, (ids, mask) = Encoder(), batch(lengths)
    weights = torch.arange(1.0, len(lengths) + 1)[:, None]
    (encoder(ids, mask) * weights).sum().backward()
    wanted = encoder.gradient()
    encoder.seen.clear()
    cache = RepresentationCache(encoder, tokens)
    cache.backward((cache(ids, mask) * weights).sum())
    assert relative(encoder.gradient(), wanted) < 1e-5
    assert (
        all(len(rows) == 1 or rows.numel() <= tokens for rows, _ in encoder.seen)
        or len(encoder.seen) == 1
    )


def test_the_second_forward_repeats_the_dropout_of_the_first() -> None:
    encoder = Encoder(dropout=0.5)
    cache = RepresentationCache(encoder, 18)
    torch.manual_seed(11)
    loss = loss_of(cache)
    first, encoder.seen = encoder.seen, []
    after = torch.get_rng_state()
    cache.backward(loss)
    assert len(first) == len(encoder.seen) > 4
    for (ids, vectors), (ids_again, again) in zip(first, encoder.seen, strict=True):
        assert torch.equal(ids, ids_again)
        assert torch.equal(vectors, again)
    assert torch.equal(torch.get_rng_state(), after), (
        "the replay moved the random numbers of what follows"
    )


def test_with_dropout_the_gradient_is_that_of_the_loss_that_was_computed() -> None:
    """One chunk per row, so that a plain loop over rows draws the same masks."""
    encoder = Encoder(dropout=0.5)
    torch.manual_seed(11)
    cache = RepresentationCache(encoder, 1)
    cached = loss_of(cache)
    cache.backward(cached)
    found = encoder.gradient()

    def row_by_row(ids: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(1).tolist()
        order = sorted(range(len(ids)), key=lambda row: (-lengths[row], row))
        parts = {
            row: encoder(ids[row : row + 1, : lengths[row]], mask[row : row + 1, : lengths[row]])
            for row in order
        }
        return torch.cat([parts[row] for row in range(len(ids))])

    torch.manual_seed(11)
    plain = loss_of(row_by_row)
    plain.backward()
    torch.testing.assert_close(cached, plain)
    assert relative(found, encoder.gradient()) < 2e-6


def test_one_chunk_is_encoded_once() -> None:
    encoder = Encoder()
    cache = RepresentationCache(encoder, 1000)
    cache.backward(loss_of(cache))
    assert len(encoder.seen) == 2


def test_padding_is_counted_as_the_chunks_hold_it() -> None:
    cache = RepresentationCache(Encoder(), 18)
    cache(*batch([9, 9, 1, 1]))
    assert cache.padded_tokens == 18 + 2
    with pytest.raises(ValueError, match="tokens_per_chunk: got 0"):
        RepresentationCache(Encoder(), 0)
