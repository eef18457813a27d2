"""The goals of the expert block are judged by the right cases, on a GPU alone, and shown with what they rest on."""

import pytest
from moe_records import COMPUTE, READ, synthetic, written

from tinymoe.bench import goals, moe
from tinymoe.bench.goals import BOTH, CUBLAS, FORWARD, GRAPH, OURS
from tinymoe.bench.roofline import described, roofline


@pytest.fixture
def record():
    return synthetic()


def find(record, *, pass_=None, **of):
    of |= {"pass": pass_} if pass_ else {}
    return [one for one in record["cases"] if all(one.get(key) == value for key, value in of.items())]


def slower(cases, times):
    for one in cases:
        one["median"] *= times
        one["times"] = [times * seconds for seconds in one["times"]]


def verdicts(record):
    return {goal.name: goal.met for goal in goals.goals(record)}


def test_a_record_that_reaches_every_goal_has_met_them(record):
    assert {*verdicts(record).values()} == {True}
    assert len(verdicts(record)) == 10
    found = {goal.name: goal.found for goal in goals.goals(record)}
    assert found["forward, N = 4096: of dense cuBLAS's throughput"] == pytest.approx(0.90 / 0.95)
    assert found["forward, N = 1: of the rate of reading"] == pytest.approx(0.91)  # of the graph
    assert found["every peer's time: of ours, which is to be less"] == pytest.approx(0.90 / 0.70)


@pytest.mark.parametrize(
    ("contestant", "tokens", "routing", "each", "times", "missed"),
    [
        (OURS, 16384, "uniform", FORWARD, 1.04, "forward, N = 16384:"),
        (OURS, 4096, "uniform", FORWARD, 1.09, "forward, N = 4096:"),
        (OURS, 4096, "uniform", BOTH, 1.13, "forward and backward, N = 4096:"),
        (OURS, 16384, "uniform", BOTH, 1.13, "forward and backward, N = 16384:"),
        (OURS, 4096, "skewed", FORWARD, 1.06, "skewed routing:"),
        (OURS, 16384, "skewed", BOTH, 1.06, "skewed routing:"),
        (OURS, 1, "uniform", GRAPH, 1.08, "forward, N = 1:"),
        (OURS, 16, "uniform", GRAPH, 1.08, "forward, N = 16:"),
        (OURS, 256, "uniform", GRAPH, 1.15, "forward, N = 256:"),
        (OURS, 64, "skewed", FORWARD, 1.51, "every peer's time:"),
        ("torch grouped_mm", 1024, "uniform", BOTH, 0.77, "every peer's time:"),
    ],
)
def test_each_goal_is_missed_by_its_own_case_alone(record, contestant, tokens, routing, each, times, missed):
    slower(find(record, contestant=contestant, tokens=tokens, routing=routing, pass_=each), times)
    (wrong,) = [name for name, met in verdicts(record).items() if not met]
    assert wrong.startswith(missed)


def test_an_error_larger_than_that_of_the_products_is_a_goal_missed(record):
    find(record, contestant=OURS, tokens=64, routing="skewed", pass_=FORWARD)[0]["error"] = 2.1e-3
    (wrong,) = [goal for goal in goals.goals(record) if not goal.met]
    assert (wrong.name, wrong.case) == ("the error of cuBLAS's products: of ours", "64 tokens, skewed, forward")
    assert wrong.found == pytest.approx(0.95)


def test_what_was_not_measured_is_neither_met_nor_missed(record):
    record["cases"] = find(record, tokens=256, contestant=OURS)
    found = [goal for goal in goals.goals(record) if goal.found is not None]
    assert [goal.name for goal in found] == ["forward, N = 256: of the rate of reading"]
    assert list(verdicts(record).values()).count(None) == 9
    assert "not measured" in "\n".join(goals.told(record))
    assert "not measured" in "\n".join(goals.page(record))


def test_an_emulated_record_judges_no_goal(record):
    record["device"] = "emulated"
    assert {*verdicts(record).values()} == {None}
    first, *lines = goals.told(record)
    assert "say nothing of a GPU" in first
    assert not any(line.split()[0] in ("met", "not") for line in lines[:10])


def test_terminal_and_page_show_figures_verdicts_and_who_was_absent(record):
    slower(find(record, contestant=OURS, tokens=64, routing="skewed", pass_=FORWARD), 1.51)
    text, page = ("\n".join(lines) for lines in (goals.told(record), goals.page(record)))
    assert "not met" in text
    assert "torch grouped_mm, 64 tokens, skewed, forward" in text
    assert "not compared: jax: no such module" in text
    assert "Not compared: jax (no such module)." in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows[:12]}) == 1  # the goals
    assert "| 4096 | uniform | forward | 0.95 | – |" in page
    assert "| 256 | uniform | forward | – | 0.91 |" in page
    assert "| 4096 | both | 1 | 1.000 |" in page  # a megabyte kept
    assert "| 4096 | both, 0 kept | 0 | 1.250 |" in page


def test_roofline_has_a_point_for_every_contestant_and_token_count_under_both_ceilings(record):
    (axes, *_) = roofline(record).axes
    points = {of.get_label(): len(of.get_offsets()) for of in axes.collections}
    assert points == dict.fromkeys((OURS, CUBLAS, "torch grouped_mm"), len(moe.TOKENS))
    (slope, flat) = axes.lines
    for x, y in slope.get_xydata():
        assert y == pytest.approx(x * READ / 1e12)
    assert list(flat.get_ydata()) == pytest.approx([COMPUTE / 1e12] * 2)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "90% at 4,096 tokens" in described(record)


def test_newest_record_of_a_gpu_is_the_one_with_the_latest_date_in_it(tmp_path):
    assert goals.newest(tmp_path) is None
    written(tmp_path / "moe-c.json", "2001-01-01", "emulated")
    written(tmp_path / "kernels-d.json", "2002-01-01")
    assert goals.newest(tmp_path) is None
    latest = written(tmp_path / "moe-a.json", "2000-10-02")
    written(tmp_path / "moe-b.json", "2000-09-30")
    assert goals.newest(tmp_path) == latest


def test_a_peer_that_the_device_may_have_waited_for_is_marked(record):
    assert not any("*" in line for line in (*goals.page(record), *goals.told(record)))
    for one in find(record, contestant="torch grouped_mm", tokens=16):
        one["waited"] = True
    marked = [row for row in goals.comparisons(record) if "torch grouped_mm*" in row["peers"]]
    assert {row["tokens"] for row in marked} == {16}
    assert any("torch grouped_mm*" in line for line in goals.page(record))
    assert [line for line in goals.told(record) if line.startswith("  * ")] == ["  * the host's time is in it"]
