"""What a run keeps of earlier ones, and what it replaces."""

import json

import pytest

from benchmarks import environment
from benchmarks.kept import kept_records, merge
from benchmarks.screen import Screen

SOURCES = ["kernels/se.py"]
HERE = {"machine": "m", "torch": "2", "date": "2026-01-01"}


def record(variant, direction="step", median_us=1.0, **changes):
    own = {"variant": variant, "direction": direction, "median_us": median_us, "sources": SOURCES}
    return {**own, "source_sha256": environment.source_hash(SOURCES), **changes}


def merged(old, new):
    return merge(old, new, lambda record: record["direction"], Screen())


def test_the_same_variants_or_more_replace_their_direction_alone():
    old = [record("a"), record("b"), record("a", "fwd")]
    new = [record("a", median_us=2.0), record("b", median_us=2.0), record("c", median_us=2.0)]
    assert merged(old, new) == [record("a", "fwd"), *new]
    assert merged([], new) == new


def test_fewer_variants_replace_nothing_and_that_is_said(capsys):
    old = [record("a"), record("b"), record("c"), record("a", "fwd")]
    new = [record("a", median_us=2.0), record("a", "fwd", median_us=2.0)]
    assert merged(old, new) == [*old[:3], new[1]]
    out = capsys.readouterr().out
    assert "Not written: step: the file has b, c too" in out
    assert "--out" in out


def test_a_variant_of_older_code_holds_nothing_back():
    new = [record("a", median_us=2.0)]
    assert merged([record("a"), record("gone", source_sha256="0")], new) == new


def write(path, settings, records, where=HERE):
    path.write_text(json.dumps({"environment": where, "settings": settings, "records": records}))


def test_other_settings_are_kept_in_the_records(tmp_path):
    path = tmp_path / "x.json"
    write(path, {"rounds": 8, "steps": 5}, [{"variant": "a", "rounds": 3}, {"variant": "b", "steps": 1}])
    assert kept_records(path, {**HERE, "date": "later"}, {"rounds": 8, "steps": 2}) == [
        {"variant": "a", "rounds": 3, "steps": 5},
        {"variant": "b", "steps": 1},
    ]
    assert kept_records(path, HERE, {"rounds": 8, "steps": 5})[0] == {"variant": "a", "rounds": 3}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"environment": 1, "settings": {}, "records": []}'])
def test_what_is_no_result_file_of_this_machine_keeps_nothing(tmp_path, text):
    path = tmp_path / "x.json"
    assert kept_records(path, HERE, {}) == []
    path.write_text(text)
    assert kept_records(path, HERE, {}) == []
    write(path, {}, [{"variant": "a"}], {**HERE, "torch": "3"})
    assert kept_records(path, HERE, {}) == []
