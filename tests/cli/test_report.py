"""`starfire report`: what it writes, how the page is in a browser, and what it refuses."""

import csv
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from starfire_prune.cli.main import main
from starfire_prune.reporting import report as write
from tests.support.commands import Ended
from tests.support.paths import ROOT
from tests.support.reported import leave_dense, leave_evaluation, leave_run

COMMAND = "report"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE = 390  # pixels across
SCHEMES = {"light": 1, "dark": 0}  # as Chromium numbers them

TABLE = """\
title: "Small <runs> & more"
base: small.yaml
columns: [{name: top1}]
runs:
- {name: ck, paper: {top1: 70.0}}
- {name: dense, set: {pruning: none}, paper: {top1: 76.5}}
"""
# Shows the page in a frame of a phone's width, and writes down what it is once all has loaded
PROBE = """\
<!DOCTYPE html><iframe id="frame" style="border:0;width:%dpx;height:2000px" srcdoc="%s"></iframe>
<pre id="found"></pre>
<script>
addEventListener("load", () => {
  const page = document.getElementById("frame").contentDocument, root = page.documentElement;
  const images = [...page.images], shown = [...page.querySelectorAll("main *")];
  document.getElementById("found").textContent = JSON.stringify({
    widths: images.map((image) => image.naturalWidth),
    sources: images.map((image) => image.currentSrc.slice(-40)),
    across: root.scrollWidth,
    beyond: shown.filter((element) => element.closest(".table") === null &&
      element.getBoundingClientRect().right > root.clientWidth).length,
    background: page.defaultView.getComputedStyle(page.body).backgroundColor,
  });
});
</script>
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run by CK that was attacked and a dense one, of a table with signs in its title."""
    folder = tmp_path_factory.mktemp("reported") / "runs"
    ck = leave_run(folder / "ck-seed3")
    clean = {"attack": "none", "epsilon": 0.0, "top1": 0.75}
    leave_evaluation(ck, clean, {"attack": "fgsm", "epsilon": 0.1, "top1": 0.25})
    dense = leave_dense(folder / "dense-seed3", top1=(0.5, 0.6, 0.7, 0.8))
    (folder / "table.yaml").write_text(TABLE, encoding="utf-8")
    return [ck, dense]


@pytest.fixture(scope="module")
def report(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report that the command has written."""
    output = tmp_path_factory.mktemp("report") / "out"
    table = runs[0].parent / "table.yaml"
    arguments = [*runs, "--table", table, "--output", output]
    assert main([COMMAND, *map(str, arguments)]) == 0
    return output


def cells_of(page: str) -> list[str]:
    found = re.findall(r"<(t[hd])[^>]*>(.*?)</\1>", page)
    return [html.unescape(re.sub(r"<[^>]*>", "", cell)) for _, cell in found]


def probed(page: str, scheme: str, folder: Path) -> dict[str, Any]:
    """What a browser makes of a page at a phone's width."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"there is none of {', '.join(BROWSERS)}")
    probe = folder / "probe.html"
    probe.write_text(PROBE % (PHONE, html.escape(page)), encoding="utf-8")
    command = [
        *(
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--dump-dom",
        ),
        *(f"--user-data-dir={folder}/own", probe.as_uri()),
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    found = result.stdout.partition('<pre id="found">')[2].partition("</pre>")[0]
    content: dict[str, Any] = json.loads(html.unescape(found))
    return content


def refusal(ended: Ended) -> str:
    """The one sentence of a refusal."""
    assert (ended.status, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
    return ended.stderr.removeprefix("starfire report: ").rstrip("\n")


# The report


def test_numbers_of_the_csv_file_are_those_of_the_page_and_of_markdown(report):
    with (report / "report.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["top-1, last epoch [%]"] for row in rows] == ["75.00", "80.00"]
    assert [row["top1, paper"] for row in rows] == ["70.00", "76.50"]
    assert [row["FGSM, ε 0.1 [%]"] for row in rows] == ["25.00", ""]
    cells = cells_of((report / "report.html").read_text(encoding="utf-8"))
    markdown = (report / "report.md").read_text(encoding="utf-8")
    for row in rows:
        for cell in filter(None, row.values()):
            assert cell in cells
            assert cell.replace("_", "\\_") in markdown


def test_pictures_beside_the_page_are_those_of_markdown(report):
    markdown = (report / "report.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\(report_pictures/([\w-]+\.png)\)", markdown)
    assert sorted(named) == sorted(path.name for path in (report / "report_pictures").iterdir())
    assert {"accuracy.png", "robustness-fgsm.png", "layers-ck.png", "masks-ck.png"} <= set(named)
    for name in named:
        with Image.open(report / "report_pictures" / name) as image:
            assert image.width == 960


def test_the_tables_title_is_the_pages(report):
    page = (report / "report.html").read_text(encoding="utf-8")
    assert "<h1>Small &lt;runs&gt; &amp; more</h1>" in page


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_a_browser_shows_every_picture_and_nothing_is_wider_than_a_phone(scheme, report, tmp_path):
    page = (report / "report.html").read_text(encoding="utf-8")
    found = probed(page, scheme, tmp_path)
    assert len(found["widths"]) == len(list((report / "report_pictures").iterdir()))
    assert set(found["widths"]) == {960}
    assert (found["across"], found["beyond"]) == (PHONE, 0)
    dark = [source[-40:] for source in re.findall(r'srcset="([^"]*)"', page)]
    assert (found["sources"] == dark) == (scheme == "dark")
    assert found["background"] == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 25, 29)"}[scheme]


# Which runs and which table


@pytest.fixture
def nothing_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    from starfire_prune.reporting import figures as pictures
    from starfire_prune.reporting import mask_figures as mask_pictures
    from starfire_prune.reporting.document import Images

    for module in (pictures, mask_pictures):
        monkeypatch.setattr(module, "rendered", lambda *_: Images(b"light", b"dark", 960, 720))


def test_a_run_that_is_named_twice_is_reported_once(tool, runs, tmp_path, nothing_drawn):
    again = runs[0].parent / ".." / "runs" / runs[0].name
    ended = tool(runs[0], again, "--output", tmp_path / "out")
    assert ended.stdout == f"1 run: {tmp_path / 'out' / 'report.html'}\n"


def test_runs_in_a_folder_of_a_tables_name_are_of_that_table(
    tool, runs, tmp_path, nothing_drawn, monkeypatch
):
    folder = tmp_path / "quickstart"
    shutil.copytree(runs[1], folder / "dense-seed0")
    assert tool(folder / "dense-seed0", "--output", tmp_path / "out").status == 0
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "Not compared with the paper: " in text
    assert "holds the run of another recipe" in text


def test_without_names_all_runs_of_a_table_that_are_there_are_reported(
    tool, runs, tmp_path, nothing_drawn, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs[0], tmp_path / "runs" / "tables" / "table" / "ck-seed3")
    ended = tool("--table", runs[0].parent / "table.yaml")
    assert ended.stdout == "1 run: report/report.html\n"
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "Runs of the table that are not reported: dense-seed3." in text


# Refusals


def test_no_run_and_no_table_is_refused(tool):
    assert refusal(tool()) == "name the folders of runs, such as runs/quickstart, or a --table"


def test_a_table_without_runs_is_refused(tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(tool("--table", ROOT / "recipes" / "tables" / "table1.yaml")) == (
        "runs/tables/table1 holds no run of table1: train some by starfire sweep, or name folders"
    )


def test_a_table_that_is_not_there_is_refused(tool, runs, tmp_path):
    assert "tables.yaml" in refusal(tool(runs[0], "--table", tmp_path / "tables.yaml"))


def test_a_missing_run_is_refused(tool, tmp_path):
    assert refusal(tool(tmp_path / "gone")) == (
        f"there is no folder {tmp_path}/gone: give a run's folder, which starfire train creates"
    )


def test_an_unfinished_run_is_refused_and_reported_when_asked_for(tool, tmp_path, nothing_drawn):
    run = leave_run(tmp_path / "ck", top1=(0.5, 0.6), exports=False)
    assert "isn't finished (2 of 4 epochs are done)" in refusal(tool(run))
    ended = tool(run, "--unfinished", "--output", tmp_path / "out")
    assert ended.status == 0
    assert "Not finished: ck (2 of 4 epochs)" in (tmp_path / "out" / "report.md").read_text()


def test_a_layer_that_is_not_pruned_is_refused(tool, runs):
    assert refusal(tool(runs[0], "--layer", "fc")).startswith(
        "--layer (=fc) is not a convolution that "
    )


@pytest.mark.parametrize("option", ["--output", "--table", None])
def test_an_empty_path_is_refused(option, tool, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = tool("") if option is None else tool(runs[1], option, "")
    name = "RUN" if option is None else option
    assert ended.status == 2
    assert f"argument {name}: is empty; name a folder or a file" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_is_one_sentence(tool, runs, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "build_report", interrupted)
    ended = tool(runs[1], "--output", tmp_path / "out")
    assert (ended.status, ended.stderr) == (
        130,
        f"starfire report: interrupted; {tmp_path}/out may hold parts of two reports\n",
    )


def test_an_output_that_is_a_file_is_refused(tool, runs, tmp_path, nothing_drawn):
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    assert refusal(tool(runs[1], "--output", tmp_path / "out")) == (f"{tmp_path}/out: File exists")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"
