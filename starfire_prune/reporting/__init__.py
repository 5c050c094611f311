"""Reports of trained runs: a web page, Markdown and CSV with the same numbers, and pictures.

`runs` reads folders, `numbers` says what their metrics come to, `tables`, `sections` and `words`
make of them what is shown, and `write` puts the files into a folder. They need matplotlib.
"""
