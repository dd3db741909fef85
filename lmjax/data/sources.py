"""Opens a source of text by its name: the standard library, local files, or a prepared TFDS data set.

What a source yields is in `pieces.py`; each kind has its own file.
"""

from lmjax.config import DataConfig, UserError
from lmjax.data.file_sources import FileSource
from lmjax.data.pieces import Piece, Source
from lmjax.data.stdlib_source import StdlibSource
from lmjax.data.tfds_sources import TfdsSource, is_prepared_folder

__all__ = ["Piece", "Source", "open_source", "short_name"]


def open_source(spec: str, config: DataConfig) -> Source:
  """Opens one source.

  Args:
    spec: `stdlib`, a path, folder or glob of files, `tfds:NAME[/CONFIG][:VERSION]`, or a prepared TFDS folder.
    config: `text_field`, `data_dir` and `validation_fraction` are used.

  Raises:
    UserError: where there is no such source or it holds nothing.
  """
  if not spec:
    raise UserError("config.data.source is empty; give stdlib, a path or glob of files, or tfds:NAME.")
  if spec == "stdlib":
    return StdlibSource(config)
  if spec.startswith("tfds:") or is_prepared_folder(spec):
    return TfdsSource(spec, config)
  return FileSource(spec, config)


def short_name(spec: str) -> str:
  """Returns a short name for a source, for naming its validation set: the data set's or the file's, without suffix."""
  if spec.startswith("tfds:"):
    return spec.removeprefix("tfds:").split(":")[0].replace("/", "_")
  parts = [part.split(".")[0] for part in spec.replace("\\", "/").split("/")]
  named = [part for part in parts if part and not any(c in part for c in "*?[")]
  return named[-1] if named else "files"
