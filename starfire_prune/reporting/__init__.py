"""Reports of trained runs: a web page, Markdown and CSV with the same numbers, and pictures.

`report.py` builds and writes a report: `runs.py` reads the folders of runs, `curves.py` and
`attacks.py` their numbers, `tables.py`, `sections.py` and `layer_section.py` make the sections, and
`document.py` and `html.py` the files. Reports need matplotlib.
"""
