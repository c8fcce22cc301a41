from __future__ import annotations

import grpc
import pytest

from controlplane.pages import Page, Pages, page_size
from puhui.rpc.errors import Refusal
from puhui.v1 import job_pb2


def test_a_token_leads_on_from_where_it_was_made() -> None:
    pages = Pages("secret")
    assert pages.after(b"jobs", pages.token(b"jobs", "42")) == "42"


@pytest.mark.parametrize("token", ["x", "not base64 at all!", "é", "A" * 400, ""])
def test_a_made_up_token_is_refused(token: str) -> None:
    refuse(Pages("secret"), b"jobs", token)


def test_a_token_of_another_centre_filter_or_position_is_refused() -> None:
    pages = Pages("secret")
    token = pages.token(b"jobs", "42")
    refuse(Pages("other"), b"jobs", token)
    refuse(pages, b"jobs of somebody", token)
    refuse(pages, b"jobs", token[:-2] + "zz")


def refuse(pages: Pages, of: bytes, token: str) -> None:
    with pytest.raises(Refusal) as refused:
        pages.after(of, token)
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID")


def test_page_sizes_have_a_default_and_a_limit() -> None:
    assert [page_size(asked) for asked in (0, 1, 500, 501)] == [50, 1, 500, 500]


def test_a_page_ends_by_number_or_by_bytes_and_always_takes_one() -> None:
    def taken(page: Page, sizes: list[int]) -> int:
        entries = [job_pb2.Job(message="x" * size) for size in sizes]
        return next((number for number, entry in enumerate(entries) if not page.takes(entry)), len(entries))

    assert taken(Page(2), [1, 1, 1]) == 2
    assert taken(Page(9, most_bytes=250), [100, 100, 100]) == 2
    assert taken(Page(9, most_bytes=250), [1000, 1]) == 1
