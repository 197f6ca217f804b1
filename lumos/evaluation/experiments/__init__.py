"""Experiments, which compare variants of settings.

Each variant is trained, evaluated with `evaluate prompts`, or both, once with each seed. In a study
of compression, a model is made smaller for each variant before, and training is its recovery. The
results are one JSON file and one picture. A run is one variant with one seed. Its commands run in
processes of their own, so a user can also type them. Runs that are done are not repeated: an
experiment that was stopped goes on, and an experiment with new variants runs only those.

settings reads the YAML file, runs makes and runs the commands, results reads what they wrote, and
intervals and claims say what follows from it. plots and heat_maps draw it, tables writes Markdown.
"""
