"""Which centres of a machine have to be made peers of each other."""

from puhui.cli.local_peers import Outdated, Pairing, pairings
from puhui.v1.peer_service_pb2 import ListPeersResponse, Peer


def centre(name: str, *peers: str, port: int = 0) -> ListPeersResponse:
    """Returns what a centre says, which knows some peers as they are without a port of their own."""
    known = [Peer(name=peer, address=f"{peer}:0", fingerprint=f"of {peer}") for peer in peers]
    return ListPeersResponse(centre=name, address=f"{name}:{port}", fingerprint=f"of {name}", peers=known)


def test_all_that_are_new_are_paired() -> None:
    known = {name: centre(name) for name in ("a", "b", "c")}
    assert pairings(known) == [Pairing("a", "b"), Pairing("a", "c"), Pairing("b", "c")]


def test_peers_stay_as_they_are_and_strangers_are_none_of_ours() -> None:
    known = {"a": centre("a", "b", "elsewhere"), "b": centre("b", "a")}
    assert pairings(known) == []
    known["c"] = centre("c")
    assert pairings(known) == [Pairing("a", "c"), Pairing("b", "c")]


def test_what_is_true_no_longer_is_removed_first() -> None:
    moved = {"a": centre("a", "b"), "b": centre("b", "a", port=9)}
    assert pairings(moved) == [Pairing("a", "b", (Outdated("a", "b", False), Outdated("b", "a", False)))]
    made_anew = {"a": centre("a", "b"), "b": centre("b")}
    made_anew["b"].fingerprint = "another"
    assert pairings(made_anew) == [Pairing("a", "b", (Outdated("a", "b", True),))]


def test_one_centre_has_nobody_to_be_paired_with() -> None:
    assert pairings({"a": centre("a")}) == []
