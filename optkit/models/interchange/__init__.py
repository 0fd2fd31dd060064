"""Models in the number formats of other tools, read and written by us: one file a format. Numbers are moved, never rounded anew."""
