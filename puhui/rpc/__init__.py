"""What both ends of a Puhui connection must agree on, beside the messages in `puhui.v1`.

`errors` how a refusal travels, `server` and `channel` the two ends of a connection, `address` where
plaintext may go, `bundle` how model code is packed, checked and unpacked (`bundle_rules`: what it may hold),
`transfer` how files travel in chunks, `identity` ids and digests, `moment` times and durations, `notify`
readiness, `logs` structured logs.
"""
