"""What both ends of a Puhui connection must agree on, beside the messages in `puhui.v1`.

`errors` how a refusal travels, `server` and `channel` the two ends of a connection, `bundle` how
model code is packed, checked and unpacked, `transfer` how files travel in chunks, `identity` ids
and digests, `moment` times and durations.
"""
