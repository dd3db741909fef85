"""Turns any source of lmjax into a prepared TFDS data set of ArrayRecord files, without TensorFlow.

Importing this module registers the builder `lmjax_text`.
"""

import os
from typing import Any, Iterator

import tensorflow_datasets as tfds

from lmjax.config import DataConfig
from lmjax.data.pieces import Source
from lmjax.data.sources import open_source

# A record is held in memory as a whole, so a longer document becomes several.
_MAX_RECORD = 1 << 20


class LmjaxText(tfds.core.GeneratorBasedBuilder):
  """Documents of a source, with the source's own training and validation splits."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, *, source: Source, **kwargs: Any):
    """Args: `source`: what to read; the rest as in `tfds.core.GeneratorBasedBuilder`."""
    self._source = source
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self, description=f"Text of {self._source.spec}.",
        features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    del dl_manager  # Nothing is downloaded.
    splits = {"train": self._generate_examples("train")}
    if next(self._source.pieces("validation"), None):
      splits["validation"] = self._generate_examples("validation")
    return splits

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, str]]]:
    texts, size, number = [], 0, 0
    for text, ends_document in self._source.pieces(split):
      texts.append(text)
      size += len(text)
      if ends_document or size >= _MAX_RECORD:
        yield number, {"text": "".join(texts)}
        texts, size, number = [], 0, number + 1


def prepare_tfds(source_spec: str, data_dir: str | os.PathLike, config: DataConfig) -> str:
  """Writes a source as a TFDS data set.

  Args:
    source_spec: as in `config.data.source`.
    data_dir: folder that takes the data set, as `lmjax_text/1.0.0`.
    config: settings of the source.

  Returns:
    The folder of the prepared data set, itself a valid `config.data.source`.

  Raises:
    UserError: where the source cannot be read.
  """
  builder = LmjaxText(source=open_source(source_spec, config), data_dir=os.fspath(data_dir), file_format="array_record")
  builder.download_and_prepare()
  return os.fspath(builder.data_dir)
