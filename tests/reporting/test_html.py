"""report.html: made from the directory alone, closed to the network and to what the model wrote."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jgrpo.cli import save_config
from jgrpo.config import TrainConfig
from jgrpo.errors import UserError
from jgrpo.report import main
from jgrpo.reporting.files import json_line
from jgrpo.reporting.html import HtmlReport, write_report
from jgrpo.reporting.run import make_reporter
from tests.reporting.conftest import metrics_of, rows_of

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags nest; collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def charts(page: Page) -> int:
    return sum(tag == "svg" for tag, _ in page.tags)


def test_a_run_in_one_page(run: Callable[[int], Path]):
    text = (run(10) / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    words = " ".join(page.text.split())
    for part in ("countdown", "demo · 10 of 10 steps", "held-out accuracy", "Completion length", "peak memory 3 GB"):
        assert part in words
    assert "reward 0.589 → 0.771" in words  # means of the first and the last five
    assert charts(page) == 16
    assert "Step 1" in words
    assert "answer 2" in words
    for _, attributes in page.tags:
        if hover := attributes.get("data-hover"):
            data = json.loads(hover)
            assert len(data["x"]) == len(data["steps"]) == len(data["rows"]) > 0


def test_nothing_is_loaded_and_nothing_the_model_wrote_runs(run: Callable[[int], Path]):
    text = (run(10) / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert re.findall(r"https?:|//[a-z]|@import|url\(", text) == []
    assert [
        a for _, attributes in page.tags for a in attributes if a in ("src", "href", "srcset") or a[:2] == "on"
    ] == []
    assert "default-src 'none'" in text
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert "<script>alert(1)</script> </td> {{ 1 }}" in page.text
    assert "\\x1b[2J\\x9b1m" in page.text
    assert not set("\x1b\x9b\u202e") & set(text)


def test_light_and_dark(run: Callable[[int], Path]):
    text = (run(1) / "report.html").read_text(encoding="utf-8")
    light, dark = (set(re.findall(r"(--[\w-]+):", block)) for block in re.findall(r":root \{(.*?)\}", text, re.S))
    assert light == dark
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= light | {"--c"}


@pytest.mark.parametrize("steps", [0, 1, 2, 41])
def test_any_number_of_steps(run: Callable[[int], Path], steps: int):
    page = Page((run(steps) / "report.html").read_text(encoding="utf-8"))
    assert charts(page) == (16 if steps else 0)
    assert ("No step has finished yet." in page.text) == (steps == 0)


def test_five_thousand_steps_stay_small(config: TrainConfig):
    run_dir = Path(config.run.output_dir)
    lines = [json_line({"step": step, **metrics_of(step, 5000)}) for step in range(1, 5001)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    path = write_report(run_dir)
    assert path.stat().st_size < 1_000_000
    assert charts(Page(path.read_text(encoding="utf-8"))) == 15


def test_the_directory_is_enough(run: Callable[[int], Path], capsys: pytest.CaptureFixture[str]):
    run_dir = run(10)
    made_by_the_run = (run_dir / "report.html").read_bytes()
    (run_dir / "report.html").unlink()
    capsys.readouterr()
    main(["--run", str(run_dir)])
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    assert (run_dir / "report.html").read_bytes() == made_by_the_run


def test_missing_numbers_leave_gaps(config: TrainConfig):
    run_dir = Path(config.run.output_dir)
    rows = [{"step": s, **metrics_of(s, 5), **({"loss": None, "reward": None} if s == 3 else {})} for s in range(1, 6)]
    (run_dir / "metrics.jsonl").write_text("".join(map(json_line, rows)))
    text = write_report(run_dir).read_text(encoding="utf-8")
    loss = re.search(r'aria-label="Loss".*?class="curve" d="([^"]*)"', text, re.S)
    assert loss is not None
    assert loss[1].count("M") == 2
    assert "nan" not in text.lower().replace("nanm", "")


def test_warnings_and_findings_are_on_the_page_once(config: TrainConfig):
    reporter = make_reporter(config)
    reporter.start(config)
    for step in range(1, 5):
        reporter.log(step, metrics_of(step, 10) | {"completions/clipped_ratio": 1.0})
    reporter.warn("<b>reward function f raised</b>")
    reporter.finish()
    page = Page((Path(config.run.output_dir) / "report.html").read_text(encoding="utf-8"))
    assert page.text.count("Every completion of the last 3 steps") == 1
    assert "<b>reward function f raised</b>" in page.text


def test_only_a_run_directory_has_a_report(tmp_path: Path, config: TrainConfig):
    with pytest.raises(UserError, match=r"no metrics.jsonl in it"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"config.yaml: cannot be read"):
        write_report(tmp_path)
    save_config(config, tmp_path / "config.yaml")
    assert write_report(tmp_path).exists()


def test_on_the_way_it_is_made_at_most_once_a_minute(run: Callable[[int], Path], config: TrainConfig):
    path = run(2) / "report.html"
    now = 0.0
    sink = HtmlReport(path.parent, lambda: now)
    sink.start(config, [], 0)
    made = []
    for now in (0.0, 59.0, 61.0):  # noqa: B007 (read by the lambda)
        path.unlink(missing_ok=True)
        sink.completions(1, rows_of(1))
        made.append(path.exists())
    assert made == [True, False, True]
