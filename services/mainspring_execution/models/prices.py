"""What tokens cost: prices as data, the platform's and the operator's."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

from mainspring.v1 import types_pb2
from mainspring_kit.config import SettingsError

_MILLION: Final = 1_000_000
_RELEASE: Final = re.compile(r"[-@](\d{4}-?\d{2}-?\d{2}|latest)(-v\d+.*)?")
_KINDS: Final = ("input", "cached", "written", "output")


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one answer used. Of the `input`, `cached` were in the provider's cache and `written` put into it."""

    input: int = 0
    output: int = 0
    cached: int = 0
    written: int = 0


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens."""

    input: float
    output: float
    cached: float
    written: float


class Prices:
    """Prices by provider and model; an earlier table goes before a later one."""

    def __init__(self, *tables: Mapping[str, Mapping[str, Price]]) -> None:
        self._tables = tables

    def price(self, provider: str, model: str) -> Price | None:
        """The price of a model; None: not known."""
        for table in self._tables:
            fits = [name for name in table.get(provider, {}) if _is_meant(name, model)]
            if fits:
                return table[provider][max(fits, key=len)]
        return None

    def usage(self, provider: str, model: str, *, tokens: Tokens) -> types_pb2.Usage:
        """Tokens and what they cost; 0 where the price is not known."""
        price = self.price(provider, model)
        cost = 0.0
        if price is not None:
            plain = max(0, tokens.input - tokens.cached - tokens.written)
            cost = plain * price.input + tokens.cached * price.cached + tokens.written * price.written
            cost = (cost + tokens.output * price.output) / _MILLION
        return types_pb2.Usage(input_tokens=tokens.input, output_tokens=tokens.output, cost_usd=cost)


def load_prices(path: Path | None) -> Prices:
    """The platform's prices, after those of an operator's file; SettingsError when that cannot be read."""
    own = resources.files("mainspring_execution.models").joinpath("prices.toml").read_text()
    tables = [read_prices(own)]
    if path is not None:
        try:
            tables.insert(0, read_prices(path.read_text()))
        except (OSError, ValueError) as error:
            raise SettingsError(f"The settings are not usable:\n  MAINSPRING_PRICES_FILE: {path}: {error}") from error
    return Prices(*tables)


def read_prices(text: str) -> dict[str, dict[str, Price]]:
    """A table of prices, as prices.toml describes it; ValueError."""
    found = tomllib.loads(text)
    if not all(isinstance(models, dict) for models in found.values()):
        raise ValueError("it has one table per provider")
    return {
        provider: {model: _read_price(entry, f"{provider}.{model}") for model, entry in models.items()}
        for provider, models in found.items()
    }


def _read_price(entry: Any, name: str) -> Price:
    """Any: a TOML value."""
    entry = entry if isinstance(entry, dict) else {}
    wrong = [kind for kind, value in entry.items() if kind not in _KINDS or not isinstance(value, int | float)]
    if wrong or "input" not in entry or "output" not in entry:
        raise ValueError(f"{name}: a price has input and output, and cached and written if they differ: numbers")
    price = float(entry["input"])
    return Price(price, float(entry["output"]), float(entry.get("cached", price)), float(entry.get("written", price)))


def _is_meant(name: str, model: str) -> bool:
    if name.endswith("*"):
        return model.startswith(name[:-1])
    return model == name or (model.startswith(name) and _RELEASE.fullmatch(model, len(name)) is not None)
