from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from optkit.report.record import Scaling, StepRecord
from optkit.report.summary import summarize
from optkit.report.table import print_table, to_markdown


def drawn(report, width=100, color=False) -> str:
    target = io.StringIO()
    print_table(report, Console(file=target, width=width, force_terminal=color, color_system="standard" if color else None))
    return target.getvalue()


def row_of(text: str, metric: str) -> str:
    return next(line for line in text.splitlines() if re.match(rf"\W*{re.escape(metric)}\s", line))


@pytest.mark.parametrize("form", [drawn, to_markdown])
def test_a_row_shows_before_after_ratio_interval_and_verdict(make_report, form):
    row = row_of(form(make_report()), "tpot_ms")
    for part in ("20.00", "10.40", "0.52 [0.51, 0.53]", "better"):
        assert part in row


@pytest.mark.parametrize("form", [drawn, to_markdown])
def test_fidelity_has_no_verdict(make_report, form):
    row = row_of(form(make_report()), "kl_divergence")
    assert "0.01230" in row
    assert "better" not in row


@pytest.mark.parametrize("form", [drawn, to_markdown])
def test_simulated_speed_is_called_simulated_and_not_better(make_report, form):
    text = form(make_report(execution="simulated", factor=0.5))
    assert "speed: simulated (int4)" in text
    for metric in ("ttft_ms", "tpot_ms", "tpot_ms@8", "tokens_per_second", "roof_share"):
        assert "simulated" in row_of(text, metric)
        assert "better" not in row_of(text, metric)
    assert "better" in row_of(text, "artefact_bytes")


@pytest.mark.parametrize("form", [drawn, to_markdown])
def test_other_arms_stand_apart_with_their_ratio(make_report, form):
    text = form(make_report())
    header = next(line for line in text.splitlines() if "other arms" in line)
    assert header.index("bfloat16") < header.index("float32", header.index("bfloat16") + len("bfloat16"))
    assert "untouched in bfloat16" in text
    assert "0.80 [0.78, 0.82]" in text


def test_the_baseline_again_is_noise_and_no_arm_of_the_table(make_report):
    summary = summarize(make_report(others=("bfloat16", "baseline-again")))
    assert [block.headers[1] for block in summary.blocks] == ["bfloat16"]
    assert "tpot_ms ±2.4 %" in summary.noise


def test_a_noise_verdict_that_is_not_same_is_said(make_report):
    made = make_report()
    noisy = tuple(entry.model_copy(update={"verdict": "unclear"}) for entry in made.noise if entry.metric == "tpot_ms")
    assert "(unclear)" in summarize(make_report(noise=noisy)).noise


@pytest.mark.parametrize("form", [drawn, to_markdown])
def test_limits_and_notes_are_told(make_report, form):
    text = form(make_report())
    assert re.search(r"limit: tpot_ms ratio 0.520, limit 0.6: held", text)
    assert re.search(r"limit: perplexity ratio 1.003, limit 1.001: NOT HELD", text)
    assert "fell back" in text


def test_colors_only_repeat_the_word(make_report):
    text = drawn(make_report(), color=True)
    assert "\x1b[" in text
    assert "\x1b[" not in drawn(make_report())
    assert re.sub(r"\x1b\[[\d;]*m", "", text) == drawn(make_report())


@pytest.mark.parametrize("width", [80, 100, 300])
def test_the_terminal_table_fits(make_report, hostile, width):
    made = make_report(name=hostile, source="long-" * 60, others=("bfloat16", "float32", "x" * 40))
    assert max(len(line) for line in drawn(made, width).splitlines()) <= min(width, 100)


def test_at_100_columns_no_number_is_cut(make_report):
    made = make_report(others=("bfloat16", "float32"))
    text = drawn(made)
    assert "…" not in text
    assert text.count("0.80 [0.78, 0.82]") == 4


def test_a_hostile_name_is_drawn_but_not_obeyed_in_the_terminal(make_report, hostile):
    text = drawn(make_report(name=hostile, source=hostile))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[bold]" in text


def test_a_hostile_name_is_text_in_markdown(make_report, hostile):
    text = to_markdown(make_report(name=hostile, source=hostile, others=(hostile,)))
    assert "<script" not in text
    assert not re.search(r"(?<!\\)\[link", text)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {6, 4}


def test_a_report_without_optimized_arm_still_has_a_table(make_report):
    made = make_report()
    alone = make_report(arms={"baseline": made.arms["baseline"]}, comparisons=(), noise=(), limits=(), data=None)
    assert "no optimized arm" in drawn(alone)
    assert "20.00" in row_of(to_markdown(alone), "tpot_ms")


def test_a_value_that_was_not_finite_is_a_dash(make_report):
    made = make_report()
    after = made.arms["optimized"]
    broken = after.metrics["perplexity"].model_copy(update={"value": None})
    after = after.model_copy(update={"metrics": {**after.metrics, "perplexity": broken}})
    row = row_of(to_markdown(make_report(arms={**made.arms, "optimized": after})), "perplexity")
    assert [cell.strip() for cell in row.split("|")][3] == "-"


def test_quick_runs_and_random_weights_are_said(make_report):
    made = make_report()
    facts = " ".join(
        summarize(
            make_report(run=made.run.model_copy(update={"quick": True}), model=made.model.model_copy(update={"trained": False}))
        ).facts
    )
    assert "quick" in facts
    assert "random weights" in facts


@pytest.mark.parametrize("form", [drawn, to_markdown])
def test_the_conditions_of_quality_are_told(make_report, form):
    assert "window 512, stride 512" in form(make_report())


def test_a_row_for_each_step_tells_what_it_has_come_to_and_what_it_did_itself(make_report):
    made = make_report(steps=("drop_layers", "int4"), others=("step-1", "bfloat16"), factor=0.4)
    first = made.arms["step-1"].model_copy(
        update={"history": (StepRecord(name="drop_layers", settings={}, execution="real", opens_in="transformers"),)}
    )
    made = made.model_copy(update={"arms": {**made.arms, "step-1": first}})
    steps, others = summarize(made).blocks
    assert steps.headers == ("after", "perplexity", "step", "tpot_ms", "step", "artefact_bytes", "step")
    assert [row[0] for row in steps.rows] == ["drop_layers", "int4"]
    assert steps.rows[0][3:5] == ("0.80 [0.78, 0.82]", "0.8000")
    assert steps.rows[1][3:5] == ("0.400 [0.392, 0.408]", "0.5000")
    assert others.headers[1] == "bfloat16"
    widest = max(len(line.rstrip()) for line in drawn(made).splitlines())
    assert widest <= 100
    assert "drop_layers" in drawn(made) and "| int4" in to_markdown(made)


def test_the_row_of_a_simulated_step_says_so(make_report):
    made = make_report(steps=("magnitude", "sparse"), others=("step-1",))
    step = StepRecord(name="magnitude", settings={}, execution="simulated", opens_in="transformers")
    first = made.arms["step-1"].model_copy(update={"history": (step,), "execution": "simulated"})
    (steps,) = summarize(made.model_copy(update={"arms": {**made.arms, "step-1": first}})).blocks
    assert steps.rows[0][4] == "simulated"
    assert steps.rows[1][4] != "simulated"


def test_a_recipe_of_one_step_needs_no_such_rows(make_report):
    assert all(block.headers[0] == "other arms" for block in summarize(make_report()).blocks)


@pytest.mark.parametrize("form", [drawn, to_markdown])
def test_what_several_processes_reach_is_told_against_one_of_them_and_against_all_threads_in_one(make_report, form):
    made = make_report()
    numbers = {"metric": "tokens_per_second", "ranks": 2, "low": 1.7, "high": 1.9}
    scaling = (
        Scaling(against="baseline", ratio=1.8, efficiency=0.9, verdict="better", **numbers),
        Scaling(against="bfloat16", ratio=1.8, efficiency=1.8, verdict="unclear", **numbers),
    )
    text = " ".join(form(made.model_copy(update={"scaling": scaling})).replace("\\", "").split())
    assert "2 processes reach 1.80 [1.70, 1.90] of the tokens_per_second of one process with as many threads as each of them" in text
    assert "efficiency 0.9" in text
    assert "of one process with the threads of all: unclear" in text
