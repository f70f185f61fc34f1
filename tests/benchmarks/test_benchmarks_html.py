"""The page of all results: whole in one file, and honest about what is stale or missing."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from benchmarks import environment, report, report_html, report_plots
from scalelong_fast.errors import UserError


def op_record(variant, median_us, op="ls_skip_linear", direction="fwd_bwd", flop=4 * 10**9, **changes):
    return {
        "op": op,
        "shape": [128, 257, 512],
        "dtype": "bfloat16",
        "layout": "rows",
        "direction": direction,
        "variant": variant,
        "plan": "pointer",
        "failed": False,
        "note": None,
        "median_us": median_us,
        "p20_us": median_us,
        "p80_us": median_us,
        "gb_s": round(10**7 / median_us / 1e3, 2),
        "fraction_of_floor": 0.5,
        "speed_up_over_eager": 100.0 / median_us,
        "speed_up_over_compile": 80.0 / median_us,
        "bytes": 10**7,
        "flop": flop,
        "peak_mib": 3.0,
        "host_us": 9.0,
        "launches": 2,
        **changes,
    }


RECORDS = [
    op_record("eager", 100.0),
    op_record("dispatch", 50.0, peak_mib=1.5),
    op_record("eager", 40.0, op="layer_norm_gap", flop=0),
    op_record("dispatch", 20.0, op="layer_norm_gap", flop=0),
]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    few = {name: table for name, table in report.TABLES.items() if name in ("step", "ops", "where_we_lose")}
    monkeypatch.setattr(report, "TABLES", few)
    (tmp_path / "kernel.py").write_text("x = 1\n")
    return tmp_path


@pytest.fixture
def no_pictures(monkeypatch):
    for name in ("draw_all", "draw_plots"):
        monkeypatch.setattr(report_html, name, lambda results, root: [])


def write(repository, name, records, device="NVIDIA <Test>", **settings):
    sources = ["kernel.py"]
    machine = "nvidia-test" if device != "cpu" else "cpu-test"
    result = {
        "environment": {**environment.describe(torch.device("cpu")), "machine": machine, "device": device},
        "settings": {"rounds": 7, **settings},
        "ceilings": {"copy_gb_s": 1000.0, "matmul_tflop_s": {"fp32": 50.0, "bf16": 500.0}},
        "records": [
            {**r, "sources": sources, "source_sha256": environment.source_hash(sources, repository)} for r in records
        ],
    }
    path = repository / "results" / machine / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return path


class Links(HTMLParser):
    """Collects what a page would load, and checks that tags are closed in order."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.sources, self._open, self.unbalanced = [], [], []
        self.feed(text)
        self.close()
        self.unbalanced += self._open

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.unbalanced.append(tag)


def page(repository, capsys):
    out = repository / "new" / "page.html"
    before = sorted(repository.rglob("*"))
    code = report.main(
        ["--html", str(out)], pages=[repository / "README.md"], results=repository / "results", root=repository
    )
    assert code == 0
    assert str(out) in capsys.readouterr().out
    assert sorted(repository.rglob("*")) == sorted([*before, out.parent, out]), "nothing but the page is written"
    return out.read_text(encoding="utf-8")


def test_the_page_loads_nothing(repository, capsys):
    write(repository, "ops", RECORDS)
    text = page(repository, capsys)
    found = Links(text)
    assert found.sources
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in found.sources)
    assert found.unbalanced == []
    assert "@import" not in text
    assert "url(" not in text


def test_it_has_the_pictures_of_every_machine(repository, capsys):
    write(repository, "ops", RECORDS)
    write(repository, "ops", RECORDS, device="cpu")
    text = page(repository, capsys)
    for kind in ("ops", "roofline", "memory-ops"):
        for machine in ("nvidia-test", "cpu-test"):
            assert f'<img alt="{kind}-{machine}"' in text


def test_a_name_from_a_result_file_stays_text(repository, capsys, no_pictures):
    write(repository, "ops", RECORDS)
    text = page(repository, capsys)
    assert "<td>NVIDIA &lt;Test&gt;</td>" in text
    assert "<test>" not in text.lower()


def test_what_is_missing_is_marked(repository, capsys, no_pictures):
    write(repository, "ops", RECORDS, device="cpu")
    text = page(repository, capsys)
    assert "<mark>No GPU measurement yet.</mark>" in text
    assert "<td>step</td>" in text
    assert "<p><mark>not measured yet</mark></p>" in text
    assert "<td>ops</td>" not in text
    assert "<td>cpu-test/ops.json</td>" in text
    write(repository, "ops", RECORDS)
    assert "<mark>No GPU measurement yet.</mark>" not in report_html.html_page(repository / "results", repository)


def test_what_is_stale_is_marked(repository, no_pictures):
    write(repository, "ops", RECORDS)
    assert report_html.evidence(repository / "results", repository)[1][0][-1] == "current"
    assert "<mark>stale</mark></td>" not in report_html.html_page(repository / "results", repository)
    (repository / "kernel.py").write_text("x = 2\n")
    assert report_html.evidence(repository / "results", repository)[1][0][-1] == "4 of 4 records stale"
    text = report_html.html_page(repository / "results", repository)
    assert "<td>ls_skip_linear 128×257×512 bf16 <mark>stale</mark></td>" in text
    assert "<mark>4 of 4 records stale</mark>" in text


def test_a_broken_file_is_named(repository):
    write(repository, "ops", RECORDS).write_text("[1]")
    with pytest.raises(UserError, match="nvidia-test/ops"):
        report_html.html_page(repository / "results", repository)


def test_a_folder_cannot_be_written(repository):
    with pytest.raises(UserError, match="--html"):
        report.main(["--html", str(repository)], pages=[], results=repository / "results", root=repository)


def test_the_page_of_this_repository_shows_every_table(no_pictures):
    text = report_html.html_page(environment.RESULTS)
    assert Links(text).unbalanced == []
    for name in report.TABLES:
        assert f'<h2 id="{name}">' in text
    files = [path.relative_to(environment.RESULTS).as_posix() for path in environment.RESULTS.glob("*/*.json")]
    assert files
    assert all(f"<td>{name}</td>" in text for name in files)


def test_roofline_points_are_flop_over_bytes_and_time():
    eager, ours = report_plots.roofline_points(RECORDS)
    assert (ours["op"], ours["variant"]) == ("ls_skip_linear", "dispatch")
    assert ours["intensity"] == 400 == eager["intensity"]
    assert ours["tflop_s"] == pytest.approx(80.0) == 2 * eager["tflop_s"]


def test_an_op_is_under_the_roof_or_among_the_bandwidths():
    bars = report_plots.bandwidth_bars(RECORDS)
    assert bars == {"layer_norm_gap 128×257×512 bf16": {"eager": 250.0, "dispatch": 500.0}}
    untimed = [op_record("eager", None, gb_s=None) if r["op"] == "ls_skip_linear" else r for r in RECORDS[2:]]
    assert report_plots.roofline_points(untimed) == []


def test_memory_is_shown_where_it_was_recorded():
    bars = report_plots.op_memory([*RECORDS, op_record("eager", 1.0, op="se_gate", peak_mib=None)])
    assert bars["ls_skip_linear 128×257×512 bf16"] == {"eager": 3.0, "dispatch": 1.5}
    assert "se_gate 128×257×512 bf16" not in bars
    step = {"model": "U-ViT-S/2", "variant": "ours_ls", "direction": "step", "peak_mib": 512.0}
    others = [{**step, "peak_mib": None}, {**step, "direction": "fwd", "peak_mib": 9.0}]
    assert report_plots.step_memory([step, *others]) == {"U-ViT-S/2, ours_ls": {"peak": 512.0}}


def test_plots_are_the_same_for_the_same_numbers(repository):
    write(repository, "ops", RECORDS)
    write(repository, "uvit", [{"model": "U-ViT-S/2", "variant": "ours_ls", "direction": "step", "peak_mib": 512.0}])
    assert report_plots.draw_plots(repository / "results", repository) == []
    files = {path.name: path.read_bytes() for path in (repository / "docs" / "images").iterdir()}
    assert set(files) == {f"{kind}-nvidia-test.png" for kind in ("roofline", "memory-ops", "memory-uvit")}
    assert all(re.match(rb"\x89PNG", content) for content in files.values())
    report_plots.draw_plots(repository / "results", repository)
    assert files == {path.name: path.read_bytes() for path in (repository / "docs" / "images").iterdir()}
