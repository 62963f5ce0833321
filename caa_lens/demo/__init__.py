"""The main job end to end, in one folder: what `caa-lens demo` and `make demo` run.

`main_job` has the steps, `kept_files` what a folder holds and was made from, `duration` how long it will take,
`on_screen` what the terminal shows, `demo_page` the report, and `made_with` on what and with what it was made. May
never be imported here: the command line.
"""
