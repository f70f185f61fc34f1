"""Loading published U-ViT and ScaleLong weights from files."""

import pytest
import torch
from safetensors.torch import save_file

from scalelong_fast.errors import UserError
from scalelong_fast.integrations import load_uvit_checkpoint
from scalelong_fast.models import UViT, UViTConfig

SIZES = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 6, "num_heads": 2, "reduction": 4}
TOKENS, HIDDEN = 17, 4


def build(scaling="none", **overrides):
    return UViT(UViTConfig(**(SIZES | {"scaling": scaling} | overrides)))


def published(scaling="none"):
    """Random weights by the authors' names."""
    state = {key: torch.randn_like(value) for key, value in build("none").state_dict().items()}
    prefixes = {"ls": ["se"], "ls-individual": ["se.0", "se.1", "se.2"]}
    for prefix in prefixes.get(scaling, []):
        state[f"{prefix}.layer1.weight"] = torch.randn(HIDDEN, TOKENS)
        state[f"{prefix}.layer1.bias"] = torch.randn(HIDDEN)
        state[f"{prefix}.layer2.weight"] = torch.randn(TOKENS, HIDDEN)
        state[f"{prefix}.layer2.bias"] = torch.randn(TOKENS)
    return state


def save(state, path):
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


@pytest.mark.parametrize("name", ["nnet_ema.pth", "nnet_ema.pt", "model.safetensors"])
@pytest.mark.parametrize("scaling", ["none", "ls", "ls-individual"])
@pytest.mark.parametrize("as_path", [True, False])
def test_files_load_into_the_model_and_return_it(tmp_path, name, scaling, as_path):
    state = published(scaling)
    path = save(state, tmp_path / name)
    model = build(scaling)
    assert load_uvit_checkpoint(model, path if as_path else str(path)) is model
    own = model.state_dict()
    for key, value in state.items():
        if not key.startswith("se."):
            assert torch.equal(own[key], value), key
    assert len(own) == len(state)


def test_the_shared_gate_keeps_its_layers():
    state = published("ls")
    gate = load_uvit_checkpoint(build("ls"), state).scaling.gate
    assert torch.equal(gate.down.weight, state["se.layer1.weight"])
    assert torch.equal(gate.down.bias, state["se.layer1.bias"])
    assert torch.equal(gate.up.weight, state["se.layer2.weight"])
    assert torch.equal(gate.up.bias, state["se.layer2.bias"])


def test_individual_gates_are_numbered_by_decoder_block_there_and_by_skip_here():
    state = published("ls-individual")
    gates = load_uvit_checkpoint(build("ls-individual"), state).scaling.gates
    for block in range(3):
        assert torch.equal(gates[2 - block].up.weight, state[f"se.{block}.layer2.weight"])


def test_coefficients_without_parameters_take_any_plain_checkpoint():
    state = published("none")
    for scaling in ("none", "uniform", "cs", "cs-reversed"):
        assert same(load_uvit_checkpoint(build(scaling), state).state_dict(), state)


def test_half_precision_files_are_widened_to_the_model():
    state = {key: value.half() for key, value in published().items()}
    model = load_uvit_checkpoint(build(), state)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model.pos_embed, state["pos_embed"].float())


@pytest.mark.parametrize(
    ("file", "model", "problem"),
    [
        ("ls", "none", "unexpected"),
        ("ls", "cs", "unexpected"),
        ("none", "ls", "missing"),
        ("ls", "ls-individual", "missing.*unexpected"),
        ("ls-individual", "ls", "missing.*unexpected"),
        ("none", "learnable", "missing"),
    ],
)
def test_another_scaling_is_refused_and_leaves_the_model_alone(file, model, problem):
    network = build(model)
    before = snapshot(network)
    with pytest.raises(UserError, match=rf"{problem}.*built with scaling '{model}'.*scaling of the checkpoint"):
        load_uvit_checkpoint(network, published(file))
    assert same(network.state_dict(), before)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"embed_dim": 32}, r"of another shape: .*\(expected "),
        ({"img_size": 16}, r"of another shape: pos_embed \(1, 17, 16\) \(expected \(1, 65, 16\)\)"),
        ({"depth": 4}, r"unexpected: in_blocks\.2\."),
        ({"depth": 8}, r"missing: in_blocks\.3\..*and \d+ more"),
        ({"num_classes": 10}, r"missing: label_emb\.weight"),
        ({"conv": False}, r"unexpected: final_layer\.bias, final_layer\.weight"),
    ],
    ids=str,
)
def test_another_shape_is_refused_and_leaves_the_model_alone(overrides, problem):
    model = build(**overrides)
    before = snapshot(model)
    with pytest.raises(UserError, match=rf"checkpoint: .*{problem}.*preset and overrides"):
        load_uvit_checkpoint(model, published())
    assert same(model.state_dict(), before)


class Trap:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_code_is_never_run(tmp_path):
    path, loot = tmp_path / "trap.pth", tmp_path / "loot"
    torch.save(published() | {"pos_embed": Trap(loot)}, path)
    model = build()
    before = snapshot(model)
    with pytest.raises(UserError, match=r"path: could not read .*trap\.pth"):
        load_uvit_checkpoint(model, path)
    assert not loot.exists()
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("name", ["missing.pth", "missing.safetensors"])
def test_missing_file(tmp_path, name):
    with pytest.raises(UserError, match=rf"path: could not read .*{name}.*(FileNotFound|No such file)"):
        load_uvit_checkpoint(build(), tmp_path / name)


@pytest.mark.parametrize("name", ["torn.pth", "torn.safetensors"])
def test_torn_file(tmp_path, name):
    whole = save(published(), tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"path: could not read .*{name}"):
        load_uvit_checkpoint(build(), tmp_path / name)


@pytest.mark.parametrize(
    "content", [[torch.zeros(1)], torch.zeros(3), {"step": 3}, {"state_dict": {"pos_embed": torch.zeros(1)}}], ids=str
)
def test_a_file_that_holds_something_else(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"path: got .*other\.pth', expected a file that holds a state dict"):
        load_uvit_checkpoint(build(), path)


def test_a_mapping_that_holds_something_else():
    with pytest.raises(UserError, match="state dict"):
        load_uvit_checkpoint(build(), published() | {"pos_embed": [1.0, 2.0]})
