"""What the page of a sweep has beside that of a run: its style, and the script that sorts, finds and copies."""

STYLE = """
:root { --best: #0b5fa5; --worst: #f0b04a; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --best: #58b4ff; --worst: #a8641c; --bad: #ff8a80; } }
figure { min-width: 0; } figure p { margin: .3rem 0 0; color: var(--soft); font-size: .85rem; }
main > figure { margin-top: 1.8rem; overflow-x: auto; } main > figure svg { min-width: 640px; }
.charts > figure:only-child { max-width: 600px; }
.rank { display: inline-block; width: 5rem; height: .6rem; border-radius: 3px; vertical-align: baseline;
  background: linear-gradient(in oklab to right, var(--best), var(--worst)); }
.trials { white-space: nowrap; } .trials th, .trials td { vertical-align: top; }
.trials th button { all: unset; cursor: pointer; color: var(--soft); }
.trials th button:focus-visible, .copy:focus-visible { outline: 2px solid var(--series-0); outline-offset: 2px; }
.trials th[aria-sort=ascending] button::after { content: " \\25B2"; }
.trials th[aria-sort=descending] button::after { content: " \\25BC"; }
.trials thead th { position: sticky; top: 0; background: var(--page); } .trials td small { color: var(--soft); }
.state, .trials thead th:nth-child(2) { text-align: left; } .failed, .diverged { color: var(--bad); }
.trials details, .failures details { display: inline-block; margin: 0; vertical-align: top; text-align: left; }
.trials summary, .failures summary { font-weight: normal; color: var(--soft); }
.failures td, .failures th { vertical-align: top; text-align: left; } .failures .words { max-width: 26rem; }
code { font-size: .82rem; overflow-wrap: anywhere; white-space: normal; display: inline-block; max-width: 34rem; }
.command code { max-width: none; } .command { white-space: normal; }
.copy { font: inherit; font-size: .8rem; color: var(--ink); background: var(--tile); border: 1px solid var(--line);
  border-radius: 5px; padding: 0 .5rem; margin-right: .6rem; cursor: pointer; }
.warnings { color: var(--soft); }
tr.lit td, tr.lit th { background: var(--tile); }
svg [data-trial] { cursor: pointer; }
.finding svg [data-trial]:not(.lit) { opacity: .1; } .finding svg .lit path { stroke-width: 3 !important; }
#told { position: fixed; left: 0; right: 0; bottom: 0; padding: .5rem 1.5rem; background: var(--tile);
  border-top: 1px solid var(--line); font-size: .9rem; }
"""

SCRIPT = """
"use strict";
const told = document.getElementById("told");
const order = (a, b) => {
  if (a === "" || b === "") return (a === "") - (b === "");
  return isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
};
for (const button of document.querySelectorAll(".trials thead button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, column = head.cellIndex, body = head.closest("table").tBodies[0];
    const turned = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", turned ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.value;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      return order(x, y) * (turned && x !== "" && y !== "" ? -1 : 1);
    });
    body.append(...rows);
  });
}
let kept = null;
const find = trial => {
  for (const old of document.querySelectorAll(".lit")) old.classList.remove("lit");
  document.body.classList.toggle("finding", trial !== null);
  told.hidden = trial === null;
  if (trial === null) return;
  for (const part of document.querySelectorAll(`[data-trial="${trial}"]`)) part.classList.add("lit");
  told.textContent = document.querySelector(`tr[data-trial="${trial}"]`).dataset.words;
};
const at = event => event.target.closest?.("[data-trial]")?.dataset.trial ?? null;
document.addEventListener("pointerover", event => { if (kept === null) find(at(event)); });
document.addEventListener("click", event => {
  if (event.target.closest("button, summary, code, a")) return;
  const trial = at(event);
  kept = trial === kept ? null : trial;
  find(trial);
});
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "copied";
    } catch {
      if (button.nextElementSibling.tagName === "DETAILS") button.nextElementSibling.open = true;
      getSelection().selectAllChildren(code);
      button.textContent = "selected";
    }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
}
"""
