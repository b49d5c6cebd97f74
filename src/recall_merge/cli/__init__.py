"""The command line: words -> recipes. Heavy packages are imported inside the commands that need them."""
