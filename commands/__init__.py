"""The commands of `vbert`, one module each: `add_flags(parser)` and `run(args)`. cli.py imports the one that is run."""
