"""Tests of the page of a run, on run folders written by hand and in a real browser."""

import html.parser
import json
import re

import numpy as np
import pytest

from lmjax import config as config_lib
from lmjax import report
from lmjax.config import Config, OptimConfig, TrainConfig, UserError
from lmjax.report import pictures
from lmjax.report.run import read_run
from tests.report.browser import needs_chromium, opened


def make_run(path, num_steps=60, *, finished=True, evaluations=True):
  path.mkdir()
  config = Config(train=TrainConfig(num_steps=num_steps), optim=OptimConfig(learning_rate=3e-3))
  (path / "config.json").write_text(config_lib.to_json(config))
  with open(path / "metrics.jsonl", "w") as f:
    for step in range(1, num_steps + 1):
      f.write(json.dumps({
          "step": step, "loss": 2 + 4 / step, "learning_rate": 3e-3, "grad_norm": 1 / step, "num_tokens": 512 * step,
          "train_flops": 1e9 * step, "tokens_per_second": 1000.0}) + "\n")
      if evaluations and step % 20 == 0:
        f.write(json.dumps({"step": step, "validation/loss": 3.25, "validation/bits_per_byte": 1.875}) + "\n")
  (path / "samples.jsonl").write_text(json.dumps({"step": num_steps, "prompt": "def ", "text": "<b>f</b> & g"}) + "\n")
  if finished:
    (path / "result.json").write_text(json.dumps({
        "status": "finished", "num_params": 12345678, "num_tokens": 30720, "train_flops": 6e10, "train_loss": 2.0625,
        "eval_loss": 3.25, "bits_per_byte": 1.875, "tokens_per_second": 1234.5, "mfu": None, "device_kind": "cpu"}))
  return path


def tiles(page):
  return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))


def titles(page):
  return re.findall(r"<figcaption>(.*?)</figcaption>", page)


def test_a_finished_run(tmp_path):
  path = report.write_report(make_run(tmp_path / "run"))
  assert path == tmp_path / "run" / "report.html"
  page = path.read_text()
  assert tiles(page) == {
      "status": "finished", "training loss": "2.0625", "evaluation loss": "3.2500", "bits per byte": "1.8750",
      "parameters": "12.3 M", "tokens seen": "30.7 K", "training FLOPs": "6.00e10", "tokens a second": "1,234",
      "MFU": "unknown"}
  assert titles(page) == ["Loss", "Loss against tokens", "Loss against training FLOPs", "Learning rate",
                          "Gradient norm", "Tokens a second"]
  assert page.count("<svg") == 6
  assert "<th>loss</th><th>bits per byte</th></tr><tr><th>validation</th><td>3.2500</td><td>1.8750</td></tr>" in page
  assert not (tmp_path / "run" / "report.html.tmp").exists()


def test_where_the_time_went_and_who_was_slow(tmp_path):
  workdir = make_run(tmp_path / "run", finished=False)
  before = report.write_report(workdir).read_text()
  assert "Where the time went" not in before and "kept their devices waiting" not in before
  with open(workdir / "metrics.jsonl", "a") as f:
    for step, process, seconds in ((61, 3, 0.2), (62, 1, 0.5), (63, 3, 0.4), (64, 3, 0.6)):
      f.write(json.dumps({"step": step, "seconds_start": 10.0, "seconds_data": 5.0, "seconds_step": step - 4.0,
                          "seconds_evaluation": 15.0, "seconds_saving": 0.0, "seconds_other": 10.0,
                          "slowest_process": process, "slowest_host_seconds": seconds,
                          "median_host_seconds": 0.1}) + "\n")
  page = report.write_report(workdir).read_text()
  assert "steps</th><td>60.0 s</td><td>60.0%</td>" in page and "evaluation</th><td>15.0 s</td><td>15.0%</td>" in page
  assert "<th>since the first start</th><td>100.0 s</td>" in page
  assert "<th>process 3</th><td>75%</td><td>0.4 s</td>" in page and "<th>process 1</th><td>25%</td>" in page
  (workdir / "result.json").write_text(json.dumps({
      "status": "finished", "seconds_start": 10.0, "seconds_data": 5.0, "seconds_step": 185.0,
      "seconds_evaluation": 0.0, "seconds_saving": 0.0, "seconds_other": 0.0}))
  assert "steps</th><td>185.0 s</td><td>92.5%</td>" in report.write_report(workdir).read_text()


def test_the_page_needs_nothing_else(tmp_path):
  page = report.write_report(make_run(tmp_path / "run")).read_text()
  # Names of XML namespaces are the only addresses; nobody fetches them.
  assert set(re.findall(r"https?://[^\"' )]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
  assert not re.search(r"<(script|link|img|iframe)\b|@import|url\((?!#)", page)


def test_tags_are_balanced_and_ids_unique(tmp_path):
  page = report.write_report(make_run(tmp_path / "run")).read_text()
  stack, ids = [], []

  class Parser(html.parser.HTMLParser):
    def handle_starttag(self, tag, attrs):
      ids.extend(value for name, value in attrs if name == "id")
      if tag not in ("meta",):
        stack.append(tag)

    def handle_startendtag(self, tag, attrs):
      ids.extend(value for name, value in attrs if name == "id")

    def handle_endtag(self, tag):
      assert stack.pop() == tag

  Parser().feed(page)
  assert stack == []
  assert ids and len(ids) == len(set(ids))


def test_what_the_run_wrote_is_escaped(tmp_path):
  run = make_run(tmp_path / "a <b> & c")
  config = json.loads((run / "config.json").read_text())
  config["data"]["source"] = "<script>alert(1)</script>"
  (run / "config.json").write_text(json.dumps(config))
  page = report.write_report(run).read_text()
  assert "<h1>a &lt;b&gt; &amp; c</h1>" in page
  assert "<b>def </b>&lt;b&gt;f&lt;/b&gt; &amp; g" in page
  assert "<script>" not in page and "&lt;script&gt;alert(1)" in page


def test_settings_that_differ_are_marked(tmp_path):
  page = report.write_report(make_run(tmp_path / "run")).read_text()
  changed = re.findall(r'<tr class=changed><th>(.*?)</th><td>(.*?)</td>', page)
  assert changed == [("optim.learning_rate", "0.003 <i>default 0.001</i>"),
                     ("train.num_steps", "60 <i>default null</i>")]
  assert "Config: 2 of " in page


def test_a_run_still_going(tmp_path):
  run = make_run(tmp_path / "run", finished=False)
  config = json.loads((run / "config.json").read_text())
  config["train"]["num_steps"] = 1000
  (run / "config.json").write_text(json.dumps(config))
  with open(run / "metrics.jsonl", "a") as f:
    f.write('{"step": 61, "los')
  shown = tiles(report.write_report(run).read_text())
  assert shown["status"] == "step 60 of 1,000, no result yet"
  assert shown["training loss"] == "2.0667" and shown["bits per byte"] == "1.8750" and shown["parameters"] == "–"


def test_a_single_point_and_nothing_else(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.5}\n')
  page = report.write_report(tmp_path).read_text()
  assert titles(page) == ["Loss"] and tiles(page)["status"] == "step 1, no result yet"


def test_values_that_are_not_finite_are_left_out(tmp_path):
  (tmp_path / "metrics.jsonl").write_text(
      '{"step": 1, "loss": 3.5, "grad_norm": null}\n{"step": 2, "loss": null, "grad_norm": null}\n')
  page = report.write_report(tmp_path).read_text()
  assert titles(page) == ["Loss"] and tiles(page)["training loss"] == "–"


def test_a_gradient_norm_of_zero_is_drawn(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "grad_norm": 0.0}\n{"step": 2, "grad_norm": 1.0}\n')
  assert titles(report.write_report(tmp_path).read_text()) == ["Gradient norm"]


def test_the_later_line_of_a_step_counts(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 9}\n{"step": 2, "loss": 2}\n')
  steps, values = read_run(tmp_path).curves["loss"]
  assert steps.tolist() == [1, 2] and values.tolist() == [3, 2]


def test_a_long_run_stays_small_and_keeps_its_spike(tmp_path):
  y = np.ones(100_000)
  y[54_321] = 7.0
  kept = pictures.thinned(y)
  assert len(kept) <= 800 and 54_321 in kept
  with open(tmp_path / "metrics.jsonl", "w") as f:
    for step in range(1, 20_001):
      f.write(f'{{"step": {step}, "loss": {2 + (step % 7) / 10}}}\n')
  assert report.write_report(tmp_path).stat().length < 100_000


def test_smoothing_keeps_the_length_the_start_and_a_line():
  assert pictures.smoothed(np.array([5.0])).tolist() == [5.0]
  line = np.arange(1000.0)
  smooth = pictures.smoothed(line)
  assert smooth[:4].tolist() == [0, 1, 2, 3]
  np.testing.assert_allclose(smooth[:990], line[:990])


@pytest.mark.parametrize("make, message", [
    (lambda path: None, "There is no folder"),
    (lambda path: path.mkdir(), "has no metrics.jsonl"),
    (lambda path: (path.mkdir(), (path / "metrics.jsonl").write_text("")), "no metrics yet"),
    (lambda path: (path.mkdir(), (path / "metrics.jsonl").write_text('{"step": 1}\nx\n')), "line 2, is not a JSON"),
    (lambda path: (make_run(path), (path / "config.json").write_text("{")), "config.json is not JSON"),
])
def test_what_is_no_run_is_told_in_a_sentence(tmp_path, make, message):
  make(tmp_path / "run")
  with pytest.raises(UserError, match=message):
    report.write_report(tmp_path / "run")
  assert not (tmp_path / "run" / "report.html").exists()


@needs_chromium
def test_a_browser_draws_every_picture(tmp_path):
  page = report.write_report(make_run(tmp_path / "run")).read_text()
  assert opened(page, tmp_path)["drawn"] == [True] * 6
