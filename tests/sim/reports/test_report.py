"""The page of `make report`, with small models in place of those that take half a minute."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kvattic import PAPER, KvatticError, RequestError
from kvattic.timing import Layer, estimate
from kvattic_sim.reports import paper_figures, report, report_charts, report_content, report_plots
from kvattic_sim.reports.bench import BARS, Verdict, benches, select
from kvattic_sim.reports.report_charts import Bar, Line, Mark, Points
from kvattic_sim.reports.report_content import Modelled, Tabular, command, entries, markdown_table, read_figures
from kvattic_sim.system.paper import compare
from kvattic_sim.system.systems import Row

ROOT = Path(__file__).parents[3]
VOID = {"meta", "img", "br", "wbr", "link"}
FIGURES = {
    "engine.dense.scaling": 0.9957,                    # met
    "sparse.speedup.random": 3.796,                    # short
    "accuracy.rel_rms.minilm": 4e-8,                   # what its bar compares with is missing
    "synth.engine.lut": 89026, "synth.engine.dsp": 77,
    "energy.token_mj.dense": 434.3, "energy.token_mj.dense.low": 176.3, "energy.token_mj.dense.high": 1927.0,
    "system.speedup.flexgen.b64.d1.dense": 10.7,
    "host.generate.match": True,
}


class Page(HTMLParser):
    """A page's tags with their attributes, its text, and whether all that opens is closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.words, self.open, self.wrong = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append((tag, self.getpos()))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return "".join(self.words)


@pytest.fixture(scope="module")
def modelled():
    load = {"model": "OPT-13B", "gpu": "A6000", "context": 2048, "new": 1024}
    parts = {"step_ms": 100.0, "kv_ms": 80.0, "host_ms": 20.0}

    def rows(figure):
        return [Row(system="kvattic", mode="dense", drives=n, batch=b, tokens_per_second=8.0 * n + b, **load, **parts)
                for n in (1, 2) for b in (4, 64)] + [
                Row(system="FlexGen (SSD)", batch=4, tokens_per_second=0.9, **load, **parts),
                Row(system="FlexGen (SSD)", batch=64, error="no memory <for> more", **load)]

    return Modelled(
        comparisons=compare(), parameters=[("gpu.bandwidth", 7.68e11, "B/s", "published", "data sheet <A&B>")],
        figures=[(figure, rows(figure)) for figure in paper_figures.FIGURES],
        drive=Tabular(("", "batch 64: 1 drive"), (("kvattic, dense", "8.35"),)),
        attends={"dense": estimate(PAPER, Layer(PAPER, heads=2, tokens=512).attend())})


@pytest.fixture
def written(tmp_path, modelled):
    """Write the page of some figures, and read it."""

    def write(figures, folder=ROOT):
        source, path = tmp_path / "bench.json", tmp_path / "report.html"
        if figures is not None:
            source.write_text(json.dumps(figures))
        counts = report.write(path, source, modelled)
        return path.read_text(), counts

    return write


def rows(html):
    """Cells of each key's row in the list of all figures."""
    found = re.findall(r'<tr id="([^"]+)">(.*?)</tr>', html)
    return {Page(key).text: [Page(cell).text for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for key, row in found}


# The page.


@pytest.mark.parametrize("figures", [FIGURES, {}, None], ids=["some", "none", "no file"])
def test_it_is_well_formed(written, figures):
    html, _ = written(figures)
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>") and html.endswith("</html>\n")
    assert page.wrong == [] and page.open == []
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))
    targets = [attributes["href"][1:] for _, attributes in page.tags if attributes.get("href", "").startswith("#")]
    assert len(targets) == 7 and set(targets) <= set(names)


def test_it_needs_no_other_file(written):
    html, _ = written(FIGURES)
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base"}
    for tag, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on")}
        if "src" in attributes:
            assert attributes["src"].startswith("data:image/png;base64,")
        if "href" in attributes:
            assert tag == "a" and attributes["href"].startswith(("#", "https://arxiv.org/"))
    assert "url(" not in html and "@import" not in html and "@font-face" not in html


def test_every_figure_stands_with_its_verdict(written):
    html, counts = written(FIGURES)
    found = rows(html)
    assert found["engine.dense.scaling"] == [
        "engine.dense.scaling", "0.9957", "met", ">= 0.97", "measured", "make bench BENCH=engine.dense.scaling"]
    assert found["sparse.speedup.random"][1:5] == ["3.796", "short", ">= 4", "measured"]
    assert found["accuracy.rel_rms.minilm"][2:4] == ["reported", "<= 5e-07 and <= accuracy.float32.minilm"]
    assert found["synth.engine.lut"][1:] == ["89,026", "short", "goal <= 25,000", "synthesised", "make synth"]
    assert found["energy.token_mj.dense"][1:] == ["434.3", "reported", "", "modelled", "make bench BENCH=energy."]
    assert found["host.generate.match"][1:3] == ["yes", "met"]
    assert set(found) == set(BARS)
    assert counts == {word: sum(cells[2] == word for cells in found.values()) for word in counts}
    assert sum(counts.values()) == len(BARS)


def test_it_says_what_is_missing(written):
    html, counts = written(FIGURES)
    assert counts["missing"] == len(BARS) - len(FIGURES)
    found = rows(html)
    assert found["latency.p50_us"][1:] == ["", "missing", "", "modelled", "make bench BENCH=latency.p50_us"]
    text = Page(html).text
    assert "sparse.centroid.speedup" in text and "Missing: latency.p50_us" in text
    assert f"{counts['missing']}missing" in text


def test_without_a_file_all_is_missing(written):
    html, counts = written(None)
    assert counts == {"met": 0, "short": 0, "reported": 0, "missing": len(BARS)}
    assert "so all figures are missing: run make bench" in Page(html).text


def test_nothing_is_missing(written):
    html, counts = written(dict.fromkeys(BARS, 1.0))
    assert counts["missing"] == 0
    text = Page(html).text
    assert "Nothing is missing." in text and "Missing:" not in text


def test_a_key_of_another_version(written):
    html, _ = written({**FIGURES, "old.key": 2.5, "engine.gone": 1})
    assert rows(html)["old.key"][1:] == ["2.5", "reported", "", "measured", "not a figure of this version"]
    assert "engine.gone" in rows(html) and "Others: 1 reported" in Page(html).text


def test_text_is_escaped(written):
    html, _ = written({'<script>alert("&")</script>': 1.0})
    assert "<script" not in html
    assert '<script>alert("&")</script>' in Page(html).text
    assert "data sheet <A&B>" in Page(html).text


def test_numbers_that_are_none(written):
    html, counts = written({"engine.dense.scaling": math.nan, "energy.token_mj.dense": math.inf,
                            "sparse.speedup.random": math.nan, "latency.p50_us": 0.0})
    assert rows(html)["engine.dense.scaling"][1:3] == ["nan", "short"]
    assert rows(html)["energy.token_mj.dense"][1] == "inf"
    assert counts["short"] == 2
    page = Page(html)
    assert page.wrong == []
    assert "no positive numbers: latency.p50_us" in page.text and "no positive numbers: energy" in page.text


def test_what_is_modelled_says_so(written):
    html, _ = written(FIGURES)
    titles = re.findall(r"<h3>(.*?)</h3>", html)
    tagged = {Page(title).text for title in titles if "tag" in title}
    assert any(title.startswith("Speed-up") and title.endswith("measured") for title in tagged)
    for what in ("Latency", "Energy", "dense: 2 heads", "The paper's figures", "As the paper's figure 14"):
        assert any(title.startswith(what) and title.endswith("modelled") for title in tagged), what


def test_tables_scroll_in_their_own_box(written):
    html, _ = written(FIGURES)
    assert html.count("<table>") == len(re.findall(r'<div class="box"[^>]*><table>', html)) > 20


# Without the documents.


def test_a_folder_without_documents(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = Page(written(FIGURES)[0]).text
    assert "Missing: what channels and dies do on the RTL. Run make trace" in text
    assert "Missing: the table of docs/system.md" in text


def test_the_last_trace_goes_before_the_recorded_one(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (report.RECORDED, report.TRACE.with_suffix(".png")):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"PNG of " + path.name.encode())
    html, _ = written(FIGURES)
    assert "base64,UE5HIG9mIHRyYWNlLnBuZw==" in html and "The last make trace" in html


def test_documents_of_the_project_are_read(written, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = Page(written(FIGURES)[0]).text
    assert "Llama-3-70B int4" in text and ("docs/timeline.png" in text or "The last make trace" in text)


# Figures.


@pytest.mark.parametrize("content, message", [
    ("{", "cannot be read as JSON"),
    ("", "cannot be read as JSON"),
    ("[1]", "must be a JSON object of figures by key, not list"),
    ('{"a.b": "fast"}', "a.b must be a number, true or false, not 'fast'"),
    ('{"a.b": null}', "a.b must be a number, true or false, not None"),
])
def test_figures_that_cannot_be_read(tmp_path, modelled, content, message):
    path = tmp_path / "bench.json"
    path.write_text(content)
    with pytest.raises(RequestError, match=re.escape(message)) as error:
        read_figures(path)
    assert str(path) in str(error.value) and "make bench" in str(error.value)
    with pytest.raises(KvatticError):
        report.write(tmp_path / "report.html", path, modelled)
    assert not (tmp_path / "report.html").exists()


def test_figures_that_are_no_text(tmp_path):
    path = tmp_path / "bench.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="cannot be read as JSON"):
        read_figures(path)


def test_commands_give_their_key():
    available = benches()
    for key in BARS:
        order = command(key)
        if order != "make synth":
            prefix = order.removeprefix("make bench BENCH=")
            assert any(key in bench.keys for bench in select(prefix, available)), key
    assert command("energy.token_mj.dense") == "make bench BENCH=energy."
    assert command("latency.alone.p99_us.sparf") == "make bench BENCH=latency.p50_us.sparf"  # the same run
    assert command("nothing.of.it") == ""


def test_verdicts_are_those_of_the_benches():
    assert {entry.verdict for entry in entries(FIGURES)} == {*Verdict, report_content.MISSING}


def test_markdown_tables():
    text = ("a\n\n| x | y |\n|-|-|\n| 1 | 2 |\n\n"
            "| model | context |\n| --- | --- |\n| A | **3** |\n| B | - |\nend\n| c |\n")
    assert markdown_table(text, ("model",)) == Tabular(("model", "context"), (("A", "**3**"), ("B", "-")))
    assert markdown_table(text, ("none",)) is None


def test_the_models_are_put_together(monkeypatch):
    monkeypatch.setattr(paper_figures, "figures", lambda: iter([(paper_figures.FIGURES[0], [])]))
    monkeypatch.setattr(report_content, "drive_page", lambda: "| | 1 drive |\n| --- | --- |\n| dense | 8.4 |\n")
    found = report_content.model()
    assert found.drive == Tabular(("", "1 drive"), (("dense", "8.4"),))
    assert set(found.attends) == {"dense", "SparF"} and len(found.attends["dense"].jobs) == report_content.HEADS
    assert found.attends["SparF"].cycles < found.attends["dense"].cycles
    assert any(source.startswith("NVIDIA") for *_, source in found.parameters)


# Charts.


def test_bars_are_as_long_as_their_values():
    svg = report_charts.bars([Bar("a", 1.0, "1"), Bar("b", 2.0, "2", mark=4.0)], "lengths", reference=(2.0, "here"))
    widths = [float(width) for width in re.findall(r'<rect[^>]*width="([\d.]+)"', svg)]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    mark, = re.findall(r'<line x1="([\d.]+)"[^>]*class="mark"', svg)
    assert float(mark) == pytest.approx(2 * widths[1], abs=0.2)


def test_points_stand_on_a_logarithmic_axis():
    svg = report_charts.points([Points("a", tuple(Mark(10.0**n, "s0", "x") for n in range(3)))], "decades")
    first, second, third = (float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg))
    assert third - second == pytest.approx(second - first, abs=0.2)


def test_a_chart_of_one_value():
    assert "<circle" in report_charts.lines([Line("a", ((4.0, 2.0),), "s0")], "one", x_name="x", y_name="y")
    assert "<circle" in report_charts.points([Points("a", (Mark(3.0, "s0", "x"),))], "one")
    assert "<rect" in report_charts.bars([Bar("a", 0.0, "0")], "one")


@pytest.mark.parametrize("value, text", [
    (0.0, "0"), (89026.0, "89,026"), (3.796, "3.8"), (4e-8, "4.0e-08"), (0.123456, "0.123"), (math.nan, "nan")])
def test_short_numbers(value, text):
    assert report_charts.short(value) == text


def test_a_range_has_its_three_points():
    chart = report_plots.energy(FIGURES)
    assert "176 / 434 / 1,927 mJ" in chart.svg and chart.svg.count("<circle") == 3
    assert set(chart.missing) == {f"energy.token_mj.{mode}{bound}" for mode in ("sparf", "fetched", "centroid")
                                  for bound in ("", ".low", ".high")}


def test_systems_that_do_not_fit_are_not_drawn(modelled):
    figure, found = modelled.figures[0]
    chart = report_plots.systems(figure, [replace(row, drives=min(row.drives, 1)) for row in found])
    assert [name for _, name in chart.legend] == ["kvattic, dense", "FlexGen (SSD)"]
    assert chart.how == "modelled"


# The command.


def test_the_command(tmp_path, monkeypatch, modelled, capsys):
    monkeypatch.setattr(report_content, "model", lambda: modelled)
    source, path = tmp_path / "bench.json", tmp_path / "new" / "page.html"
    source.write_text(json.dumps(FIGURES))
    report.main(["--figures", str(source), "-o", str(path)])
    assert re.search(rf"\d+ met, \d+ short, \d+ reported, \d+ missing; open {re.escape(str(path))}",
                     capsys.readouterr().out)
    assert "engine.dense.scaling" in rows(path.read_text())


def test_the_target_of_the_makefile():
    assert "\treport" not in (ROOT / "Makefile").read_text()
    assert re.search(r"^report: \$\(VENV\)/\.stamp-figures  ## .*\n\t@\$\(RUN\) kvattic_sim\.reports\.report$",
                     (ROOT / "Makefile").read_text(), re.M)
