r"""
Lesson 19 · Long context: how far back a model sees, and how far it was taught to
=================================================================================

**The question.** Mixtral reads 32,768 tokens, and the paper reports that it finds a passkey wherever in them it is
hidden (section 3.2, figure 4). What decides how far back a model can look: its mask, its depth, or its training? And
how does one measure that it does look?

Three limits are often taken for one. The **reach** is how far back anything can influence a token at all; it follows
from the mask and the number of layers, and holds for untrained weights. **Retrieval** is whether a trained model uses
what is in reach. The **trained length** is where the distances end that its weights have ever met. We derive the first
and watch it byte by byte, build the task that measures the second, and break the third with a model that is committed
here.

**You need** rotary positions from :doc:`lesson 3 </lessons/lesson_03_rotary>` and the window of attention from
:doc:`lesson 4 </lessons/lesson_04_attention>`. Two things are read, not made: the small model in
``lessons/checkpoint`` (its README has the command) and the record ``docs/results/passkey.json``, which
``tinymoe experiment passkey`` writes.
"""

# %%
# What one layer sees
# -------------------
# With a window of W a token attends to itself and the W − 1 before it. Written over all pairs this is a band of ones:
# row t is the token that looks, column s the one that is looked at.
import dataclasses
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import tinymoe

LINE = "def add(a, b): return a + b"
tokens = np.frombuffer(LINE.encode(), np.uint8).astype(np.int64)  # (T,)
T, W = len(tokens), 4
back = np.arange(T)[:, None] - np.arange(T)  # (T, T): how far s lies behind t
band = (back >= 0) & (back < W)

print("T", T, "| keys that a token sees:", band.sum(axis=1))

# %%
# What L layers see
# -----------------
# The output of layer 1 at position s carries what s saw. Layer 2 at position t mixes such outputs, so t hears of
# whatever one of the W positions that it sees has heard of. Position t hears of s after L layers if there is a
# **chain** :math:`t \ge s_1 \ge \dots \ge s` of L steps, each 0 to W − 1 back. Norms, experts and the residual stream
# mix nothing between positions, so there is no other way. The longest chain takes the longest step in every layer:
#
# .. math:: \text{reach} = L \, (W - 1).
#
# The number of chains is an entry of the band's L-th power. Its generating function is
# :math:`(1 + z + \dots + z^{W-1})^L`: the coefficient of :math:`z^d` counts the chains that end d back. Of all
# :math:`W^L` chains exactly one leads to the far end.
for L in (1, 2, 3):
    chains = np.linalg.matrix_power(band.astype(int), L)[-1]  # of the last token, by position
    assert chains.sum() == W**L
    assert chains[back[-1] == L * (W - 1)] == 1
    assert not chains[back[-1] > L * (W - 1)].any()
    print(f"{L} layer{'s' * (L > 1)}: chains by distance {chains[::-1][: L * (W - 1) + 2]}")

# %%
# Watched in a model
# ------------------
# Reach is about what is connected, so random weights will do. We change one byte of the line into a question mark,
# run the model again, and ask at which positions the logits moved at all. The weights are eight times as large as
# those that training starts from, or the far end would be there but too faint to draw.


def untrained(n_layers, window):
    config = tinymoe.MixtralConfig.tiny(dim=32, hidden_dim=32, n_layers=n_layers, num_experts=4, sliding_window=window)
    model = tinymoe.Mixtral.init(config, seed=0, dtype="float64")
    for name, p in model.params.items():
        if not name.endswith("norm"):
            p *= 8
    return model


def influence(model):
    before, moved = model(tokens[None])[0], np.zeros((T, T))  # (T, V)
    for s in range(T):
        changed = tokens.copy()
        changed[s] = ord("?")
        moved[:, s] = abs(model(changed[None])[0] - before).max(axis=1)
    return moved


moved = {L: influence(untrained(L, W)) for L in (1, 2, 3)}
for L, of_model in moved.items():
    inside = (back >= 0) & (back <= L * (W - 1))
    assert of_model[~inside].max() < 1e-12 < of_model[inside].min()
    far = of_model[back == L * (W - 1)].mean()
    print(f"L = {L}: nothing moves beyond {L * (W - 1)} bytes; just there logits move by {far:.3f} on average")

# %%
# The whole band is there and nothing outside of it, neither ahead nor too far behind: a position moved if and only if
# there is a chain. The colour is the other half of the story. Where there is one chain of 64, little of the byte is
# left. **Reach is an upper bound, not a promise.**
names = [c if c != " " else "␣" for c in LINE]
figure, axes = plt.subplots(1, 3, figsize=(10, 3.7), layout="constrained", sharey=True)
for axis, (L, of_model) in zip(axes, moved.items()):
    shown = np.full((T, T), np.nan)
    np.log10(of_model, out=shown, where=of_model > 1e-12)
    image = axis.imshow(shown, vmin=-2, vmax=1, cmap="viridis")
    axis.set_title(f"{L} layer{'s' * (L > 1)}, W = {W}: {L * (W - 1)} bytes", fontsize=10)
    axis.set_xticks(range(T), names, family="monospace", fontsize=6)
    axis.set_yticks(range(T), names, family="monospace", fontsize=6)
    axis.set_xlabel("changed byte")
axes[0].set_ylabel("position whose logits move")
figure.colorbar(image, label="log10 of the largest change")
figure.suptitle("One changed byte is felt up to L (W − 1) positions later, and less the fewer chains lead there")
plt.show()

# %%
# The gradient knows the same. If only the last byte is a target, the embedding of a byte beyond the reach gets a
# gradient of exactly zero. To give each position an embedding of its own, feed T different tokens; then move one number
# of the embedding at the very end of the reach, and the loss must move as the gradient says.
model, L = untrained(2, W), 2
different, target = np.arange(T)[None], np.full((1, T), -100)
target[0, -1] = 65
_, grads = model.loss_and_grads(different, target, aux_loss_coef=0.0)
felt = abs(grads["tok_embeddings"][:T]).max(axis=1) > 0
assert (felt == (back[-1] <= L * (W - 1))).all()

edge, h, losses = T - 1 - L * (W - 1), 1e-5, []
for step in (h, -h):
    model.params["tok_embeddings"][edge, 3] += step
    losses.append(model.loss(different, target))
    model.params["tok_embeddings"][edge, 3] -= step
by_hand, measured = grads["tok_embeddings"][edge, 3], (losses[0] - losses[1]) / (2 * h)
print(f"{felt.sum()} bytes get a gradient; at the farthest {by_hand:.8f}, by finite differences {measured:.8f}")
assert abs(by_hand - measured) < 1e-7 * max(1, abs(by_hand))

# %%
# A task that needs one thing from far back
# -----------------------------------------
# A loss on text hardly tells whether a model looks 100 bytes back: most of what predicts a byte stands right before
# it. The passkey (Mohtashami and Jaggi, `arXiv 2305.16300 <https://arxiv.org/abs/2305.16300>`__) turns it into a yes
# or no. Digits are hidden in filler; at the end the text asks for them; nothing but the hidden sentence can tell.
WORDS = "the grass is green the sky is blue the sun is yellow here we go there and back again"
ASK = "the pass key is "


def passage(length, depth, rng):
    key = "".join(rng.permutation(list("0123456789"))[:4])
    room = length - len(f"{ASK}{key}. ") - len(f"{ASK}{key}")
    at = round(room * depth)
    filler = (" ".join(rng.choice(WORDS.split(), room)) + " ")[:room]
    return filler[:at] + f"{ASK}{key}. " + filler[at:] + ASK, key


text, key = passage(128, 0.4, np.random.default_rng(1))
print(f"{text}|{key}")

# %%
# The four digits differ on purpose. Then the byte before the second, third and fourth digit of the answer occurs once
# in the key, and says which digit is next: an induction head, which looks for an earlier occurrence of the present
# byte and copies what followed, can answer. (For the first digit it must match more than the space before it.) A key
# such as 4484 would also ask it to count.
#
# The generator of the experiment is ``tinymoe.experiments.passkey.passages``. It makes the same kind of text as
# tokens, with the answer at the end, so that the model's most probable digits can be compared in one pass.
from tinymoe.experiments import passkey

made = passkey.passages(3, 128, np.random.default_rng(0), depth=0.4)
first = bytes(made.tokens[0].astype(np.uint8)).decode()
key = "".join(map(chr, made.keys[0]))
print(first)
assert first.endswith(ASK + key)
assert first[made.starts[0] - len(ASK) :].startswith(f"{ASK}{key}. ")
assert len(first) == 128 == len(text) + 4

# %%
# The record: every length, every position
# ----------------------------------------
# Two models of 3 layers were trained on passages of up to 128 bytes: one with full attention, one with a window of 32,
# so that it reaches L(W − 1) = 93 bytes. Training took minutes, so here the record speaks. A cell is 50 keys at one
# length and one position.
repository = Path(tinymoe.__file__).parents[1]
record = json.loads((repository / "docs/results/passkey.json").read_text())
numbers, trained = record["numbers"], record["numbers"]["trained_length"]
print(record["command"], "of", record["machine"]["date"])
for name, of_model in numbers["models"].items():
    print(f"{name:>6}: {of_model['inside']} keys up to {trained} bytes, {of_model['beyond']} beyond")

figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
for axis, of_model in zip(axes, numbers["models"].values()):
    lengths, depths = (sorted({cell[key] for cell in of_model["cells"]}) for key in ("length", "depth"))
    found = np.zeros((len(depths), len(lengths)))
    for cell in of_model["cells"]:
        found[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["exact"] / cell["asked"]
    image = axis.imshow(found, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axis.axvline(sum(length <= trained for length in lengths) - 0.5, color="black", linestyle="--")
    axis.set_xticks(range(len(lengths)), lengths)
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set_xlabel("length of the text, bytes")
    axis.set_title(f"a window of {of_model['window']}" if of_model["window"] else "full attention", fontsize=10)
axes[0].set_ylabel("where the key is hidden")
figure.colorbar(image, label="share of keys found")
figure.suptitle("Full attention finds every key in the trained length (dashed), the window nearly all in its reach")
plt.show()

# %%
# The paper's claim, retrieval at every length and position, holds here inside the trained length. What the picture of
# the window shows is clearer when the cells are sorted by **distance**, from the question back to the key.
windowed = numbers["models"]["window"]
one, far = windowed["window"] - 1, windowed["reach"]
assert far == 3 * one
by_distance = {}
for cell in windowed["cells"]:
    exact, asked = by_distance.get(cell["distance"], (0, 0))
    by_distance[cell["distance"]] = exact + cell["exact"], asked + cell["asked"]
bounds = ((0, one, "in sight of one layer"), (one + 1, far, "in reach of all"), (far + 1, 512, "out of reach"))
for low, high, what in bounds:
    exact, asked = np.sum([found for distance, found in by_distance.items() if low <= distance <= high], axis=0)
    print(f"{what:>21}, {low:>2} to {high:>3} bytes: {exact:>4} of {asked} keys = {exact / asked:.1%}")
assert exact <= 3, "luck"
near = {distance: f"{exact}/{asked}" for distance, (exact, asked) in sorted(by_distance.items()) if 80 < distance < 105}
print("by distance:", near)

# %%
# Between 32 and 93 bytes no layer sees key and question together. That most keys are found all the same means that
# the layers hand them on: bytes on the way pick the key up in one layer, and the next layer finds it there. It gets
# harder towards the end, where few chains lead. Beyond 93 there is only luck, one key in 5040.
#
# What the trained length adds
# ----------------------------
# Full attention reaches everything. Beyond 128 bytes it loses about half of its keys all the same, because a distance
# is an **angle**: rotary positions turn pair j of a head by :math:`d \cdot \theta^{-2j/K}` between tokens that are d
# apart. Fast pairs have gone round many times within the trained length and meet nothing new. Slow ones have not:
head_dim, theta = 16, 1e6
angles = theta ** (-np.arange(0, head_dim, 2) / head_dim)  # (K/2,) radians a byte
turns = angles * (trained - 1) / (2 * math.pi)
for j, of_pair in enumerate(turns):
    met = "all angles" if of_pair >= 1 else f"{of_pair:.2%} of all angles"
    print(f"pair {j}: {of_pair:8.4f} turns within {trained} bytes: has met {met}")
assert (turns >= 1).sum() == 2
assert np.allclose(angles, np.angle(tinymoe.reference.rope_table(np.array([1]), head_dim, theta, np.float64)[0]))

# %%
# Of 8 pairs, 2 have met all their angles. The attention scores of the others at larger distances are whatever the
# weights happen to give there. A window protects from that: however long the text, no layer sees a distance of W or
# more. This can be broken on purpose, live. The committed model was trained on 128 bytes with a window of 128. We let
# it read held-out text, and score **the same 32 bytes** of each passage after more and more of what comes before them:
# with a context of c the first of them has c bytes before it, the last c + 31.
from tinymoe.corpora import standard_library
from tinymoe.tokenizer import ByteTokenizer

contexts, rng = (4, 8, 16, 32, 64, 96, 160, 256), np.random.default_rng(0)
held_out = standard_library().held_out_tokens(ByteTokenizer())
size = contexts[-1] + 32
documents = [document for of_domain in held_out.values() for document in of_domain if len(document) > size]
starts = [(d, rng.integers(len(d) - size)) for d in (documents[i] for i in rng.integers(len(documents), size=24))]
passages = np.stack([document[start : start + size] for document, start in starts]).astype(np.int64)  # (n, size)

small = tinymoe.Mixtral.from_pretrained(repository / "lessons/checkpoint")
without = tinymoe.Mixtral(dataclasses.replace(small.config, sliding_window=None), small.params)
curves = {
    name: passkey.loss_by_context(of_model, passages, contexts, scored=32)
    for name, of_model in (("window of 128", small), ("window taken away", without))
}
print("context          " + "".join(f"{context:>8}" for context in contexts))
for name, losses in curves.items():
    print(f"{name:<17}" + "".join(f"{loss:8.3f}" for loss in losses), " nats per byte")
    print(f"{'  perplexity':<17}" + "".join(f"{np.exp(loss):8.2f}" for loss in losses))
kept, broken = curves.values()
assert kept[0] > kept[4], "more context helps"
assert abs(kept[-1] - kept[5]) < 0.1, "and beyond the trained length it does no harm"
np.testing.assert_allclose(kept[:6], broken[:6], rtol=1e-5)
assert broken[-1] > kept[-1] + 1, "without the window it breaks"

# %%
# What the function does is a line of counting: with −100 for a target that does not count (lesson 1), all but the last
# 32 are left out. By hand, from the logits, for the shortest context; and beside it the loss of a model that knows
# only how frequent each byte is, the entropy of the bytes:
part = passages[:, -(4 + 32) :]
logits = small(part[:, :-1])[:, 3:]  # (n, 32, V): those at position t are of the byte at t + 1
top = logits.max(axis=-1, keepdims=True)
log_probs = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
by_hand = -np.take_along_axis(log_probs, part[:, 4:, None], axis=-1).mean(dtype=np.float64)
np.testing.assert_allclose(by_hand, kept[0], rtol=1e-5)

shares = np.bincount(passages.ravel()) / passages.size
entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
print(f"by hand {by_hand:.3f}; knowing only how frequent each byte is: {entropy:.3f} nats per byte")
assert broken[-1] > entropy > kept[-1]

# %%
# The same weights, the same text. Up to 128 bytes both are the same model. Beyond, the one without a window meets
# distances that it was never taught, and is worse than one that knows only how frequent each byte is. The record says
# the same of two models that were *trained* with and without a window:
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", sharey=True)
of_record = {"full attention": numbers["text"]["loss"]["full"], "a window of 32": numbers["text"]["loss"]["window"]}
for axis, of_curves, xs, where in (
    (axes[0], curves, contexts, "live: one model, its window taken away"),
    (axes[1], of_record, numbers["text"]["contexts"], "the record: two models"),
):
    for name, losses in of_curves.items():
        axis.plot(xs, losses, "o-", markersize=4, label=name)
    axis.axvline(trained, color="black", linestyle="--", label="trained length")
    axis.set_xscale("log", base=2)
    axis.set_xlabel("bytes of context")
    axis.set_title(where, fontsize=10)
    axis.legend(fontsize=8)
axes[0].set_ylabel("loss, nats per byte")
figure.suptitle("The loss of the same bytes falls with context, and leaps at distances that were never trained")
plt.show()

for name, losses in of_record.items():
    by_context = dict(zip(numbers["text"]["contexts"], losses))
    print(f"{name}: perplexity {np.exp(by_context[4]):.2f} after 4 bytes, {np.exp(by_context[64]):.2f} after 64")

# %%
# So the paper's second claim, that perplexity falls as context grows (figure 4 right), holds here to the trained
# length, with little to gain from more in models this small. Mixtral has no window: it was trained at 32,768 tokens,
# and that is as far as its claim goes, too.
#
# Broken on purpose
# -----------------
# **1. A mask that looks the wrong way.** This one is in circulation: ``distances = i - j``, and a key is seen where
# ``(distances <= 0) & (distances >= -w)``. Evaluated, it shows a token itself and what comes *after* it. A model
# trained with it predicts the next byte by reading it, with a splendid loss, and cannot write.
distances = np.arange(6)[:, None] - np.arange(6)
circulated = (distances <= 0) & (distances >= -2)
print(circulated.astype(int))
assert not np.tril(circulated, -1).any()
assert circulated[0].sum() == 3

# %%
# **2. A window of W + 1.** That mask also has one key too many: w = 2 shows three. Nobody sees this in a loss. The test
# of this lesson does, because the reach grows by one *per layer*: it is :math:`L W` where :math:`L (W - 1)` was meant.
off = influence(untrained(3, W + 1))
print("meant:", 3 * (W - 1), "| measured:", back[off > 1e-12].max())
assert back[off > 1e-12].max() == 3 * W

# %%
# **3. Contexts compared on different bytes.** It is tempting to cut a text into pieces and to average over all bytes of
# each piece. Then "context 128" means anything from 1 to 127 bytes, and the curve falls for a reason of its own: the
# longer the pieces, the fewer bytes stand at the beginning of one, with nearly nothing before them.
for n in (8, 32, 128):
    pieces = passages[:, :256].reshape(-1, n)
    print(f"pieces of {n:>3}: {small.loss(pieces[:, :-1], pieces[:, 1:]):.3f} nats per byte")

# %%
# From 8 to 128 this falls about eleven times as far as the curve of the same bytes did.
#
# Remember
# --------
# * Reach is L(W − 1): a property of the mask, exact, and an upper bound. One chain of :math:`W^L` leads to its end.
# * Change one byte and look where the output moves: the cheapest test of a mask, and it finds an error by one.
# * Retrieval must be learnt; loss on text hardly shows it, a passkey does, cell by cell.
# * Beyond the trained length full attention meets rotary angles that it never saw; a window never sees a new distance.
# * Compare contexts on the same bytes.
#
# **Ask yourself.** (a) Why do norms and experts not add to the reach? (b) Mistral 7B has a window of 4096 and 32
# layers: does it use 131,040 tokens? (c) A cell of the heat map is 50 of 50. What is the smallest true rate that would
# show this one time in twenty? (d) Why does the windowed model lose a key 100 bytes back in a text of 128 bytes, which
# is inside the trained length? (e) What would a larger θ change in the table of turns?
#
# Exercises
# ---------
# 1. Three layers have windows of 2, 4 and 8. Derive the reach, and check it by products of bands. Does the order
#    matter?
# 2. One layer in four has full attention, the others a window of W. What is the reach, and how many keys do the caches
#    hold for a text of T tokens?
# 3. A model guesses four different digits. How probable is the right key, and how many of the record's 5500 keys would
#    be found by luck? How many if it knows the first digit?

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) they work on each position's row alone (a capacity limit, or experts that choose their tokens, would
# mix positions: lesson 7); (b) that much could arrive; whether it is used is a question of training, and of a passkey;
# (c) :math:`p^{50} = 0.05` gives p = 94.2 %, so a full cell is not yet "always"; (d) 100 is more than L(W − 1) = 93:
# its limit is distance, not length; (e) all pairs but the first turn more slowly, so a longer text brings them fewer
# new angles per byte, which is why models of longer contexts come with a larger θ.
assert abs(0.05 ** (1 / 50) - 0.942) < 1e-3

# %%
# 1. Each layer adds its own longest step: 1 + 3 + 7 = 11, and a sum has no order.
bands = [((back >= 0) & (back < w)).astype(int) for w in (2, 4, 8)]
for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
    seen = np.linalg.multi_dot([bands[layer] for layer in order])
    assert back[seen > 0].max() == 1 + 3 + 7

# %%
# 2. One full layer anywhere makes the reach the whole text: a chain takes its long step there. Its cache holds T keys,
#    each of the others min(T, W). For 32 layers, T = 32,768 and W = 4096:
mixed, full = 8 * 32768 + 24 * 4096, 32 * 32768
print(f"{mixed:,} keys instead of {full:,}: {mixed / full:.1%}")
reach = passkey.reach(tinymoe.MixtralConfig.mistral_7b())
print(f"with windows in all layers, as in Mistral 7B: {32 * 4096 / full:.1%}, and a reach of {reach:,} tokens")
assert reach == 32 * 4095

# %%
# 3. There are :math:`10 \cdot 9 \cdot 8 \cdot 7 = 5040` keys, so about one of 5500 is luck. With the first digit known
#    504 are left, and eleven would be found: a leak can look like a little retrieval.
assert math.perm(10, 4) == 5040
assert sum(cell["asked"] for cell in windowed["cells"]) == 5500
print(f"by luck {5500 / math.perm(10, 4):.1f} keys; with the first digit known {5500 / math.perm(9, 3):.1f}")

# %%
# .. raw:: html
#
#    </details>

# %%
# **Next:** :doc:`lesson 20 </lessons/lesson_20_instruct>` teaches a model that continues text to answer, and then to
# prefer one form of an answer over another.
