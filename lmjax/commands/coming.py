"""The commands whose names are taken and whose work is not done yet: name -> (summary, what it will do)."""

COMING = {
    "coordcheck": (
        "check that activations do not grow with width or depth",
        "Will train --config for a few steps at several widths and depths and draw the size of the activations."),
}
