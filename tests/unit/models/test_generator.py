"""Generation against manual forward passes, and its paths (batch, one by one, stream) against each
other.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from invar_ray.config import TinyConfig
from invar_ray.errors import ModelError, RequestError
from invar_ray.models.generator import Generation, Generator, encode_prompt
from invar_ray.models.tiny import build_tiny

PROMPTS = [
    "The capital of France",
    "Rain",
    "A lighthouse stands on the northern cape and warns the ships of",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tiny(TinyConfig(num_layers=1, num_heads=2, intermediate_size=16), seed=0)[1]


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.6,  # peaked enough that greedy choices differ between prompts
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def generator(model: LlamaForCausalLM, tokenizer: Any) -> Generator:
    return Generator(model, tokenizer)


def manual_greedy(
    model: LlamaForCausalLM, ids: list[int], steps: int
) -> tuple[list[int], list[float]]:
    """Greedy decoding without a cache, padding or generate()."""
    new: list[int] = []
    logprobs: list[float] = []
    with torch.no_grad():
        for _ in range(steps):
            row = model(torch.tensor([ids + new])).logits[0, -1].log_softmax(-1)
            new.append(int(row.argmax()))
            logprobs.append(float(row[new[-1]]))
    return new, logprobs


def test_equals_a_manual_forward_pass(
    generator: Generator, model: LlamaForCausalLM, tokenizer: Any
) -> None:
    for prompt, result in zip(PROMPTS, generator.generate(PROMPTS, max_new_tokens=6), strict=True):
        ids, logprobs = manual_greedy(model, encode_prompt(tokenizer, prompt), 6)
        assert (
            result.text
            == tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            ).strip()
        )
        assert result.token_logprobs == pytest.approx(logprobs, abs=1e-4)
        assert result.num_tokens == 6
        assert result.finish == "length"
        assert result.confidence == pytest.approx(sum(logprobs) / 6, abs=1e-4)


def test_the_head_sees_states_in_one_block(model: LlamaForCausalLM, generator: Generator) -> None:
    """Else torch copies its weights once a prompt."""
    seen: list[bool] = []
    handle = model.lm_head.register_forward_pre_hook(
        lambda _, states: seen.append(states[0].is_contiguous())
    )
    generator.generate(["one two", "three four five", "six"], max_new_tokens=2)
    handle.remove()
    assert seen == [True, True]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_batch_equals_one_by_one(generator: Generator, temperature: float) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": temperature, "seed": 5}
    together = generator.generate(PROMPTS, **options)
    apart = [generator.generate([prompt], **options)[0] for prompt in PROMPTS]
    assert [result.text for result in together] == [result.text for result in apart]
    assert len({result.text for result in together}) == len(PROMPTS)
    for one, other in zip(together, apart, strict=True):
        assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-4)


def test_sampling_follows_its_seed_and_leaves_the_global_random_state(generator: Generator) -> None:
    state = torch.random.get_rng_state()
    first = generator.generate(PROMPTS, max_new_tokens=8, temperature=1.5, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert generator.generate(PROMPTS, max_new_tokens=8, temperature=1.5, seed=1) == first
    assert generator.generate(PROMPTS, max_new_tokens=8, temperature=1.5, seed=2) != first


def test_samples_are_distributed_as_the_model_says(
    generator: Generator, model: LlamaForCausalLM
) -> None:
    temperature = 1.2
    with torch.no_grad():
        ids = torch.tensor([encode_prompt(generator.tokenizer, "Rain")])
        expected = (model(ids).logits[0, -1] / temperature).softmax(-1)
    top = int(expected.argmax())
    picks = [
        generator.generate(["Rain"], max_new_tokens=1, temperature=temperature, seed=seed)[0]
        for seed in range(300)
    ]
    with torch.no_grad():
        logprob = float(model(ids).logits[0, -1].log_softmax(-1)[top])
    share = sum(abs(pick.token_logprobs[0] - logprob) < 1e-5 for pick in picks) / len(picks)
    deviation = (float(expected[top]) * (1 - float(expected[top])) / len(picks)) ** 0.5
    assert 0.05 < expected[top] < 0.95, (
        "the check needs a distribution that is neither flat nor saturated"
    )
    assert abs(share - float(expected[top])) < 4 * deviation


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_stream_adds_up_to_generate(generator: Generator, temperature: float) -> None:
    for prompt in PROMPTS:
        whole = generator.generate([prompt], max_new_tokens=12, temperature=temperature, seed=4)[
            0
        ].text
        pieces = list(generator.stream(prompt, max_new_tokens=12, temperature=temperature, seed=4))
        assert "".join(pieces) == whole
        assert len(pieces) > 3
        stop = (whole[len(whole) // 2 :][:4],)
        cut = generator.generate(
            [prompt], max_new_tokens=12, temperature=temperature, seed=4, stop=stop
        )[0].text
        assert (
            "".join(
                generator.stream(
                    prompt, max_new_tokens=12, temperature=temperature, seed=4, stop=stop
                )
            )
            == cut
        )


def test_stop_string_ends_each_row_on_its_own(generator: Generator) -> None:
    free = generator.generate(PROMPTS, max_new_tokens=8)
    word = free[0].text.split()[2]
    stopped = generator.generate(PROMPTS, max_new_tokens=8, stop=[word])
    assert stopped[0].text == free[0].text[: free[0].text.index(word)].strip()
    assert stopped[0].finish == "stop"
    assert stopped[0].num_tokens < free[0].num_tokens
    assert stopped[0].token_logprobs == pytest.approx(
        free[0].token_logprobs[: stopped[0].num_tokens], abs=1e-4
    )
    for one, other in zip(stopped[1:], free[1:], strict=True):
        if word not in other.text:
            assert one.text == other.text


def test_end_token_ends_a_row_and_counts(model: LlamaForCausalLM, tokenizer: Any) -> None:
    ids, logprobs = manual_greedy(model, encode_prompt(tokenizer, PROMPTS[0]), 4)
    other = build_tiny(TinyConfig(num_layers=1, num_heads=2, intermediate_size=16), seed=0)[1]
    other.eos_token = tokenizer.convert_ids_to_tokens(ids[2])
    assert ids[2] not in ids[:2]
    result = Generator(model, other).generate(PROMPTS, max_new_tokens=8)[0]
    assert (result.finish, result.num_tokens) == ("eos", 3)
    assert result.token_logprobs == pytest.approx(logprobs[:3], abs=1e-4)
    assert result.text == tokenizer.decode(ids[:2], clean_up_tokenization_spaces=False).strip()


def test_too_long_a_prompt_names_the_counts(generator: Generator) -> None:
    long = "word " * 70
    assert generator.count_tokens(long) == 70
    for call in (
        lambda: generator.generate(["Rain", long], max_new_tokens=8),
        lambda: generator.stream(long, max_new_tokens=8),
    ):
        with pytest.raises(
            RequestError, match=r"70 tokens and 8 are kept for the answer: 14 too many.*at most 64"
        ):
            call()
    exact = generator.generate(["word " * 56], max_new_tokens=8)[0]
    assert exact.num_tokens == 8
    with pytest.raises(RequestError, match="empty"):
        generator.generate([""], max_new_tokens=2)


def test_misuse_is_refused(generator: Generator, model: LlamaForCausalLM, tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="max_context is 65"):
        Generator(model, tokenizer, 65)
    for bad in (
        {"max_new_tokens": 0},
        {"max_new_tokens": 1, "stop": "x"},
        {"max_new_tokens": 1, "temperature": -1.0},
    ):
        with pytest.raises(ValueError, match="must be"):
            generator.generate(["Rain"], **bad)
    assert generator.generate([], max_new_tokens=3) == []


def test_the_checkpoints_own_decoding_settings_do_not_leak_in(
    model: LlamaForCausalLM, tokenizer: Any
) -> None:
    expected = Generator(model, tokenizer).generate(PROMPTS, max_new_tokens=6)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=9.0, max_length=2
    )
    assert Generator(model, tokenizer).generate(PROMPTS, max_new_tokens=6) == expected


def test_a_closing_special_token_is_not_part_of_a_prompt(tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    from invar_ray.models.tiny import minilm_folder

    bert = AutoTokenizer.from_pretrained(minilm_folder())
    assert encode_prompt(bert, "Rain falls")[1:] == encode_prompt(tokenizer, "Rain falls")
    assert encode_prompt(bert, "Rain falls")[0] == bert.cls_token_id


def test_stream_passes_exceptions_on(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    forward = generator.model.forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise RuntimeError("the device went away")
        return forward(*args, **kwargs)

    monkeypatch.setattr(generator.model, "forward", failing)
    with pytest.raises(RuntimeError, match="the device went away"):
        list(generator.stream("Rain", max_new_tokens=20))


def test_closing_a_stream_stops_the_model(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    forward = generator.model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:
            gate.wait(10)  # the consumer has left the loop by now
        return forward(*args, **kwargs)

    gate = threading.Event()
    monkeypatch.setattr(generator.model, "forward", counting)
    pieces = generator.stream("Rain", max_new_tokens=40)
    assert next(iter(pieces))
    threading.Timer(0.2, gate.set).start()
    pieces.close()  # type: ignore[attr-defined]
    assert calls < 10
    assert not [thread for thread in threading.enumerate() if thread.name == "generate"]


def test_generation_without_tokens_has_no_confidence() -> None:
    assert Generation("", [], 0).confidence is None
