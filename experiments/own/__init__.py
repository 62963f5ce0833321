"""Questions that the paper has no figure or table of: experiments of a run, and scripts that are run as they are.

An experiment of a run goes into the catalogue; a script is short, has its settings at its top, and prints what it
finds. May be imported: `caa_lens`, `experiments.running`, and `experiments.paper`, as a question of ours may begin
where a figure ends. Never: another module of this folder, the catalogue, the command line. Nothing imports a script.
"""
