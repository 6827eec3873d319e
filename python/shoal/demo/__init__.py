"""The main job, end to end: three real models share less memory than they need, and a driver that shows it.

``prepare`` makes the models (once), ``run`` starts a server and talks to it. Both are subcommands of
``python -m shoal.demo``; ``make demo`` runs them in that order.
"""
