"""The machinery of runs: settings, the folder that keeps every unit's frame, who does what, plans, and what is told.

What experiments share is here too: their data, scores and means, rank correlations, figures, and our cells beside the
paper's. Never imported here: `experiments.paper`, `experiments.own`, the catalogue. The machinery knows experiments as
`Experiment` only, handed to it by its caller, and does not choose layers or read results for them. Lowest first:
`settings`, `units`, `costs`, `rates`, `behavior_sets`, `beforehand`, `holder`, `run_folder`, `context`, `experiment`,
`identity`, `engines`, `ray_cluster`, `ray_worker`, `ray_workers`, `runner`, `terminal`, `plan`, `first_units`, `shown`;
and `scores`, `many_behaviors`, `rank_correlations`, `comparison`, `figures` for the experiments alone.
"""
