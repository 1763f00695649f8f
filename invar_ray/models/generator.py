"""Prompts in, answers out: greedy or seeded generation with a causal language model, in batches or streamed.

Shape legend: B prompts · T tokens (prompts are padded on the left) · V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from invar_ray.errors import ModelError, RequestError
from invar_ray.models.decoding import Cancelled, QueueStreamer, StopStrings, TokenPicker, first_stop, steady


@dataclass(frozen=True, slots=True)
class Generation:
    """One continuation.

    Attributes:
        text: without special tokens, outer whitespace, the stop string and what follows it.
        token_logprobs: natural-log probability (nats) of each generated token, the end token included, under the
            model's own distribution (before any temperature).
        num_tokens: number of generated tokens, equal to ``len(token_logprobs)``.
        finish: why it ended: the end token, a stop string, or ``max_new_tokens``.
    """

    text: str
    token_logprobs: list[float]
    num_tokens: int
    finish: Literal["eos", "stop", "length"] = "length"

    @property
    def confidence(self) -> float | None:
        """Mean log-probability of the tokens in nats; ``None`` without tokens."""
        return sum(self.token_logprobs) / len(self.token_logprobs) if self.token_logprobs else None


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt that text is to follow: with the tokenizer's start token, without a closing end token.

    Training and serving both encode with this, so that a model sees at answer time what it saw in training.  A
    tokenizer that closes texts (``[CLS] .. [SEP]``) would tell the model that everything was already said.
    """
    ids: list[int] = list(tokenizer(prompt, add_special_tokens=True, truncation=False, verbose=False)["input_ids"])
    closing = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    # A text's own tokens never end in a special token, so this takes only what the tokenizer's template added.
    while ids and ids[-1] in closing:
        ids.pop()
    return ids


class Generator:
    """Generation with a causal language model whose adapter, if any, is already on it and stays on it.

    Results do not depend on what else is in the batch (up to floating-point rounding), nor on the global random state.
    ``generate`` and ``stream`` may run in several threads at once: nothing of the model is switched.

    Args:
        model: a Hugging Face causal LM.  Its own ``generation_config`` is replaced: decoding settings that came with a
            checkpoint (temperatures, penalties) would mix with the ones given here.
        tokenizer: its tokenizer; the end token is ``eos``, or ``sep`` where there is none.
        max_context: most tokens of prompt and answer together; ``None`` takes the model's positions.
        version: a name or fingerprint that answers of a service carry.

    Raises:
        ModelError: if model, tokenizer and ``max_context`` do not fit each other.
    """

    def __init__(self, model: Any, tokenizer: Any, max_context: int | None = None, *, version: str = "") -> None:
        positions = getattr(model.config, "max_position_embeddings", None)
        context = positions if max_context is None else max_context
        if context is None:
            raise ModelError("the model does not say how many positions it has", action="give max_context")
        if context < 2 or (positions is not None and context > positions):
            raise ModelError(
                f"max_context is {context}",
                expected=f"between 2 and the model's {positions} positions",
                action="lower max_context or use a model with a longer context",
            )
        self._eos_ids = _end_tokens(model, tokenizer)
        rows = model.get_input_embeddings().weight.shape[0]
        if rows and max(self._eos_ids) >= rows:
            raise ModelError(
                f"the tokenizer's end token is number {max(self._eos_ids)}, the model has {rows} token embeddings",
                action="use the tokenizer that belongs to the model",
            )
        self.model, self.tokenizer, self.version = model.eval(), tokenizer, version
        self.max_context: int = int(context)
        pad = tokenizer.pad_token_id
        self._pad_id: int = pad if pad is not None else self._eos_ids[0]
        model.generation_config = GenerationConfig(
            do_sample=False, num_beams=1, eos_token_id=self._eos_ids, pad_token_id=self._pad_id
        )

    def count_tokens(self, text: str) -> int:
        """Tokens that ``text`` takes as a prompt, the start token included."""
        return len(encode_prompt(self.tokenizer, text))

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Generation]:
        """Continue each prompt; all of them in one batch.

        Args:
            prompts: B texts.
            max_new_tokens: longest continuation in tokens.
            stop: strings that end a continuation where they first occur in it.
            temperature: 0 takes the likeliest token (greedy); above 0 samples from softmax(logits / temperature).
            seed: of the sampling.  The draw depends on seed and prompt only, not on the batch.

        Raises:
            RequestError: if a prompt is empty, or does not fit the context together with ``max_new_tokens``.
        """
        if not prompts:
            return []
        _check_options(max_new_tokens, stop, temperature)
        encoded = [self._encode(prompt, max_new_tokens) for prompt in prompts]
        criteria = [StopStrings(self._decode, tuple(stop), max(map(len, encoded)))] if stop else []
        ids, logprobs = self._run(encoded, max_new_tokens, temperature, seed, criteria, None)
        return [self._finish(ids[row], logprobs[row], tuple(stop)) for row in range(len(prompts))]

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Continue one prompt and yield its text in pieces that add up to what :meth:`generate` returns.

        The model runs in a thread of its own; what it raises is raised here, and closing the iterator (or leaving the
        loop) stops it within one token.

        Raises:
            RequestError: at the call, not at the first piece; see :meth:`generate`.
        """
        _check_options(max_new_tokens, stop, temperature)
        encoded = self._encode(prompt, max_new_tokens)
        return self._stream(encoded, max_new_tokens, tuple(stop), temperature, seed)

    def _stream(
        self, encoded: list[int], max_new_tokens: int, stop: tuple[str, ...], temperature: float, seed: int
    ) -> Iterator[str]:
        streamer, cancelled = QueueStreamer(), threading.Event()
        criteria: list[StoppingCriteria] = [Cancelled(cancelled)]
        if stop:
            criteria.append(StopStrings(self._decode, stop, len(encoded)))

        def work() -> None:
            try:
                self._run([encoded], max_new_tokens, temperature, seed, criteria, streamer)
                streamer.items.put(None)
            except BaseException as error:  # handed to the consumer, which is waiting
                streamer.items.put(error)

        thread = threading.Thread(target=work, name="generate", daemon=True)
        thread.start()
        ids: list[int] = []
        sent = ""
        try:
            while True:
                item = streamer.items.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    break
                ids.append(item)
                safe = steady(self._decode(ids), stop)
                if len(safe) > len(sent) and safe.startswith(sent):
                    yield safe[len(sent) :]
                    sent = safe
            text = self._finish(ids, [0.0] * len(ids), stop).text
            if len(text) > len(sent):
                yield text[len(sent) :]
        finally:
            cancelled.set()
            thread.join()

    @torch.inference_mode()
    def _run(
        self,
        encoded: list[list[int]],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        criteria: list[Any],
        streamer: BaseStreamer | None,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """New token ids and their log-probabilities per row; what follows a row's end is not yet cut."""
        width = max(map(len, encoded))
        device = self.model.get_input_embeddings().weight.device
        input_ids = torch.tensor([[self._pad_id] * (width - len(ids)) + ids for ids in encoded])  # [B, T]
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded])  # [B, T]
        picker = TokenPicker(temperature, seed, encoded)
        output = self.model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            logits_processor=LogitsProcessorList([picker]),
            stopping_criteria=StoppingCriteriaList(criteria),
            streamer=streamer,
            return_dict_in_generate=False,
            use_cache=True,
        )  # [B, T + new]
        return output[:, width:].tolist(), torch.stack(picker.logprobs, dim=1).tolist()

    def _encode(self, prompt: str, max_new_tokens: int) -> list[int]:
        ids = encode_prompt(self.tokenizer, prompt)
        if not ids:
            raise RequestError("the prompt is empty", expected="at least one token")
        if len(ids) + max_new_tokens > self.max_context:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and {max_new_tokens} are kept for the answer: "
                f"{len(ids) + max_new_tokens - self.max_context} too many",
                expected=f"at most {self.max_context} together",
                action="shorten the question, give fewer passages or ask for a shorter answer",
            )
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        shown = [token for token in ids if token not in self._eos_ids]  # not every end token is marked as special
        # Clean-up rewrites text across tokens ("don ' t" -> "don't"): without it, text only ever grows at its end,
        # which streaming relies on.
        text = self.tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _finish(self, ids: list[int], logprobs: list[float], stop: tuple[str, ...]) -> Generation:
        finish: Literal["eos", "stop", "length"] = "length"
        end = next((index + 1 for index, token in enumerate(ids) if token in self._eos_ids), None)
        if end is not None:
            ids, finish = ids[:end], "eos"
        text = self._decode(ids)
        if first_stop(text, stop) is not None:
            # The shortest run of tokens that holds the stop string, so that the batch does not change the count.
            count = next(n for n in range(1, len(ids) + 1) if first_stop(self._decode(ids[:n]), stop) is not None)
            ids, finish = ids[:count], "stop"
            text = self._decode(ids)
            text = text[: first_stop(text, stop)]
        return Generation(text.strip(), logprobs[: len(ids)], len(ids), finish)


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    own = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if own is None:
        raise ModelError("the tokenizer has neither an end token (eos) nor a separator (sep)", action="set eos_token")
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    # Chat models end a turn with other tokens as well and list them all in their generation config.
    extra = [int(token) for token in stated] if isinstance(stated, (list, tuple)) and own in stated else []
    return [int(own), *(token for token in extra if token != own)]


def _check_options(max_new_tokens: int, stop: Sequence[str], temperature: float) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if isinstance(stop, str) or any(not text for text in stop):
        raise ValueError(f"stop must be a sequence of non-empty strings, got {stop!r}")
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or above, got {temperature}")
