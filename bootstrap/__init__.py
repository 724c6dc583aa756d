"""A node that only introduces peers to each other, and what its operator deploys.

It is a member like any other, run by the same code with the role "bootstrap": it keeps the DHT
and passes on signed records, serves no model and answers no requests. `public.json` describes
the public mesh; README.md is for operators.
"""
