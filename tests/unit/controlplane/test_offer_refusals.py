"""Whatever reason a peer gives for making no offer, people are told what it means."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

from controlplane import offer_desk, peer_limits
from controlplane.offer_refusals import REFUSALS, UNANSWERED, OfferRefusal, refused_clause, unanswered_clause
from controlplane.peer import Peer
from controlplane.peer_identity import certificate_of, unknown_peer
from controlplane.records import PeerRecord
from puhui.rpc.errors import Refusal
from puhui.v1.peer_service_pb2 import PeerTerms


def refused_in_the_source() -> set[str]:
    """Returns every reason for which the offer desk refuses, as its source has them."""
    source = ast.parse(Path(offer_desk.__file__).read_text())
    calls = [node for node in ast.walk(source) if isinstance(node, ast.Call) and ast.unparse(node.func) == "_No"]
    return {ast.unparse(call.args[0]).removeprefix("OfferRefusal.") for call in calls}


def test_every_refusal_has_a_sentence_and_no_sentence_is_without_its_refusal() -> None:
    assert set(REFUSALS) == {str(reason) for reason in OfferRefusal} == refused_in_the_source()
    assert len(set(REFUSALS.values())) == len(REFUSALS)


@pytest.mark.parametrize("reason", OfferRefusal)
def test_a_refusal_is_told_in_words_with_its_code_behind(reason: OfferRefusal) -> None:
    said = refused_clause("b", reason)
    assert said.startswith("b ")
    assert said.endswith(f"({reason})")
    assert reason not in said.removesuffix(f"({reason})")


def test_a_refusal_of_a_later_version_is_told_as_far_as_it_is_known() -> None:
    said = refused_clause("b", "MOON_IS_FULL")
    assert said == "b makes no offer, for a reason that this version does not know (MOON_IS_FULL)"


def refusals_of_the_call() -> set[str]:
    """Returns every reason with which a peer, or this centre, refuses the call itself."""
    record = PeerRecord("b", "c-b", "", b"", PeerTerms(most_calls_a_second=1), 0.0)
    limits, reasons = peer_limits.PeerLimits(lambda: 0.0), {unknown_peer().reason}
    with pytest.raises(Refusal) as missing:
        certificate_of(SimpleNamespace(auth_context=dict))
    for _ in range(5):
        limits.call(record)
    with pytest.raises(Refusal) as rate:
        limits.call(record)
    with pytest.raises(Refusal) as not_called:
        _ = Peer.of(record, None).client
    return reasons | {missing.value.reason, rate.value.reason, not_called.value.reason}


def test_every_reason_why_the_call_fails_has_a_sentence() -> None:
    assert set(UNANSWERED) == refusals_of_the_call() | {"UNKNOWN"}
    assert unanswered_clause("b", "PEER_RATE").endswith("more often than was agreed (PEER_RATE)")
    assert unanswered_clause("b", "its offer made no sense") == "b did not answer: its offer made no sense"
