"""SQL functions that SQLite lacks, or has with another meaning, as pure Python functions over SQLite's values.

Dates are ISO text. A time at midnight is written without its time of day, so that text compares as time does whether a column
holds dates or timestamps. Intervals are text that begins with their length: `~SECONDS|months|days|seconds`. NULL in, NULL out.

The clock stands still: NOW() and its kin give `CLOCK` in every run, so that a reward does not depend on the day of training.
"""

from __future__ import annotations

import calendar
import datetime as dt
import decimal
import math
import re
import sqlite3
from collections.abc import Callable
from typing import Any

#: What every clock says. Inferred instances put their dates around it.
CLOCK = "2025-06-15 12:00:00"

#: Longest text, in characters, that a function of ours returns.
MAX_TEXT = 1_000_000

Value = None | int | float | str | bytes
_ISO = re.compile(
    r"\s*(\d{4})-(\d{1,2})-(\d{1,2})(?:[T ]+(\d{1,2}):(\d{2})(?::(\d{2})(?:\.(\d{1,9}))?)?)?\s*(?:Z|[+-]\d{2}(?::?\d{2})?)?\s*",
    re.ASCII,
)
_MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_OFFSET = 10**13  # keeps the length of an interval positive, so that text order is order of length


def moment(value: Value) -> dt.datetime | None:
    """ISO text (or a compact 20240131) as a datetime; None where it is none."""
    if isinstance(value, int) and 10000101 <= value <= 99991231:
        value = str(value)
    if not isinstance(value, str):
        return None
    if re.fullmatch(r"\d{8}", value, re.ASCII):
        value = f"{value[:4]}-{value[4:6]}-{value[6:]}"
    found = _ISO.fullmatch(value)
    if found is None:
        return None
    year, month, day, hour, minute, second, fraction = found.groups()
    try:
        return dt.datetime(
            int(year),
            int(month),
            int(day),
            int(hour or 0),
            int(minute or 0),
            int(second or 0),
            int((fraction or "0").ljust(6, "0")[:6]),
        )
    except ValueError:
        return None


def iso(when: dt.datetime) -> str:
    """The one spelling of a moment: seconds, then microseconds, only where they are not zero; no time of day at midnight."""
    if not (when.hour or when.minute or when.second or when.microsecond):
        return f"{when.year:04d}-{when.month:02d}-{when.day:02d}"
    text = when.strftime("%H:%M:%S") + (f".{when.microsecond:06d}".rstrip("0") if when.microsecond else "")
    return f"{when.year:04d}-{when.month:02d}-{when.day:02d} {text}"


def _due(value: Value) -> dt.datetime:
    when = moment(value)
    if when is None:
        raise ValueError(f"not a date: {str(value)[:40]!r}")
    return when


def now() -> str:
    return CLOCK


def today() -> str:
    return CLOCK[:10]


def to_date(value: Value) -> str | None:
    """CAST(x AS DATE)."""
    return None if value is None else iso(_due(value).replace(hour=0, minute=0, second=0, microsecond=0))


def to_timestamp(value: Value) -> str | None:
    """CAST(x AS TIMESTAMP); a number counts seconds since 1970."""
    if value is None:
        return None
    if isinstance(value, int | float) and not moment(value):
        return iso(dt.datetime(1970, 1, 1) + dt.timedelta(seconds=value))
    return iso(_due(value))


def parse_time(value: Value, pattern: Value) -> str | None:
    """STR_TO_DATE, TO_DATE, TO_TIMESTAMP with a strftime pattern (sqlglot writes every dialect's pattern so)."""
    if value is None or pattern is None:
        return None
    text, form = str(value).strip(), str(pattern)
    try:
        return iso(dt.datetime.strptime(text, form))
    except ValueError:
        when = moment(text)  # TO_DATE('2024-1-5', 'YYYY-MM-DD') and a date with a time behind it: databases are lenient
        if when is None:
            raise ValueError(f"{text[:40]!r} does not fit {form!r}") from None
        if not re.search(r"%-?[HIMSfTRcX]", form):
            when = when.replace(hour=0, minute=0, second=0, microsecond=0)
        return iso(when)


def format_time(value: Value, pattern: Value) -> str | None:
    """TO_CHAR, DATE_FORMAT, FORMAT with a strftime pattern; a number is written as a database would."""
    if value is None or pattern is None:
        return None
    when = moment(value)
    form = str(pattern)[:200]
    if when is None:
        return _number_text(value, form)
    return _strftime(when, form)


def _strftime(when: dt.datetime, form: str) -> str:
    """strftime that is the same on every system: English names, years of four digits, %-d and its kin."""
    english = {
        "Y": f"{when.year:04d}", "y": f"{when.year % 100:02d}", "m": f"{when.month:02d}", "d": f"{when.day:02d}", "H": f"{when.hour:02d}",
        "I": f"{(when.hour - 1) % 12 + 1:02d}", "M": f"{when.minute:02d}", "S": f"{when.second:02d}", "f": f"{when.microsecond:06d}",
        "B": _MONTHS[when.month - 1].title(), "b": _MONTHS[when.month - 1][:3].title(), "A": calendar.day_name[when.weekday()],
        "a": calendar.day_abbr[when.weekday()], "p": "AM" if when.hour < 12 else "PM", "j": f"{when.timetuple().tm_yday:03d}",
        "w": str((when.weekday() + 1) % 7), "u": str(when.isoweekday()), "W": f"{_week(when):02d}", "V": f"{when.isocalendar().week:02d}",
        "U": when.strftime("%U"), "G": f"{when.isocalendar().year:04d}", "T": when.strftime("%H:%M:%S"), "F": f"{when.year:04d}-{when.month:02d}-{when.day:02d}",
        "D": when.strftime("%m/%d/%y"), "R": when.strftime("%H:%M"), "s": str(calendar.timegm(when.timetuple())), "e": str(when.day), "%": "%",
    }  # fmt: skip
    return re.sub(
        r"%(-?)([A-Za-z%])",
        lambda m: (english.get(m[2], m[0]).lstrip("0") or "0") if m[1] else english.get(m[2], m[0]),
        form,
    )


def _week(when: dt.datetime) -> int:
    return int(when.strftime("%W"))


def _number_text(value: Value, form: str) -> str:
    """TO_CHAR(number, '999,990.00'), for the digits, commas and points that anyone uses."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return str(value)
    if not isinstance(value, int | float):
        return str(value)
    mask = form.replace("FM", "").replace("$", "").replace("L", "")
    if not re.fullmatch(r"[90,.]+", mask):
        return _text(value) or ""
    decimals = len(mask.partition(".")[2])
    number = f"{_round(value, decimals):{',' if ',' in mask else ''}.{decimals}f}"
    return number if form.startswith("FM") else number.rjust(len(mask) + 1)


# ---------------------------------------------------------------------------------------------------------- intervals


def interval_text(months: int, days: float, seconds: float) -> str:
    """An interval as text; a month counts 30 days for its length, as PostgreSQL counts it for comparison."""
    length = (months * 30 + days) * 86400 + seconds + _OFFSET
    return f"~{length:018.3f}|{months}|{days:g}|{seconds:g}"


def _interval(value: Value) -> tuple[int, float, float] | None:
    if not isinstance(value, str) or not value.startswith("~") or value.count("|") != 3:
        return None
    _, months, days, seconds = value.split("|")
    return int(months), float(days), float(seconds)


_UNITS: dict[str, tuple[float, float, float]] = {
    "year": (12, 0, 0), "quarter": (3, 0, 0), "month": (1, 0, 0), "week": (0, 7, 0), "day": (0, 1, 0), "hour": (0, 0, 3600), "minute": (0, 0, 60),
    "second": (0, 0, 1), "decade": (120, 0, 0), "century": (1200, 0, 0), "millisecond": (0, 0, 1e-3), "microsecond": (0, 0, 1e-6),
}  # fmt: skip
_SHORT = {
    "yy": "year", "yyyy": "year", "y": "year", "yr": "year", "qq": "quarter", "q": "quarter", "mm": "month", "mon": "month", "wk": "week", "ww": "week",
    "w": "week", "dd": "day", "d": "day", "hh": "hour", "hh24": "hour", "h": "hour", "mi": "minute", "n": "minute", "min": "minute", "ss": "second",
    "s": "second", "sec": "second", "ms": "millisecond", "dw": "weekday", "dy": "dayofyear", "doy": "dayofyear", "dow": "dow", "weekday": "weekday",
    "syyyy": "year", "rrrr": "year", "iso_week": "week", "isoweek": "week", "isowk": "week", "iw": "week", "dayofweek": "weekday", "day_of_week": "weekday",
    "day_of_year": "dayofyear", "year_month": "year", "j": "day", "ddd": "day", "month_name": "month",
}  # fmt: skip


def unit_name(unit: Value) -> str:
    """`DAYS`, `dd`, `d` -> `day`."""
    name = str(unit or "day").strip().lower().strip("'\"")
    name = _SHORT.get(name, name)
    if name not in _UNITS and name.endswith("s") and name[:-1] in {*_UNITS, *_SHORT}:
        name = _SHORT.get(name[:-1], name[:-1])
    return "century" if name == "centuries" else name


def interval(value: Value, unit: Value) -> str | None:
    """INTERVAL '3' MONTH, and INTERVAL '1 year 2 days' where the unit is NULL."""
    if value is None:
        return None
    months = days = seconds = 0.0
    parts = [(str(value), unit)] if unit is not None else re.findall(r"([+-]?\d+(?:\.\d+)?)\s*([A-Za-z]+)", str(value))
    clock = re.search(r"(-?)(\d{1,3}):(\d{2})(?::(\d{2}(?:\.\d+)?))?", str(value)) if unit is None else None
    if clock:
        sign = -1 if clock[1] else 1
        seconds += sign * (int(clock[2]) * 3600 + int(clock[3]) * 60 + float(clock[4] or 0))
    if not parts and not clock:
        raise ValueError(f"not an interval: {str(value)[:40]!r}")
    for number, name in parts:
        m, d, s = _UNITS.get(unit_name(name), (None, 0, 0))
        if m is None:
            raise ValueError(f"no unit of time: {str(name)[:20]!r}")
        months, days, seconds = months + float(number) * m, days + float(number) * d, seconds + float(number) * s
    whole = int(months)
    return interval_text(whole, days + (months - whole) * 30, seconds)


def _shift(when: dt.datetime, months: int, days: float, seconds: float) -> dt.datetime:
    if months:
        index = when.year * 12 + when.month - 1 + months
        year, month = divmod(index, 12)
        when = when.replace(year=year, month=month + 1, day=min(when.day, calendar.monthrange(year, month + 1)[1]))
    return when + dt.timedelta(days=days, seconds=seconds)


def add(left: Value, right: Value) -> Value:
    """a + b in a dialect that adds days and intervals to dates (and, in T-SQL, strings to strings)."""
    if left is None or right is None:
        return None
    if isinstance(left, int | float) and isinstance(right, int | float):
        return left + right
    for a, b in ((left, right), (right, left)):
        when, gap = moment(a) if isinstance(a, str) else None, _interval(b)
        if when is not None and gap is not None:
            return iso(_shift(when, *gap))
        if when is not None and isinstance(b, int | float):
            return iso(when + dt.timedelta(days=b))
    first, second = _interval(left), _interval(right)
    if first and second:
        return interval_text(first[0] + second[0], first[1] + second[1], first[2] + second[2])
    if isinstance(left, str) and isinstance(right, str) and not (_numeric(left) and _numeric(right)):
        return _bounded(left + right)
    return _number(left) + _number(right)


def subtract(left: Value, right: Value) -> Value:
    """a - b: of dates their days, of moments an interval, of a date and days or an interval a date."""
    if left is None or right is None:
        return None
    if isinstance(left, int | float) and isinstance(right, int | float):
        return left - right
    when, other, gap = (
        (moment(left) if isinstance(left, str) else None),
        (moment(right) if isinstance(right, str) else None),
        _interval(right),
    )
    if when is not None and gap is not None:
        return iso(_shift(when, -gap[0], -gap[1], -gap[2]))
    if when is not None and isinstance(right, int | float):
        return iso(when - dt.timedelta(days=right))
    if when is not None and other is not None:
        difference = when - other
        if len(str(left).strip()) <= 10 and len(str(right).strip()) <= 10:
            return difference.days
        return interval_text(0, difference.days, difference.seconds + difference.microseconds / 1e6)
    first = _interval(left)
    if first and gap:
        return interval_text(first[0] - gap[0], first[1] - gap[1], first[2] - gap[2])
    return _number(left) - _number(right)


def subtract_days(left: Value, right: Value) -> Value:
    """Oracle's a - b: the difference of two dates is a number of days with its fraction."""
    a, b = (moment(x) if isinstance(x, str) else None for x in (left, right))
    if a is not None and b is not None:
        days = (a - b) / dt.timedelta(days=1)
        return int(days) if days.is_integer() else days
    return subtract(left, right)


def date_add(value: Value, amount: Value, unit: Value) -> str | None:
    """DATE_ADD, DATEADD: the last day of a shorter month where the day does not exist."""
    if value is None or amount is None:
        return None
    gap = _interval(amount) or _interval(interval(amount, unit))
    if gap is None:
        raise ValueError("not an interval")
    return iso(_shift(_due(value), *gap))


def date_sub(value: Value, amount: Value, unit: Value) -> str | None:
    gap = _interval(amount) or (None if amount is None else _interval(interval(amount, unit)))
    return None if value is None or gap is None else iso(_shift(_due(value), -gap[0], -gap[1], -gap[2]))


def add_months(value: Value, months: Value) -> str | None:
    """ADD_MONTHS: the last day of a month stays the last day."""
    if value is None or months is None:
        return None
    when = _due(value)
    last = when.day == calendar.monthrange(when.year, when.month)[1]
    moved = _shift(when, int(_number(months)), 0, 0)
    return iso(moved.replace(day=calendar.monthrange(moved.year, moved.month)[1]) if last else moved)


def last_day(value: Value) -> str | None:
    if value is None:
        return None
    when = _due(value)
    return iso(dt.datetime(when.year, when.month, calendar.monthrange(when.year, when.month)[1]))


def months_between(later: Value, earlier: Value) -> Value:
    """Oracle: whole months between equal days of the month or two last days; else with 31sts of a month."""
    if later is None or earlier is None:
        return None
    a, b = _due(later), _due(earlier)
    months = (a.year - b.year) * 12 + a.month - b.month
    if a.day == b.day or all(x.day == calendar.monthrange(x.year, x.month)[1] for x in (a, b)):
        return months
    seconds = (a - a.replace(hour=0, minute=0, second=0)).seconds - (b - b.replace(hour=0, minute=0, second=0)).seconds
    return months + (a.day - b.day + seconds / 86400) / 31


def boundaries(later: Value, earlier: Value, unit: Value) -> int | None:
    """DATEDIFF in T-SQL: how many boundaries of the unit lie between. In MySQL with days: the difference of the dates."""
    if later is None or earlier is None:
        return None
    a, b, name = _due(later), _due(earlier), unit_name(unit)
    if name in ("year", "quarter", "month"):
        months = (a.year - b.year) * 12 + a.month - b.month
        quarters = (a.year * 4 + (a.month - 1) // 3) - (b.year * 4 + (b.month - 1) // 3)
        return {"year": a.year - b.year, "quarter": quarters, "month": months}[name]
    if name == "week":
        return (a.toordinal() // 7) - (b.toordinal() // 7)
    if name in ("day", "dayofyear"):
        return a.toordinal() - b.toordinal()
    size = {"hour": 3600, "minute": 60, "second": 1}[name]
    start = dt.datetime(1, 1, 1)
    return int((a - start).total_seconds() // size - (b - start).total_seconds() // size)


def whole_units(later: Value, earlier: Value, unit: Value) -> int | None:
    """TIMESTAMPDIFF in MySQL: whole units, cut towards zero."""
    if later is None or earlier is None:
        return None
    a, b, name = _due(later), _due(earlier), unit_name(unit)
    if name in ("year", "quarter", "month"):
        sign = 1 if a >= b else -1
        if sign < 0:
            a, b = b, a
        months = (a.year - b.year) * 12 + a.month - b.month - ((a.day, a.time()) < (b.day, b.time()))
        return sign * (months // {"year": 12, "quarter": 3, "month": 1}[name])
    size = {"week": 604800, "day": 86400, "hour": 3600, "minute": 60, "second": 1}[name]
    return math.trunc((a - b).total_seconds() / size)


def age(later: Value, earlier: Value) -> str | None:
    """AGE(a, b) in PostgreSQL: years and months, then days."""
    if later is None or earlier is None:
        return None
    a, b = _due(later), _due(earlier)
    sign = 1 if a >= b else -1
    if sign < 0:
        a, b = b, a
    months = (a.year - b.year) * 12 + a.month - b.month - ((a.day, a.time()) < (b.day, b.time()))
    rest = a - _shift(b, months, 0, 0)
    return interval_text(sign * months, sign * rest.days, sign * rest.seconds)


def age_today(value: Value) -> str | None:
    return age(today(), value)


def extract(unit: Value, value: Value) -> Value:
    """EXTRACT(unit FROM x), DATE_PART, DATEPART, YEAR(x) ...; of an interval its field."""
    if value is None:
        return None
    name, gap = unit_name(unit), _interval(value)
    if isinstance(value, int) and moment(value) is None:  # two moments at midnight, subtracted: days
        gap = (0, value, 0)
    if gap is not None:
        months, days, seconds = gap
        length = (months * 30 + days) * 86400 + seconds
        fields = {"year": int(months / 12), "month": int(math.fmod(months, 12)), "day": days, "hour": int(seconds / 3600), "epoch": length,
                  "minute": int(math.fmod(seconds, 3600) / 60), "second": math.fmod(seconds, 60)}  # fmt: skip
        number = fields[name]
        return int(number) if float(number).is_integer() else number
    when = _due(value)
    seconds = calendar.timegm(when.timetuple()) + when.microsecond / 1e6
    field: Any = {
        "year": when.year, "quarter": (when.month + 2) // 3, "month": when.month, "day": when.day, "hour": when.hour, "minute": when.minute,
        "second": when.second + when.microsecond / 1e6, "week": when.isocalendar().week, "dow": when.isoweekday() % 7, "isodow": when.isoweekday(),
        "weekday": when.isoweekday() % 7 + 1, "dayofyear": when.timetuple().tm_yday, "epoch": seconds, "decade": when.year // 10,
        "century": (when.year + 99) // 100, "isoyear": when.isocalendar().year, "date": to_date(value),
    }[name]  # fmt: skip
    return int(field) if isinstance(field, float) and field.is_integer() else field


def weekday_monday(value: Value) -> int | None:
    """WEEKDAY(x) in MySQL: Monday is 0."""
    return None if value is None else _due(value).weekday()


def truncate_time(unit: Value, value: Value) -> Value:
    """DATE_TRUNC('month', x), TRUNC(x, 'MM'); TRUNC of a number cuts it at a number of decimals."""
    if value is None:
        return None
    if isinstance(value, int | float) and moment(value) is None:
        digits = int(unit) if isinstance(unit, int | float) else 0
        scale = 10**digits
        return math.trunc(value * scale) / scale if digits else math.trunc(value)
    when, name = _due(value), unit_name(unit)
    day = dt.datetime(when.year, when.month, when.day)
    starts: dict[str, Callable[[], dt.datetime]] = {
        "year": lambda: dt.datetime(when.year, 1, 1),
        "quarter": lambda: dt.datetime(when.year, (when.month - 1) // 3 * 3 + 1, 1),
        "month": lambda: dt.datetime(when.year, when.month, 1),
        "week": lambda: day - dt.timedelta(days=when.weekday()),
        "day": lambda: day,
        "hour": lambda: when.replace(minute=0, second=0, microsecond=0),
        "minute": lambda: when.replace(second=0, microsecond=0),
        "second": lambda: when.replace(microsecond=0),
        "decade": lambda: dt.datetime(when.year // 10 * 10, 1, 1),
    }
    return iso(starts[name]())


def time_of_day(value: Value) -> str | None:
    return None if value is None else _due(value).strftime("%H:%M:%S")


def days(value: Value) -> int | None:
    """Days since the first of January of the year 0, as DATEDIFF(x, '0000-01-01') counts them in MySQL."""
    return None if value is None else _due(value).toordinal() + 364


def unix(value: Value) -> int | None:
    return None if value is None else calendar.timegm(_due(value).timetuple())


# ------------------------------------------------------------------------------------------------------ numbers, text


def _numeric(text: str) -> bool:
    return re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", text, re.ASCII) is not None


def _number(value: Value) -> int | float:
    if isinstance(value, int | float):
        return value
    if isinstance(value, str) and _numeric(value):
        return float(value) if re.search(r"[.eE]", value) else int(value)
    raise ValueError(f"not a number: {str(value)[:40]!r}")


def _round(value: int | float, digits: int) -> float:
    """Half away from zero, on the decimal number that the float is written as."""
    with decimal.localcontext(prec=400):
        return float(
            decimal.Decimal(str(value)).quantize(decimal.Decimal(1).scaleb(-digits), rounding=decimal.ROUND_HALF_UP)
        )


def round_number(value: Value, digits: Value = 0) -> Value:
    """ROUND(x, n); an integer stays one, and 2.675 rounds as it reads."""
    if value is None or digits is None:
        return None
    number, places = _number(value), max(-30, min(30, int(_number(digits))))
    if isinstance(number, int) and places >= 0:
        return number
    rounded = _round(number, places)
    return int(rounded) if places <= 0 and abs(rounded) < 2**62 else rounded


def to_integer(value: Value) -> int | None:
    """CAST(x AS INTEGER) where it rounds (PostgreSQL, MySQL, Oracle)."""
    if value is None:
        return None
    number = _number(value)
    return number if isinstance(number, int) else int(_round(number, 0))


def cut_integer(value: Value) -> int | None:
    """CAST(x AS INT) where it cuts (T-SQL)."""
    return None if value is None else math.trunc(_number(value))


def to_number(value: Value) -> Value:
    """CAST(x AS NUMERIC), TO_NUMBER: an error where the text is none."""
    if value is None:
        return None
    return _number(value.replace(",", "") if isinstance(value, str) else value)


def to_decimal(value: Value, digits: Value) -> Value:
    """CAST(x AS DECIMAL(p, s))."""
    return None if value is None else _round(_number(value), int(_number(digits)))


def to_boolean(value: Value) -> int | None:
    if value is None:
        return None
    if isinstance(value, str):
        word = value.strip().lower()
        if word in ("t", "true", "y", "yes", "on", "1"):
            return 1
        if word in ("f", "false", "n", "no", "off", "0"):
            return 0
    return int(_number(value) != 0)


def _text(value: Value) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def to_text(value: Value) -> str | None:
    return _text(value)


def _bounded(text: str) -> str:
    if len(text) > MAX_TEXT:
        raise ValueError("text too long")
    return text


def concat(*values: Value) -> str:
    """CONCAT in PostgreSQL and T-SQL: NULL is nothing."""
    return _bounded("".join(_text(v) or "" for v in values))


def concat_strict(*values: Value) -> str | None:
    """CONCAT in MySQL: NULL makes NULL."""
    return None if any(v is None for v in values) else concat(*values)


def concat_ws(separator: Value, *values: Value) -> str | None:
    return (
        None
        if separator is None
        else _bounded((_text(separator) or "").join(_text(v) or "" for v in values if v is not None))
    )


def _pick(order: Callable[..., Any], skip: bool) -> Callable[..., Value]:
    def chosen(*values: Value) -> Value:
        present = [v for v in values if v is not None]
        if not present or (not skip and len(present) < len(values)):
            return None
        if len({isinstance(v, str) for v in present}) > 1:
            present = [_number(v) for v in present]
        best: Value = order(present)
        return best

    return chosen


def repeat(value: Value, times: Value) -> str | None:
    text = _text(value)
    if text is None or times is None:
        return None
    count = max(0, int(_number(times)))
    if len(text) * count > MAX_TEXT:
        raise ValueError("text too long")
    return text * count


def pad(value: Value, width: Value, fill: Value, left: int) -> str | None:
    text, filler = _text(value), _text(fill)
    if text is None or width is None or filler is None:
        return None
    size = max(0, int(_number(width)))
    if size > MAX_TEXT:
        raise ValueError("text too long")
    if len(text) >= size or not filler:
        return text[:size]
    extra = (filler * (size // len(filler) + 1))[: size - len(text)]
    return extra + text if left else text + extra


def left_part(value: Value, count: Value) -> str | None:
    text = _text(value)
    return None if text is None or count is None else text[: int(_number(count))]


def right_part(value: Value, count: Value) -> str | None:
    text = _text(value)
    if text is None or count is None:
        return None
    n = int(_number(count))
    return text[-n:] if n else ""


def split_part(value: Value, separator: Value, index: Value) -> str | None:
    text, mark = _text(value), _text(separator)
    if text is None or mark is None or index is None:
        return None
    parts = text.split(mark) if mark else [text]
    i = int(_number(index))
    at = i - 1 if i > 0 else len(parts) + i
    return parts[at] if 0 <= at < len(parts) else ""


def substring_index(value: Value, separator: Value, count: Value) -> str | None:
    text, mark = _text(value), _text(separator)
    if text is None or mark is None or count is None:
        return None
    n = int(_number(count))
    if not mark or not n:
        return ""
    parts = text.split(mark)
    return mark.join(parts[:n] if n > 0 else parts[n:])


def position(text: Value, part: Value, start: Value = 1) -> int | None:
    where, what = _text(text), _text(part)
    return (
        None
        if where is None or what is None or start is None
        else where.find(what, max(0, int(_number(start)) - 1)) + 1
    )


def reverse(value: Value) -> str | None:
    text = _text(value)
    return None if text is None else text[::-1]


def initcap(value: Value) -> str | None:
    text = _text(value)
    return None if text is None else re.sub(r"\w+", lambda m: m[0][:1].upper() + m[0][1:].lower(), text)


def translate(value: Value, old: Value, new: Value) -> str | None:
    text, a, b = _text(value), _text(old), _text(new)
    if text is None or a is None or b is None:
        return None
    table = {ord(c): (b[i] if i < len(b) else None) for i, c in reversed(list(enumerate(a)))}
    return text.translate(table)


def _pattern(pattern: Value, flags: int = 0) -> re.Pattern[str]:
    text = _text(pattern) or ""
    if len(text) > 200:
        raise ValueError("regular expression too long")
    return re.compile(text, flags)  # a bad one raises, and the statement fails


def regexp(pattern: Value, value: Value) -> int | None:
    """x REGEXP pattern (SQLite gives the pattern first)."""
    text = _text(value)
    return None if text is None or pattern is None else int(_pattern(pattern).search(text) is not None)


def regexp_i(pattern: Value, value: Value) -> int | None:
    text = _text(value)
    return None if text is None or pattern is None else int(_pattern(pattern, re.IGNORECASE).search(text) is not None)


def regexp_replace(value: Value, pattern: Value, new: Value, every: int) -> str | None:
    text = _text(value)
    if text is None or pattern is None or new is None:
        return None
    return _bounded(_pattern(pattern).sub((_text(new) or "").replace("\\0", "\\g<0>"), text, count=0 if every else 1))


def regexp_substr(value: Value, pattern: Value) -> str | None:
    text = _text(value)
    found = None if text is None or pattern is None else _pattern(pattern).search(text)
    return found.group() if found else None


def like(pattern: Value, value: Value, escape: Value, fold: int) -> int | None:
    """value LIKE pattern in linear time: the fixed pieces between the %s, each at its first place.

    `fold`: 1 ignores the case of ASCII letters (SQLite, MySQL, T-SQL), 2 of all letters (ILIKE), 0 none (PostgreSQL, Oracle).
    """
    if pattern is None or value is None:
        return None
    text, form, mark = _text(value) or "", _text(pattern) or "", _text(escape)
    if len(form) > 10_000:
        raise ValueError("LIKE pattern too long")
    return int(_like(text, form, mark, fold))


_LOWER = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")


def _like(text: str, form: str, mark: str | None, fold: int) -> bool:
    if fold:
        text, form = (text.lower(), form.lower()) if fold == 2 else (text.translate(_LOWER), form.translate(_LOWER))
        mark = mark and mark.lower()
    pieces: list[list[str | None]] = [[]]
    i = 0
    while i < len(form):
        c = form[i]
        if mark and c == mark and i + 1 < len(form):
            i += 1
            pieces[-1].append(form[i])
        elif c == "%":
            if pieces[-1] or len(pieces) == 1:
                pieces.append([])
        else:
            pieces[-1].append(None if c == "_" else c)
        i += 1
    if len(pieces) == 1:
        return len(text) == len(pieces[0]) and _fits(text, 0, pieces[0])
    if not _fits(text, 0, pieces[0]):
        return False
    at, tail = len(pieces[0]), pieces[-1]
    for piece in pieces[1:-1]:
        at = _find(text, at, piece)
        if at < 0:
            return False
        at += len(piece)
    return len(text) - len(tail) >= at and _fits(text, len(text) - len(tail), tail)


def _fits(text: str, at: int, piece: list[str | None]) -> bool:
    return len(text) - at >= len(piece) and all(c is None or text[at + i] == c for i, c in enumerate(piece))


def _find(text: str, at: int, piece: list[str | None]) -> int:
    if None not in piece:
        return text.find("".join(c for c in piece if c is not None), at)
    found = re.compile("".join("." if c is None else re.escape(c) for c in piece), re.DOTALL).search(text, at)
    return found.start() if found else -1


def field(value: Value, *choices: Value) -> int:
    """FIELD in MySQL: the place of the first equal argument, from 1; 0 without one."""
    return next((i for i, choice in enumerate(choices, 1) if value is not None and choice == value), 0)


def make_date(year: Value, month: Value, day: Value) -> str | None:
    if year is None or month is None or day is None:
        return None
    return iso(dt.datetime(int(_number(year)), int(_number(month)), int(_number(day))))


def stuff(value: Value, start: Value, length: Value, new: Value) -> str | None:
    """STUFF in T-SQL: characters replaced by others."""
    text = _text(value)
    if text is None or start is None or length is None:
        return None
    begin, count = int(_number(start)) - 1, int(_number(length))
    return (
        None if not 0 <= begin < len(text) or count < 0 else text[:begin] + (_text(new) or "") + text[begin + count :]
    )


def _rank(value: Value) -> tuple[int, Any]:
    """Numbers before text, NULL last."""
    return (2, 0) if value is None else (0, value) if isinstance(value, int | float) else (1, _text(value))


class _StringAgg:
    """Text joined in the order of the rows, or of (key, descending) pairs behind the separator; a text too long is an error."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, str]] = []
        self.keys: list[tuple[Value, ...]] = []
        self.size = 0

    def step(self, value: Value, separator: Value = ",", *order: Value) -> None:
        text = _text(value)
        if text is not None:
            self.parts.append((_text(separator) or "", text))
            self.keys.append(order)
            self.size += len(text)
            if self.size > MAX_TEXT:
                raise ValueError("text too long")

    def finalize(self) -> str | None:
        places = list(range(len(self.parts)))
        for i in reversed(range(0, len(self.keys[0]) if self.keys else 0, 2)):  # the last key first: the sort is stable
            places.sort(key=lambda place, i=i: _rank(self.keys[place][i]), reverse=bool(self.keys[0][i + 1]))  # type: ignore[misc]
        self.parts = [self.parts[place] for place in places]
        return "".join((mark if i else "") + text for i, (mark, text) in enumerate(self.parts)) if self.parts else None


class _DistinctAgg(_StringAgg):
    """The same of distinct texts; each keeps the place and the keys of its first row."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str | None] = set()

    def step(self, value: Value, separator: Value = ",", *order: Value) -> None:
        if _text(value) not in self.seen:
            self.seen.add(_text(value))
            super().step(value, separator, *order)


class _Spread:
    """Standard deviation and variance, two passes."""

    sample = True
    root = True

    def __init__(self) -> None:
        self.values: list[float] = []

    def step(self, value: Value) -> None:
        if value is not None:
            self.values.append(float(_number(value)))

    def finalize(self) -> float | None:
        n = len(self.values)
        if n < (2 if self.sample else 1):
            return None
        mean = math.fsum(self.values) / n
        variance = math.fsum((v - mean) ** 2 for v in self.values) / (n - self.sample)
        return math.sqrt(variance) if self.root else variance


class _SpreadAll(_Spread):
    sample = False


class _Variance(_Spread):
    root = False


class _VarianceAll(_Spread):
    sample, root = False, False


class _Median:
    def __init__(self) -> None:
        self.values: list[float] = []

    def step(self, value: Value) -> None:
        if value is not None:
            self.values.append(_number(value))

    def finalize(self) -> Value:
        ordered = sorted(self.values)
        n = len(ordered)
        return None if not n else ordered[n // 2] if n % 2 else (ordered[n // 2 - 1] + ordered[n // 2]) / 2


class _BoolAnd:
    start = True

    def __init__(self) -> None:
        self.value: bool | None = None

    def step(self, value: Value) -> None:
        if value is not None:
            truth = bool(value)
            self.value = truth if self.value is None else (self.value and truth if self.start else self.value or truth)

    def finalize(self) -> int | None:
        return None if self.value is None else int(self.value)


class _BoolOr(_BoolAnd):
    start = False


#: name -> (number of arguments, function). `tt_` names are what `dialects.py` writes.
SCALARS: dict[str, tuple[int, Callable[..., Any]]] = {
    "tt_now": (0, now), "tt_today": (0, today), "tt_date": (1, to_date), "tt_timestamp": (1, to_timestamp), "tt_parse_time": (2, parse_time),
    "tt_format_time": (2, format_time), "tt_interval": (2, interval), "tt_add": (2, add), "tt_subtract": (2, subtract),
    "tt_subtract_days": (2, subtract_days), "tt_date_add": (3, date_add), "tt_date_sub": (3, date_sub), "tt_boundaries": (3, boundaries),
    "tt_whole_units": (3, whole_units), "tt_age": (2, age), "tt_age_today": (1, age_today), "tt_extract": (2, extract),
    "tt_truncate_time": (2, truncate_time), "tt_time": (1, time_of_day), "tt_unix": (1, unix), "tt_weekday": (1, weekday_monday),
    "tt_add_months": (2, add_months), "tt_days": (1, days), "tt_last_day": (1, last_day), "tt_months_between": (2, months_between),
    "tt_integer": (1, to_integer), "tt_cut_integer": (1, cut_integer), "tt_number": (1, to_number), "tt_decimal": (2, to_decimal),
    "tt_boolean": (1, to_boolean), "tt_text": (1, to_text), "tt_round": (2, round_number), "tt_concat": (-1, concat),
    "tt_concat_strict": (-1, concat_strict), "tt_concat_ws": (-1, concat_ws), "tt_greatest": (-1, _pick(max, True)),
    "tt_least": (-1, _pick(min, True)), "tt_greatest_strict": (-1, _pick(max, False)), "tt_least_strict": (-1, _pick(min, False)),
    "tt_repeat": (2, repeat), "tt_pad": (4, pad), "tt_left": (2, left_part), "tt_right": (2, right_part), "tt_split_part": (3, split_part),
    "tt_substring_index": (3, substring_index), "tt_position": (-1, position), "tt_reverse": (1, reverse), "tt_initcap": (1, initcap),
    "tt_translate": (3, translate), "tt_regexp_i": (2, regexp_i), "tt_regexp_replace": (4, regexp_replace),
    "tt_field": (-1, field), "tt_make_date": (3, make_date), "tt_stuff": (4, stuff),
    "tt_regexp_substr": (2, regexp_substr), "regexp": (2, regexp), "tt_like": (4, like),
}  # fmt: skip

AGGREGATES: dict[str, tuple[int, type]] = {
    "tt_string_agg": (-1, _StringAgg), "tt_string_agg_distinct": (-1, _DistinctAgg), "tt_stddev": (1, _Spread), "tt_stddev_pop": (1, _SpreadAll), "tt_variance": (1, _Variance),
    "tt_variance_pop": (1, _VarianceAll), "tt_median": (1, _Median), "tt_bool_and": (1, _BoolAnd), "tt_bool_or": (1, _BoolOr),
}  # fmt: skip

_CLOCK_FUNCTIONS = ("date", "time", "datetime", "julianday", "unixepoch")


def register(connection: sqlite3.Connection, dialect: str, report: Callable[[str], None]) -> frozenset[str]:
    """Give a connection these functions; SQLite's own clock and LIKE are replaced. Returns the names, for the allow-list.

    Args:
        dialect: which case rule LIKE follows; the `tt_` functions are for every dialect but SQLite's own.
        report: told why a function failed (SQLite passes on only that one did).
    """
    names = set()

    def told(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Value) -> Any:
            try:
                return function(*values)
            except Exception as error:  # any failure of a function is the statement's failure, and its text is wanted
                report(str(error))
                raise

        return call

    def put(name: str, count: int, function: Callable[..., Any]) -> None:
        connection.create_function(name, count, told(function), deterministic=True)
        names.add(name)

    fold = 0 if dialect in ("postgres", "oracle") else 1
    put("like", 2, lambda pattern, value: like(pattern, value, None, fold))
    put("like", 3, lambda pattern, value, escape: like(pattern, value, escape, fold))
    _freeze(put)
    if dialect != "sqlite":
        for name, (count, function) in SCALARS.items():
            put(name, count, function)
        for name, (count, aggregate) in AGGREGATES.items():
            connection.create_aggregate(name, count, aggregate)
            names.add(name)
    return frozenset(names)


def _freeze(put: Callable[[str, int, Callable[..., Any]], None]) -> None:
    """SQLite's date functions with 'now' meaning `CLOCK`: asked of a second connection, which nothing else can reach."""
    clock = sqlite3.connect(":memory:", check_same_thread=False)

    def still(name: str, first: int) -> Callable[..., Any]:
        def call(*values: Value) -> Any:
            arguments = list(values)
            if len(arguments) <= first:
                arguments.append(CLOCK)
            elif isinstance(arguments[first], str) and arguments[first].strip().lower() == "now":  # type: ignore[union-attr]
                arguments[first] = CLOCK
            marks = ",".join("?" * len(arguments))
            return clock.execute(f"SELECT {name}({marks})", arguments).fetchone()[0]

        return call

    for name in _CLOCK_FUNCTIONS:
        put(name, -1, still(name, 0))
    put("strftime", -1, still("strftime", 1))
    put("current_timestamp", 0, now)
    put("current_date", 0, today)
    put("current_time", 0, lambda: CLOCK[11:])
