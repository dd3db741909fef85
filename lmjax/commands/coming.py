"""The commands whose names are taken and whose work is not done yet: name -> (summary, what it will do)."""

COMING = {
    "isoflop": (
        "lay out compute-optimal runs",
        "Will lay out runs of equal compute around the optimum for each of --budgets, from --config."),
    "coordcheck": (
        "check that activations do not grow with width or depth",
        "Will train --config for a few steps at several widths and depths and draw the size of the activations."),
}
