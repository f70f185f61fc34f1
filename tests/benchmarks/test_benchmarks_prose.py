"""No figure stands in README.md that no result file, or no named source, stands for."""

import pytest

from benchmarks import prose
from benchmarks.environment import ROOT
from benchmarks.prose import Claim, unsourced


def found(text):
    words = prose.prose(text)
    return [words[start:end] for start, end in prose.figures(words)]


def test_every_figure_in_the_readme_has_a_source():
    faults = unsourced("README.md", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert faults == [], "\n".join(faults)


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        ("It is 2.3 times faster.", ["2.3 times"]),
        ("It is 1.4× faster", ["1.4×"]),
        ("a factor of × 2.5 or 1.5 × eager", ["× 2.5", "1.5 ×"]),
        ("LS costs 3 % or 4.5% of a step", ["3 %", "4.5%"]),
        ("in 12 ms, not 900 µs", ["12 ms", "900 µs"]),
        ("1,297 images/s at 29.4 GB/s and 0.18 TFLOP/s", ["1,297 images/s", "29.4 GB/s", "0.18 TFLOP/s"]),
        ("peaks at 512 MiB and saves 2 GB", ["512 MiB", "2 GB"]),
        ("| a row | 1.31 ms |", ["1.31 ms"]),
        ("is twice as fast, within half a minute", ["twice", "half a minute"]),
        ("three times\nthe speed", ["three times"]),
        ("a 2-fold gain", ["2-fold"]),
    ],
)
def test_figures_are_numbers_with_units(text, figures):
    assert found(text) == figures


@pytest.mark.parametrize(
    "text",
    [
        "CelebA 64×64 and a 1×1 shortcut, (B, 3, 32 × 32)",
        "1,797 handwritten digits on 2 cores, four GPU architectures",
        "κ = 0.7, good values 0.5 – 0.95, times on the 0…999 scale",
        "`sleep 3 s` and\n```\ntakes 5 minutes, 80 %\n```\n",
        "[a page](https://example.org/5%20ms) of bf16 and fp32",
        "<!-- benchmark:step -->\n| 12 ms | 3 × |\n<!-- /benchmark:step -->",
    ],
)
def test_sizes_code_and_generated_tables_are_no_figures(text):
    assert found(text) == []


def test_a_figure_needs_a_claim_that_covers_it():
    text = "Ours takes 12 ms, theirs\n20 ms."
    assert len(unsourced("README.md", text, claims=())) == 2
    (fault,) = unsourced("README.md", text, claims=(Claim("Ours takes 12 ms", "paper: Table 2"),))
    assert "'20 ms'" in fault
    assert unsourced("README.md", text, claims=(Claim("12 ms, theirs 20 ms", "paper: Table 2"),)) == []


def test_a_claim_that_is_not_made_any_more_is_a_fault():
    (fault,) = unsourced("README.md", "Nothing.", claims=(Claim("12 ms", "goal"),))
    assert "no longer says '12 ms'" in fault


def test_a_source_must_be_there(tmp_path):
    claims = (Claim("12 ms", "results/step.json: ours"),)
    (fault,) = unsourced("README.md", "12 ms", claims, tmp_path)
    assert "results/step.json" in fault
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "step.json").write_text("{}")
    assert unsourced("README.md", "12 ms", claims, tmp_path) == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_every_speed_in_the_docs_has_a_source(path):
    faults = unsourced(path.name, path.read_text(encoding="utf-8"))
    assert faults == [], "\n".join(faults)


@pytest.mark.parametrize("text", ["12 ms", "1,297 images/s", "29.4 GB/s", "1.4× faster", "2.3 times faster", "× 2.5"])
def test_other_pages_answer_for_their_speeds(text):
    (fault,) = unsourced("other.md", f"It is {text} here.")
    assert f"'{text.removesuffix(' faster') if '×' in text else text}'" in fault
    assert "SPEED_CLAIMS" in fault


@pytest.mark.parametrize(
    "text", ["7 to 13 minutes", "at 80 % of the peak", "4 GiB of host memory", "64×64", "1.1 times its loss"]
)
def test_limits_waits_and_sizes_of_other_pages_are_left_alone(text):
    assert unsourced("other.md", text) == []


def test_the_speeds_that_a_page_may_say_are_on_it():
    (fault, *_) = unsourced("data.md", "Nothing.")
    assert "data.md no longer says" in fault
