"""Tests of the page of a sweep, on real boards whose runs were written by hand."""

import dataclasses
from html import unescape
import html.parser
import json
import math
import re
import shlex
import xml.etree.ElementTree

import numpy as np
import pytest

from lmjax import report
from lmjax.config import UserError
from lmjax.records import read_lines
from lmjax.report import trial_pictures, trials
from lmjax.report.sweep import page, read_sweep
from lmjax.sweeps import Sweep, chain, grid, log_uniform, product, values
from lmjax.sweeps.board import Board
from lmjax.sweeps.sweep import resolve
from tests.report.browser import needs_chromium, opened
from tests.report.sweeps import TRAIN, loss_of, make_sweep, write_run

RATE, WIDTH, BATCH = "optim.learning_rate", "model.embed_dim", "train.batch_size"
GRID = grid({RATE: [3e-3, 1e-2, 3e-2], WIDTH: [32, 64, 128]})


class Page(html.parser.HTMLParser):
  """Finds tables by class, figures, and tags that do not match."""

  def __init__(self, text):
    super().__init__()
    self.stack, self.rows, self.ids, self.titles, self.svgs = [], {}, [], [], []
    self.svgs = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    self._table, self._cell = None, None
    self.feed(text)
    assert self.stack == []

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.ids += [attrs["id"]] if "id" in attrs else []
    if tag in ("meta", "link", "br"):
      return
    self.stack.append(tag)
    if tag == "table":
      self._table = self.rows.setdefault(attrs.get("class", ""), [])
    elif tag == "tr":
      self._table.append([])
    elif tag in ("td", "th"):
      self._table[-1].append("")

  def handle_startendtag(self, tag, attrs):
    self.ids += [value for name, value in attrs if name == "id"]

  def handle_endtag(self, tag):
    assert self.stack.pop() == tag

  def handle_data(self, data):
    if "td" in self.stack or "th" in self.stack:
      self._table[-1][-1] += data
    if self.stack and self.stack[-1] == "figcaption":
      self.titles.append(data)


@pytest.fixture(scope="module")
def grid_page(tmp_path_factory):
  """Returns (folder, text) of the report of a grid whose largest rate diverges at the largest width."""
  folder = tmp_path_factory.mktemp("report") / "grid"
  make_sweep(folder, GRID, lambda s: None if s[RATE] * s[WIDTH] > 3 else loss_of(s))
  return folder, report.write_report(folder).read_text()


def test_the_table_has_every_trial_best_first(grid_page):
  folder, text = grid_page
  head, *rows = Page(text).rows["trials"]
  assert head == ["trial", "state", "eval_loss", "learning_rate", "embed_dim", "parameters", "tokens", "FLOPs",
                  "device time", "command"]
  found = [float(row[2]) for row in rows[:-1]]
  assert found == sorted(found) and len(rows) == 9
  assert found[0] == pytest.approx(min(loss_of({RATE: r, WIDTH: w}) for r in (3e-3, 1e-2, 3e-2)
                                       for w in (32, 64, 128)), abs=1e-4)
  assert rows[-1][1:5] == ["diverged", "–", "0.03", "128"]
  assert rows[0][5:9] == ["197 K", "20 K", "2.36e10", "20.0 s"]
  # What scripts sort by are the numbers themselves.
  assert f'data-value="{loss_of({RATE: 3e-3, WIDTH: 128})!r}"' in text


def test_every_trial_has_the_command_that_makes_it(grid_page):
  folder, text = grid_page
  commands = [shlex.split(unescape(code)) for code in re.findall(r"<code>(.*?)</code>", text)]
  best, *rows = commands
  assert best[:3] == list(TRAIN) and best == rows[0] and len(rows) == 9 + 1  # The one that failed is there twice.
  settings = {tuple(sorted(argv[3:5])) for argv in rows}
  assert settings == {(f"--config.{WIDTH}={w}", f"--config.{RATE}={r}") for w in (32, 64, 128)
                      for r in (3e-3, 1e-2, 3e-2)}
  assert {argv[5] for argv in rows} == {f"--workdir={folder}/trials/{i:03}" for i in range(9)}


def test_what_has_no_result_says_why(grid_page):
  rows = Page(grid_page[1]).rows["left failures"]
  assert len(rows) == 2 and rows[1][1:4] == ["diverged", "The loss is not finite at step 7.",
                                             f"{RATE} = 0.03, {WIDTH} = 128"]


def test_the_top_sums_up(grid_page):
  tiles = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", grid_page[1]))
  assert tiles["of 9 trials"] == "8 complete, 1 diverged" and tiles["machine"] == "2 × TPU v5e"
  assert tiles["device time of all"] == "3.0 min" and tiles["tokens of all"] == "180 K"
  assert tiles["versions"] == "lmjax 0.1.0, jax 0.10.2, flax 0.12.8"
  assert "Has the largest that was tried of model.embed_dim 128" in grid_page[1]


def test_every_picture_is_xml_with_a_name_and_finds_its_trials(grid_page):
  shown = Page(grid_page[1])
  assert shown.titles == ["All settings at once", "eval_loss against learning rate, by embed_dim",
                          "Training loss, smoothed", "Evaluations: validation/loss", "Importance of settings"]
  assert len(shown.svgs) == 5 and len(shown.ids) == len(set(shown.ids))
  for svg, trial_count in zip(shown.svgs, (9, 8, 9, 9, 0)):
    root = xml.etree.ElementTree.fromstring(svg)
    assert root.get("role") == "img" and root.get("aria-label")
    assert len({part.get("data-trial") for part in root.iter() if part.get("data-trial")}) == trial_count
  # Nothing of what stands for a colour is left, and nothing is fetched.
  assert "#0102" not in grid_page[1] and "#0103" not in grid_page[1]
  assert set(re.findall(r"https?://[^\"' )]+", grid_page[1])) <= {"http://www.w3.org/2000/svg",
                                                                  "http://www.w3.org/1999/xlink"}
  assert not re.search(r"<(link|img|iframe)\b|<script src|@import|url\((?!#)", grid_page[1])


def test_a_law_that_the_runs_leave_open_is_told_in_a_sentence(grid_page):
  assert "No law can be fitted to these runs." in grid_page[1]
  assert "fewer than 3 different numbers of tokens" in grid_page[1]


def test_names_are_escaped(tmp_path):
  folder = tmp_path / "<b>&"
  make_sweep(folder, values("data.source", ["<script>alert(1)</script>", "$x_1$ & b", '"']),
             lambda s: "<i>disk</i>" if s["data.source"] == '"' else len(s["data.source"]), retries=0)
  text = report.write_report(folder).read_text()
  assert Page(text).stack == [] and "<script>alert" not in text and "<i>disk" not in text
  assert "<h1>&lt;b&gt;&amp;</h1>" in text and "ValueError: &lt;i&gt;disk&lt;/i&gt;" in text
  for svg in Page(text).svgs:
    xml.etree.ElementTree.fromstring(svg)


def test_a_sweep_under_way(tmp_path):
  make_sweep(tmp_path / "sweep", GRID, num_trials=2)
  sweep = resolve(Sweep(GRID))
  claim = Board(sweep, tmp_path / "sweep").take()
  write_run(claim.settings, claim.folder, 3.0, 1000, 100, status="running")
  text = report.write_report(tmp_path / "sweep").read_text()
  rows = Page(text).rows["trials"][1:]
  assert [row[1] for row in rows] == ["complete", "complete", "running step 20 of 20", *["waiting"] * 6]
  assert "Fewer than four trials" in text
  # A sweep that has only begun has a page, too.
  Board(sweep, tmp_path / "begun")
  text = report.write_report(tmp_path / "begun").read_text()
  assert "No trial is complete yet." in text and "No law can be fitted" in text and "<svg" not in text


def test_a_sweep_in_a_database(tmp_path):
  url = f"sqlite:///{tmp_path / 'trials.db'}"
  board = make_sweep(tmp_path / "sweep", values(BATCH, [1, 2]), lambda s: s[BATCH], storage=url)
  with pytest.raises(UserError, match="keeps its trials in a database; give its URL by --storage"):
    report.write_report(tmp_path / "sweep")
  assert len(Page(report.write_report(tmp_path / "sweep", url).read_text()).rows["trials"]) == 3
  board.write_record([{**vars(row), "command": ""} for row in board.best_first()])
  assert len(Page(report.write_report(tmp_path / "sweep").read_text()).rows["trials"]) == 3
  with pytest.raises(UserError, match="holds no study sweep-"):
    report.write_report(tmp_path / "sweep", f"sqlite:///{tmp_path / 'other.db'}")


def test_the_best_of_each_rate_is_a_mean_over_seeds(tmp_path):
  make_sweep(tmp_path / "sweep", grid({RATE: [1e-3, 1e-2], "seed": [0, 1]}),
             lambda s: {(1e-3, 0): 2.0, (1e-3, 1): 4.0, (1e-2, 0): 2.5, (1e-2, 1): 2.7}[s[RATE], s["seed"]])
  sweep = read_sweep(tmp_path / "sweep")
  value, group = trials.best_of(sweep.trials, "min")
  assert value == 2.6 and {trial.row.settings[RATE] for trial in group} == {1e-2}
  assert trials.best_of(sweep.trials, "max")[0] == 3.0
  assert "best at 0.01" in page(sweep)


def test_importance_is_of_what_matters(grid_page):
  method, shares = trials.importance(read_sweep(grid_page[0]).trials)
  assert method == "functional ANOVA" and sum(shares.values()) == pytest.approx(1)
  assert set(shares) == {RATE, WIDTH} and shares[RATE] > shares[WIDTH]


def test_runs_that_trained_together_share_their_time(grid_page):
  trial = read_sweep(grid_page[0]).trials[0]
  together = dataclasses.replace(trial, result={**trial.result, "num_together": 4})
  assert trial.seconds == 20.0 and together.seconds == 5.0


def test_only_some_of_many_curves_are_drawn(tmp_path):
  make_sweep(tmp_path / "sweep", values("seed", list(range(64))), lambda s: 2 + s["seed"] / 100)
  sweep = read_sweep(tmp_path / "sweep")
  shown = trial_pictures._some(sweep.trials, trial_pictures.ranks(sweep.trials, "min"))
  assert [trial.number for trial in shown[:30]] == list(range(30)) and len(shown) == 60
  assert shown[-1].number == 63
  assert "60 of 64 trials: the best 30" in trial_pictures.curves(sweep.trials, "eval_loss", "min")[0]


def test_of_a_long_run_a_part_is_read(tmp_path):
  lines = [{"step": i, "loss": 1.0, **({"validation/loss": 2.0} if i == 777 else {})} for i in range(1, 5001)]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  steps = [record["step"] for record in read_lines(tmp_path / "metrics.jsonl", 100)]
  assert len(steps) < 110 and steps[0] == 1 and steps[-1] == 5000 and 777 in steps


IN_THE_BROWSER = """
const heads = [...document.querySelectorAll(".trials thead button")];
const column = i => [...document.querySelectorAll(".trials tbody tr")].map(row => row.cells[i].dataset.value);
const press = name => heads.find(head => head.textContent === name).click();
found.orders = [];
for (const name of ["trial", "learning_rate", "learning_rate", "eval_loss", "eval_loss"]) {
  press(name);
  const at = heads.findIndex(head => head.textContent === name);
  found.orders.push([name, heads[at].parentElement.getAttribute("aria-sort"), column(at)]);
}
const over = element => element.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
over(document.querySelector("figure svg [data-trial='4'] path"));
found.lit = [...document.querySelectorAll(".lit")].map(part => part.dataset.trial);
found.told = document.getElementById("told").textContent;
over(document.querySelector("h1"));
found.left = document.querySelectorAll(".lit").length;
found.wide = document.documentElement.scrollWidth <= innerWidth;
"""


@needs_chromium
def test_in_a_browser_all_is_drawn_sorted_and_found(grid_page, tmp_path):
  found = opened(grid_page[1], tmp_path, IN_THE_BROWSER)
  assert found["errors"] == [] and found["drawn"] == [True] * 5 and found["wide"]
  rates = sorted([0.003, 0.01, 0.03] * 3)
  orders = [(name, way, [float(value) if value else None for value in column]) for name, way, column in found["orders"]]
  assert orders[0] == ("trial", "ascending", list(range(9)))
  assert orders[1] == ("learning_rate", "ascending", rates)
  assert orders[2] == ("learning_rate", "descending", rates[::-1])
  for _, way, column in orders[3:]:  # What has no value is last, whichever way.
    assert column[-1] is None and column[:-1] == sorted(column[:-1], reverse=way == "descending")
  # In the table, and in the pictures of settings, rates, training and evaluations.
  assert found["lit"] == ["4"] * 5 and found["left"] == 0
  assert found["told"].startswith("trial 4, complete, 2.") and "model.embed_dim = 64" in found["told"]


SIZES, TOKENS = [64, 96, 128, 192, 256], [2e6, 4e6, 8e6, 16e6]


def law(settings, noise=0.001):
  size, tokens = 48 * settings[WIDTH] ** 2, settings["train.num_tokens"]
  wiggle = noise * math.sin(1e3 * settings[WIDTH] + tokens)
  return (1.69 + 406.4 / size ** 0.34 + 410.7 / tokens ** 0.28) * math.exp(wiggle)


def test_the_law_foretells_the_next_size_by_the_best_of_each(tmp_path):
  space = grid({WIDTH: SIZES, "train.num_tokens": TOKENS, RATE: [1e-3, 1e-2]})
  make_sweep(tmp_path / "sweep", space, lambda s: law(s) + (s[RATE] > 5e-3), size=lambda s: 48 * s[WIDTH] ** 2,
             tokens=lambda s: s["train.num_tokens"])
  text = report.write_report(tmp_path / "sweep").read_text()
  assert "By 20 runs, the best of each size and number of tokens" in text
  loss, low, high = map(float, re.search(r"<b>([\d.]+)</b> \(([\d.]+) to ([\d.]+)\)", text).groups())
  flops = 8 * 6 * 48 * 256 ** 2 * 16e6
  size = np.geomspace(1e6, 1e9, 4000)
  truth = (1.69 + 406.4 / size ** 0.34 + 410.7 / (flops / 6 / size) ** 0.28).min()
  assert low < truth < high and loss == pytest.approx(truth, rel=0.01)
  assert "Loss against compute" in Page(text).titles


def test_isoflop_curves_are_drawn_where_runs_share_a_compute(tmp_path):
  best = lambda flops: (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62) * (flops / 6) ** (0.28 / 0.62)
  widths = lambda flops: [round((best(flops) * factor / 48) ** 0.5) for factor in (0.25, 0.5, 1, 2, 4)]
  points = [{WIDTH: w, "train.num_tokens": c / (6 * 48 * w ** 2)} for c in (1e14, 3e14, 1e15) for w in widths(c)]
  space = chain(*(product(*(values(field, [value]) for field, value in point.items())) for point in points))
  make_sweep(tmp_path / "sweep", space, law, size=lambda s: 48 * s[WIDTH] ** 2, tokens=lambda s: s["train.num_tokens"])
  text = report.write_report(tmp_path / "sweep").read_text()
  assert "IsoFLOP curves" in Page(text).titles
  assert float(re.search(r"N = \S+ C\^([\d.]+)", text)[1]) == pytest.approx(0.28 / 0.62, abs=0.01)


@pytest.mark.slow
def test_five_hundred_trials_make_a_page_that_can_be_used(tmp_path):
  space = product(log_uniform(RATE, 1e-4, 1e-1), grid({WIDTH: [32, 64, 128], "optim.name": ["adamw", "muon"]}))
  make_sweep(tmp_path / "sweep", space, lambda s: None if s[RATE] > 5e-2 else loss_of(s), driver="random",
             num_trials=500, num_steps=400)
  path = report.write_report(tmp_path / "sweep")
  assert path.stat().length < 5e6 and len(Page(path.read_text()).rows["trials"]) == 501


@pytest.mark.parametrize("break_it, message", [
    (lambda folder: (folder / "sweep.json").write_text("{"), "sweep.json is not as a sweep writes it"),
    (lambda folder: (folder / "optuna.journal").unlink(), "has no optuna.journal"),
    (lambda folder: (folder / "trials/000/result.json").write_text("{"), "result.json is not JSON"),
    (lambda folder: (folder / "trials/000/metrics.jsonl").write_text("x\n"), "line 1, is not a JSON object")])
def test_what_is_broken_is_told_in_a_sentence(tmp_path, break_it, message):
  make_sweep(tmp_path / "sweep", values(BATCH, [1, 2]), lambda s: s[BATCH])
  break_it(tmp_path / "sweep")
  with pytest.raises(UserError, match=message):
    report.write_report(tmp_path / "sweep")
  assert not (tmp_path / "sweep" / "report.html").exists()
