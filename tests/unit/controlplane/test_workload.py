"""What a job becomes on its node."""

from controlplane.workload import container_request
from puhui.v1 import card_pb2, job_pb2

OWNER = card_pb2.AttemptRef(centre="b", job_id="j-there", attempt=1)
SLICE = card_pb2.Slice(uuid="MIG-1", profile="1g.10gb", memory_mib=9856)


def test_a_job_from_a_peer_is_told_the_id_that_its_user_knows() -> None:
    guest = job_pb2.Guest(peer="a", job_id="j-home", attempt=2)
    env = container_request(job_pb2.Job(id="j-there", guest=guest), OWNER, SLICE, "r-1").env
    assert (env["PUHUI_CENTRE"], env["PUHUI_JOB_ID"]) == ("b", "j-there")
    assert (env["PUHUI_ORIGIN_CENTRE"], env["PUHUI_ORIGIN_JOB_ID"]) == ("a", "j-home")


def test_a_job_of_this_centre_has_no_other_origin() -> None:
    env = container_request(job_pb2.Job(id="j-there"), OWNER, SLICE, "r-1").env
    assert not [name for name in env if name.startswith("PUHUI_ORIGIN")]
