"""Models of the Hugging Face hub by their name there, kept in that library's own cache."""

import os

from etils import epath

from lmjax.config_checks import Refused, UserError

PREFIX = "hf:"

_SETTINGS = ("config.json", "tokenizer.json", "tokenizer_config.json", "*.index.json", "modules.json",
             "1_Pooling/config.json")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def local_folder(path: epath.PathLike) -> epath.Path:
  """Returns a folder as it is, and for hf:OWNER/NAME or hf:OWNER/NAME@REVISION the one it is downloaded to.

  Weights come as safetensors where the hub has them so. What is in the cache (HF_HOME) is not downloaded again, and
  serves without a network under HF_HUB_OFFLINE=1.

  Raises:
    UserError: where the name, or its revision, is not one of the hub's, or may not be read.
    Refused: where it cannot be downloaded now.
  """
  if not os.fspath(path).startswith(PREFIX):
    return epath.Path(path)
  try:
    import huggingface_hub
    from huggingface_hub import errors
  except ImportError as e:
    raise UserError(f"{path} needs huggingface_hub; install it with pip install lmjax[hf].") from e
  name, _, revision = os.fspath(path).removeprefix(PREFIX).partition("@")
  try:
    for weights in _WEIGHTS:
      folder = epath.Path(huggingface_hub.snapshot_download(
          name, revision=revision or None, allow_patterns=[*_SETTINGS, weights]))
      if any(folder.glob(weights)):
        break
    return folder
  except errors.HFValidationError as e:
    raise UserError(f"{path} is not a name on the hub; give hf:OWNER/NAME or hf:OWNER/NAME@REVISION.") from e
  except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as e:  # Gated models are among the former.
    raise UserError(f"The hub has no {name}{f' at {revision}' if revision else ''}, or it may not be read without a "
                    "token; check the name, or set HF_TOKEN.") from e
  except (OSError, errors.HfHubHTTPError) as e:
    reason = str(e).splitlines()[0].rstrip(".")
    raise Refused(f"{path} could not be downloaded ({reason}); check the network, or give a local folder.") from e
