r"""
Lesson 18 · The roofline: what Mixtral needs, where it fits, and what it waits for
==================================================================================

**The question.** 8x7B has 46.7 billion parameters and uses 12.9 billion of them for a token. Is it then a 13B or a 47B
model? Which machine holds it, how many sequences must run together before a GPU is busy, and can it be made busy at
all?

Nearly everything here is arithmetic on the config, small enough for a page. It answers more than a benchmark does,
since it also says *why*. No GPU has run any of it: figures of devices are **published specifications** from NVIDIA's
datasheets, which no program quite reaches, and a rate computed from them is a ceiling, not a result.

**You need** the parts of the model from :doc:`lesson 8 </lessons/lesson_08_model>` and decoding from :doc:`lesson 10
</lessons/lesson_10_generation>`. The derivations are worked by hand in :doc:`/math/roofline`.
"""

# %%
# Counting parameters
# -------------------
# From Table 1 of the paper, with the letters of all lessons. Attention has four matrices, of which keys and values have
# G heads in place of H; an expert has three; embedding and output head are two matrices.
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import tinymoe
from tinymoe import Mixtral, MixtralConfig
from tinymoe.experiments.throughput import expected_distinct
from tinymoe.scale import footprint
from tinymoe.scale.devices import DEVICES
from tinymoe.scale.plan import place

config = MixtralConfig.mixtral_8x7b()
D, L, F, V = config.dim, config.n_layers, config.hidden_dim, config.vocab_size
H, G, K, E, k = config.n_heads, config.n_kv_heads, config.head_dim, config.num_experts, config.top_k_experts

attention, expert, router, norms = 2 * D * K * (H + G), 3 * D * F, D * E, 2 * D
shared = L * (attention + router + norms) + D + 2 * V * D
total, active = shared + L * E * expert, shared + L * k * expert
for name, count in (("attention, a layer", attention), ("router, a layer", router), ("expert, a layer", expert)):
    print(f"{name:20} {count:>14,}")
for name, count in (("all but experts", shared), ("experts", L * E * expert), ("total", total), ("active", active)):
    print(f"{name:20} {count:>14,}  {count / total:6.1%}")
assert (total, active) == (config.count_parameters(), config.count_active_parameters())

# %%
# 96.6 % are experts. The count is exact: it is what the library finds, and what the checkpoint on disk has. With it one
# can check what is written about the model. All of these are in circulation:
claims = [
    ("8 x 7B = 56 B parameters", 56e9, total, "only experts are eightfold"),
    ("an expert is a 7 B model", 7e9, L * expert, "its 32 blocks; none is a model"),
    ("the router has 100 M parameters", 100e6, L * router, "in all layers"),
    ("attention has 200 M a layer", 200e6, attention, "grouped keys and values"),
    ("11.5 B are shared", 11.5e9, shared, "attention, router, norms, embeddings"),
    ("top-2 of 8 uses 2/8 of the parameters", 2 / 8, active / total, "the shared part is always used"),
    ("FLOPs 2.2 x fewer than a dense 70 B", 2.2, 70e9 / active, "by active parameters"),
    ("bfloat16 on one GPU takes 15 GB", 15e9, 2 * total, "of weights"),
]
for claim, said, counted, why in claims:
    unit, scale = (
        ("GB", 1e9) if "GB" in claim else ("", 1) if counted < 1000 else ("M", 1e6) if counted < 1e9 else ("B", 1e9)
    )
    print(f"{claim:40} counted: {counted / scale:6.2f} {unit:2}  ({why})")
    assert abs(said - counted) > 0.05 * counted  # each is off by more than rounding

# %%
# Memory
# ------
# Weights take 2 bytes each in bfloat16, and **all** of them must be there: which experts a token wants is known when it
# wants them. Beside them stands the cache of keys and values, 2 · L · G · K numbers for each token of each sequence.
weight_bytes, kv_bytes = 2 * total, 2 * 2 * L * G * K
print(f"weights {weight_bytes / 1e9:.1f} GB; keys and values of a token {kv_bytes:,} bytes")
for batch, context in ((1, 4096), (16, 4096), (1, 32768), (8, 32768)):
    print(f"  cache of {batch:2} x {context:6} tokens: {batch * context * kv_bytes / 1e9:6.2f} GB")
assert weight_bytes == footprint.weight_bytes(config, "bf16")
assert 8 * 32768 * kv_bytes == footprint.kv_cache_bytes(config, 8, 32768, "bf16")

# %%
# Training needs more: for each parameter its gradient, two moments of AdamW, and, when weights are bfloat16, a float32
# master copy to which small updates can be added. Here a mixture pays for all experts, though a token trains two.
per_parameter = {"weight": 2, "gradient": 2, "master": 4, "first moment": 4, "second moment": 4}
training_bytes = sum(per_parameter.values()) * total
print(f"training, {sum(per_parameter.values())} bytes a parameter: {training_bytes / 1e9:.0f} GB without activations")

# %%
# What fits where, against the published memory of four GPUs. float32 weights for comparison; "4 bits" is half a byte a
# weight, without the scales that such formats carry.
figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
cache = 16 * 4096 * kv_bytes
bars = {"4 bits": total / 2, "bfloat16": weight_bytes, "float32": 2 * weight_bytes}
for level, size in enumerate(bars.values()):
    axes.barh(level, size / 1e9, color="C0", height=0.6)
    axes.barh(level, cache / 1e9, left=size / 1e9, color="C1", height=0.6)
for memory in sorted({device.memory_bytes / 1e9 for device in DEVICES.values()}):
    axes.axvline(memory, color="black", linestyle=":", linewidth=1)
    names = ", ".join(d.name for d in DEVICES.values() if d.memory_bytes == memory * 1e9)
    axes.text(memory + 1.5, 2.45, names.replace(", ", "\n"), fontsize=7, va="bottom")
axes.set(yticks=range(3), yticklabels=bars, xlabel="GB (blue: weights, orange: cache of 16 x 4096 tokens)")
axes.set(xlim=(0, 230), ylim=(-0.5, 3.2))
axes.set_title("8x7B and the published memory of one GPU: in bfloat16 it fits on a single 141 GB card")
plt.show()
assert 80e9 < weight_bytes + cache < 141e9

# %%
# FLOPs
# -----
# A parameter that multiplies costs a token 2 FLOPs. The embedding is looked up and does not. To that comes attention
# itself: for each key that is attended to, :math:`2K` for the score and :math:`2K` for the value, in H heads and L
# layers.


def decode_flops(context):
    return 2 * (active - V * D - (2 * L + 1) * D) + 4 * L * H * K * context  # norms do not count as products


for context in (1, 4096, 32768):
    print(f"a token after {context:6}: {decode_flops(context) / 1e9:5.1f} GFLOP")
    assert decode_flops(context) == footprint.decode_flops(config, context)

# %%
# At the whole context attention adds two thirds to the rest. FLOPs follow the *active* parameters: in this respect it
# is a 13B model.
#
# Bytes
# -----
# A decoding step yields one token for each of B sequences. Each weight that *any* of them uses is read, once. Which are
# they? A token misses a given expert with probability :math:`1 - k/E`, and if tokens choose independently
#
# .. math:: \mathbb{E}[\text{experts used}] = E \bigl( 1 - (1 - k/E)^B \bigr) .
#
# Check it by drawing, and look at what one token more costs: :math:`k (1 - k/E)^B` experts, less for every one.
rng = np.random.default_rng(0)
for batch in (1, 2, 4, 8, 16, 64):
    drawn = np.argsort(rng.random((2000, batch, E)), axis=2)[:, :, :k]  # 2000 batches of independent choices
    distinct = np.mean([len(np.unique(step)) for step in drawn])
    formula = E * (1 - (1 - k / E) ** batch)
    more = footprint.experts_touched(config, batch + 1) - footprint.experts_touched(config, batch)
    print(
        f"batch {batch:2}: drawn {distinct:.2f}, formula {formula:.2f} experts a layer; one token more adds {more:.3f}"
    )
    assert abs(distinct - formula) < 0.1
    assert np.isclose(formula, footprint.experts_touched(config, batch))
    assert np.isclose(more, k * (1 - k / E) ** batch)

# %%
# Do trained tokens choose independently? The small committed checkpoint (``lessons/checkpoint/``, made by
# ``python lessons/checkpoint/make.py``) decodes 64 texts side by side; we count the experts that B of them use in a
# step. An uneven load lowers the count, since :math:`(1-p)^B` is convex in p; so do tokens that resemble each other.
repository = Path(tinymoe.__file__).parents[1]
model = Mixtral.from_pretrained(repository / "lessons/checkpoint")
library = Path(subprocess.__file__).parent
texts = [path.read_bytes()[1000:1033] for path in sorted(library.glob("*.py")) if path.stat().st_size > 5000][:64]
sequences = [np.frombuffer(text, np.uint8).astype(np.int64) for text in texts]
caches = [model.cache(64) for _ in sequences]
chosen = []
for t in range(33):
    _, experts = model.extend([s[t : t + 1] for s in sequences], caches)
    chosen.append(experts)  # of each layer (64, k)
chosen = np.array(chosen)[1:]  # (T, L, 64, k), without the first, before which there is no context
load = np.stack([np.bincount(of_layer.ravel(), minlength=8) for of_layer in np.moveaxis(chosen, 1, 0)])
inclusion = k * load / load.sum(axis=1, keepdims=True)  # p_e of each layer
print("share of tokens that use each expert of layer 1:", inclusion[1].round(2))
for batch in (2, 8, 32):
    picked = [rng.permutation(64)[:batch] for _ in range(20)]
    counted = np.mean([len(np.unique(of_layer[some])) for step in chosen for of_layer in step for some in picked])
    by_load = np.mean([expected_distinct(p, batch) for p in inclusion])
    uniform = footprint.experts_touched(config, batch)
    print(f"batch {batch:2}: counted {counted:.2f}, from the load {by_load:.2f}, uniform {uniform:.2f}")
    assert counted < uniform + 0.05

# %%
# Close to the formula: a balance loss has kept the load nearly even. ``tinymoe experiment throughput`` does this at
# length, with tokens per second on this CPU and the hits of an expert cache; its record is at :doc:`/results`.
#
# Read by a step are thus the shared weights, the experts in use, and each sequence's whole cache. Per token, and beside
# dense models of the same active and the same total size:


def step_bytes(batch, context):
    used = E * (1 - (1 - k / E) ** batch)
    return 2 * (shared - V * D + L * used * expert) + batch * context * kv_bytes  # of the embedding only B rows


batches = 2 ** np.arange(0, 11)
assert np.isclose(step_bytes(16, 4096), footprint.decode_bytes(config, 16, 4096, "bf16"))
per_token = np.array([step_bytes(b, 1) / b for b in batches])
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.loglog(batches, per_token / 1e9, "o-", label="8x7B, top-2")
axes.loglog(batches, 2 * active / batches / 1e9, "--", label=f"dense, {active / 1e9:.1f} B")
axes.loglog(batches, 2 * total / batches / 1e9, ":", label=f"dense, {total / 1e9:.1f} B")
axes.set(xlabel="sequences decoded together", ylabel="GB of weights per token")
axes.legend()
axes.set_title("One sequence reads like a 13B model, sixteen like a 47B one")
plt.show()
print("GB per token:", ", ".join(f"{b}: {v / 1e9:.3g}" for b, v in zip(batches, per_token)))

# %%
# So the answer to the first question depends on who asks. Memory says 47B. FLOPs say 13B. Bytes per step say 13B for
# one sequence and 47B for a crowd. From 1 to 2 sequences the bytes per token fall by a sixth, where a dense model's
# halve, because the second one brings its own experts. It takes a crowd to share them, which is one reason for the
# paper's remark that mixtures are "more suitable for batched workloads". Once all experts are in use, B tokens do
# :math:`2 B k \cdot 3DF` FLOPs on :math:`2 E \cdot 3DF` bytes, B·k/E FLOPs a byte in place of a dense block's B: a
# mixture needs E/k = 4 times the batch for the same.
#
# The roofline
# ------------
# Work of f FLOPs and b bytes takes at least the longer of both times, so with the *intensity* :math:`I = f/b` the rate
# is at most :math:`\min(\Pi, I \beta)`, for a device of :math:`\Pi` FLOP/s and :math:`\beta` bytes/s. The two meet at
# the ridge, :math:`\Pi / \beta`.
for device in DEVICES.values():
    print(
        f"{device.name:10} published: {device.flops / 1e12:.0f} TFLOP/s, {device.bandwidth / 1e12:.2f} TB/s, "
        f"ridge {device.flops / device.bandwidth:.0f} FLOP a byte"
    )

h200 = DEVICES["h200"]
ridge = h200.flops / h200.bandwidth
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
line = np.geomspace(0.5, 5000, 200)
axes.loglog(line, np.minimum(h200.flops, line * h200.bandwidth) / 1e12, "k", linewidth=1.2)
for context, colour in ((1, "C0"), (4096, "C1"), (32768, "C3")):
    points = np.array([b * decode_flops(context) / step_bytes(b, context) for b in (1, 8, 64, 512)])
    axes.loglog(
        points,
        np.minimum(h200.flops, points * h200.bandwidth) / 1e12,
        "o",
        color=colour,
        label=f"decoding at context {context}: batch 1, 8, 64, 512",
    )
prefill = 4096 * footprint.prefill_flops(config, 4096) / (2 * (total - V * D))
axes.loglog(prefill, h200.flops / 1e12, "s", color="C2", label="prefill of 4096 tokens, weights alone")
axes.set(xlabel="FLOP per byte", ylabel="TFLOP/s, at most")
axes.legend(fontsize=8)
axes.set_title("Ceilings from an H200's published figures: decoding is on the slope, prefill under the roof")
plt.show()
assert prefill > ridge

# %%
# Why decoding stays on the slope
# -------------------------------
# Reading the weights is shared by all sequences, so a larger batch raises the intensity. But each sequence has a
# cache of its own (unless prompts begin alike and their common part is kept once), and reads it at every step. With B
# growing the weights' part vanishes, and what is left is one token's FLOPs over one cache:
#
# .. math:: I_\infty = \frac{\text{FLOPs of a token at context } T}{T \cdot 131{,}072 \text{ bytes}} .
#
# A token's FLOPs are :math:`c + 4LHK\,T`, so :math:`I_\infty = \Pi/\beta` is reached at
# :math:`T = c / (131{,}072\,\Pi/\beta - 4LHK)`. As T grows, :math:`I_\infty` falls to
# :math:`4LHK / 131{,}072 = 4 = H/G`: each cached number is used by H/G query heads, which is what grouping them is for.
for context in (512, 4096, 32768):
    limit = decode_flops(context) / (context * kv_bytes)
    print(f"context {context:6}: at most {limit:6.1f} FLOP a byte; ridge of an H200 (published) {ridge:.0f}")
    assert np.isclose(footprint.decode_intensity(config, 10**9, context, "bf16"), limit, rtol=1e-3)
longest = 2 * (active - V * D - (2 * L + 1) * D) / (ridge * kv_bytes - 4 * L * H * K)
print(f"beyond {longest:.0f} tokens of context no batch is large enough")
assert 500 < longest < 1500

# %%
# This is not about experts: it is the cache. Grouped keys and values (G = 8 of 32) are what makes it bearable at all;
# with 32 of them the caches would be four times as large.
#
# And the batch must fit. :func:`tinymoe.scale.plan.place` puts it together, and so does the command:
for context in (512, 4096, 32768):
    there = place(config, 1, context, "bf16", h200)
    print(
        f"one H200 (published memory), context {context:6}: at most {there.largest_batch} sequences beside the weights"
    )
command = ["plan", "mixtral_8x7b", "--batch", "16", "--context", "4096", "--device", "h200"]
print("$ tinymoe", *command)
print(subprocess.run([sys.executable, "-m", "tinymoe", *command], capture_output=True, text=True, check=True).stdout)

# %%
# Without ``--device`` it lists all that it knows, and measures this machine too.
#
# Broken on purpose
# -----------------
# Four ways to be wrong by arithmetic.
#
# 1. *FLOPs "with sparsity".* Datasheets of Hopper print twice the dense figure, which moves the ridge, and with it
#    every conclusion.
# 2. *k experts for each token.* B · k experts a layer counts each as often as it is used.
# 3. *No cache.* Weights alone say that decoding is bound by arithmetic from some batch on.
# 4. *GB and GiB.* Seven per cent, and that has decided whether a model fits.
print(f"1. ridge with sparse FLOPs: {2 * ridge:.0f} in place of {ridge:.0f}")
counted_twice, all_experts = 2 * L * 64 * k * expert, 2 * L * E * expert
print(
    f"2. batch 64: {64 * k} experts a layer, {counted_twice / 1e9:.0f} GB; there are {all_experts / 1e9:.0f} GB of them"
)
no_cache = next(b for b in range(1, 10_000) if b * decode_flops(1) / step_bytes(b, 0) > ridge)
at_context = no_cache * decode_flops(32768) / step_bytes(no_cache, 32768)
print(f"3. without caches arithmetic decides from batch {no_cache} on")
print(f"   with 32,768 tokens in each, that batch has {at_context:.1f} FLOP a byte")
print(f"4. weights: {weight_bytes / 1e9:.1f} GB, {weight_bytes / 2**30:.1f} GiB")
assert at_context < ridge / 10

# %%
# Remember
# --------
# * Memory follows the total parameters, FLOPs the active ones, bytes per step lie between and depend on the batch.
# * Distinct experts: :math:`E (1 - (1 - k/E)^B)` for independent tokens and an even load; an uneven one uses fewer.
# * A mixture needs E/k times the batch of a dense block for the same intensity of its weights.
# * Beyond about a thousand tokens of context decoding cannot be bound by arithmetic on an H200, at any batch: each
#   sequence reads its own cache.
# * Published figures give ceilings. What is reached, a measurement says.
#
# **Ask yourself.** (a) Why must all experts be in memory for a single sequence? (b) What is the intensity of decoding
# one sequence with an empty context, in bfloat16, and why? (c) Would 8-bit weights make decoding faster, and prefill?
# (d) 8 GPUs, one expert of each layer on each: what is that called, and what must travel? (e) Which is larger at
# batch 16 and context 4096, what is read of weights or of caches?
#
# Exercises
# ---------
# 1. How many bits may a weight have if 8x7B is to fit into 24 GB, with 1 GB for the cache? How many tokens is that
#    cache?
# 2. Do it for 8x22B (``MixtralConfig.mixtral_8x22b()``): total, active, bytes in bfloat16, and how many H200s, by
#    published memory, hold the weights?
# 3. At which batch does the step read as much of caches as of weights, at context 4096 and at 32,768?

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) which of them the next token wants is known only when it is there, and differs by layer and token;
# (b) 1: 2 FLOPs for each weight of 2 bytes; (c) decoding up to twice, since the bytes halve; prefill only if the
# arithmetic is faster as well, or the batch is small; (d) expert parallelism, and token rows travel to their experts
# and back, in every layer; (e) weights, 92 GB of them, against 8.6 GB.
assert 0.99 < decode_flops(1) / step_bytes(1, 1) < 1.01
assert 90e9 < step_bytes(16, 0) < 94e9

# %%
# 1. 23 GB for 46.7 billion weights are 3.94 bits each, scales included. 1 GB of cache holds 7629 tokens.
print(f"{8 * 23e9 / total:.2f} bits, {1e9 / kv_bytes:.0f} tokens")
assert round(8 * 23e9 / total, 2) == 3.94

# %%
# 2. Two, for the weights alone, and what they leave is a cache of a few thousand tokens in all. So three.
larger = MixtralConfig.mixtral_8x22b()
size = footprint.weight_bytes(larger, "bf16")
print(f"{larger.count_parameters():,} and {larger.count_active_parameters():,}; {size / 1e9:.1f} GB")
needed = -(-size // h200.memory_bytes)
left = needed * h200.memory_bytes - size
print(f"{needed} H200s by published memory, {left / footprint.kv_bytes_per_token(larger, 'bf16'):.0f} tokens of cache")
assert needed == 2

# %%
# 3. Caches grow with B, weights saturate at all experts: 93.1 GB. At 4096 tokens a cache is 0.54 GB, at 32,768 4.29 GB:
for context in (4096, 32768):
    equal = next(b for b in range(1, 1000) if b * context * kv_bytes > step_bytes(b, 0))
    print(f"context {context}: from batch {equal} on")
assert equal == 22

# %%
# .. raw:: html
#
#    </details>

# %%
# **Next:** :doc:`lesson 19 </lessons/lesson_19_long_context>` makes those contexts long.
