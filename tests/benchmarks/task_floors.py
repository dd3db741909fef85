"""What the standard library's labelled tasks give without a model: the floors that training has to pass.

    python tests/benchmarks/task_floors.py

Each floor is computed from train and measured on validation. Docstrings: bits per byte of the summaries, each followed
by an end symbol that counts in the bits but not in the bytes, under a character 5-gram model interpolated as by Witten
and Bell (1991), and chrF (Popovic 2015) of answers made without reading the code. Packages and identifiers: accuracy.
Answers: exact match and F1 after the normalisation of SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250; for questions
without answer 2018, arXiv 1806.03822).
"""

import collections
import math
import re
import string
import time

from lmjax.data.stdlib_tasks import STDLIB_TASKS, stdlib_records

ORDER = 5
END = "\n"


def main() -> None:
  for name in STDLIB_TASKS:
    begun = time.perf_counter()
    train, validation = (stdlib_records(name, split) for split in ("train", "validation"))
    seconds = time.perf_counter() - begun
    print(f"{name}: {len(train)} train, {len(validation)} validation, built in {seconds:.1f} s")
    for floor, value in FLOORS[name](train, validation):
      print(f"  {floor}: {value:.4f}")


def docstrings(train, validation):
  from sacrebleu import corpus_chrf
  contexts = counted_contexts(record["summary"] for record in train)
  alphabet = 1 + len({char for split in (train, validation) for record in split for char in record["summary"]})
  summaries = [record["summary"] for record in validation]
  bits = sum(bits_of(text, contexts, alphabet) for text in summaries)
  yield f"bits per byte, {ORDER}-gram", bits / sum(len(text.encode()) for text in summaries)
  common = most_common(record["summary"] for record in train)
  yield f"chrF of {common!r}", corpus_chrf([common] * len(summaries), [summaries]).score
  yield "chrF of the function's name", corpus_chrf(
      [words_of(record["name"]) for record in validation], [summaries]).score


def counted_contexts(texts):
  """Counts what follows each context of 0 to ORDER - 1 characters; the beginning is padded with ends."""
  contexts = collections.defaultdict(collections.Counter)
  for text in texts:
    padded = END * (ORDER - 1) + text + END
    for place in range(ORDER - 1, len(padded)):
      for length in range(ORDER):
        contexts[padded[place - length:place]][padded[place]] += 1
  return contexts


def bits_of(text, contexts, alphabet):
  padded, bits = END * (ORDER - 1) + text + END, 0.0
  for place in range(ORDER - 1, len(padded)):
    probability = 1 / alphabet
    for length in range(ORDER):
      following = contexts.get(padded[place - length:place])
      if following:
        # Witten-Bell: a context that was followed by T different characters leaves T / (N + T) to the shorter one.
        kinds, total = len(following), following.total()
        probability = (following[padded[place]] + kinds * probability) / (total + kinds)
    bits -= math.log2(probability)
  return bits


def words_of(name):
  """Splits the last part of a qualified name: `read_HTMLPage` becomes `read html page`."""
  parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]+", name.rpartition(".")[2])
  return " ".join(parts).lower()


def packages(train, validation):
  from sklearn.feature_extraction.text import CountVectorizer
  from sklearn.naive_bayes import MultinomialNB
  labels, truth = ([record["package"] for record in split] for split in (train, validation))
  yield "accuracy, majority", accuracy([most_common(labels)] * len(truth), truth)
  vectorizer = CountVectorizer()
  model = MultinomialNB().fit(vectorizer.fit_transform(record["text"] for record in train), labels)
  yield "accuracy, naive Bayes on words", accuracy(
      model.predict(vectorizer.transform(record["text"] for record in validation)), truth)


def identifiers(train, validation):
  by_token = collections.defaultdict(collections.Counter)
  for record in train:
    for token, kind in zip(record["tokens"], record["kinds"]):
      by_token[token][kind] += 1
  total = sum(by_token.values(), collections.Counter())
  majority = most_common(total)
  tokens, truth = ([item for record in validation for item in record[field]] for field in ("tokens", "kinds"))
  yield f"accuracy, majority ({majority})", accuracy([majority] * len(truth), truth)
  yield "accuracy, most frequent kind of each token", accuracy(
      [most_common(by_token.get(token, total)) for token in tokens], truth)


def answers(train, validation):
  by_question = collections.defaultdict(collections.Counter)
  for record in train:
    by_question[record["question"]]["".join(record["answers"])] += 1
  usual = {question: most_common(counts) for question, counts in by_question.items()}
  for name, known in (("no answer", {}), ("the most frequent answer to the question", usual)):
    pairs = [(normalised(known.get(record["question"], "")), normalised("".join(record["answers"])))
             for record in validation]
    yield f"exact match, always {name}", sum(given == truth for given, truth in pairs) / len(pairs)
    yield f"F1, always {name}", sum(f1(given.split(), truth.split()) for given, truth in pairs) / len(pairs)


def normalised(text):
  text = "".join(char for char in text.lower() if char not in string.punctuation)
  return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(given, truth):
  shared = (collections.Counter(given) & collections.Counter(truth)).total()
  return 2 * shared / (len(given) + len(truth)) if given and truth else float(given == truth)


def most_common(items):
  """Returns the most frequent of some items, or of what a Counter counted."""
  return collections.Counter(items).most_common(1)[0][0]


def accuracy(given, truth):
  return sum(a == b for a, b in zip(given, truth)) / len(truth)


FLOORS = {"docstrings": docstrings, "packages": packages, "identifiers": identifiers, "answers": answers}

if __name__ == "__main__":
  main()
