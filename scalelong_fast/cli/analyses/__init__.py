"""The analyses of ``scalelong-fast analyze``, a file for each kind."""

from scalelong_fast.cli.analyses import ablation, convergence, dataset, theory, watched

#: By name, in the order in which ``--help`` lists them.
ANALYSES = {**theory.ANALYSES, **dataset.ANALYSES, **watched.ANALYSES, **convergence.ANALYSES, **ablation.ANALYSES}
