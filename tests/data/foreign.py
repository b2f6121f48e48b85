"""Datasets as others write them."""

import pathlib
from typing import Any

import tensorflow_datasets as tfds


def write_tfds(
    directory: pathlib.Path, features: dict[str, Any], splits: dict[str, list[dict[str, Any]]]
) -> pathlib.Path:
    """A TFDS dataset of these features and examples in array_record files; its directory."""
    directory.mkdir(parents=True)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name="foreign", version=tfds.core.Version("1.0.0"), data_dir=str(directory),
            module_name="foreign",
        ),
        features=tfds.features.FeaturesDict(features),
    )  # fmt: skip
    writer = tfds.core.SequentialWriter(info, 50, file_format="array_record")
    writer.initialize_splits(list(splits))
    writer.add_examples(splits)
    writer.close_all()
    return directory
