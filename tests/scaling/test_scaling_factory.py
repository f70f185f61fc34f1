"""Scalings by name: what is known, what is refused, and that modules copy and save as usual."""

import copy

import pytest
import torch

from scalelong_fast.errors import UserError
from scalelong_fast.scaling import LongSkipScaling, create_scaling, list_scalings

NAMES = ["none", "uniform", "cs", "cs-reversed", "ls", "ls-individual", "learnable"]


def make(name, **options):
    return create_scaling(name, num_skips=3, widths=6, **options)


def test_every_name_is_listed_and_builds():
    assert list_scalings() == NAMES
    for name in NAMES:
        scaling = make(name)
        assert isinstance(scaling, LongSkipScaling)
        assert scaling.num_skips == 3


@pytest.mark.parametrize(("alias", "name"), [("ls_individual", "ls-individual"), ("CS_Reversed", "cs-reversed")])
def test_underscores_and_capitals_are_as_good(alias, name):
    assert type(make(alias)) is type(make(name))


@pytest.mark.parametrize(
    ("name", "suggestion"), [("cs-reverse", "cs-reversed"), ("ls_indiv", "ls-individual"), ("uniforn", "uniform")]
)
def test_unknown_name_offers_the_nearest(name, suggestion):
    with pytest.raises(UserError, match=rf"scaling: got '{name}'.*Did you mean .*'{suggestion}'"):
        make(name)


def test_a_name_without_neighbours_lists_them_all():
    with pytest.raises(UserError, match="Known: cs, cs-reversed, learnable, ls, ls-individual, none, uniform"):
        make("zzz")
    with pytest.raises(UserError, match="scaling: got None"):
        make(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "reul"}, r"activation: got 'reul'.*Did you mean .*'relu'"),
        ({"init": "identiti"}, r"init: got 'identiti'.*Did you mean 'identity'"),
        ({"calibration": "sf"}, r"calibration: got 'sf'.*Did you mean 'se'"),
        ({"reduction": 0}, r"reduction: got 0, expected a whole number >= 1"),
        ({"reduction": 1.5}, r"reduction: got 1.5, expected a whole number >= 1"),
    ],
)
def test_bad_gate_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make("ls", **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_skips", [0, -1, 2.0])
def test_number_of_skips_is_a_positive_whole_number(name, num_skips):
    with pytest.raises(UserError, match=r"num_skips: got .*expected a whole number >= 1"):
        create_scaling(name, num_skips=num_skips, widths=4)


@pytest.mark.parametrize("name", ["cs", "learnable", "ls"])
def test_a_misspelt_option_is_not_swallowed(name):
    with pytest.raises((UserError, TypeError), match="kapa"):
        make(name, kapa=0.5)


@pytest.mark.parametrize("name", ["none", "uniform", "cs", "learnable"])
def test_gate_options_do_not_disturb_other_scalings(name):
    make(name, reduction=4, activation="mish", init="identity")


@pytest.mark.parametrize("name", NAMES)
def test_deepcopy_gives_an_equal_and_separate_module(name):
    scaling, skip = make(name), torch.randn(2, 6, 4)
    twin = copy.deepcopy(scaling)
    assert all(torch.equal(twin(skip, i), scaling(skip, i)) for i in (1, 2, 3))
    for ours, theirs in zip(scaling.parameters(), twin.parameters(), strict=True):
        assert ours.data_ptr() != theirs.data_ptr()


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(name):
    scaling, other, skip = make(name), make(name), torch.randn(2, 6, 4)
    with torch.no_grad():
        for parameter in scaling.parameters():
            parameter.normal_()
    other.load_state_dict(scaling.state_dict())
    assert all(torch.equal(other(skip, i), scaling(skip, i)) for i in (1, 2, 3))


def test_abstract_scaling_asks_for_a_coefficient():
    with pytest.raises(NotImplementedError):
        LongSkipScaling(1)(torch.ones(1, 1, 1), 1)


def test_a_new_kind_of_coefficient_needs_one_method():
    class Halves(LongSkipScaling):
        def coefficient(self, i, skip, pooled=None):
            return 0.5**i

    skip = torch.randn(1, 2, 3)
    torch.testing.assert_close(Halves(3)(skip, 2), skip / 4)
