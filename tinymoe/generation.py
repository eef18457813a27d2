"""Generation: prefill the prompt, then decode token by token over a KV cache, greedily or by sampling."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tinymoe.checks import check_tokens
from tinymoe.errors import InputError
from tinymoe.model import Mixtral

Array = np.ndarray


class Generated(NamedTuple):
    """One step of generation."""

    tokens: list[int | None]  # of each prompt; None where the prompt's text has ended
    experts: list[Array]  # per layer (N, k): the experts of the tokens that were fed in this step, prompt by prompt


def generate(
    model: Mixtral,
    prompt_tokens: Array | Sequence[Array],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token: int | None = None,
    seed: int | None = None,
) -> Array | list[Array]:
    """Continue one prompt, or several at once.

    Parameters
    ----------
    model
        To write with.
    prompt_tokens
        (T,) integers, or a sequence of such prompts, which may differ in length.
    max_new_tokens
        How many tokens to add at most.
    temperature
        0: always the most probable token. Above: sample from softmax(logits / temperature).
    top_k
        Sample from the k most probable tokens only.
    top_p
        Sample from the smallest set of most probable tokens that together have at least this probability
        (Holtzman et al. 2019, arXiv 1904.09751).
    eos_token
        Stop a prompt's text after this token. None: never stop early.
    seed
        Of the sampling; None: a new one each time. Each prompt of a batch draws from its own stream.

    Returns
    -------
    tokens
        (T + n,) with the prompt included; for several prompts a list of such.

    Raises
    ------
    InputError
        A prompt is empty or holds no token ids, the text would outgrow the context, or an option is out of range.
    """
    single = not _is_batch(prompt_tokens)
    prompts = [np.asarray(p) for p in ([prompt_tokens] if single else prompt_tokens)]
    texts = [prompt.tolist() for prompt in prompts]
    for step in stream(model, prompts, max_new_tokens, temperature, top_k, top_p, eos_token, seed):
        for text, token in zip(texts, step.tokens):
            if token is not None:
                text.append(token)
    outputs = [np.array(text, dtype=np.int64) for text in texts]
    return outputs[0] if single else outputs


def stream(
    model: Mixtral,
    prompts: Sequence[Array],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token: int | None = None,
    seed: int | None = None,
) -> Iterator[Generated]:
    """Yield the next token of every prompt as soon as it is known; the parameters are those of `generate`."""
    _check_options(max_new_tokens, temperature, top_k, top_p, seed)
    checked = [_checked_prompt(model, np.asarray(prompt), max_new_tokens) for prompt in prompts]
    return _stream(model, checked, max_new_tokens, temperature, top_k, top_p, eos_token, seed)


def _stream(
    model: Mixtral,
    prompts: Sequence[Array],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_token: int | None,
    seed: int | None,
) -> Iterator[Generated]:
    caches = {i: model.cache(len(prompt) + max_new_tokens) for i, prompt in enumerate(prompts)}
    rngs = [np.random.default_rng(stream) for stream in np.random.SeedSequence(seed).spawn(len(prompts))]
    waiting = {i: np.asarray(prompt) for i, prompt in enumerate(prompts)}  # prompt -> tokens the model has not seen
    for _ in range(max_new_tokens):
        if not waiting:
            return
        logits, experts = model.extend(list(waiting.values()), list(caches.values()))
        tokens: list[int | None] = [None] * len(prompts)
        for i, row in zip(list(waiting), logits):
            token = sample(row, temperature, top_k, top_p, rngs[i])
            tokens[i] = token
            if token == eos_token:
                del waiting[i], caches[i]
            else:
                waiting[i] = np.array([token])
        yield Generated(tokens, experts)


def sample(logits: Array, temperature: float, top_k: int | None, top_p: float | None, rng: np.random.Generator) -> int:
    """Return a token drawn from logits (V,), narrowed by ``top_k`` and ``top_p``; at temperature 0 the largest.

    Raises
    ------
    FloatingPointError
        The largest logit is not finite.
    """
    if not np.isfinite(logits.max()):  # NaN and +∞ show in the maximum
        raise FloatingPointError("the logits are not finite: the model's weights overflow")
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[:top_k]  # most probable first
    with np.errstate(over="ignore"):  # a temperature near 0 sends all but the largest to −∞
        probs = np.exp((logits[order] - logits[order[0]]).astype(np.float64) / temperature)
    cumulative = np.cumsum(probs)
    if top_p is not None:
        cumulative = cumulative[: 1 + np.searchsorted(cumulative, top_p * cumulative[-1])]
    return int(order[np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")])


def _is_batch(prompt_tokens: Array | Sequence[Array]) -> bool:
    return (not isinstance(prompt_tokens, np.ndarray) and any(np.ndim(p) > 0 for p in prompt_tokens)) or (
        isinstance(prompt_tokens, np.ndarray) and prompt_tokens.ndim == 2
    )


def _checked_prompt(model: Mixtral, prompt: Array, max_new_tokens: int) -> Array:
    if prompt.ndim != 1 or prompt.dtype.kind not in "iu" or prompt.size == 0:
        raise InputError(f"a prompt must be a non-empty (T,) array of integers; got {prompt.dtype} of {prompt.shape}")
    check_tokens(prompt, model.config.vocab_size)
    if len(prompt) + max_new_tokens > model.config.context_len:
        raise InputError(
            f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones exceed the context of "
            f"{model.config.context_len}: shorten the prompt or ask for fewer"
        )
    return prompt.astype(np.int64)


def _check_options(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int | None
) -> None:
    for name, value, least in (("max_new_tokens", max_new_tokens, 0), ("top_k", top_k, 1), ("seed", seed, 0)):
        if value is not None and (not isinstance(value, int | np.integer) or value < least):
            raise InputError(f"{name} is {value}; give an integer of at least {least}")
    if not isinstance(temperature, int | float | np.number) or not 0 <= temperature < np.inf:
        raise InputError(f"temperature is {temperature!r}; give 0 for the most probable token, or more to sample")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; give more than 0 and at most 1")
