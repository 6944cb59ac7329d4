"""What a hosted teacher costs: prices with their date and source (conf/prices), and the cost of a reply."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from needle.errors import ConfigError

Usd = Annotated[float, Field(ge=0)]
MILLION = 1e6


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens; thinking is charged as output. `batch_frac`: of the price, in batch mode."""

    input_usd: Usd
    cached_usd: Usd
    output_usd: Usd
    batch_frac: Annotated[float, Field(gt=0, le=1)]

    def cost_usd(
        self, *, prompt_tokens: int, cached_tokens: int, output_tokens: int, thinking_tokens: int, batch: bool
    ) -> float:
        """`prompt_tokens` include the cached ones, `output_tokens` exclude thinking."""
        full = (
            (prompt_tokens - cached_tokens) * self.input_usd
            + cached_tokens * self.cached_usd
            + (output_tokens + thinking_tokens) * self.output_usd
        ) / MILLION
        return full * (self.batch_frac if batch else 1)


@dataclass(frozen=True)
class PriceTable:
    """`models` maps a model's name to its price; `otherwise` is the price of any other model, null: it is refused."""

    dated: str
    source: str
    models: Mapping[str, Price]
    otherwise: Price | None

    def of(self, model: str) -> Price:
        """Raises ConfigError for a model without a price, since a budget could not be held."""
        price = self.models.get(model, self.otherwise)
        if price is None:
            listed = ", ".join(sorted(self.models)) or "no model"
            raise ConfigError(
                f"teacher.model={model}: no price; those of {self.dated} are of {listed}; add its own "
                "to conf/prices (no budget can be held without one)"
            )
        return price
