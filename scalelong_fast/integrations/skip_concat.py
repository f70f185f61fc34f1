"""``SkipConcat``: a module in the place of ``torch.cat([x, skip], dim)``, with the scaled long skip built in."""

from torch import Tensor, nn

from scalelong_fast.errors import UserError, check_bool, check_range, invalid
from scalelong_fast.models.long_skip import is_plain_scaling, plain_gate
from scalelong_fast.ops import ls_scale_concat, scale_concat
from scalelong_fast.scaling import SCALINGS, LongSkipScaling, create_scaling, resolve_scaling
from scalelong_fast.scaling.constant import CS, ConstantScaling, ReversedCS
from scalelong_fast.scaling.learnable import LearnableScaling


class SkipConcat(nn.Module):
    """cat[x, κ ⊙ skip], a long skip connection with its coefficient (ScaleLong Eq. 4).

    Use one for each long skip of a network, in the place of ``torch.cat([x, skip], dim)``::

        self.merge = SkipConcat("ls", width=64)            # a gate of its own, for a skip of 64 channels
        self.merge = SkipConcat("cs", kappa=0.7, i=3)      # κ_3 = 0.7²
        self.merge = SkipConcat("uniform", kappa=0.5)      # κ = 0.5

    Skips that are to share one gate get one scaling::

        scaling = create_scaling("ls", num_skips=3, widths=[32, 64, 128])  # outermost first
        self.merges = nn.ModuleList(SkipConcat(scaling, i=i) for i in (3, 2, 1))

    The names of its parameters are then in the state dict once for each user; they are one parameter for optimisers
    and ``torch.save``. (``safetensors`` asks for ``save_model`` there, which knows of shared tensors.)

    Args:
        scaling: name in :data:`scalelong_fast.scaling.SCALINGS`, or a scaling that several skips share.
        width: of a gate (``ls``, ``ls-individual``: the same here): what κ gates, dim 1 of the skip, i.e. channels of
            ``(B, C, *spatial)`` and tokens of ``(B, L, D)``. The others ignore it.
        kappa: κ > 0 of ``uniform``, ``cs``, ``cs-reversed``; first value of ``learnable``.
        i: index of the skip, 1 (outermost, next to the input) … N (innermost): of ``cs``, ``cs-reversed`` and a shared
            scaling. The others ignore it.
        num_skips: N, for ``cs-reversed``.
        dim: what is concatenated: 1, channels of ``(B, C, *spatial)`` with one to three spatial dimensions; or -1,
            features of ``(B, L, D)``.
        skip_first: concatenate as cat[κ ⊙ skip, x].
        reduction, activation, init: of the gate, see :class:`~scalelong_fast.scaling.SEGate`.

    Raises:
        UserError: an unknown scaling, an argument that it needs and that is missing, or a value out of range.
    """

    def __init__(
        self,
        scaling: str | LongSkipScaling = "ls",
        *,
        width: int | None = None,
        kappa: float | None = None,
        i: int | None = None,
        num_skips: int | None = None,
        dim: int = 1,
        skip_first: bool = False,
        reduction: int = 16,
        activation: str = "relu",
        init: str = "paper",
    ):
        super().__init__()
        if isinstance(dim, bool) or dim not in (1, 2, -1):
            raise invalid("dim", dim, "1 for (B, C, *spatial), or -1 for (B, L, D)")
        check_bool("skip_first", skip_first)
        self.dim, self.skip_first = dim, skip_first
        if isinstance(scaling, LongSkipScaling):
            self.scaling, self.i = scaling, _index(i, scaling.num_skips, "a shared scaling serves several skips")
            return
        name = resolve_scaling(scaling)
        kind = SCALINGS[name]
        if issubclass(kind, LearnableScaling) and width is None:
            raise UserError(
                f"width: missing, and scaling {name!r} has a gate. Pass the number of channels of the skip "
                "(of tokens for (B, L, D)), dim 1 of the feature."
            )
        # Only κ_i of CS depends on where the skip is; a gate or a scalar of its own is the only one of its scaling.
        if issubclass(kind, (CS, ReversedCS)):
            if kind is ReversedCS and num_skips is None:
                raise UserError(f"num_skips: missing, and κ_i of {name!r} counts from it. Pass N, the number of skips.")
            count = num_skips if num_skips is not None else max(1, i if isinstance(i, int) else 1)
            check_range("num_skips", count, low=1, integer=True)
            self.i = _index(i, count, f"κ_i of {name!r} is another for each skip")
        else:
            count, self.i = 1, 1
        self.scaling = create_scaling(
            name,
            num_skips=count,
            widths=1 if width is None else width,
            kappa=kappa,
            reduction=reduction,
            activation=activation,
            init=init,
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """cat[x, κ ⊙ skip].

        Args:
            x: the decoder's feature, ``(B, C, *spatial)``, or ``(B, L, D)``.
            skip: the encoder's feature; may differ from x in the concatenated dimension.

        Returns:
            The concat, in the dtype and the memory format of x; see :func:`scalelong_fast.ops.scale_concat`.

        Raises:
            UserError: features that do not fit each other or the gate.
        """
        scaling, i = self.scaling, self.i
        where = {"dim": self.dim, "skip_first": self.skip_first}
        if not is_plain_scaling(scaling):
            # Somebody added to the scaling: it makes the product itself.
            return scale_concat(x, scaling(skip, i), **where)
        gate = plain_gate(scaling, i)
        if gate is None:
            return scale_concat(x, skip, scaling.kappa(i, skip), **where)
        scaling.check_width(i, skip)
        down, up = gate.down, gate.up
        out, kappa = ls_scale_concat(
            x, skip, down.weight, down.bias, up.weight, up.bias, activation=gate.activation, **where
        )
        scaling.record(i, kappa)
        return out

    def extra_repr(self) -> str:
        index = "" if isinstance(self.scaling, ConstantScaling) and self.i == 1 else f"i={self.i}, "
        return f"{index}dim={self.dim}, skip_first={self.skip_first}"


def _index(i: int | None, num_skips: int, why: str) -> int:
    """``i`` where it is the index of one of N skips."""
    if i is None:
        raise UserError(f"i: missing, and {why}. Pass its index, 1 (outermost, next to the input) to N (innermost).")
    check_range("i", i, low=1, high=num_skips, integer=True)
    return i
