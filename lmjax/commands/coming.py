"""The commands whose names are taken and whose work is not done yet: name -> (summary, what it will do)."""

COMING = {
    "isoflop": (
        "lay out compute-optimal runs",
        "Will lay out runs of equal compute around the optimum for each of --budgets, from --config."),
}
