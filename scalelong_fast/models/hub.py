"""Saving and loading of models, through huggingface_hub where it is installed."""

from scalelong_fast.errors import UserError

try:
    from huggingface_hub import PyTorchModelHubMixin as HubMixin
except ImportError:  # importing the library needs torch and einops only

    class HubMixin:  # type: ignore[no-redef]
        """Stands in for ``PyTorchModelHubMixin`` where huggingface_hub is missing."""

        def __init_subclass__(cls, **card: object) -> None:
            super().__init_subclass__()

        def save_pretrained(self, *args: object, **kwargs: object) -> None:
            raise UserError(_MEND.format("save_pretrained"))

        @classmethod
        def from_pretrained(cls, *args: object, **kwargs: object) -> None:
            raise UserError(_MEND.format("from_pretrained"))

    _MEND = '{} needs huggingface_hub and safetensors: pip install "scalelong_fast[train]"'
