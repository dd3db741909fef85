"""What doing nothing clever reaches on the offline tasks: figures to hold a model's against.

  python tests/benchmarks/task_floors.py

Everything is learned from the training records and measured on the held-out ones.
"""

import collections
import math
import re

from lmjax import scores
from lmjax.data.stdlib_tasks import stdlib_records

_ORDER = 5


def both(task):
  return stdlib_records(task, "train"), stdlib_records(task, "validation")


def most_common(values):
  return collections.Counter(values).most_common(1)[0][0]


def packages():
  """The most frequent package, and naive Bayes on words."""
  from sklearn.feature_extraction.text import CountVectorizer
  from sklearn.naive_bayes import MultinomialNB
  train, held_out = both("packages")
  labels = [record["package"] for record in held_out]
  majority = most_common(record["package"] for record in train)
  words = CountVectorizer(token_pattern=r"\w+")
  model = MultinomialNB().fit(words.fit_transform([record["text"] for record in train]),
                              [record["package"] for record in train])
  guessed = model.predict(words.transform([record["text"] for record in held_out])).tolist()
  return {"majority": scores.scores(["accuracy", "f1_macro"], [majority] * len(labels), labels),
          "naive Bayes": scores.scores(["accuracy", "f1_macro"], guessed, labels)}


def identifiers():
  """The most frequent kind, and the most frequent kind of each token."""
  train, held_out = both("identifiers")
  kinds = collections.defaultdict(collections.Counter)
  for record in train:
    for token, kind in zip(record["tokens"], record["kinds"]):
      kinds[token][kind] += 1
  majority = most_common(kind for record in train for kind in record["kinds"])
  true = [kind for record in held_out for kind in record["kinds"]]
  names = most_common(kind for record in train for kind in record["kinds"] if kind != "operator")
  guessed = [kinds[token].most_common(1)[0][0] if token in kinds else names
             for record in held_out for token in record["tokens"]]
  return {"majority": scores.scores(["accuracy", "f1_macro"], [majority] * len(true), true),
          "kind of the token": scores.scores(["accuracy", "f1_macro"], guessed, true)}


def answers():
  """Always none, and the most frequent answer of each question."""
  train, held_out = both("answers")
  usual = collections.defaultdict(list)
  for record in train:
    usual[record["question"]].append((record["answers"] or [""])[0])
  usual = {question: most_common(given) for question, given in usual.items()}
  true = [record["answers"] for record in held_out]
  return {"none": scores.scores(["squad"], [""] * len(true), true),
          "usual answer": scores.scores(["squad"], [usual[record["question"]] for record in held_out], true)}


def docstrings():
  """A model of five characters, the most frequent summary, and the words of the function's name."""
  train, held_out = both("docstrings")
  true = [record["summary"] for record in held_out]
  usual = most_common(record["summary"] for record in train)
  words = [" ".join(re.findall(r"[A-Za-z][a-z]*|\d+", record["name"].rpartition(".")[2])) for record in held_out]
  return {f"{_ORDER} characters": {"bits_per_byte": bits_per_byte([record["summary"] for record in train], true)},
          "usual summary": scores.scores(["rouge", "chrf"], [usual] * len(true), true),
          "words of the name": scores.scores(["rouge", "chrf"], words, true)}


def bits_per_byte(train, held_out):
  """Returns the cost of texts and their ends under a Witten-Bell model of characters (Witten and Bell 1991)."""
  following = collections.defaultdict(collections.Counter)
  pad, end = "\x02" * (_ORDER - 1), "\x03"
  for text in train:
    text = pad + text + end
    for place in range(_ORDER - 1, len(text)):
      for length in range(_ORDER):
        following[text[place - length:place]][text[place]] += 1
  uniform = 1 / (len(following[""]) + 1)

  def probability(context, character):
    seen = following.get(context)
    shorter = probability(context[1:], character) if context else uniform
    if not seen:
      return shorter
    total, kinds = sum(seen.values()), len(seen)
    return (seen[character] + kinds * shorter) / (total + kinds)

  bits = 0.0
  for text in held_out:
    text = pad + text + end
    bits -= sum(math.log2(probability(text[place - _ORDER + 1:place], text[place]))
                for place in range(_ORDER - 1, len(text)))
  return bits / sum(len(text.encode()) for text in held_out)


if __name__ == "__main__":
  for task in (packages, identifiers, answers, docstrings):
    for floor, values in task().items():
      print(f"{task.__name__:<12} {floor:<18} " + "  ".join(f"{name} {value:.3f}" for name, value in values.items()))
