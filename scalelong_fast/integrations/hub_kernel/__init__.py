"""Our ops as a package that the Hub's kernel loader (the library ``kernels``) takes: Triton only, stateless layers.

The loader imports a folder under a name of its own, so everything inside is imported relatively, and the ops are
registered in a namespace that depends on the content: several versions can be loaded side by side, beside
``scalelong_fast`` itself too.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import scalelong_fast
from scalelong_fast.errors import UserError, check_range, invalid
from scalelong_fast.version import __version__

#: Repository and package on the Hub; what the loader looks for in a folder named so.
NAME = "scalelong-fast"
PACKAGE = "scalelong_fast"

#: The variant for any PyTorch, Python and platform.
VARIANT = "torch-universal"

#: Of the ops: what a package of kernels has no use for.
_LEFT_OUT = {"ops/__init__.py", "ops/examples.py", "ops/tuning.py"}

_IMPORT = re.compile(r"^(\s*)from scalelong_fast\.([\w.]+) import ", re.M)

_OPS = (
    *("add_layer_norm_gap", "channel_stats", "group_norm_gap", "layer_norm_gap", "ls_scale_concat", "ls_skip_linear"),
    *("scale_concat", "scale_concat_conv1x1", "scale_concat_group_norm", "scale_concat_linear", "se_gate"),
)
_PLANS = ("explain_plan", "force_plan", "list_plans")


def sources() -> dict[str, str]:
    """The package's files by path, before imports and namespace are changed."""
    root = Path(scalelong_fast.__file__).parent
    files = [root / "errors.py", root / "version.py", *(root / "ops").glob("*.py")]
    files += [*(root / "kernels").glob("*.py"), *(root / "kernels" / "tables").glob("*.json")]
    found = {str(file.relative_to(root)): file.read_text(encoding="utf-8") for file in files}
    found = {path: text for path, text in found.items() if path not in _LEFT_OUT}
    ops = "".join(f"from scalelong_fast.ops.{op} import {op}\n" for op in _OPS)
    ops += f"from scalelong_fast.ops.plans import {', '.join(_PLANS)}\n"
    names = "".join(f'    "{name}",\n' for name in sorted((*_OPS, *_PLANS)))
    found["ops/__init__.py"] = f'"""Differentiable ops on long skip connections."""\n\n{ops}\n__all__ = [\n{names}]\n'
    found["kernels/__init__.py"] = '"""Triton kernels and the functions that launch them."""\n'
    found["layers.py"] = Path(__file__).with_name("layers.py").read_text(encoding="utf-8")
    imports = f"from scalelong_fast.ops import {', '.join(sorted((*_OPS, *_PLANS)))}\n"
    found["__init__.py"] = (
        f'"""Scaled long skip connections (ScaleLong), fused: ops of scalelong_fast {__version__}."""\n\n'
        f'from . import layers\n{imports}\n__all__ = [\n    "layers",\n{names}]\n'
    )
    return dict(sorted(found.items()))


def relative_imports(path: str, text: str) -> str:
    """``text`` of the file ``path`` with imports of our own relative to it."""
    up = "." * (path.count("/") + 1)
    here = path.rpartition("/")[0].replace("/", ".")

    def rewrite(match: re.Match[str]) -> str:
        module = match[2]
        if here and (module == here or module.startswith(f"{here}.")):
            return f"{match[1]}from .{module[len(here) + 1 :]} import "
        return f"{match[1]}from {up}{module} import "

    return _IMPORT.sub(rewrite, text)


def package_files() -> tuple[dict[str, str], str]:
    """The package's files by path, and the name, unique to their content, of its ops."""
    found = sources()
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]
    unique = f"_{PACKAGE}_{digest}"
    for path, text in found.items():
        if path.endswith(".py"):
            text = relative_imports(path, text)
            text = text.replace('"scalelong_fast::', f'"{unique}::').replace(
                "torch.ops.scalelong_fast.", f"torch.ops.{unique}."
            )
            found[path] = text
    return found, unique


def _card(version: int) -> str:
    return f"""---
library_name: kernels
license: apache-2.0
tags:
- kernels
- triton
- scalelong
---

# {NAME}

Fused Triton ops on the long skip connections of diffusion UNets and U-ViTs
([ScaleLong](https://arxiv.org/abs/2310.13545)), from scalelong_fast {__version__}.

```python
from kernels import get_kernel

ops = get_kernel("USER/{NAME}", version={version}, trust_remote_code=True)
out = ops.scale_concat(x, skip, 0.7)  # cat[x, 0.7 * skip] in one pass
```

Layers for `kernelize`: `ScaleConcat`, `LSScaleConcat`, `ScaleConcatLinear`, `ScaleConcatGroupNorm`.
"""


def build_hub_kernel(out: str | Path, version: int = 1) -> Path:
    """Write a repository of the Hub's kernels: ``OUT/build/torch-universal/scalelong_fast``, metadata and a card.

    Args:
        out: the folder; a repository written before is replaced.
        version: of the interface, which the Hub's branches ``v1``, ``v2`` … are named after.

    Returns:
        ``out``.

    Raises:
        UserError: a bad version, or a folder that holds other things or cannot be written.
    """
    check_range("version", version, low=1, integer=True)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise invalid("OUT", str(out), "a folder", "There is a file of that name.")
    others = sorted({entry.name for entry in out.iterdir()} - {"build", "README.md"}) if out.is_dir() else []
    builds = {entry.name for entry in (out / "build").iterdir()} if (out / "build").is_dir() else set()
    if others or builds - {VARIANT}:
        name = others[0] if others else "other builds"
        raise invalid("OUT", str(out), "a new folder, or one that this command wrote", f"It also holds {name}.")
    files, unique = package_files()
    variant = out / "build" / VARIANT
    metadata = {
        "id": unique,
        "name": NAME,
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    try:
        if variant.is_dir():
            shutil.rmtree(variant)
        for path, text in files.items():
            file = variant / PACKAGE / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        (out / "README.md").write_text(_card(version))
    except OSError as error:
        raise UserError(f"OUT: cannot write {out} ({error}). Free some space or choose another place.") from error
    return out
