"""lmjax coordcheck: the numbers, the picture and the table of a small check, and a sentence for each mistake."""

import json

import pytest

MUP = ("--config.model.parametrization=mup", "--config.model.base_embed_dim=32")


def test_a_check_of_widths_and_depths(lmjax_command, debug, tmp_path):
  (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
  out = lmjax_command.succeed(
      "coordcheck", debug, "--workdir=check", "--config.data.source=text.txt",
      "--config.model.parametrization=completep",
      "--config.model.base_embed_dim=32", "--config.model.base_num_layers=2", "--config.data.seq_len=32",
      "--widths=32,64", "--depths=1,2", "--steps=2", "--seeds=2")
  assert "Change after 2 steps as a power of the width, over 32 to 64:" in out
  assert "Change after 2 steps as a power of the depth, over 1 to 2:" in out
  found = json.loads((tmp_path / "check" / "coordcheck.json").read_text())["found"]
  assert found.keys() == {"width", "depth"} and found["width"].keys() == {"completep", "standard"}
  query = {kind: one["activations"]["layers/attention/query"] for kind, one in found["width"].items()}
  # At the base both are the same; beyond it the standard one's change is larger.
  assert query["completep"]["change"][0] == query["standard"]["change"][0]
  assert query["completep"]["change"][1][-1] < query["standard"]["change"][1][-1]
  assert f"{query['standard']['slope']:+.3f} ± {query['standard']['slope_error']:.3f}" in out
  assert (tmp_path / "check" / "coordcheck.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags, told", [
    (("--widths=64",), "--widths has 64 alone, but a slope needs two sizes or more"),
    (("--widths=64,x",), "--widths is '64,x', but it must be whole numbers"),
    (("--widths=",), "--widths and --depths are both empty"),
    (("--steps=0",), "--steps is 0, but it must be at least 1"),
    (("--grow=width",), "--grow is 'width', but it must be heads or head_dim"),
])
def test_a_mistake_is_told_before_anything_is_made(flags, told, run_wrong, debug, tmp_path):
  status, _, line = run_wrong("coordcheck", debug, f"--workdir={tmp_path / 'check'}", *MUP, *flags)
  assert status == 2 and told in line and not (tmp_path / "check").exists()


def test_a_width_that_heads_do_not_divide(run_wrong, debug, tmp_path):
  (tmp_path / "text.txt").write_text("one two three four five\n" * 500)
  status, _, line = run_wrong("coordcheck", debug, f"--workdir={tmp_path / 'check'}", *MUP, "--widths=64,72",
                              f"--config.data.source={tmp_path / 'text.txt'}")
  assert status == 2 and "Width 72 would give config.model.num_heads = 4.5" in line
  assert not (tmp_path / "check").exists()


def test_a_model_that_training_breaks_is_told(run_wrong, debug, tmp_path):
  (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
  status, _, line = run_wrong(
      "coordcheck", debug, f"--workdir={tmp_path / 'check'}", f"--config.data.source={tmp_path / 'text.txt'}",
      "--config.data.seq_len=32", "--widths=32,64", "--steps=2", "--seeds=1", "--config.optim.learning_rate=1e30", *MUP)
  assert status == 2 and "of width 32 under mup are not finite at config.optim.learning_rate = 1e+30" in line
  assert not (tmp_path / "check" / "coordcheck.json").exists()
