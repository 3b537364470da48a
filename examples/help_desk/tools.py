"""The tools of the help desk: one looks, one gives money back and is made so that a second call gives none."""

from __future__ import annotations

from typing import Any

from mainspring import ToolContext, ToolError, tool

ORDERS = {
    "1001": {"article": "teapot", "amount_eur": 24.50},
    "1002": {"article": "desk lamp", "amount_eur": 49.90},
}
# By the call's key, which is the same however often the call is made.
REFUNDS: dict[str, dict[str, Any]] = {}


@tool(name="desk.find-order", effect="pure")
def find_order(order: str) -> dict[str, Any]:
    """Says what an order was and what was paid for it.

    Args:
        order: Its number.
    """
    if order not in ORDERS:
        raise ToolError(f"There is no order {order}: ask for the number on the receipt.", reason="ORDER_NOT_FOUND")
    return {"order": order, **ORDERS[order]}


@tool(name="desk.refund", effect="keyed")
def refund(order: str, amount_eur: float, context: ToolContext) -> dict[str, Any]:
    """Gives money back for an order.

    Args:
        order: Its number.
        amount_eur: How much, in euros.
    """
    return REFUNDS.setdefault(context.call_id, {"order": order, "refunded_eur": amount_eur})
