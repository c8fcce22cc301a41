"""The daemon of one GPU node: cuts slices, runs containers on them, forgets nothing.

`daemon` puts the parts together; `service` is its face; `slices` and `containers` do the work through the seams
`driver` and `runtime`; `journal` remembers what was intended, and `recovery` makes it so again after a crash.
"""
