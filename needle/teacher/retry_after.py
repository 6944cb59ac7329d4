"""How long a server wishes to be left alone, where it names a date."""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


def until_s(http_date: str) -> float | None:
    """Seconds until a date of RFC 9110, 0 when it is past; None for what is no date."""
    try:
        date = parsedate_to_datetime(http_date)
    except ValueError:
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())
