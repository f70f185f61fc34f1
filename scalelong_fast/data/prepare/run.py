"""A whole preparation: open the source, plan, pack shard after shard, write the manifest."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from scalelong_fast.data.crop import CROPS
from scalelong_fast.data.packed.format import Manifest, Plan
from scalelong_fast.data.packed.writer import PackedWriter, begun_source
from scalelong_fast.data.prepare.captions import add_captions
from scalelong_fast.data.prepare.files import ARCHIVES, list_files, open_archive, open_folder
from scalelong_fast.data.prepare.latents import LatentPacker
from scalelong_fast.data.prepare.options import Request
from scalelong_fast.data.prepare.pixels import PixelPacker, PixelReader
from scalelong_fast.data.prepare.progress import counting
from scalelong_fast.data.prepare.recipes import Recipe
from scalelong_fast.data.prepare.source import Source
from scalelong_fast.data.prepare.tables import is_table, open_hub, open_local
from scalelong_fast.errors import UserError, invalid


def open_source(request: Request, progress: bool = False) -> Source:
    """The images that a request names, with the labels or captions that its recipe asks for.

    Raises:
        UserError: nothing there, or without them, or not as many as the data set has.
    """
    recipe, options, split = request.recipe, request.options, request.split
    name = options.source or recipe.hub
    if name is None:
        raise invalid("--source", None, "a folder, an archive, a table or a name on the hub", "Give it with --source.")
    path = Path(name).expanduser()
    if path.exists() and options.revision is not None:
        raise invalid("--revision", options.revision, "none for a local source")
    if path.is_dir():
        files = list_files(path, progress)
        is_folder = not is_table(files)
        source = open_folder(path, files, progress) if is_folder else open_local(path, split, recipe.condition)
    elif path.exists():
        is_parquet = path.suffix == ".parquet"
        source = open_local(path, split, recipe.condition) if is_parquet else open_archive(path, progress)
    elif (
        name.count("/") == 1 and not name.startswith((".", "/", "~")) and path.suffix not in (*ARCHIVES, ".gz", ".tgz")
    ):
        begun = begun_source(request.out)
        commit = begun.get("revision") if begun.get("path") == name else None
        source = open_hub(name, split, options.revision, recipe.condition, commit)
    else:
        raise invalid(
            "--source", name, "an existing folder or file, or OWNER/NAME on the hub", "There is no such file."
        )
    return _with_condition(source, request)


def _with_condition(source: Source, request: Request) -> Source:
    recipe, options, where = request.recipe, request.options, source.facts["path"]
    if options.captions is not None:
        source = add_captions(source, options.captions)
    if recipe.condition == "captions" and source.captions is None:
        mend = "Give COCO's annotations with --captions captions_train2014.json, or a table with a column of captions."
        raise invalid("--captions", None, f"captions, since {where} has none", mend)
    if recipe.condition == "labels" and source.labels is None:
        mend = f"{recipe.name} is labelled: give class folders, or a table with a column of labels."
        raise invalid("--source", where, "labels", mend)
    if recipe.condition in ("none", "captions"):
        source = replace(source, labels=None, class_names=())
    if recipe.condition != "captions":
        source = replace(source, captions=None)
    if recipe.parts and "split" not in source.facts:
        source = _take_part(source, request)
    elif options.split is not None and "split" not in source.facts:
        raise invalid("--split", options.split, f"none for {where}", "Give the folder of that split with --source.")
    if options.limit is None:
        if not options.allow_partial:
            _check_count(source, recipe)
    elif options.limit < len(source):
        # Spread over the whole source: its first images may all be of one class.
        chosen = np.arange(options.limit, dtype=np.int64) * len(source) // options.limit
        source = source.take(chosen)
    return source


def _check_count(source: Source, recipe: Recipe) -> None:
    """Raise unless there are as many images as were published: a download or an unpacking may have been cut short."""
    counts = recipe.counts
    split = source.facts.get("split")
    if split is not None and split in counts:
        counts = {split: counts[split]}
    if counts and len(source) not in counts.values():
        known = " or ".join(f"{count:,} ({split})" for split, count in counts.items())
        raise UserError(
            f"--source: {source.facts['path']} has {len(source):,} images, {recipe.name} {known}. Download or unpack "
            "it again; --allow-partial packs what is there, --limit a few for a try."
        )


def _take_part(source: Source, request: Request) -> Source:
    """The images of the split asked for, where the source holds the whole data set."""
    parts, split = request.recipe.parts, request.split
    if len(source) != max(part.stop for part in parts.values()):
        return source  # chosen by hand
    if split not in parts:
        raise invalid("--split", split, f"one of {', '.join(parts)}")
    chosen = source.take(np.arange(parts[split].start, parts[split].stop, dtype=np.int64))
    return replace(chosen, facts={**source.facts, "split": split})


def prepare(request: Request, progress: bool = False) -> Manifest:
    """Pack what is asked for into ``request.out``, or go on with it; a finished set is left as it is.

    Raises:
        UserError: bad input; the message says what. Shards that were finished stay, and the same command goes on there.
    """
    recipe, options = request.recipe, request.options
    source = open_source(request, progress)
    workers = options.workers or min(32, os.cpu_count() or 1)
    rule = CROPS[options.crop or recipe.crop]
    reader = PixelReader(source, rule, request.size, options.channels, workers, options.skip_unreadable)
    try:
        packer = _packer(reader, request)
        shard_size = max(1, min(len(source), (options.shard_mib << 20) // packer.sample_bytes()))
        plan = Plan(
            name=recipe.name,
            count=len(source),
            shard_size=shard_size,
            fields=packer.fields,
            class_names=source.class_names,
            latent_scale=packer.latent_scale,
            source=source.facts,
            preparation=packer.facts(),
        )
        mark = None if source.marks is None else source.mark
        with PackedWriter(request.out, plan, options.verify, progress, mark) as writer:
            todo = list(writer.todo)
            done = plan.count - sum(len(plan.samples(shard)) for shard in todo)
            show = progress and bool(todo)
            with counting(f"Packing {recipe.name}", "images", show, total=plan.count, done=done) as tick:
                for shard in todo:
                    rows, skipped = packer.pack(plan.samples(shard), tick)
                    writer.write_shard(shard, rows, skipped)
            return writer.finish(packer.null_text)
    except OSError as error:
        raise UserError(
            f"OUT: packing into {str(request.out)!r} stopped ({error}). Finished shards are untouched: free some space "
            "or bring the source back, then run the same command again to go on."
        ) from error
    except MemoryError as error:
        raise UserError(
            f"--shard-mib: a shard of {options.shard_mib} MiB, or of one image of {request.size} pixels, does not fit "
            "into memory. Give a smaller --shard-mib or --size."
        ) from error
    finally:
        reader.close()


def _packer(reader: PixelReader, request: Request) -> PixelPacker | LatentPacker:
    if request.recipe.condition != "captions":
        return PixelPacker(reader)
    from scalelong_fast.data.prepare.encoders import ImageEncoder, TextEncoder

    options = request.options
    images = ImageEncoder(options.autoencoder, request.device)
    text = TextEncoder(options.text_encoder, request.device)
    return LatentPacker(reader, images, text, options.batch_size)
