"""One centre's control plane: accepts jobs, sizes and places them, drives them on nodes, keeps their results.

    python -m controlplane serve --state DIR

`centre` puts the parts together. `jobs`, `placement`, `sizing` and `schedule` decide and touch nothing;
`store` and `sqlite_store` remember; `scheduler` and `attempts` act; `node_client` and `node_link` talk to
nodes; `job_service` and `fleet_service` answer people and nodes.
"""
