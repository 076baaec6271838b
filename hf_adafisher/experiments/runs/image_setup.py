"""Setup of an image classification run: images, network, optimizer and checkpoint, all checked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, set_seed

from hf_adafisher.data.fingerprint import images_sha256
from hf_adafisher.data.images.augmentation import ImageCollator
from hf_adafisher.data.images.corpora import DEFAULT_IMAGES, ImageCorpus, ImageSplit, check_classes, load_images
from hf_adafisher.data.images.dataset import ImageDataset
from hf_adafisher.data.images.metrics import require_scikit_learn
from hf_adafisher.data.images.normalization import corpus_normalization, pretrained_normalization
from hf_adafisher.experiments.runs.checkpoints import check_resumable, find_checkpoint, warn_of_changed_data
from hf_adafisher.experiments.runs.image import ImageRun
from hf_adafisher.experiments.runs.image_arguments import (
    ImageDataArguments,
    ImageModelArguments,
    ImageTrainingArguments,
)
from hf_adafisher.models import (
    LoadReport,
    create_model,
    freeze_backbone,
    layer_decay_scales,
    load_pretrained,
    model_kind,
    scratch_config,
)
from hf_adafisher.models.configurations import SMALL_IMAGE, image_side, vision_part
from hf_adafisher.optimizers.factory.create import available_optimizers
from hf_adafisher.training.arguments import optimizer_name

logger = logging.getLogger(__name__)

USUAL_SIZE = 224
"""Side of images in pixels, where it follows neither from the model nor from the images."""
_BEST_SIZES = {DEFAULT_IMAGES: 16}
"""Data sets for which another size than the images' own works better."""
_SIZE_SAMPLE = 32


def prepare_image_run(
    model_args: ImageModelArguments, data_args: ImageDataArguments, training_args: ImageTrainingArguments
) -> ImageRun:
    """Load images and network, choose the optimizer, and check all of it before any work is done.

    The images that are used, held-out ones included, are the same for every seed; the initial weights depend on the
    seed and the model's arguments only, never on the optimizer.

    Raises:
        ValueError: Unknown names, images or labels that no classifier can be trained on (see ``load_images``), an image
            size that the network cannot take, a checkpoint of another task, options that do not go together, a
            checkpoint that is incomplete, of another optimizer or of a run that has finished.
        FileNotFoundError: A folder or a checkpoint that does not exist.
        ConnectionError: A data set of the Hub that cannot be had.
        ImportError: A library that is needed and not installed; the message says how to install it.
        OSError: No such pretrained model.
    """
    _check_arguments(model_args, data_args, training_args)
    checkpoint = find_checkpoint(Path(training_args.output_dir or "."), training_args.resume_from_checkpoint)
    corpus = _corpus(data_args, model_args.token)
    images = {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}
    hashes = {name: {"sha256": images_sha256(split)} for name, split in images.items() if len(split)}
    if checkpoint is not None:
        warn_of_changed_data(Path(checkpoint), hashes)
    image_size = choose_image_size(model_args, corpus)
    set_seed(training_args.seed)
    network, model, loaded = load_classifier(model_args, corpus.class_names, image_size)
    training_args.choose_optimizer(network, model_kind(model.config), loaded is not None)
    if checkpoint is not None:
        check_resumable(Path(checkpoint), training_args)
    if model_args.freeze_backbone:
        names = freeze_backbone(model)
        trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
        logger.info("the backbone is frozen: %s of %s parameters are trained (%s)", f"{trained:,}", f"{total:,}", names)
    scales = {} if model_args.layer_decay is None else layer_decay_scales(model, model_args.layer_decay)
    if checkpoint is not None and (Path(checkpoint) / "preprocessor_config.json").is_file():
        normalization = pretrained_normalization(checkpoint)  # whatever the images have become
    elif model_args.model_name_or_path is None:
        normalization = corpus_normalization(corpus)
    else:
        normalization = pretrained_normalization(model_args.model_name_or_path, model_args.hub())
    crop: dict[str, Any] = {"crop_ratio": data_args.crop_ratio}
    random_crop: dict[str, Any] = {"random_resized_crop": data_args.random_resized_crop, "seed": training_args.seed}
    datasets = {"train": ImageDataset(corpus.train, image_size, **crop, **random_crop)}
    for name, split in (("validation", corpus.validation), ("test", corpus.test)):
        if len(split):
            datasets[name] = ImageDataset(split, image_size, **crop)
    shape = (normalization, len(corpus.class_names), image_size)
    return ImageRun(
        training_args=training_args,
        checkpoint=checkpoint,
        model=model,
        model_args=model_args,
        data_args=data_args,
        corpus=corpus,
        network=network,
        image_size=image_size,
        datasets=datasets,
        train_collator=ImageCollator(*shape, data_args.augmentation(), seed=training_args.seed),
        eval_collator=ImageCollator(*shape),
        normalization=normalization,
        scales=scales,
        loaded=loaded,
        data_hashes=hashes,
    )


def _check_arguments(
    model_args: ImageModelArguments, data_args: ImageDataArguments, training_args: ImageTrainingArguments
) -> None:
    """Check what is impossible or missing, before anything is loaded."""
    require_scikit_learn()
    optim = optimizer_name(training_args)
    if model_args.layer_decay is not None and optim not in available_optimizers():
        raise ValueError(
            f"--layer_decay works with this package's optimizers only, not with Trainer's {optim}: "
            f"use one of {', '.join(available_optimizers())}"
        )
    if training_args.label_smoothing_factor and data_args.augmentation().uses_soft_labels:
        raise ValueError(
            "--label_smoothing_factor does not go together with --mixup or --cutmix, whose labels are soft already: "
            "leave out one of them"
        )


def _corpus(data_args: ImageDataArguments, token: str | None) -> ImageCorpus:
    corpus = load_images(
        data_args.dataset,
        data_dir=data_args.data_dir,
        config=data_args.dataset_config_name,
        token=token,
        image_column=data_args.image_column,
        label_column=data_args.label_column,
        validation_fraction=data_args.validation_fraction,
        skip_broken=data_args.skip_broken,
    )

    def reduced(split: ImageSplit, limit: int | None) -> ImageSplit:
        return split if limit is None else split.sample(limit)

    corpus = replace(
        corpus,
        train=reduced(corpus.train, data_args.max_train_samples),
        validation=reduced(corpus.validation, data_args.max_eval_samples),
        test=reduced(corpus.test, data_args.max_eval_samples),
    )
    splits = {"train": corpus.train, "validation": corpus.validation, "test": corpus.test}
    check_classes({name: split for name, split in splits.items() if len(split)}, corpus.class_names)
    return corpus


def choose_image_size(model_args: ImageModelArguments, corpus: ImageCorpus) -> int:
    """Return the size asked for, the pretrained model's own, or for a network from scratch that of the images.

    Images count as having a size if they are square and all alike (32 of them are looked at), and not above 224
    pixels; otherwise it is 224.
    """
    if model_args.image_size is not None:
        return model_args.image_size
    if model_args.model_name_or_path is not None:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path, **model_args.hub())
        return image_side(vision_part(config)) or USUAL_SIZE
    if corpus.name in _BEST_SIZES:
        return _BEST_SIZES[corpus.name]
    some = corpus.train.sample(_SIZE_SAMPLE)
    sizes = {side for position in range(len(some)) for side in some.image(position).size}
    side = sizes.pop()
    return side if not sizes and side <= USUAL_SIZE else USUAL_SIZE


def load_classifier(
    model_args: ImageModelArguments, class_names: Sequence[str], image_size: int
) -> tuple[str, PreTrainedModel, LoadReport | None]:
    """Create or load a network with a head for these classes.

    Returns:
        Its name, the model, and the report on the weights loaded.
    """
    if model_args.model_name_or_path is not None:
        name = model_args.model_name_or_path
        model, report = load_pretrained(name, class_names, image_size=image_size, hub=model_args.hub())
        if report.new and not model_args.ignore_mismatched_sizes:
            raise ValueError(
                f"{name!r} has no weights of these shapes: {', '.join(report.new[:6])}. Give --ignore_mismatched_sizes "
                "to train them anew"
            )
        return name, model, report
    name = model_args.model or ("cct-2-3x2" if image_size <= SMALL_IMAGE else "resnet18")
    options = model_args.options()
    if options:
        check_options(scratch_config(name, image_size=image_size), options)
    try:
        return name, create_model(name, class_names, image_size=image_size, options=options), None
    except (TypeError, AttributeError, KeyError, ZeroDivisionError) as error:
        if not options:
            raise
        raise ValueError(f"{name} cannot be made with --model_options {model_args.model_options}: {error}") from error


def check_options(config: PreTrainedConfig, options: dict[str, Any]) -> None:
    """Raise ValueError for an option that the configuration does not have; it would be kept without any effect."""
    known = set(config.to_dict())
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"the configuration of a {config.model_type} has no {unknown[0]!r}; it has: {', '.join(sorted(known))}"
        )
