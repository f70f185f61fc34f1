"""The command itself: help, versions, unknown commands, and the table of models."""

import pytest

import scalelong_fast.cli.train as train_command
from scalelong_fast.cli import COMMANDS
from scalelong_fast.errors import UserError
from scalelong_fast.models import list_models
from scalelong_fast.training import NonFiniteLossError, list_presets
from scalelong_fast.version import __version__


class TestHelp:
    @pytest.mark.parametrize("flag", ["-h", "--help"])
    def test_lists_the_commands(self, cli, flag):
        result = cli(flag)
        assert result.code == 0
        assert all(name in result.out for name in COMMANDS)
        assert "scalelong-fast train digits-uvit" in result.out

    def test_no_arguments_is_help_and_an_error(self, cli):
        result = cli()
        assert result.code == 2
        assert "usage: scalelong-fast COMMAND" in result.out

    @pytest.mark.parametrize("command", COMMANDS)
    @pytest.mark.parametrize("flag", ["-h", "--help"])
    def test_every_command_explains_itself(self, cli, command, flag):
        result = cli(command, flag)
        assert result.code == 0
        assert result.out.startswith("usage: scalelong-fast " + command)
        assert result.err == ""

    @pytest.mark.parametrize("command", ["train", "sample"])
    def test_a_command_that_lacks_its_argument_is_help_and_an_error(self, cli, command):
        result = cli(command)
        assert result.code == 2
        assert f"usage: scalelong-fast {command}" in result.out

    def test_train_lists_the_presets(self, cli):
        assert all(name in cli("train", "--help").out for name in list_presets())

    def test_a_preset_lists_its_options_with_their_values(self, cli):
        result = cli("train", "digits-uvit", "--help")
        assert result.code == 0
        for text in ("--out", "--model.scaling", "--train.lr", "0.003", "--diffusion.label-dropout"):
            assert text in result.out

    def test_sample_lists_its_options(self, cli):
        result = cli("sample", "anywhere", "--help")
        assert result.code == 0
        for text in ("--labels", "--num-per-label", "--guidance", "--out"):
            assert text in result.out

    def test_version(self, cli):
        result = cli("--version")
        assert result.code == 0
        assert result.out.strip() == f"scalelong_fast {__version__}"


class TestUnknown:
    def test_command(self, cli, assert_refused):
        assert_refused(cli("trian"), "COMMAND: got 'trian'", "Did you mean 'train'?")

    def test_preset(self, cli, assert_refused):
        assert_refused(cli("train", "digits"), "preset: got 'digits'", "'digits-uvit'", "cifar10-uvit")

    def test_an_option_in_place_of_the_preset(self, cli, assert_refused):
        assert_refused(cli("train", "--out", "x"), "PRESET: got '--out'", "digits-uvit")

    def test_an_option_in_place_of_the_run(self, cli, assert_refused):
        assert_refused(cli("sample", "--labels", "3"), "RUN: got '--labels'")


class TestFailures:
    """How the ways to fail come out; they are raised in place of the training itself."""

    def fail_with(self, cli, monkeypatch, error):
        def main(args):
            raise error

        monkeypatch.setattr(train_command, "main", main)
        return cli("train", "digits-uvit")

    def test_user_error(self, cli, monkeypatch, assert_refused):
        assert_refused(self.fail_with(cli, monkeypatch, UserError("kappa: got -1.")), "kappa: got -1.")

    def test_missing_package(self, cli, monkeypatch, assert_refused):
        result = self.fail_with(cli, monkeypatch, ImportError("No module named 'rich'"))
        assert_refused(result, "No module named 'rich'", 'pip install "scalelong_fast[train]"')

    def test_non_finite_loss(self, cli, monkeypatch):
        result = self.fail_with(cli, monkeypatch, NonFiniteLossError("at step 7"))
        assert (result.code, result.err) == (1, "scalelong-fast: error: at step 7\n")

    def test_interruption(self, cli, monkeypatch):
        result = self.fail_with(cli, monkeypatch, KeyboardInterrupt())
        assert (result.code, result.err) == (130, "scalelong-fast: error: interrupted\n")

    def test_a_bug_keeps_its_traceback(self, cli, monkeypatch):
        with pytest.raises(ZeroDivisionError):
            self.fail_with(cli, monkeypatch, ZeroDivisionError())


class TestModels:
    def test_lists_every_preset(self, cli):
        result = cli("models")
        assert result.code == 0
        rows = {line.split("│")[1].strip(): line for line in result.out.splitlines() if line.startswith("│")}
        assert list(rows) == list_models()
        for text in ("3×32×32", "44.3M", " 6 ", " 257 ", "none"):
            assert text in rows["uvit_s2"]
        for text in ("1×8×8", "11 labels", " 2 ", " 18 "):
            assert text in rows["uvit_digits"]
        for text in ("3×32×32", "35.8M", " 12 ", " – ", "none"):
            assert text in rows["unet_cifar10"]

    def test_a_pattern_selects(self, cli):
        result = cli("models", "uvit_t2i*")
        assert result.code == 0
        assert [name for name in list_models() if name in result.out] == ["uvit_t2i_s2", "uvit_t2i_s2_deep"]

    def test_a_pattern_without_a_match(self, cli, assert_refused):
        assert_refused(cli("models", "uvit_s3"), "PATTERN: got 'uvit_s3'", "Did you mean", "uvit_s2")

    def test_more_than_a_pattern_is_refused(self, cli, assert_refused):
        assert_refused(cli("models", "uvit_s2", "--json"), "--json")
