"""The compatibility suite: optimizers, losses, networks and steps of other people, one row each.

`rows.ROWS` is the table that tests/test_ecosystem.py runs, `table.ecosystem_table` what users are told. A row trains 20
steps, four to an epoch.
"""
