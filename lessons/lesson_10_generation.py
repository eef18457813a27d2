r"""
Lesson 10 · Generation: writing without computing anything twice
================================================================

**The question.** A model gives the probabilities of one next byte. To write a page it must be asked a thousand times,
each time with a longer text. How much of that work is new, where do the old results wait, and how is a byte chosen from
256 probabilities?

We build decoding over a key/value cache and hold it against the full forward pass, position by position. Then the ways
to choose: greedy, temperature, top-k and top-p, draw for draw the same as the library's. Then the cache that rolls over
when the model has a sliding window, beyond the window's length. And what a decoded token costs, counted.

**You need** the forward pass of :doc:`lesson 8 </lessons/lesson_08_model>` and attention from
:doc:`lesson 4 </lessons/lesson_04_attention>`. The trained model is ``lessons/checkpoint``; its README has the command
that made it.
"""

# %%
# Asked again and again
# ---------------------
# The model reads T bytes and gives T rows of logits, of which only the last is news. The plain way to write: append the
# most probable byte, and run it all again.
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

import tinymoe
from tinymoe import reference
from tinymoe.generation import sample as library_sample

LINE = "def add(a, b): return a + b"
repository = Path(tinymoe.__file__).parents[1]
model = tinymoe.Mixtral.from_pretrained(repository / "lessons/checkpoint")
config, params = model.config, model.params
W = config.sliding_window
print(f"{config.n_layers} layers, {config.n_kv_heads} key/value heads of {config.head_dim}, window of {W} bytes")


def as_tokens(text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int64)


def as_text(tokens):
    return bytes(list(tokens)).decode(errors="replace")


prompt = as_tokens("def add(a, b):\n    return ")
text = list(prompt)
rows = 0
for _ in range(40):
    logits = model(np.array([text]))[0, -1]  # (V,)
    rows += len(text)
    text.append(int(logits.argmax()))
print(repr(as_text(text)))
print(f"{rows} rows went through the model for 40 new bytes")

# %%
# What changes and what does not
# ------------------------------
# Attention is causal: row t of every layer depends on the tokens 0 … t and on no later one. So when a token is
# appended,
# *all earlier rows of all layers stay as they are*. What the new token needs of them are their keys and values, and
# nothing else, since the rest of a block treats each row alone. Keep those, and a step computes one row:
#
# .. math:: o_T = \sum_{s \le T} \mathrm{softmax}_s \Bigl( \frac{q_T \cdot k_s}{\sqrt K} \Bigr) \, v_s,
#           \qquad k_0 \ldots k_{T-1},\ v_0 \ldots v_{T-1} \text{ from the cache.}
#
# Keys are kept *rotated*, each by its own position. A position's rotation never changes, so it is done once.
# Here is a step by hand, over lists of arrays; the formula itself, for one query, and the experts' part are the
# library's.


def step(token, position, cache, rotate_at=None):
    """One token through the model; cache is a list per layer of keys and values, which it grows. Returns (V,)."""
    at = position if rotate_at is None else rotate_at
    rotation = reference.rope_table(np.array([at]), config.head_dim, config.rope_theta, np.float32)
    x = params["tok_embeddings"][[token]]  # (1, D)
    for layer in range(config.n_layers):

        def w(name, layer=layer):
            return params[f"layers.{layer}.{name}"]

        h, _ = reference.rmsnorm(x, w("attention_norm"), config.norm_eps)
        q, k, v = (reference.linear(h, w(f"attention.w{n}"))[0].reshape(1, 1, -1, config.head_dim) for n in "qkv")
        q, k = reference.rope(q, rotation)[0], reference.rope(k, rotation)[0]
        keys, values = cache[layer]
        keys.append(k)
        values.append(v)
        seen = slice(-W, None)  # a window of W: itself and the W − 1 before
        o = reference.attention_decode(q, np.concatenate(keys[seen], 1), np.concatenate(values[seen], 1))
        x = x + reference.linear(o.reshape(1, -1), w("attention.wo"))[0]
        h, _ = reference.rmsnorm(x, w("ffn_norm"), config.norm_eps)
        gate, *experts = (w(f"moe.{n}") for n in ("gate", "w1", "w2", "w3"))
        x = x + reference.moe_decode(h, gate, *experts, config.top_k_experts)[0]
    x, _ = reference.rmsnorm(x, params["norm"], config.norm_eps)
    return reference.linear(x, params["output"])[0][0]


def empty():
    return [([], []) for _ in range(config.n_layers)]


cache, stepped = empty(), []
for position, token in enumerate(as_tokens(LINE)):
    stepped.append(step(token, position, cache))
full = model(as_tokens(LINE)[None])[0]  # (T, V), all at once
print("cached against full, largest difference:", abs(np.array(stepped) - full).max())
np.testing.assert_allclose(stepped, full, rtol=0, atol=1e-3)

# %%
# The same numbers to float32's rounding, at every position. The library does it as
# :meth:`tinymoe.Mixtral.extend`, which takes several tokens at once: the prompt goes through in one pass, the
# **prefill**, in which the matrices see many rows; then comes **decode**, one row at a time.
kept = model.cache(capacity=200)
prefilled, _ = model.extend([as_tokens(LINE)[:-1]], [kept])
decoded, _ = model.extend([as_tokens(LINE)[-1:]], [kept])
np.testing.assert_allclose(prefilled[0], full[-2], rtol=0, atol=1e-3)
np.testing.assert_allclose(decoded[0], full[-1], rtol=0, atol=1e-3)
greedy = tinymoe.generate(model, prompt, max_new_tokens=40)
assert greedy.tolist() == text
print(f"the same 40 bytes from {len(prompt) + 39} rows in place of {rows}")


def seconds(function):
    times = []
    with threadpool_limits(1):
        for _ in range(3):
            start = time.thread_time()
            function()
            times.append(time.thread_time() - start)
    return min(times)


def again(n):
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(model(np.array([tokens]))[0, -1].argmax()))


model.num_workers = 1
ratio = seconds(lambda: again(60)) / seconds(lambda: tinymoe.generate(model, prompt, 60))
print(f"60 new bytes: {ratio:.1f} times as fast with a cache, here")
assert ratio > 1

# %%
# Choosing a byte
# ---------------
# **Greedy** takes the largest logit. It is the same every time, and a small model soon repeats itself. Or draw from the
# probabilities, after bending them. A **temperature** τ divides the logits: :math:`p \propto e^{\ell / \tau}`. With τ
# → 0 the largest takes all, since :math:`e^{(\ell_i - \ell_{max})/\tau} \to 0` for the others: greedy is its limit.
# With τ → ∞ all become equal. At τ = 1 it is what the model believes.
#
# A thousand tokens of a large vocabulary with a probability of :math:`10^{-5}` each would together be drawn once in a
# hundred times; among 256 bytes the tail is shorter, but it is there. So it is cut:
# **top-k** keeps the k most probable; **top-p** the fewest that together reach p, which is one where the model is
# sure and many where it is not. What is left is divided by its sum.


def sample(logits, temperature, top_k, top_p, rng):
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[:top_k]  # most probable first; None keeps all
    p = np.exp((logits[order] - logits[order[0]]).astype(np.float64) / temperature)
    if top_p is not None:
        reached = np.cumsum(p) >= top_p * p.sum()
        p = p[: 1 + reached.argmax()]  # with the one that reaches it
    p /= p.sum()
    return int(order[np.searchsorted(np.cumsum(p), rng.random(), side="right")])


after = model(as_tokens("def add(a, b):\n    re")[None])[0, -1]
for options in ((1.0, None, None), (0.7, 5, None), (1.5, None, 0.9), (0.8, 20, 0.5), (0.0, None, None)):
    ours, theirs = np.random.default_rng(0), np.random.default_rng(0)
    draws = [sample(after, *options, ours) for _ in range(300)]
    assert draws == [library_sample(after, *options, theirs) for _ in range(300)]
    found, counts = np.unique(draws, return_counts=True)
    most = ", ".join(f"{chr(found[i])!r} {counts[i]}" for i in np.argsort(-counts)[:4])
    print(f"temperature {options[0]}, top-k {options[1]}, top-p {options[2]}: {len(found):2} different of 300: {most}")

# %%
# In a picture, after two prefixes: one where the next byte is nearly settled, one where it is open. The same p = 0.9
# keeps few bytes of the one and many of the other; a fixed k cannot do both.
figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", sharey=True)
for axis, prefix in zip(axes, ("import nump", "def ")):
    row = model(as_tokens(prefix)[None])[0, -1].astype(np.float64)
    ranked = np.sort(reference.softmax(row))[::-1]
    nucleus = 1 + int((np.cumsum(ranked) >= 0.9).argmax())
    for temperature in (0.5, 1.0, 2.0):
        axis.plot(np.sort(reference.softmax(row / temperature))[::-1][:25], marker=".", label=f"τ = {temperature}")
    axis.axvspan(-0.5, nucleus - 0.5, alpha=0.12, color="C1", label=f"top-p 0.9 at τ = 1: {nucleus} bytes")
    axis.set(title=f"after {prefix!r}", xlabel="rank of the byte")
    axis.legend(fontsize=8)
axes[0].set_ylabel("probability")
figure.suptitle("Temperature bends the probabilities; top-p adapts to how settled they are")
plt.show()

# %%
for temperature, top_p in ((0.0, None), (0.7, 0.9), (1.0, None), (2.0, None)):
    written = tinymoe.generate(model, prompt, 70, temperature=temperature, top_p=top_p, seed=1)
    print(f"τ = {temperature}, top-p {top_p}: {as_text(written[len(prompt) :])!r}\n")

# %%
# A buffer that rolls
# -------------------
# This model has a sliding window: no token sees further back than W positions. So a key that is older is never read
# again, and its place can be taken. Position p lives in slot p mod W; the newest overwrites the one that has just
# become invisible. The slots then lie in a rotated order, which does not matter: softmax sums over a *set* of keys,
# and each carries its position in its rotation. Memory stays bounded however long the text.
# (Mixtral 8x7B has no window; its cache keeps growing, as counted below.)


class Rolling:
    """W slots; append puts position p into slot p mod W, and slicing gives all that are filled."""

    def __init__(self):
        self.slots, self.count = [], 0

    def append(self, row):
        if self.count < W:
            self.slots.append(row)
        else:
            self.slots[self.count % W] = row
        self.count += 1

    def __getitem__(self, _):
        return self.slots


source = Path(tinymoe.__file__).read_text()[: 2 * W + 40]
long = as_tokens(source)
rolled = [(Rolling(), Rolling()) for _ in range(config.n_layers)]
stepped = np.array([step(token, position, rolled) for position, token in enumerate(long)])
full = model(long[None])[0]
print(f"{len(long)} positions, {len(rolled[0][0].slots)} slots; largest difference {abs(stepped - full).max():.1e}")
np.testing.assert_allclose(stepped, full, rtol=0, atol=1e-3)
kept = model.cache(capacity=100_000)
print("the library's cache for 100,000 tokens:", kept.keys[0].shape, "per layer, keys and values")
assert kept.keys[0].shape[1] == W

# %%
# With a window of eight, to see it roll: a row per step, the position that each slot holds, the newest framed.
small, held = 8, np.full((20, 8), np.nan)
for position in range(20):
    held[position:, position % small] = position

figure, axis = plt.subplots(figsize=(5, 4.6), layout="constrained")
axis.imshow(held, cmap="viridis", aspect="auto")
for position in range(20):
    axis.add_patch(plt.Rectangle((position % small - 0.5, position - 0.5), 1, 1, fill=False, edgecolor="red"))
    for slot in range(small):
        if not np.isnan(held[position, slot]):
            axis.text(slot, position, f"{held[position, slot]:.0f}", ha="center", va="center", fontsize=7, color="w")
axis.set(xlabel="slot", ylabel="step")
axis.set_title("A rolling buffer of 8 slots: the newest replaces what is 8 steps old")
plt.show()

# %%
# What a token costs
# ------------------
# Decoding multiplies each weight that a token uses with one row: 2 FLOPs for each weight, and each must be fetched.
# In bfloat16 that is one FLOP per byte, where today's processors can do hundreds in the time of fetching one. So
# decoding one text is bound by *reading*: the weights, and the cache, which grows. For Mixtral 8x7B:
large = tinymoe.MixtralConfig.mixtral_8x7b()
weights = 2 * (large.count_active_parameters() - large.vocab_size * large.dim)  # the embedding is one row
of_position = 2 * 2 * large.n_layers * large.n_kv_heads * large.head_dim
print(f"weights that a token reads: {weights / 1e9:.1f} GB; keys and values: {of_position / 1024:.0f} KiB a position")
for positions in (1024, 8192, 32768):
    share = positions * of_position / (weights + positions * of_position)
    print(
        f"  with {positions:6,} positions: {positions * of_position / 1e9:5.2f} GB of cache, {share:.0%} of all reads"
    )
assert 32768 * of_position == 2**32

# %%
# Several texts at once share the reading of the weights, and here a mixture differs from a dense model: two texts'
# tokens go to different experts. With B texts on average :math:`8 (1 - (3/4)^B)` of the 8 are touched (lesson 6), so
# the bytes per token fall slowly at first:
per_expert = large.n_layers * 3 * large.dim * large.hidden_dim
everywhere = large.count_parameters() - 8 * per_expert - large.vocab_size * large.dim
for texts in (1, 2, 4, 8, 16, 64):
    touched = 8 * (1 - 0.75**texts)
    mixture, dense = everywhere + touched * per_expert, everywhere + 2 * per_expert
    print(
        f"{texts:3} texts: {touched:.1f} experts, {2 * mixture / texts / 1e9:6.2f} GB of weights per token;"
        f" a dense model of the same FLOPs: {2 * dense / texts / 1e9:6.2f}"
    )

# %%
# Broken on purpose
# -----------------
# Four mistakes with a cache. The first token is always right, so a short look does not find them.
#
# **1. Positions from zero.** Each new token is rotated as if it were the first; its keys' distances are lost.
# **2. One slot too few.** The buffer forgets the oldest key that should still be seen; right until the text is W long.
# **3. A window that was forgotten.** Trained with one, decoded without: right until W, and then it sees too much.
# **4. The prompt's last token fed twice**, once in the prefill and once more as the first to decode.
line = long[: W + 60]
right = model(line[None])[0]


def run(make, tokens=line, **keywords):
    cache = [make() for _ in range(config.n_layers)]
    return np.array([step(t, p, cache, **keywords) for p, t in enumerate(tokens)])


class Short(list):
    def __getitem__(self, _):
        return list(self)[-(W - 1) :]


class Endless(list):
    def __getitem__(self, _):
        return list(self)


half = len(line) // 2
attempts = {
    "positions from zero": run(lambda: ([], []), rotate_at=0),
    "one slot too few": run(lambda: (Short(), Short())),
    "window forgotten": run(lambda: (Endless(), Endless())),
    "last token fed twice": np.delete(run(lambda: ([], []), np.insert(line, half, line[half - 1])), half, axis=0),
}
figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
for name, logits in attempts.items():
    off = abs(logits - right).max(axis=1)
    first = int((off > 1e-2).argmax())
    print(f"{name:22} first seen at position {first}, largest difference {off.max():.2f}")
    axis.semilogy(np.maximum(off, 1e-6), label=name, linewidth=1)
    assert off[0] < 1e-3 < 1e-2 < off.max()
axis.axvline(W, color="grey", linewidth=0.7, linestyle=":")
axis.set(xlabel="position", ylabel="largest error of a logit")
axis.set_title("Mistakes with a cache: right at first, two of them as long as the text is no longer than the window")
axis.legend(fontsize=8)
plt.show()

# %%
# With one slot too few, or a token fed twice, the model still writes something that looks like Python; the other two
# end in gibberish, the forgotten window only once the text is longer than it. The check that finds all four is the one
# that we began with: cached decoding equals the full forward, *at every position, and beyond the window*.
#
# Remember
# --------
# * Causality makes earlier rows final: keep their rotated keys and their values, and a step is one row.
# * Greedy is the limit of temperature zero. Top-p keeps few bytes where the model is sure and many where it is not.
# * With a window of W the cache has W slots, position p in slot p mod W; the order of keys does not matter.
# * Decoding one text reads each used weight for 2 FLOPs. Batching shares the reading, for a mixture later than for a
#   dense model.
#
# **Ask yourself.** (a) Why are queries not kept? (b) What would break the cache if attention were not causal? (c)
# Which of top-k 1, top-p → 0 and τ → 0 is greedy? (d) Why may the rolling buffer hold keys out of order? (e) Three
# layers, window 128: how far back can the last layer's output depend on?
#
# Exercises
# ---------
# 1. Let :func:`tinymoe.generate` continue two prompts of different length at once. Show that each gets what it gets
#    alone.
# 2. How many bytes are the keys and values of this checkpoint in float32, for a text of 10,000 bytes, with the window
#    and without?
# 3. Draw 3000 bytes after ``"def add(a, b):\n    re"`` at τ = 1 and compare their mean :math:`-\ln p` with the entropy
#    :math:`-\sum p \ln p`. Why are they close? What does greedy get?

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) a query is used by its own row only, which is done; (b) a new token would change earlier rows, and
# with them their keys and values in the next layer; (c) all three, but for ties; (d) a sum over keys has no order,
# and the position is in the rotation; (e) 3 · 127 = 381 positions, each layer hands on what the one below has seen.
#
# 1. Rows are packed without padding, and only attention looks at each text apart:
prompts = [as_tokens("import "), as_tokens("class Parser:\n    def ")]
together = tinymoe.generate(model, prompts, 20)
assert all((one == tinymoe.generate(model, p, 20)).all() for one, p in zip(together, prompts))
print([as_text(one) for one in together])

# %%
# 2. Per position keys and values of G heads of K numbers, in each layer:
per_position = 2 * config.n_layers * config.n_kv_heads * config.head_dim * 4
print(f"{10_000 * per_position:,} bytes without, {min(10_000, W) * per_position:,} with the window")

# %%
# 3. The mean of :math:`-\ln p` over draws from p *is* the entropy, up to chance. Greedy gets the least that is
#    possible, :math:`-\ln \max p`: its text is more probable than what the model was trained on usually is, one
#    reason why it is dull.
p = reference.softmax(after.astype(np.float64))
rng = np.random.default_rng(0)
drawn = np.mean([-np.log(p[sample(after, 1.0, None, None, rng)]) for _ in range(3000)])
entropy = -(p * np.log(p)).sum()
print(f"drawn {drawn:.3f}, entropy {entropy:.3f}, greedy {-np.log(p.max()):.3f}")
assert abs(drawn - entropy) < 0.1

# %%
# .. raw:: html
#
#    </details>

# %%
# **Next:** :doc:`lesson 11 </lessons/lesson_11_experts_learn>` looks inside: which tokens the experts of a trained
# model have shared out among themselves, beside what chance would give.
