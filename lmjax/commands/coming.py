"""The commands whose names are taken and whose work is not done yet: name -> (summary, what it will do)."""

COMING = {
    "sweep": (
        "run many variants of an experiment",
        "Will run the trials that get_sweep() of --config describes, each a normal run under --workdir, and go on "
        "where it stopped."),
    "isoflop": (
        "lay out compute-optimal runs",
        "Will lay out runs of equal compute around the optimum for each of --budgets, from --config."),
    "coordcheck": (
        "check that activations do not grow with width or depth",
        "Will train --config for a few steps at several widths and depths and draw the size of the activations."),
}
