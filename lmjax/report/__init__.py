"""Draws a run, or a sweep, as one HTML page that needs nothing else: no network, no other file.

It reads what runs and sweeps have written, so it works on any machine and for those that are still going. The pictures
are SVG inside the page, and their colours follow the reader's light or dark mode.
"""

from etils import epath

from lmjax.config_checks import UserError
from lmjax.workdir import write_whole

_SWEEP = "sweep.json"  # What tells the folder of a sweep from that of a run.


def write_report(workdir: epath.PathLike, storage: str | None = None) -> epath.Path:
  """Writes report.html into the workdir of a run or a sweep.

  Args:
    workdir: folder of either, or object-store URL of a run.
    storage: URL of the database that keeps a sweep's trials, where one does.

  Returns:
    The path of the page.

  Raises:
    UserError: where there is neither, or nothing has been logged yet.
  """
  workdir = epath.Path(workdir)
  if not workdir.is_dir():
    raise UserError(f"There is no folder {workdir}; give the --workdir of a run or a sweep.")
  if (workdir / _SWEEP).exists():
    from lmjax.report import sweep
    text = sweep.page(sweep.read_sweep(workdir, storage))
  else:
    from lmjax.report import run
    text = run.page(run.read_run(workdir))
  path = workdir / "report.html"
  write_whole(path, text)
  return path
