"""The main job end to end, in one folder: what `caa-lens demo` and `make demo` run.

`main_job` has the steps, `kept_files` what a folder holds and was made from, `on_screen` what the terminal shows, and
`demo_page` the report. May never be imported here: the command line.
"""
