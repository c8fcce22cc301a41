"""The Python client of a centre.

    from pathlib import Path
    from puhui.client import Centre
    from puhui.v1.job_pb2 import JobSpec

    with Centre("127.0.0.1:7070") as centre:
        job = centre.submit(JobSpec(command=["python3", "train.py"]), Path("my-code"))
        for event in centre.watch(job.id):
            print(event.reason, event.message)
        centre.pull(job.id, Path("outputs"))

`centre` what can be asked of jobs, `fleet_calls` of nodes, `peer_calls` of peers, `connection` what all go through,
`run` a command in a session, `patience` which failures are waited out, `archives` how files travel.
Everything that goes wrong is raised as `Refusal`.
"""

from puhui.client.archives import Pulled
from puhui.client.centre import DEFAULT_ADDRESS, Centre
from puhui.client.patience import Patience, Trouble
from puhui.client.run import RunCall
from puhui.rpc.errors import Refusal

__all__ = ["DEFAULT_ADDRESS", "Centre", "Patience", "Pulled", "Refusal", "RunCall", "Trouble"]
