r"""
Lesson 5 · The router: two of four, ties, and a gradient
========================================================

**The question.** A layer has several feed-forward blocks, its *experts*, and each token may use two of them. Who
decides, and how does a decision learn, when "the two largest" is not a function that one can differentiate?

The decision is made by the smallest part of the model: one matrix with a row for each expert. In Mixtral 8x7B it has
4096 · 8 = 32,768 weights a layer, 1.05 million in 32 layers: one in 45,000 of all parameters. We route a line of Python
text with it, byte by byte, derive its gradient, check its forward and its gradient against the library, and then break
it in the three ways in which it is broken most often.

**You need** the softmax and its backward from :doc:`lesson 1 </lessons/lesson_01_bytes>`. On paper, with numbers for
three tokens and four experts, the same chain stands in :doc:`/math/router`.
"""

# %%
# From a token to scores
# ----------------------
# The running example is one line of Python, a token per byte. A token enters the layer as a row of D numbers; here they
# are random, since nothing has been trained. The router's matrix, the *gate*, has a row of D weights per expert. The
# dot product of both is a **logit**: how well this token suits this expert.
import matplotlib.pyplot as plt
import numpy as np

LINE = "def add(a, b): return a + b"
tokens = np.frombuffer(LINE.encode(), np.uint8)  # (N,)
N, D, E, k = len(tokens), 16, 4, 2

rng = np.random.default_rng(0)
x = rng.standard_normal((256, D))[tokens]  # (N, D): the same byte gives the same row
w_gate = rng.standard_normal((E, D)) / D**0.5  # (E, D)
logits = x @ w_gate.T  # (N, E)

print(f"x {x.shape}, w_gate {w_gate.shape}, logits {logits.shape}")
for byte, row in list(zip(LINE, logits.round(2)))[:4]:
    print(repr(byte), row)

# %%
# From scores to weights
# ----------------------
# Softmax turns a row of logits into probabilities. The two largest are kept, in that order, and divided by their sum,
# so that what the chosen experts say is averaged, not shrunk:
#
# .. math:: p = \mathrm{softmax}(x W_g^\top), \qquad
#           w_i = \frac{p_i}{\sum_{j \in K} p_j} \quad (i \in K, \text{ the } k \text{ largest of } p).


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def route(logits, k):
    p = softmax(logits)  # (N, E)
    experts = np.argsort(-p, axis=1, kind="stable")[:, :k]  # (N, k), most probable first
    chosen = np.take_along_axis(p, experts, axis=1)  # (N, k)
    return chosen / chosen.sum(axis=1, keepdims=True), experts


weights, experts = route(logits, k)
for n in range(4):
    print(f"{LINE[n]!r}: p = {softmax(logits)[n].round(3)} -> experts {experts[n]}, weights {weights[n].round(3)}")

# %%
# The Mixtral paper (arXiv 2401.04088, section 2.1) writes it the other way round,
# :math:`G(x) = \mathrm{Softmax}(\mathrm{TopK}(x W_g))`: first
# the largest logits, then a softmax over those alone. It is the same, because the sum over all experts cancels:
#
# .. math:: \frac{p_i}{\sum_{j\in K} p_j}
#           = \frac{e^{\ell_i} / \sum_{m} e^{\ell_m}}{\sum_{j \in K} e^{\ell_j} / \sum_{m} e^{\ell_m}}
#           = \frac{e^{\ell_i}}{\sum_{j \in K} e^{\ell_j}}.
#
# So the experts that were not chosen have no say in the weights at all. Keep this: it is the key to the gradient.
paper = softmax(np.take_along_axis(logits, experts, axis=1))
print("largest difference:", abs(paper - weights).max())

# %%
# Looked at as a picture, the line becomes a sparse matrix: two entries a row, which sum to one. The same byte goes the
# same way each time, since its row is the same; in a trained model what came before it would matter, too.
dense = np.zeros((N, E))
np.put_along_axis(dense, experts, weights, axis=1)

figure, axes = plt.subplots(figsize=(9, 2.4), layout="constrained")
image = axes.imshow(dense.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
axes.set_xticks(range(N), [c if c != " " else "␣" for c in LINE], family="monospace")
axes.set_yticks(range(E), [f"expert {e}" for e in range(E)])
axes.set_title("Each token uses two of four experts; its two weights sum to one")
figure.colorbar(image, label="weight")
plt.show()

# %%
# Ties
# ----
# Two experts with the same probability hardly ever meet in float32. In bfloat16, which keeps 8 significant bits, some
# four tokens in a thousand have a second and a third choice that are equal (exercise 3 counts them). Then "the two
# largest" is not defined, and two programs that both are right can send a token to different experts, whose outputs
# have nothing in common. So a rule is part of the definition: **ties go to the lowest expert**. A stable sort of the
# negated probabilities obeys it. The usual shortcut, sort upwards and take from the end, does not:
tied = np.array([[0.0, 1.0, 1.0, 1.0]])
print("stable, negated: ", np.argsort(-tied, kind="stable")[0, :2])
print("upwards, reversed:", np.argsort(tied, kind="stable")[0, ::-1][:2])

# %%
# What the layer does with it
# ---------------------------
# Each chosen expert computes an output row, and the layer returns their weighted sum. To have experts to choose from,
# take four random matrices (the real ones, SwiGLU blocks, were built in lesson 2, and meet the router in lesson 6):
#
# .. math:: y_n = \sum_{j=1}^{k} w_{nj} \, o_{nj}, \qquad o_{nj} = \mathrm{expert}_{e(n,j)}(x_n).
matrices = rng.standard_normal((E, D, D)) / D**0.5


def mix(logits):
    weights, experts = route(logits, k)
    out = np.stack([np.stack([matrices[e] @ x[n] for e in experts[n]]) for n in range(N)])  # (N, k, D)
    return (weights[:, :, None] * out).sum(axis=1), (weights, experts, out)  # (N, D)


y, (weights, experts, out) = mix(logits)
print("y", y.shape)

# %%
# The gradient
# ------------
# Let L be a loss and :math:`dy = \partial L / \partial y`. Which experts are chosen is a step function of the logits:
# flat nearly everywhere, with jumps between. Its derivative is zero where it exists, and nothing goes back through
# it. All that the router can learn, it learns **through the weights**. Two links of the chain:
#
# 1. :math:`y = \sum_j w_j o_j`, so :math:`dw_j = dy \cdot o_j`: an expert whose output points along :math:`-dy` would
#    lower the loss, and its weight should grow.
# 2. :math:`w = \mathrm{softmax}` over the chosen logits, as we saw. A softmax has
#    :math:`\partial w_i / \partial \ell_j = w_i (\delta_{ij} - w_j)`, where :math:`\delta_{ij}` is 1 if i = j, else 0.
#    So
#
#    .. math:: d\ell_j = \sum_i dw_i \, w_i (\delta_{ij} - w_j) = w_j \Bigl( dw_j - \sum_i w_i \, dw_i \Bigr)
#              \quad (j \in K), \qquad d\ell_j = 0 \quad (j \notin K).
#
# The sum in brackets is the weighted mean of the :math:`dw`. A logit's gradient is its weight, times how much worse its
# expert does *than the mix of both*, so that descent, which moves against it, raises the better one. With weights
# (0.8, 0.2) and dw = (3, −2) the mean is 2, and :math:`d\ell = (0.8 \cdot 1, \; 0.2 \cdot (-4)) = (0.8, -0.8)`. For the
# experts that were not chosen the gradient is exactly zero, since their logits do not occur in the weights.
#
# The backward reads :math:`o`: the outputs of all k experts of each token must be kept from the forward.


def route_backward(dweights, weights, experts):
    mean = (weights * dweights).sum(axis=1, keepdims=True)  # (N, 1)
    dlogits = np.zeros((len(weights), E))
    np.put_along_axis(dlogits, experts, weights * (dweights - mean), axis=1)
    return dlogits


goal = rng.standard_normal((N, D))


def loss_of(logits):
    return 0.5 * ((mix(logits)[0] - goal) ** 2).sum()


dy = y - goal  # (N, D)
dweights = (dy[:, None, :] * out).sum(axis=2)  # (N, k)
dlogits = route_backward(dweights, weights, experts)  # (N, E)
dw_gate, dx_router = dlogits.T @ x, dlogits @ w_gate
print("dlogits of", repr(LINE[0]), dlogits[0].round(3), "and its sum:", dlogits[0].sum().round(12))

# %%
# The row sums to zero, as it must: adding the same number to all logits changes nothing.
#
# Checked
# -------
# By finite differences: move every logit a little up and a little down, and see what the loss does. Central
# differences err by about :math:`h^2`, and by the rounding of the loss over h; :math:`h = 10^{-5}` is a good place
# between both. A token whose second and third choice are closer than h would change its experts on the way; there is
# none here, and the smallest margin says so.


def slope(f, z, h=1e-5):
    d = np.zeros_like(z)
    for i in np.ndindex(z.shape):
        up, down = z.copy(), z.copy()
        up[i] += h
        down[i] -= h
        d[i] = (f(up) - f(down)) / (2 * h)
    return d


ranked = np.sort(logits, axis=1)
measured = slope(loss_of, logits)
print("smallest margin between second and third:", (ranked[:, -2] - ranked[:, -3]).min().round(4))
print("by hand against finite differences:", abs(dlogits - measured).max())
assert abs(dlogits - measured).max() < 1e-7

# %%
# And against the library, where the same lines read :func:`tinymoe.reference.route` and
# :func:`tinymoe.reference.route_backward`. The ``None`` is the gradient of a balance loss, which reads the logits, too;
# there is none before lesson 7.
from tinymoe.reference import route as library_route
from tinymoe.reference import route_backward as library_route_backward

routing, saved = library_route(x, w_gate, k)
dx_library, dw_gate_library = library_route_backward(dweights, None, saved)
assert (routing.experts == experts).all()
np.testing.assert_allclose(routing.weights, weights, rtol=1e-12)
np.testing.assert_allclose(dw_gate_library, dw_gate, rtol=1e-9)
np.testing.assert_allclose(dx_library, dx_router, rtol=1e-9, atol=1e-12)
print("the library agrees, forward and backward")

# %%
# What the gradient cannot see
# ----------------------------
# Let the logit of expert 0 rise from −3 to 3 while the other three stay. Where it passes the second place, at 0.2, it
# enters with a weight of 0.35, and expert 2 leaves with as much: these two jump, and so does the output. Expert 1
# stays, and its weight has no jump; nor has any where expert 0 takes the first place, at 0.8. Between the jumps the
# weights are smooth, and that is where the derivative lives. A gradient is blind to what lies on the other side of a
# jump, which is one reason why a router that favours two experts early may never try the rest:
# :doc:`lesson 7 </lessons/lesson_07_balance>`.
sweep = np.linspace(-3, 3, 601)
moved = np.tile([0.0, 0.8, 0.2, -0.5], (len(sweep), 1))
moved[:, 0] = sweep
of_sweep, chosen = route(moved, k)
lines = np.zeros((len(sweep), E))
np.put_along_axis(lines, chosen, of_sweep, axis=1)

figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for e in range(E):
    axes.plot(sweep, np.where(lines[:, e] > 0, lines[:, e], np.nan), label=f"expert {e}")
axes.set(xlabel="logit of expert 0", ylabel="weight")
axes.set_title("A weight jumps where the second choice changes hands, and is smooth between")
axes.legend(ncols=4, fontsize=8)
plt.show()

# %%
# Broken on purpose
# -----------------
# Three mistakes that are found in published code. None raises an error, and whatever else is trained still learns.
#
# **1. The renormaliser left out of the backward.** It looks natural: divide the gradient of the weights by the sum
# :math:`s` of the chosen probabilities, scatter it to (N, E), and go back through
# :math:`p = \mathrm{softmax}(\ell)`. But s depends on the logits, too.


def forgetful_backward(dweights, logits, experts):
    p = softmax(logits)
    s = np.take_along_axis(p, experts, axis=1).sum(axis=1, keepdims=True)
    dp = np.zeros_like(p)
    np.put_along_axis(dp, experts, dweights / s, axis=1)
    return p * (dp - (p * dp).sum(axis=1, keepdims=True))


wrong = forgetful_backward(dweights, logits, experts)
print("forgotten renormalisation: off by", np.linalg.norm(wrong - measured) / np.linalg.norm(measured))
print("  and experts that nobody asked get gradient:", wrong[0].round(3))
assert np.linalg.norm(wrong - measured) > 0.1 * np.linalg.norm(measured)

# %%
# **2. Weights that were cut off from the graph.** Some code computes the weights outside of what is differentiated, or
# detaches them. Then the experts learn, and the gate stays as it was drawn. To see what both mistakes cost, let the
# gate alone descend, with the right gradient, the forgetful one, and none.


def descend(backward, steps=100, rate=1e-3):
    gate, losses = w_gate.copy(), []
    for _ in range(steps):
        y, (weights, experts, out) = mix(x @ gate.T)
        losses.append(0.5 * ((y - goal) ** 2).sum())
        dweights = ((y - goal)[:, None, :] * out).sum(axis=2)
        gate -= rate * backward(dweights, weights, experts, x @ gate.T).T @ x
    return losses


curves = {
    "right": descend(lambda dw, w, experts, z: route_backward(dw, w, experts)),
    "renormaliser forgotten": descend(lambda dw, w, experts, z: forgetful_backward(dw, z, experts)),
    "cut off": descend(lambda dw, w, experts, z: np.zeros_like(z)),
}
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for name, losses in curves.items():
    axes.plot(losses, label=name)
    print(f"{name:<23} {losses[0]:.1f} -> {losses[-1]:.1f}")
axes.set(xlabel="step", ylabel="loss")
axes.set_title("The gate alone descends: with the right gradient, a forgetful one, and none")
axes.legend()
plt.show()
assert curves["right"][-1] < min(curves["renormaliser forgotten"][-1], curves["cut off"][-1])

# %%
# **3. Top-1 with renormalisation.** With k = 1 the only weight is :math:`p_i / p_i = 1` whatever the logit, and the
# formula gives :math:`w (dw - w \, dw) = 0`. That is not an error of the gradient but of the design. A Switch
# transformer, which is top-1, keeps the weight :math:`p_i` as it is for this reason. Top-2 does not need to: its two
# weights share out one, and either can grow.
w1, e1 = route(logits, 1)
print("top-1, renormalised: largest gradient", abs(route_backward(dweights[:, :1], w1, e1)).max())

# %%
# Remember
# --------
# * The router is one matrix product, a softmax and the k largest; renormalised, its weights are a softmax over the
#   *chosen* logits alone.
# * The choice itself has no gradient. The router learns through the weights: :math:`d\ell = w (dw - \sum w\,dw)` for
#   the chosen, exactly 0 for the others. (The balance loss of lesson 7 does reach the others.)
# * Ties go to the lowest expert, by rule, so that two programs agree.
# * Compare a router's gradient with finite differences: no error message finds the first two mistakes.
#
# **Ask yourself.** (a) Why may the unchosen logits not matter for the weights, though softmax sums over all experts?
# (b) What is the gradient of a token whose two experts give the same output? (c) A token has weights (0.5, 0.5) and
# :math:`dw = (1, -1)`: what is :math:`d\ell`? (d) Why does a row of :math:`d\ell` sum to zero? (e) When would finite
# differences disagree with a correct gradient? (f) Which part of the layer's backward reads :math:`o`, the experts'
# outputs, and what must therefore be kept? (g) With k = E, what is left of the choice? (h) Why is top-1 with
# renormalised weights unable to train its router? (i) What changes if 5 is added to all logits of a token? (j) Which
# expert gets a token whose logits are all equal?
#
# Exercises
# ---------
# 1. Write the gradient with k = E. Show that it is the ordinary softmax backward.
# 2. Give each token the weight :math:`p_i` without renormalising, as Switch does. Derive :math:`d\ell`, and check it by
#    finite differences with k = 1. Which logits get a gradient now?
# 3. Round the logits to bfloat16 (``ml_dtypes.bfloat16``) for 100,000 random tokens with 8 experts and count how many
#    have a tie between second and third place.

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) the common denominator cancels in the renormalisation; (b) zero, both :math:`dw` are equal to
# their mean; (c) the mean is 0, so (0.5, −0.5); (d) weights do not change when all logits move together; (e) when a
# step of size h changes the chosen experts; (f) :math:`dw_j = dy \cdot o_j`, so the outputs of all k experts of each
# token; (g) nothing, it is a plain softmax mixture; (h) its weight is always one; (i) nothing; (j) its first choice
# is expert 0, its second 1.
#
# 1. With k = E the chosen are all, their probabilities sum to one, and :math:`w = p`:
p = softmax(logits)
all_weights, all_experts = route(logits, E)
dw = rng.standard_normal((N, E))
dp = np.zeros((N, E))
np.put_along_axis(dp, all_experts, dw, axis=1)
np.testing.assert_allclose(
    route_backward(dw, all_weights, all_experts), p * (dp - (p * dp).sum(axis=1, keepdims=True)), atol=1e-12
)

# %%
# 2. Now :math:`w_i = p_i`, so :math:`d\ell_j = p_j (dp_j - \sum_i p_i \, dp_i)` with dp zero but at the chosen. Every
#    logit gets a gradient, because every logit is in the softmax's denominator.
first = experts[:, :1]
c = rng.standard_normal((N, 1))


def weighted(z):
    return (c * np.take_along_axis(softmax(z), first, axis=1)).sum()


dp = np.zeros((N, E))
np.put_along_axis(dp, first, c, axis=1)
by_hand = p * (dp - (p * dp).sum(axis=1, keepdims=True))
np.testing.assert_allclose(by_hand, slope(weighted, logits), atol=1e-8)
assert (by_hand != 0).all()

# %%
# 3. Logits between 1 and 2 are 2⁻⁷ apart in bfloat16. Of standard normal ones, about four tokens in a thousand have
#    such a tie, each of which two programs without a common rule may send to different experts:
import ml_dtypes

rounded = np.sort(rng.standard_normal((100_000, 8)).astype(ml_dtypes.bfloat16).astype(np.float32), axis=1)
share = (rounded[:, -2] == rounded[:, -3]).mean()
print(f"{100 * share:.2f} % of tokens have a tie between second and third")
assert 0.001 < share < 0.05

# %%
# .. raw:: html
#
#    </details>

# %%
# **Next:** :doc:`lesson 6 </lessons/lesson_06_moe_layer>` gives the chosen experts their tokens, in three ways that
# return the same numbers at very different cost.
