"""Variants: who gets which."""

from collections import Counter

import pytest

from rec.errors import UserError
from rec.ops.loop.variants import Variant, choose, parse_variants

TWO = [Variant("stable", "production", 90), Variant("canary", "canary", 10)]
USERS = [f"u{number}" for number in range(20_000)]


def test_variants_are_read() -> None:
    assert parse_variants(["stable=production:90", "canary=canary:10"]) == TWO
    assert parse_variants(["a=latest:0.5"]) == [Variant("a", "latest", 0.5)]


@pytest.mark.parametrize("text", ["stable", "a=b", "a=b:x", "a=b:0", "=b:1", "a b=c:1", "a=b:-1"])
def test_what_is_no_variant_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--variant .*: write NAME=ALIAS:SHARE"):
        parse_variants([text])


def test_a_name_is_given_once() -> None:
    with pytest.raises(UserError, match="there is a variant a already"):
        parse_variants(["a=b:1", "a=c:1"])


def test_users_are_split_by_the_shares() -> None:
    counts = Counter(choose(TWO, user, "") for user in USERS)
    assert counts[1] / len(USERS) == pytest.approx(0.1, abs=0.01)


def test_a_user_stays_and_another_salt_splits_anew() -> None:
    first = {user for user in USERS if choose(TWO, user, "") == 1}
    assert first == {user for user in USERS if choose(TWO, user, "") == 1}
    other = {user for user in USERS if choose(TWO, user, "winter") == 1}
    assert len(first & other) / len(other) == pytest.approx(0.1, abs=0.03)


def test_a_larger_share_takes_over_no_user_of_the_variants_own() -> None:
    larger = [Variant("stable", "production", 80), Variant("canary", "canary", 20)]
    before = {user for user in USERS if choose(TWO, user, "") == 1}
    assert before < {user for user in USERS if choose(larger, user, "") == 1}


def test_requests_without_a_user_get_the_first() -> None:
    assert [choose(TWO, user, "") for user in (None, "")] == [0, 0]
