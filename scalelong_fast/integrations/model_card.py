"""The model card of a trained run: what it is, how it was trained, how good it is and how to load it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalelong_fast.data.optional import import_optional
from scalelong_fast.diffusion import default_steps
from scalelong_fast.models import UNet, UViT
from scalelong_fast.training.config import RunConfig

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

#: Data sets whose name on the Hub is known.
_ON_THE_HUB = {"cifar10": "uoft-cs/cifar10"}

_CITATION = """@inproceedings{huang2023scalelong,
  title = {{ScaleLong}: Towards More Stable Training of Diffusion Model via Scaling Network Long Skip Connection},
  author = {Huang, Zhongzhan and Zhou, Pan and Yan, Shuicheng and Lin, Liang},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023}
}"""


def describe_scaling(model: UViT | UNet) -> str:
    """The coefficients of the long skips in a line."""
    config, scaling = model.config, model.scaling
    if scaling is None:
        return "no long skips"
    skips = f"{scaling.num_skips} long skips"
    base = getattr(scaling, "base", None)
    if config.scaling == "none":
        return f"{skips}, not scaled (κ_i = 1)"
    if base is not None:
        formula = {"uniform": "κ", "cs": "κ^(i−1)", "cs-reversed": "κ^(N−i+1)"}[config.scaling]
        return f"{skips}, constant κ_i = {formula} with κ = {base:.4g}"
    if config.scaling == "learnable":
        return f"{skips}, each with a learnt number κ_i"
    gate = "one gate for all of them" if config.scaling == "ls" else "a gate for each"
    if config.calibration == "se":
        gate += f", reduction {config.reduction}"
    return f"{skips}, learnt scaling κ_i = σ({config.calibration.upper()}(GAP(skip_i))): {gate}"


def _condition(config: RunConfig) -> str:
    if config.model.clip_dim > 0:
        return "text-conditional"
    return "class-conditional" if config.model.num_classes > 0 else "unconditional"


def facts_of(
    model: UViT | UNet, config: RunConfig, facts: dict[str, Any], step: int | None, loss: float | None
) -> dict:
    """The rows of the card's table.

    Args:
        model: what is published.
        config: the run's.
        facts: preset and fingerprint of the data, as ``config.json`` has them beside the config.
        step: at which the weights were taken, if known.
        loss: mean loss of the last logged steps.
    """
    train, size = config.train, config.model.img_size
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kind = "U-ViT" if isinstance(model, UViT) else "UNet"
    data = config.data.name + (", flipped at random" if config.data.flip else "")
    done = train.steps if step is None else step
    trained = f"{done:,} steps of {train.batch_size} samples, AdamW, learning rate {train.lr:g}"
    if done < train.steps:
        trained = f"unfinished, {trained}; {train.steps:,} planned"
    rows = {
        "network": f"{kind}, {_condition(config)}, {config.model.in_chans} × {size} × {size}",
        "parameters": f"{parameters:,}",
        "long skip connections": describe_scaling(model),
        "preset": str(facts.get("preset") or "none"),
        "training data": f"{data} (fingerprint {facts.get('data_fingerprint') or 'unknown'})",
        "training": trained + ("" if loss is None else f"; last loss {loss:.4g}"),
        "weights": f"average over the training, step {'unknown' if step is None else f'{step:,}'}",
        "noise": config.diffusion.schedule,
    }
    if config.model.block_scaling != "none":
        rows["residual branches"] = f"scaled by {config.model.block_scaling}"
    if config.diffusion.label_dropout > 0:
        rows["label dropout"] = f"{config.diffusion.label_dropout:g}"
    return rows


def usage(model: UViT | UNet, config: RunConfig, repo_id: str) -> str:
    """Python that loads the model and uses it: samples where labels and noise are all it takes, else one prediction."""
    kind, sample, diffusion = type(model).__name__, config.sample, config.diffusion
    load = f'model = {kind}.from_pretrained("{repo_id}").eval()'
    if config.model.clip_dim > 0:
        return f"""import torch

from scalelong_fast.models import {kind}

{load}
x = torch.randn(1, *model.input_shape)  # noisy samples
text = torch.randn(1, {config.model.num_clip_token}, {config.model.clip_dim})  # features of a caption
with torch.no_grad():
    noise = model(x, torch.tensor([500.0]), text)  # times from 0 to 999
"""
    schedule = f'"{diffusion.schedule}"'
    if diffusion.schedule == "vpsde":
        schedule += f", beta_min={diffusion.beta_min!r}, beta_max={diffusion.beta_max!r}"
    label = 0 if config.num_labels else None
    options = [f'sampler="{sample.sampler}"', f"steps={sample.steps or default_steps(sample.sampler)}"]
    if label is not None:
        options.append(f"y=torch.full((4,), {label})")
        if config.null_label is not None:
            options += [f"null_y={config.null_label}", f"guidance={sample.guidance!r}"]
    latents = config.model.in_chans not in (1, 3)
    if latents:
        options.append("clip_denoised=False")
    lines = "".join(f"    {option},\n" for option in options)
    made = "latents, to be decoded" if latents else "images, values from -1 to 1"
    return f"""import torch

from scalelong_fast.diffusion import create_schedule, image_seeds, sample_images
from scalelong_fast.models import {kind}

{load}
images = sample_images(
    model,
    create_schedule({schedule}),
    image_shape=model.input_shape,
    seeds=image_seeds(0, 4, {label}),
{lines})  # 4 {made}
"""


def _metric(result: dict[str, Any]) -> str:
    return "FID" if result["extractor"]["name"] == "inception" else "Fréchet distance"


def evaluation_table(results: Sequence[dict[str, Any]]) -> str:
    """The evaluations of these weights as a Markdown table."""
    if not results:
        return "These weights have not been evaluated."
    lines = ["| metric | value | images | reference | extractor | sampler | guidance | seed |", "|---" * 8 + "|"]
    for result in results:
        drawn, reference, extractor = result["sampling"], result["reference"], result["extractor"]
        cells = [
            _metric(result),
            f"{result['fid']:.4f}",
            f"{result['n']:,}" if result["n"] else "unknown",
            f"{Path(str(reference['name'])).name} ({reference['n'] or 'unknown number of'} images)",
            f"{Path(str(extractor['name'])).name} ({extractor['fingerprint']})",
            f"{drawn['sampler']}, {drawn['steps']} steps",
            f"{drawn['guidance']:g}",
            str(drawn["seed"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def model_card(
    model: UViT | UNet,
    config: RunConfig,
    repo_id: str,
    *,
    facts: dict[str, Any],
    step: int | None,
    loss: float | None,
    results: Sequence[dict[str, Any]],
    picture: str | None,
    license: str,
) -> "ModelCard":
    """Write the card.

    Args:
        model, config, facts, step, loss: see :func:`facts_of`.
        repo_id: where the model will be, which the code to load it names.
        results: evaluations of these weights, as ``evaluation.json`` has them.
        picture: file name of a grid of samples in the same folder, or None.
        license: identifier of the weights' licence.
    """
    hub = import_optional("huggingface_hub")
    name, condition = repo_id.split("/")[-1], _condition(config)
    kind = "U-ViT" if isinstance(model, UViT) else "UNet"
    dataset = _ON_THE_HUB.get(config.data.name)
    pipeline = {"unconditional": "unconditional-image-generation", "text-conditional": "text-to-image"}.get(condition)
    data = hub.ModelCardData(
        license=license,
        library_name="scalelong_fast",
        pipeline_tag=pipeline,
        tags=["diffusion", kind.lower(), "scalelong", condition, "pytorch_model_hub_mixin", "model_hub_mixin"],
        datasets=None if dataset is None else [dataset],
        model_name=name,
        eval_results=[_eval_result(result, config, dataset, pipeline) for result in results if _is_finite(result)]
        or None,
    )
    rows = facts_of(model, config, facts, step, loss)
    table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
    image = "" if picture is None else f"\n![Samples]({picture})\n"
    content = f"""---
{data.to_yaml()}
---

# {name}

A {condition} diffusion model, a {kind} trained with `scalelong_fast`, whose long skip connections have coefficients as
in [ScaleLong](https://arxiv.org/abs/2310.13545): {describe_scaling(model)}.
{image}
## The model

{table}

All settings are in `run.json`, the metrics of the training in `metrics.jsonl`.

## Use

```bash
pip install "scalelong_fast[train] @ git+<address of the repository of scalelong_fast>"
```

```python
{usage(model, config, repo_id)}```

## Evaluation

{evaluation_table(results)}

Values can be compared only where reference, extractor and number of images are the same.

## Citation

```bibtex
{_CITATION}
```
"""
    return hub.ModelCard(content)


def _is_finite(result: dict[str, Any]) -> bool:
    return math.isfinite(result["fid"])


def _eval_result(result: dict[str, Any], config: RunConfig, dataset: str | None, task: str | None) -> Any:
    hub = import_optional("huggingface_hub")
    return hub.EvalResult(
        task_type=task or "unconditional-image-generation",
        dataset_type=dataset or config.data.name,
        dataset_name=config.data.name,
        metric_type="fid" if _metric(result) == "FID" else "frechet-distance",
        metric_name=f"{_metric(result)} ({Path(str(result['extractor']['name'])).name}, {result['n'] or '?'} images)",
        metric_value=round(result["fid"], 4),
    )
