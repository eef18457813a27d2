"""What a batch costs a mixture: distinct experts, weights read and tokens per second; and what an expert cache saves.

A decoded token uses k experts of E, but a batch of B tokens needs the weights of every expert that any of them uses. If
tokens chose uniformly and apart, that would be E (1 − (1 − k/E)^B) experts in each layer. What to look at:

* At batch 1 a mixture reads k experts for its one token; already at a batch of a few E all experts are read, and only
  from there on does a larger batch read less for each token. Decoding waits for memory, so that tokens per second
  should grow like 1 / (bytes read per token), until arithmetic or the overhead of a sequence takes as long.
* A trained router's load is uneven and its tokens resemble each other: distinct experts stay below the uniform
  prediction. With the observed load in place of k/E the formula is Σ_e (1 − (1 − p_e)^B).
* A cache of n experts (Eliseev and Mazur, arXiv 2312.17238) holds a text's last n distinct ones. Uniform choices hit it
  with probability n/E. What a generated text hits beyond that is worth two things, told apart by shuffling: its load
  (the same choices, drawn independently), and its order in time (whatever is left).
"""

import statistics
import time
from typing import Any

import numpy as np

from tinymoe import workers
from tinymoe.config import MixtralConfig
from tinymoe.experiments.learning import learn, micro, text
from tinymoe.generation import stream
from tinymoe.model import Mixtral
from tinymoe.reference import expert_load
from tinymoe.training import Options

Array = np.ndarray
PROMPT = 16  # tokens
COEFFICIENTS = {"without balancing": 0.0, "Switch loss": 0.02}  # of the trained models


def expected_distinct(inclusion: Array, batch: int) -> float:
    """Return the expected number of distinct experts that a batch of independent tokens uses: Σ_e (1 − (1 − p_e)^B).

    Parameters
    ----------
    inclusion
        (E,) p_e, the probability that e is among a token's k experts; k/E for all gives E (1 − (1 − k/E)^B).
    batch
        B.
    """
    return float(np.sum(1 - (1 - inclusion) ** batch))


def weights_read(config: MixtralConfig, distinct: float, batch: int, itemsize: int = 4) -> float:
    """Return the bytes of weights that a decode step reads per token, each weight once.

    Parameters
    ----------
    distinct
        Experts used, the sum over layers.
    batch
        B; of the embedding a token reads its own row.
    """
    expert = 3 * config.dim * config.hidden_dim
    shared = config.count_parameters() - config.n_layers * config.num_experts * expert
    if not config.tie_embeddings:
        shared -= config.vocab_size * config.dim  # the embedding; a tied one is read whole, as the head
    return itemsize * ((shared + distinct * expert) / batch + config.dim)


def lru_hit_rates(experts: Array, num_experts: int) -> Array:
    """Return the share of requests that a cache of n = 1 … E experts answers, (E,), evicting the least recently used.

    A token asks for its k experts at once: what the cache holds of them before is a hit. Afterwards they are the most
    recently used, the first choice foremost. Ordered by last use, the first n experts are what a cache of n ≥ k holds,
    so the place of an expert in that order says for all n at once whether it is a hit (the stack property, Mattson et
    al. 1970). Before the text begins the cache holds the experts 0 … n − 1.

    Parameters
    ----------
    experts
        (T, k) ids, the tokens of one text in order.
    num_experts
        E.
    """
    at_place = np.zeros(num_experts)
    used = list(range(num_experts))  # last used first
    for asked in experts.tolist():
        for e in asked:
            at_place[used.index(e)] += 1
        used = asked + [e for e in used if e not in asked]
    return np.cumsum(at_place) / experts.size


def run(seed: int, quick: bool) -> dict[str, Any]:
    """Return throughput by batch on random weights, distinct experts of trained models, and their texts' hit rates."""
    batches = [1, 2, 4] if quick else [2**i for i in range(8)]
    changes: dict[str, Any] = dict(dim=512, n_layers=2, hidden_dim=1792, n_heads=8, n_kv_heads=2, vocab_size=256)
    model = Mixtral.init(micro() if quick else MixtralConfig(**changes), seed)
    # on one core: two that wait for each other measure the machine's other work
    timed = workers.run(lambda batch: _decode(model, batch, 3 if quick else 40, seed), batches, workers=1)
    if not quick:
        for line in timed:
            print(
                f"batch {line['batch']:>3}: {line['tokens_per_second']:8.1f} tokens/s, "
                f"{np.mean(line['distinct']):.2f} experts of a layer (uniform: {line['distinct_uniform']:.2f}), "
                f"{line['bytes_per_token'] / 1e6:6.1f} MB of weights per token",
                flush=True,
            )
    chosen = {name: _generated(seed, quick, coef) for name, coef in COEFFICIENTS.items()}  # of (L, texts, T, k)
    E = model.config.num_experts
    return {
        "random": {
            "parameters": model.config.count_parameters(),
            "experts": E,
            "batches": timed,
        },
        "trained": {name: [_distinct(texts, batch, E, seed) for batch in batches] for name, texts in chosen.items()},
        "cache": {name: [_hit_rates(layer, E, seed) for layer in texts] for name, texts in chosen.items()},
    }


def _decode(model: Mixtral, batch: int, rounds: int, seed: int) -> dict[str, Any]:
    """Time decode steps of random tokens after random prompts, and count what they read."""
    config = model.config
    rng = np.random.default_rng([seed, batch])
    caches = [model.cache(PROMPT + rounds + 2) for _ in range(batch)]
    model.extend(list(rng.integers(config.vocab_size, size=(batch, PROMPT))), caches)
    times, distinct = [], []
    for step in range(rounds + 2):
        tokens = list(rng.integers(config.vocab_size, size=(batch, 1)))
        start = time.perf_counter()
        _, experts = model.extend(tokens, caches)
        if step >= 2:  # after a warm-up
            times.append(time.perf_counter() - start)
            distinct.append([len(np.unique(of_layer)) for of_layer in experts])
    mean = np.mean(distinct, axis=0)  # (L,)
    uniform = expected_distinct(np.full(config.num_experts, config.top_k_experts / config.num_experts), batch)
    return {
        "batch": batch,
        "tokens_per_second": batch / statistics.median(times),
        "distinct": mean.tolist(),
        "distinct_uniform": uniform,
        "bytes_per_token": weights_read(config, float(mean.sum()), batch, model.dtype.itemsize),
        "bytes_per_token_uniform": weights_read(config, config.n_layers * uniform, batch, model.dtype.itemsize),
    }


def _generated(seed: int, quick: bool, aux_loss_coef: float) -> Array:
    """Train a small model, let it continue held-out text, and return its choices (L, texts, T, k)."""
    tokens, held_out = text(quick)
    changes: dict[str, Any] = dict(aux_loss_coef=aux_loss_coef)
    config = micro(**changes) if quick else MixtralConfig.tiny(n_layers=4, **changes)
    steps, seq_len, texts, new = (3, 16, 6, 8) if quick else (600, 128, 128, 112)
    model = learn(config, tokens, Options(steps=steps, batch_size=16, seq_len=seq_len, warmup=steps // 10, seed=seed))
    rng = np.random.default_rng([seed, 1])
    documents = [d for of_domain in held_out.values() for d in of_domain if len(d) > PROMPT]
    prompts = []
    for i in rng.integers(len(documents), size=texts):
        start = int(rng.integers(len(documents[i]) - PROMPT))
        prompts.append(documents[i][start : start + PROMPT])
    generated = stream(model, prompts, new, temperature=0.8, seed=seed)
    next(generated)  # fed the prompts
    return np.stack([step.experts for step in generated], axis=2)


def _distinct(chosen: Array, batch: int, num_experts: int, seed: int) -> dict[str, Any]:
    """Count the distinct experts of a step over ``batch`` of the texts, beside what each prediction says; by layer."""
    layers, texts, steps, k = chosen.shape
    rng = np.random.default_rng([seed, batch])
    some = min(batch, texts)
    distinct = np.zeros(layers)
    for step in range(steps):
        drawn = chosen[:, rng.permutation(texts)[:some], step]  # (L, B, k)
        distinct += [len(np.unique(of_layer)) for of_layer in drawn]
    inclusion = [k * expert_load(of_layer.reshape(-1, k), num_experts) for of_layer in chosen]
    return {
        "batch": some,
        "distinct": (distinct / steps).tolist(),
        "distinct_uniform": expected_distinct(np.full(num_experts, k / num_experts), some),
        "distinct_load": [expected_distinct(of_layer, some) for of_layer in inclusion],
    }


def _hit_rates(chosen: Array, num_experts: int, seed: int) -> dict[str, Any]:
    """Return the hit rates of caches of k … E experts, one per text, over a layer's choices (texts, T, k)."""
    k = chosen.shape[-1]
    rng = np.random.default_rng(seed)
    pool = chosen.reshape(-1, k)
    independent = pool[rng.integers(len(pool), size=chosen.shape[:2])]

    def mean(texts: Any) -> list[float]:
        return np.mean([lru_hit_rates(of_text, num_experts)[k - 1 :] for of_text in texts], axis=0).tolist()

    return {
        "slots": list(range(k, num_experts + 1)),
        "load": expert_load(pool, num_experts).tolist(),
        "generated": mean(chosen),
        "shuffled": mean(rng.permutation(of_text) for of_text in chosen),
        "independent": mean(independent),
        "uniform": [n / num_experts for n in range(k, num_experts + 1)],
    }


def plot(numbers: dict[str, Any]) -> Any:
    """Draw tokens per second, weights read, distinct experts and the hits of a cache, each beside its prediction."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.5), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    timed = numbers["random"]["batches"]
    batches = [line["batch"] for line in timed]
    speed = [line["tokens_per_second"] for line in timed]
    bandwidth = speed[0] * timed[0]["bytes_per_token"]  # bytes per second, at batch 1
    axes[0].loglog(batches, speed, "o-", label="measured")
    bound = [bandwidth / line["bytes_per_token_uniform"] for line in timed]
    axes[0].loglog(batches, bound, "k--", label=f"if only weights cost: {bandwidth / 1e9:.1f} GB/s, as at batch 1")
    axes[0].set(title="decoding on one core, random weights", xlabel="batch", ylabel="tokens per second")
    for key, label, style in (("", "from the distinct experts", "o-"), ("_uniform", "predicted, uniform", "k--")):
        axes[1].loglog(batches, [line[f"bytes_per_token{key}"] / 1e6 for line in timed], style, label=label)
    axes[1].set(title="weights read, random weights", xlabel="batch", ylabel="MB per token")
    axes[2].plot(batches, [np.mean(line["distinct"]) for line in timed], "o-", label="random weights")
    for name, trained in numbers["trained"].items():
        of_trained = [line["batch"] for line in trained]
        axes[2].plot(of_trained, [np.mean(line["distinct"]) for line in trained], "s-", label=f"trained {name}")
    axes[2].plot(batches, [line["distinct_uniform"] for line in timed], "k--", label="E (1 − (1 − k/E)^B)")
    axes[2].set(title="distinct experts, mean over layers", xlabel="batch", xscale="log", ylabel="experts")
    for colour, (name, layers) in zip(("C1", "C2"), numbers["cache"].items()):
        slots = layers[0]["slots"]
        for key, label, style in (("generated", "", "o-"), ("independent", ", its load alone", ":")):
            hits = np.mean([layer[key] for layer in layers], axis=0)
            axes[3].plot(slots, hits, style, color=colour, label=name + label)
    axes[3].plot(slots, layers[0]["uniform"], "k--", label="uniform: n / E")
    axes[3].set(title="hits of an expert cache, mean over layers", xlabel="slots per layer", ylabel="hit rate")
    for axis in axes[:3]:
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.minorticks_off()
    for axis in axes:
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    return figure
