"""Captions of MS-COCO's annotation files, joined to a source of images."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from scalelong_fast.data.prepare.files import parents
from scalelong_fast.data.prepare.source import Source, fingerprint
from scalelong_fast.errors import UserError


def add_captions(source: Source, file: Path) -> Source:
    """The images that ``file`` names, in the order of their COCO ids, with all of their captions.

    Args:
        source: a folder or an archive that holds the images.
        file: like ``captions_train2014.json``: ``images`` with ``id`` and ``file_name``, ``annotations`` with
            ``image_id`` and ``caption``.

    Raises:
        UserError: the file cannot be read as such, an image of it is not in the source, or one has no caption.
    """
    names, captions = _read(file)
    numbers = {end: index for index, name in enumerate(source.names) for end in parents(name)}
    missing = [names[key] for key in names if names[key] not in numbers]
    if missing:
        raise UserError(
            f"--source: {len(missing)} of the {len(names)} images of {file} are not there (first: {missing[0]!r}). "
            "Give the images that belong to the captions, e.g. train2014.zip with captions_train2014.json."
        )
    silent = [names[key] for key in names if not captions.get(key)]
    if silent:
        raise UserError(f"--captions: {file} has no caption of {silent[0]!r}. Download the file again.")
    order = sorted(names)
    chosen = [numbers[names[key]] for key in order]
    text = [captions[key] for key in order]
    facts = {
        **source.facts,
        "images": len(order),
        "captions": {
            "file": file.name,
            "count": sum(map(len, text)),
            "fingerprint": fingerprint((key, *captions[key]) for key in order),
        },
    }
    chosen_images = replace(source, labels=None, captions=None).take(np.array(chosen, np.int64))
    return replace(chosen_images, class_names=(), captions=text, facts=facts)


def _read(file: Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    """File names and captions by image id."""
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in values["images"]}
        captions: dict[int, list[str]] = {}
        for annotation in values["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(" ".join(annotation["caption"].split()))
        if not names:
            raise ValueError("no images")
        return names, captions
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--captions: {str(file)!r} cannot be read as COCO captions ({type(error).__name__}: {error}). Expected a "
            "file like captions_train2014.json, with 'images' and 'annotations'."
        ) from error
