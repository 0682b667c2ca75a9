"""In which order the tests run, and during which of them lines of the money modules are counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

# Files with tests of many seconds, the longest first: one that began last would be waited for alone.
LONG = """
    test_together test_crash test_several_machines test_bad_postgres test_ledger_machine test_commands_reconcile
    test_scripted_day test_fal_bill test_webhooks test_idempotency_clients test_holds_cover test_users test_alerts
    test_queue_sizes test_openapi test_pages_roles test_prices_served test_webhook_delivery test_pages_sessions
    test_deploy test_serving
""".split()
# Those with pages in a browser: one process begins with all of them, so one browser is started and one looks at a page.
PAGES = "test_pages_browser test_playground_browser test_reference_pages test_pages_figures_browser".split()

# The files that between them run every line and branch of the money modules. Counting makes Python half as fast again
# and is left out elsewhere; a line that only another file reaches shows as missed.
MEASURED = frozenset(
    """
    test_alerts test_commands_books test_costs test_gateway test_ledger test_metering test_money test_price_sync
    test_pricing test_spending
    """.split()
)


def dealt(items: Iterable[T], module_of: Callable[[T], str], hands: int) -> list[T]:
    """The items as so many equal shares, one after the other, each with its part of the long files; pages in the first.

    Every other share begins with them, the rest have them in their middle: they keep the machine so busy that all of
    them at once would wait for each other.

    The runner's processes start with one such share each; who has done theirs takes from the end of another's.
    """
    by_module: dict[str, list[T]] = {}
    for item in items:
        by_module.setdefault(module_of(item), []).append(item)
    pages = [item for name in PAGES for item in by_module.pop(name, ())]
    long = [pages] * bool(pages) + [by_module.pop(name) for name in LONG if name in by_module]
    shares: list[list[T]] = [[item for file in long[hand::hands] for item in file] for hand in range(hands)]
    others = [item for file in by_module.values() for item in file]
    left = sum(map(len, shares)) + len(others)
    for hand, share in enumerate(shares):
        room = max(0, left // (hands - hand) - len(share))
        before = room // 2 if hand % 2 else 0
        share[:0] = others[:before]
        share.extend(others[before:room])
        del others[:room]
        left -= len(share)
    return [item for share in shares for item in share] + others
