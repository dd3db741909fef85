"""How fast a sweep's trials are taken to go."""

import json

from lmjax.sweeps import listing


def test_the_speed_of_a_worker_is_that_of_all_that_trained_together(tmp_path):
  result = {"status": "finished", "train_flops": 600.0, "num_tokens": 100, "tokens_per_second": 5.0}
  for number, more in enumerate(({}, {"num_together": 4}, {"num_together": 4, "tokens_per_second": 4.0})):
    folder = tmp_path / "trials" / str(number)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({**result, **more}))
  rate, source = listing._rate(str(tmp_path), None)
  assert rate == 6 * 16 and source == "the median of the sweep's finished trials"  # Of 30, 120 and 96.
