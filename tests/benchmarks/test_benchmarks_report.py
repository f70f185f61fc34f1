"""README.md, docs/results.md and docs/planning.md show what the result files hold."""

import json

import pytest

from benchmarks import environment, report
from scalelong_fast.errors import UserError

README = "# Title\n\n<!-- benchmark:step -->\nold\n<!-- /benchmark:step -->\n\nThe end.\n"


@pytest.fixture
def repository(tmp_path):
    (tmp_path / "model.py").write_text("x = 1\n")
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def write(repository, name, records, machine="cpu-test", **settings):
    sources = ["model.py"]
    result = {
        "environment": {**environment.describe(environment.torch.device("cpu")), "cpu_model": f"Model {machine}"},
        "settings": settings,
        "ceilings": {"copy_gb_s": 10.0, "matmul_tflop_s": {"fp32": 0.1, "bf16": 0.3}},
        "records": [
            {**r, "sources": sources, "source_sha256": environment.source_hash(sources, repository)} for r in records
        ],
    }
    path = repository / "results" / machine / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))


def step_record(variant, median_us=1500.0, **changes):
    ratios = {f"{kind}ratio_to_{name}": 2.0 for kind in ("", "round_") for name in ("authors_fp32", "authors_bf16")}
    return {
        "model": "U-ViT/2",
        "shape": [32, 3, 32, 32],
        "dtype": "fp32",
        "variant": variant,
        "median_us": median_us,
        "p20_us": 1400.0,
        "p80_us": 1600.0,
        "images_per_second": 21333.0,
        "rounds": 12,
        "rel_error": 1e-7,
        "ratio_to_ours_none": 0.8,
        "round_ratio_to_ours_none": 0.8,
        **ratios,
        **changes,
    }


def write_step(repository, *records, machine="cpu-test"):
    write(repository, "step", records or [step_record("ours")], machine, rounds=12, steps_per_round=3)


def run(repository, *args):
    return report.main(args, pages=[repository / "README.md"], results=repository / "results", root=repository), (
        repository / "README.md"
    ).read_text()


def test_the_repository_is_in_sync(capsys):
    assert report.main(["--check"]) == 0, "run: python -m benchmarks report"


def test_a_missing_result_is_not_measured_yet(repository):
    code, text = run(repository)
    assert code == 0
    assert text == README.replace("old", "not measured yet")


def test_links_of_a_page_in_docs_are_relative_to_it(repository, monkeypatch):
    monkeypatch.setattr(report, "render", lambda *_: "![x](docs/images/x.png) [y](docs/y.md) docs/z.md")
    assert "](docs/images/x.png) [y](docs/y.md)" in report.updated(README)
    assert "![x](images/x.png) [y](y.md) docs/z.md" in report.updated(README, page="docs/results.md")


def test_a_page_in_docs_is_rewritten_once(repository):
    page = repository / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text(README)
    write_step(repository)
    arguments = {"pages": [page], "results": repository / "results", "root": repository}
    assert report.main([], **arguments) == 0
    text = page.read_text()
    assert "With LS our step" in text
    assert report.main(["--check"], **arguments) == 0
    assert report.main([], **arguments) == 0
    assert page.read_text() == text


def test_report_is_idempotent_and_leaves_the_rest_alone(repository):
    write_step(repository)
    _, once = run(repository)
    _, twice = run(repository)
    assert once == twice
    assert once.startswith("# Title\n\n<!-- benchmark:step -->\n| training step |")
    assert once.endswith("<!-- /benchmark:step -->\n\nThe end.\n")
    assert "old" not in once


def test_check_writes_nothing(repository):
    write_step(repository)
    assert run(repository, "--check") == (1, README)
    run(repository)
    assert run(repository, "--check")[0] == 0


def test_a_row_shows_its_numbers_and_where_they_come_from(repository):
    write_step(repository, step_record("authors_fp32", median_us=3000.0), step_record("ours", mfu=0.123))
    _, text = run(repository)
    assert "| authors' recipe, fp32 | fp32 | 3 | 1.4 – 1.6 | 2.133e+04 | – |" in text
    assert (
        "| scalelong_fast | fp32 | 1.5 | 1.4 – 1.6 | 2.133e+04 | 12.3% | 2.00 (2.00) | 2.00 (2.00) | 1.0e-07 |" in text
    )
    assert "With LS our step takes 1.250 (1.250) times as long as without." in text
    where = environment.describe(environment.torch.device("cpu"))
    for fact in ("Model cpu-test", where["torch"], where["python"], where["date"], "12 interleaved rounds of 3 steps"):
        assert fact in text


def test_a_ratio_to_what_was_not_measured_is_a_dash(repository):
    write_step(repository, step_record("ours", ratio_to_authors_bf16=None, round_ratio_to_authors_bf16=None))
    assert "| 2.00 (2.00) | – |" in run(repository)[1]


def test_a_changed_or_missing_source_makes_the_row_stale(repository):
    write_step(repository)
    assert "(stale)" not in run(repository)[1]
    (repository / "model.py").write_text("x = 2\n")
    assert "| scalelong_fast (stale) |" in run(repository)[1]
    (repository / "model.py").unlink()
    assert "| scalelong_fast (stale) |" in run(repository)[1]


def test_every_machine_has_a_table(repository):
    write_step(repository, machine="b")
    write_step(repository, machine="a")
    text = run(repository)[1]
    assert text.count("| training step |") == 2
    assert text.index("Model a") < text.index("Model b")


def test_residual_dtype_pairs_the_seeds(repository):
    losses = {("fp32", 0): 0.5, ("bf16", 0): 0.52, ("fp32", 1): 0.6, ("bf16", 1): 0.64, ("fp32", 2): 0.7}
    records = [{"dtype": dtype, "seed": seed, "loss": loss} for (dtype, seed), loss in losses.items()]
    write(repository, "residual_dtype", records, preset="p", steps=9, autocast="bf16", evaluation_passes=8)
    (repository / "README.md").write_text("<!-- benchmark:residual_dtype -->\n<!-- /benchmark:residual_dtype -->")
    text = run(repository)[1]
    assert "| fp32 | 3 | 0.600000 ± 0.100000 | – |" in text
    assert "| bf16 | 2 | 0.580000 ± 0.084853 | +0.030000 ± 0.014142 |" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- benchmark:stp -->\n<!-- /benchmark:stp -->", "Did you mean 'step'"),
        ("<!-- benchmark:step -->\n", "has no <!-- /benchmark:step -->"),
        (
            "<!-- benchmark:step -->\n<!-- benchmark:residual_dtype -->\n<!-- /benchmark:residual_dtype -->\n"
            "<!-- /benchmark:step -->",
            "before the next marker",
        ),
    ],
)
def test_broken_markers_are_refused(repository, text, message):
    with pytest.raises(UserError, match=message):
        report.updated(text, repository / "results", repository)


def test_a_broken_result_file_is_named(repository):
    write_step(repository)
    (repository / "results" / "cpu-test" / "step.json").write_text('{"records": []}')
    with pytest.raises(UserError, match=r"cpu-test/step\.json"):
        run(repository)
