"""What a request may ask of sampling, and one sentence for each value that is out of range, at every entrance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pregate.base.errors import UserError

#: Of who names no max_tokens, over gRPC (the proto says so too) and on the command line.
DEFAULT_MAX_TOKENS = 64
MAX_SEED = (1 << 63) - 1
#: OpenAI's is 2. Far above, every token is as likely as any other, and float32 ends.
MAX_TEMPERATURE = 100
MAX_TOP_LOGPROBS = 20
MAX_COMPLETIONS = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_PRIORITY = 1 << 31
#: No count of tokens that a message carries is larger.
MAX_TOKENS = (1 << 31) - 1

#: Each number's name, what holds for it, and what is allowed; None, where a number may be left out, is never asked.
_NUMBERS: Mapping[str, tuple[Callable[[Any], bool], str]] = MappingProxyType(
    {
        "max_tokens": (lambda v: v >= 1, "must be at least 1"),
        "min_tokens": (lambda v: 0 <= v <= MAX_TOKENS, f"must be 0 or more, at most {MAX_TOKENS}"),
        "temperature": (lambda v: 0 <= v <= MAX_TEMPERATURE, f"must be 0 (greedy) to {MAX_TEMPERATURE}"),
        "top_p": (lambda v: 0 < v <= 1, "must be above 0 and at most 1"),
        "top_k": (
            lambda v: 0 <= v <= MAX_TOKENS,
            f"must be 0 (every token) or a number of tokens, at most {MAX_TOKENS}",
        ),
        "min_p": (lambda v: 0 <= v <= 1, "must be 0 to 1"),
        "repetition_penalty": (lambda v: 0.01 <= v <= 100, "must be 0.01 to 100"),
        "presence_penalty": (lambda v: -2 <= v <= 2, "must be -2 to 2"),
        "frequency_penalty": (lambda v: -2 <= v <= 2, "must be -2 to 2"),
        "seed": (lambda v: 0 <= v <= MAX_SEED, f"must be 0 to {MAX_SEED}"),
        "logprobs": (lambda v: 0 <= v <= MAX_TOP_LOGPROBS, f"must be 0 to {MAX_TOP_LOGPROBS}"),
        "prompt_logprobs": (lambda v: 0 <= v <= MAX_TOP_LOGPROBS, f"must be 0 to {MAX_TOP_LOGPROBS}"),
        "n": (lambda v: 1 <= v <= MAX_COMPLETIONS, f"must be 1 to {MAX_COMPLETIONS}"),
    }
)


def check_sampling(sampling: object) -> None:
    """Raise UserError naming the first of its numbers that is out of range, the value and what is allowed."""
    for name, (holds, allowed) in _NUMBERS.items():
        value = getattr(sampling, name)
        if value is not None and not holds(value):
            raise UserError.of(name, value, allowed)


def check_priority(priority: int) -> None:
    """Raise UserError for a priority that no message carries."""
    if not -MAX_PRIORITY <= priority < MAX_PRIORITY:
        raise UserError.of("priority", priority, f"must be {-MAX_PRIORITY} to {MAX_PRIORITY - 1}")


def check_stop_strings(stop: Sequence[str]) -> None:
    """Raise UserError for too many stop strings, empty ones, and ones that are too long."""
    if len(stop) > MAX_STOP_STRINGS:
        raise UserError.of("--stop", f"of {len(stop)} texts", f"allowed: at most {MAX_STOP_STRINGS}")
    for text in stop:
        if not 0 < len(text) <= MAX_STOP_CHARACTERS:
            raise UserError.of("--stop", f"of {len(text)} characters", f"must be 1 to {MAX_STOP_CHARACTERS} characters")


def check_logit_bias(bias: Iterable[tuple[int, float]], vocab_size: int) -> None:
    """Raise UserError for a bias of a token that is not there, or beyond OpenAI's -100 to 100."""
    bias = tuple(bias)
    check_ids("logit_bias token id", (token_id for token_id, _ in bias), vocab_size)
    wrong = next((value for _, value in bias if not -100 <= value <= 100), None)
    if wrong is not None:
        raise UserError.of("logit_bias", wrong, "must be -100 to 100")


def check_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Raise UserError naming the first of `token_ids` that is no token of the vocabulary."""
    outside = next((i for i in token_ids if not 0 <= i < vocab_size), None)
    if outside is not None:
        raise UserError.of(name, outside, f"must be 0 to {vocab_size - 1}")


def most_tokens(asked: int, num_prompt: int, max_context: int, *, cut: bool) -> int:
    """Return how many tokens follow a prompt: those `asked`, `cut` to what the context leaves; UserError for more than
    that where they are not to be cut."""
    left = max_context - num_prompt
    if asked > left and not cut:
        sentence = f"with a prompt of {num_prompt} tokens exceeds the context of {max_context}; allowed: 1 to {left}"
        raise UserError.of("--max-tokens", asked, sentence)
    return min(asked, left)
