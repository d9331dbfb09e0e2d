"""The parity matrix: what a Trainer and a module can do, one row each, and how two runs are recorded and compared.

`rows.ROWS` is the table that tests/test_matrix.py runs; `table.COMPATIBILITY` is what users are
told, one line per feature.
"""
