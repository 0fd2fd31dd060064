from __future__ import annotations

import html
import re
from html.parser import HTMLParser

import pytest

from optkit.report.page import to_html
from optkit.report.plots import DRAWN, Point, quality_speed_figure, samples_figure
from optkit.report.summary import axes_of

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Page(HTMLParser):
    """Collects the elements, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data


def test_the_page_stays_under_300_kb_with_five_arms_ten_metrics_and_400_samples(make_report, recipe_text):
    made = make_report(others=("bfloat16", "float32", "int8"), count=400)
    assert len(made.arms) == 5
    assert all(len(arm.metrics) == 10 for arm in made.arms.values())
    assert len(to_html(made, recipe_text).encode()) < 300_000


def test_the_page_stays_under_300_kb_with_many_arms_notes_and_a_long_recipe(make_report):
    made = make_report(others=tuple(f"arm-{number}" for number in range(12)), count=400, notes=("note " * 400,) * 500)
    assert len(to_html(made, "# comment\n" * 100_000).encode()) < 300_000


def test_the_page_loads_nothing_and_runs_nothing(make_report, recipe_text):
    text = to_html(make_report(), recipe_text)
    page = Page(text)
    assert ("meta", "content", POLICY) in page.attributes
    assert not {"script", "iframe", "object", "embed", "link", "img", "base", "form"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    loads = [value for _, name, value in page.attributes if name in ("href", "src", "xlink:href", "action")]
    assert loads
    assert all(value.startswith("#") or value == "samples.csv" for value in loads)
    assert "http" not in text.replace("http-equiv", "")
    assert not re.search(r"url\((?!#)|@import", text)


def test_a_hostile_name_survives_nowhere(make_report, hostile):
    clean, dirty = (
        Page(to_html(make_report(others=("x",)), "name: a")),
        to_html(
            make_report(name=hostile, source=hostile, others=(hostile,), machine={"cpu": hostile}, notes=(hostile,), steps=(hostile,)),
            hostile,
        ),
    )
    assert "<script" not in dirty
    assert "\x1b" not in dirty
    assert "\u202e" not in dirty
    page = Page(dirty)
    assert set(page.tags) == set(clean.tags)
    assert "<script>alert(1)</script>" in page.text


def test_the_page_holds_table_recipe_and_environment(make_report, recipe_text):
    text = Page(to_html(make_report(), recipe_text)).text
    for part in ("0.52 [0.51, 0.53]", "NOT HELD", "Imaginary 9000", "packages.torch", recipe_text.strip(), "fell back"):
        assert part in text


def test_the_drawings_name_every_arm_and_carry_tool_tips(make_report, recipe_text):
    text = to_html(make_report(), recipe_text)
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        titles = re.findall(r"<title>(.*?)</title>", drawing)
        for arm in ("baseline", "optimized", "bfloat16", "float32"):
            assert any(html.unescape(title).startswith(f"{arm}:") for title in titles)


def test_the_same_report_gives_the_same_page(make_report, recipe_text):
    assert to_html(make_report(), recipe_text) == to_html(make_report(), recipe_text)


def test_the_drawings_follow_the_colors_of_the_page(make_report, recipe_text):
    text = to_html(make_report(), recipe_text)
    assert "prefers-color-scheme: dark" in text
    for drawing in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        assert "currentColor" in drawing
        assert not re.search(r"(?:fill|stroke): #", drawing)


def test_ids_are_unique_over_the_drawings(make_report, recipe_text):
    ids = [value for _, name, value in Page(to_html(make_report(), recipe_text)).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_samples_are_thinned_but_the_ends_are_drawn():
    figure = samples_figure({"a": [float(value) for value in range(2000)]}, "tpot_ms", "one")
    strip = re.search(r'<title>a: 2000 samples.*?d="([^"]*)"', figure, flags=re.DOTALL)
    assert strip
    assert strip.group(1).count("M") == DRAWN


def test_samples_beyond_the_edge_are_counted():
    figure = samples_figure({"a": [1.0] * 200 + [500.0]}, "tpot_ms", "one")
    assert "1 beyond, up to 500.0" in figure


@pytest.mark.parametrize("values", [[2.0, 2.0], [0.0, 0.0], [1e-9, 1e9]])
def test_odd_samples_can_be_drawn(values):
    assert samples_figure({"a": values}, "ms", "odd").endswith("</svg>\n")


def test_simulated_points_are_hollow_and_said():
    figure = quality_speed_figure([Point("a", "a", 1.0, 2.0), Point("b", "b", 2.0, 3.0, simulated=True)], "x", "y", "two")
    assert "b (simulated)" in figure
    assert "a (simulated)" not in figure
    assert "var(--paper)" in figure


def test_the_axes_are_per_token_time_and_perplexity(make_report):
    assert axes_of(make_report()) == ("tpot_ms", "perplexity")


def test_a_task_without_perplexity_is_drawn_with_its_own_quality(make_report):
    made = make_report()
    arms = {}
    for name, arm in made.arms.items():
        metrics = {"item_ms": arm.metrics["tpot_ms"], "accuracy": arm.metrics["perplexity"].model_copy(update={"unit": "share"})}
        arms[name] = arm.model_copy(update={"metrics": metrics})
    assert axes_of(make_report(arms=arms, comparisons=(), noise=(), limits=())) == ("item_ms", "accuracy")


def test_without_quality_there_is_no_scatter(make_report, recipe_text):
    made = make_report()
    arms = {name: arm.model_copy(update={"metrics": {"tpot_ms": arm.metrics["tpot_ms"]}}) for name, arm in made.arms.items()}
    assert "Quality against speed" not in to_html(make_report(arms=arms, comparisons=(), noise=(), limits=()), recipe_text)
