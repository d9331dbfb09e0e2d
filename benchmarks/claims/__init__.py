"""The paper's claims, tested at a size that fits: `make claims`; the verdicts are in benchmarks/CLAIMS.md.

One module per claim. Each has

- `QUESTION`: the claim, as a question.
- `plan(size, runs)`: the settings of all runs that can be named so far; later ones may depend on results of earlier
  ones (a tuned learning rate), so it is asked again until it names nothing new. `size` is "full" (what is committed),
  "default" (a part of it, at most 45 minutes for a claim) or "tiny" (what the tests train; it says nothing).
- `measure(settings)`: one run, in a process of its own: numbers, by name.
- `verdict(runs)`: a short name of the outcome, a sentence, all numbers. `tables(runs)`: Markdown. Tasks that only
  "full" has may be missing.
- `draw(runs)`: the figure.

What was measured is in results/CLAIM.json, one line per run; a run that is there is not made again.
"""
