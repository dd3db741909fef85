"""What a run tells the outside: metrics.jsonl always, other trackers where asked, a progress bar, samples, its result.

Files, all in the run's workdir:
  metrics.jsonl   one JSON object a logged step: `step`, then the metrics. A value that is not finite is null, because
                  JSON knows no NaN.
  samples.jsonl   one JSON object a sample: `step`, `prompt`, `text` (the continuation alone).
  result.json     written once, at the end.
TensorBoard's events lie there too, and run_id.txt, the run's name with W&B and trackio.
"""

import concurrent.futures
import dataclasses
import importlib
import json
import math
import numbers
import os
import secrets
import sys
import time
from typing import Any, Mapping

from etils import epath

from lmjax.config import Config, UserError
from lmjax.workdir import is_local, write_whole

# Without a terminal a line is printed this many times a run.
_NUM_PLAIN_LINES = 20


class Tracker:
  """Writes a run's metrics, samples and result, and shows its progress.

  A run that goes on from step k first drops what was recorded after k, so that in the end its files hold the same steps
  as those of a run that was never stopped.
  """

  def __init__(self, workdir: epath.PathLike, config: Config, *, start_step: int, num_steps: int, active: bool = True):
    """Opens the records.

    Args:
      workdir: folder or object-store URL of the run; made where it does not exist.
      config: the experiment.
      start_step: steps already done, 0 for a fresh run.
      num_steps: steps of the whole run.
      active: whether this process writes; False makes every method do nothing.

    Raises:
      UserError: where a tracker that the config asks for is not installed.
    """
    self._active = active
    if not active:
      return
    workdir = epath.Path(workdir)
    try:
      workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise UserError(f"The workdir {workdir} cannot be made: {e.strerror}; choose a folder you can write to.") from e
    self._workdir = workdir
    self._sinks = _open_sinks(workdir, config, start_step)
    self._metrics = _JsonLines(workdir / "metrics.jsonl", start_step)
    self._samples = _JsonLines(workdir / "samples.jsonl", start_step)
    self._progress = _open_progress(start_step, num_steps)

  def __enter__(self) -> "Tracker":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Records the metrics of a step everywhere, and shows those of an evaluation, whose names are `SET/METRIC`."""
    if not self._active:
      return
    metrics = {name: _plain(value) for name, value in metrics.items()}
    self._metrics.append({"step": int(step), **metrics})
    if lines := _evaluation_lines(step, metrics):
      self._progress.pause()
      print(*lines, sep="\n", file=sys.stderr, flush=True)
    finite = {name: value for name, value in metrics.items() if value is not None}
    for sink in self._sinks:
      sink.write(int(step), finite)

  def progress(self, step: int, metrics: Mapping[str, float]) -> None:
    """Shows how far the run is; of the metrics it shows `loss`, `tokens_per_second` and `mfu`."""
    if self._active:
      self._progress.show(int(step), _summary(metrics))

  def sample(self, step: int, prompt: str, text: str) -> None:
    """Records and prints what the model makes of a prompt; `text` is the continuation alone."""
    if not self._active:
      return
    self._samples.append({"step": int(step), "prompt": prompt, "text": text})
    for sink in self._sinks:
      sink.write_text(int(step), "sample", prompt + text)
    self._progress.pause()
    print(f"--- sample at step {step} ---\n{prompt}{text}\n---", flush=True)

  def write_result(self, result: Mapping[str, Any]) -> None:
    """Writes result.json, whole or not at all."""
    if self._active:
      write_whole(self._workdir / "result.json", json.dumps(_plain_tree(result), indent=2) + "\n")

  def close(self) -> None:
    """Ends the progress bar and flushes every tracker."""
    if not self._active:
      return
    self._progress.close()
    for sink in self._sinks:
      sink.close()


class _JsonLines:
  """A file of JSON objects with a `step` each, which are appended."""

  def __init__(self, path: epath.Path, start_step: int):
    self._path = path
    before = path.read_text() if path.exists() else ""
    kept = _lines_until(path, before, start_step)
    text = "".join(kept)
    if text != before:
      write_whole(path, text)
    # A run that was killed after it had saved its step does again what comes after the save, such as the last
    # evaluation; what it had written of that is not written twice.
    self._already = {line for line in kept if json.loads(line)["step"] == start_step}
    # An object store cannot append, so there the whole text is kept and written again.
    self._text = None if is_local(path) else text

  def append(self, record: Mapping[str, Any]) -> None:
    line = json.dumps(record, allow_nan=False) + "\n"
    if line in self._already:
      return
    if self._text is None:
      with open(self._path, "a", encoding="utf-8") as f:
        f.write(line)
    else:
      self._text += line
      self._path.write_text(self._text)


def _lines_until(path: epath.Path, text: str, step: int) -> list[str]:
  """Returns the lines up to `step`; a last line that was cut short by a kill is left out."""
  kept = []
  for line in text.splitlines(keepends=True):
    if not line.endswith("\n"):
      break
    try:
      if json.loads(line)["step"] <= step:
        kept.append(line)
    except (ValueError, KeyError, TypeError) as e:
      raise UserError(f"{path} has a line that is not a JSON object with a step, {line.strip()[:80]!r}; mend or remove "
                      "the file, or choose another workdir.") from e
  return kept


def _plain(value: Any) -> int | float | None:
  """Turns a number of any library into Python's, and what is not finite into None."""
  if isinstance(value, numbers.Integral):
    return int(value)
  value = float(value)
  return value if math.isfinite(value) else None


def _plain_tree(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {name: _plain_tree(v) for name, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain_tree(v) for v in value]
  return value if value is None or isinstance(value, (str, bool)) else _plain(value)


def _summary(metrics: Mapping[str, float]) -> dict[str, str]:
  shown = {}
  if "loss" in metrics:
    shown["loss"] = f"{float(metrics['loss']):.3f}"
  if "tokens_per_second" in metrics:
    shown["tokens/s"] = f"{float(metrics['tokens_per_second']):,.0f}"
  if metrics.get("mfu") is not None:
    shown["MFU"] = f"{float(metrics['mfu']):.1%}"
  return shown


def _evaluation_lines(step: int, metrics: Mapping[str, float | None]) -> list[str]:
  """Returns a line a set, such as `step 50  validation: loss 2.799  bits per byte 4.039`."""
  sets = {}
  for name, value in metrics.items():
    set_name, _, metric = name.rpartition("/")
    if set_name:
      shown = "not finite" if value is None else f"{value:.3f}"
      sets.setdefault(set_name, []).append(f"{metric.replace('_', ' ')} {shown}")
  return [f"step {step}  {set_name}: {'  '.join(words)}" for set_name, words in sets.items()]


def _open_progress(start_step: int, num_steps: int) -> "_Bar | _PlainLines":
  return _Bar(start_step, num_steps) if sys.stderr.isatty() else _PlainLines(start_step, num_steps)


class _Bar:
  """tqdm's bar on a terminal."""

  def __init__(self, start_step: int, num_steps: int):
    import tqdm
    self._bar = tqdm.tqdm(initial=start_step, total=num_steps, unit="step", dynamic_ncols=True, file=sys.stderr)

  def show(self, step: int, summary: Mapping[str, str]) -> None:
    if summary:
      self._bar.set_postfix(summary, refresh=False)
    self._bar.update(step - self._bar.n)
    if step == self._bar.total:
      self._bar.close()  # What follows may take long, and meanwhile the bar would stand as it was last drawn.

  def pause(self) -> None:
    self._bar.clear()

  def close(self) -> None:
    self._bar.close()


class _PlainLines:
  """A line now and then, where the output is a file."""

  def __init__(self, start_step: int, num_steps: int):
    self._start_step, self._num_steps = start_step, num_steps
    self._start_time = time.monotonic()
    self._shown = _NUM_PLAIN_LINES * start_step // num_steps

  def show(self, step: int, summary: Mapping[str, str]) -> None:
    part = _NUM_PLAIN_LINES * step // self._num_steps
    if part <= self._shown:
      return
    self._shown = part
    # The first steps include compilation, so the estimate falls as the run goes on.
    remaining = (time.monotonic() - self._start_time) / (step - self._start_step) * (self._num_steps - step)
    words = [f"step {step}/{self._num_steps} ({step / self._num_steps:.0%})"]
    words += [f"{name} {value}" for name, value in summary.items()]
    words += [f"{_clock(remaining)} left"] if step < self._num_steps else []
    print("  ".join(words), file=sys.stderr, flush=True)

  def pause(self) -> None:
    pass

  def close(self) -> None:
    pass


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _open_sinks(workdir: epath.Path, config: Config, start_step: int) -> list:
  tracking = config.tracking
  sinks = []
  if tracking.tensorboard:
    sinks.append(_TensorBoard(workdir, start_step))
  for name, project in (("wandb", tracking.wandb_project), ("trackio", tracking.trackio_project)):
    if project is not None:
      sinks.append(_Hosted(name, project, config, _run_id(workdir, start_step)))
  return sinks


def _run_id(workdir: epath.Path, start_step: int) -> str:
  """Returns the name under which hosted trackers know this run: kept when it goes on, new when it starts afresh."""
  path = workdir / "run_id.txt"
  if start_step == 0 or not path.exists():
    write_whole(path, f"{workdir.name}-{secrets.token_hex(4)}\n")
  return path.read_text().strip()


class _TensorBoard:
  """Scalars and texts as TensorBoard events."""

  def __init__(self, workdir: epath.Path, start_step: int):
    # tensorboardX imports torch where that is installed, which takes seconds; meanwhile the first step is compiled.
    self._opening = concurrent.futures.ThreadPoolExecutor(1).submit(_summary_writer, workdir, start_step)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
      self._writer.add_scalar(name, value, step)

  def write_text(self, step: int, name: str, text: str) -> None:
    indented = "\n".join("    " + line for line in text.splitlines())  # Markdown's code block.
    self._writer.add_text(name, indented, step)

  def close(self) -> None:
    self._writer.close()

  @property
  def _writer(self) -> Any:
    return self._opening.result()


def _summary_writer(workdir: epath.Path, start_step: int) -> Any:
  import tensorboardX
  # purge_step hides what a stopped run recorded after the step this one goes on from.
  return tensorboardX.SummaryWriter(os.fspath(workdir), purge_step=start_step + 1, flush_secs=30)


class _Hosted:
  """Weights & Biases or trackio, which share the calls used here."""

  def __init__(self, name: str, project: str, config: Config, run_id: str):
    try:
      module = importlib.import_module(name)
    except ImportError as e:
      raise UserError(f"config.tracking.{name}_project is set, but {name} is not installed; pip install "
                      "'lmjax[tracking]', or set it to None.") from e
    # W&B knows a run that goes on by its id, trackio by its name. Runs that train together are open side by side, which
    # W&B has to be told; trackio ends one when the next begins (see sweeps/stacking.py).
    own = {"id": run_id, "reinit": "create_new"} if name == "wandb" else {}
    self._run = module.init(project=project, name=run_id, config=dataclasses.asdict(config), resume="allow", **own)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    self._run.log(dict(metrics), step=step)

  def write_text(self, step: int, name: str, text: str) -> None:
    pass  # Samples are in samples.jsonl.

  def close(self) -> None:
    self._run.finish()
