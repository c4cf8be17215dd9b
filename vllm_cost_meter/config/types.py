"""Types for single settings: the check of each value, and the text for what it expects.

They are apart from `settings.py` so that the list of settings can be read as a list. A check raises
WrongError; `loading.py` adds the setting's name and the value.

Invariant: a WrongError never holds a secret value.
"""

import hashlib
import importlib.util
import re
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, SecretStr

from vllm_cost_meter.config.engine import LABELS_EXPECTED, labels_of
from vllm_cost_meter.prices.cost import parse_price
from vllm_cost_meter.tenants.rules import NAME_CHARS_MAX, name_problem
from vllm_cost_meter.units.time import NS_PER_HOUR, instant_of, rfc3339, unix_ns_of

# A larger price, or one with more decimal places, is a slip of the finger.
PRICE_USD_MAX = 1_000_000
_PRICE_PLACES_MAX = 18
SHOWN_CHARS_MAX = 60
_AMOUNT_MAX = 1_000_000_000_000
_PERCENT_MAX = 10_000
_NOTE_CHARS_MAX = 200
_SHA256_OF_NOTHING = hashlib.sha256(b"").hexdigest()
# The ISO 4217 codes (2026) in which somebody can be billed: no metals, drawing rights, test codes.
CURRENCIES = frozenset(
    """
    AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BHD BIF BMD BND BOB BOV BRL BSD BTN BWP
    BYN BZD CAD CDF CHE CHF CHW CLF CLP CNY COP COU CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN
    ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD HNL HTG HUF IDR ILS INR IQD IRR ISK
    JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD
    MMK MNT MOP MRU MUR MVR MWK MXN MXV MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP
    PKR PLN PYG QAR RON RSD RUB RWF SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP
    SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD USN UYI UYU UYW UZS VED VES VND VUV
    WST XAF XCD XCG XOF XPF YER ZAR ZMW ZWG
    """.split()  # noqa: SIM905 - a list of 164 literals would be read by nobody
)
# The values of these headers are secrets, which must not become names in a ledger.
_SECRET_HEADERS = frozenset({"authorization", "cookie", "proxy-authorization", "x-api-key"})


class Text(str):
    """Text that a message shows without quotes."""

    def __repr__(self) -> str:
        return str(self)


class WrongError(ValueError):
    """A setting's value is not what was expected.

    Without `expected` the message uses the setting's own text. `got`, if given, replaces the value.
    `within` is the path to the value inside the checked setting, e.g. (1, "source") in a list of
    tables.
    """

    def __init__(
        self, expected: str = "", got: str | None = None, within: tuple[int | str, ...] = ()
    ) -> None:
        super().__init__(expected)
        self.expected = expected
        self.got = None if got is None else Text(got)
        self.within = within


def about(
    expected: str, unit: str = "", *, secret: bool = False, live: bool = False
) -> dict[str, Any]:
    """Return a field's facts for docs and messages, besides its description.

    `expected` and `unit` are shown, `secret` hides the value in messages, and a `live` setting may
    change while a server runs.
    """
    return {"expected": expected, "unit": unit, "secret": secret, "live": live}


KUBERNETES = (
    "Kubernetes sets this for a Service named cost-meter: rename it or set enableServiceLinks: "
    "false"
)
PRICE = (
    f"a decimal number from 0 to {PRICE_USD_MAX:,} with at most {_PRICE_PLACES_MAX} decimal places"
)
AMOUNT = (
    f"a decimal number from 0 to {_AMOUNT_MAX:,} with at most {_PRICE_PLACES_MAX} decimal places"
)
RATE = (
    f"a decimal number above 0, up to {PRICE_USD_MAX:,}, with at most {_PRICE_PLACES_MAX} decimal"
    " places"
)
PERCENT = (
    f"a decimal number from 0 to {_PERCENT_MAX:,} with at most {_PRICE_PLACES_MAX} decimal places"
)
CURRENCY = "the three capital letters of a currency in ISO 4217"
FULL_HOUR = "an RFC 3339 instant on a full UTC hour, such as 2026-01-01T00:00:00Z"
NOTE = f"1 to {_NOTE_CHARS_MAX} printable characters"
PATTERN = f"{NOTE}: a name, or a pattern with `*`, `?` or `[...]`"
PORT = "0 to 65535, or off"
LEDGER = "an SQLAlchemy URL such as sqlite:////var/lib/cost-meter/ledger.db"
FLEET = "the SQLAlchemy URL of a PostgreSQL database, as postgresql+psycopg://user@host/fleet"
HOST = "a host name or an IP address"
HEADER = "the name of an HTTP header, at most 64 characters"
# A shorter token could be guessed. Random text of this length cannot.
TOKEN_CHARS_MIN = 16
TOKEN = f"at least {TOKEN_CHARS_MIN} printable ASCII characters without spaces"
SHA256 = "64 hexadecimal digits"
REPLY = "all, headers or none"
COMMENT = "asked or always"
UNNAMED = "serve or refuse"
TENANT_METRICS = "everywhere or side_port"
TENANT_DETAIL = "exact or coarse"
DURABILITY = "process or disk"
FOLDER = "the absolute path of a folder"
_DAYS_MAX = 36_500
FOREVER = "forever"
_SIZES = {"MB": 10**6, "GB": 10**9, "TB": 10**12}
BYTES = "a whole number of MB, GB or TB, such as 20GB; at least 100MB"
_BYTES_MIN = 100 * _SIZES["MB"]
DAYS = f"a whole number from 1 to {_DAYS_MAX}, or {FOREVER}"
METADATA_KEY = "1 to 64 letters, digits, `_`, `-` or `.`"
ENTRY_ID = "1 to 64 letters, digits, `_`, `-` or `.`"
_ENTRY_ID = r"[0-9A-Za-z_.-]{1,64}"
ENTRY_ID_IS = (
    "Name of the entry where a fleet shares it; unique. Needed there: [shared settings]"
    "(../howto/fleet-settings.md)."
)
TAG_KEY = "1 to 64 small letters, digits, `_` or `-`"
_TAG_KEY = r"[a-z0-9_-]{1,64}"
LABEL_PATTERNS = "a table of labels: for each name a text, or a pattern with `*`, `?` or `[...]`"
TAGS = (
    "a table of texts: keys of 1 to 64 small letters, digits, `_` or `-`, values of 1 to 128"
    " printable characters"
)


def _matching(pattern: str, expected: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise WrongError(expected)
        return value

    return AfterValidator(check)


def _decimal(expected: str, most: int, *, above_zero: bool = False) -> BeforeValidator:
    def check(value: object) -> Decimal:
        try:
            number = parse_price(str(value))
        except ValueError:
            raise WrongError(expected) from None
        places = number.as_tuple().exponent
        if number > most or not isinstance(places, int) or places < -_PRICE_PLACES_MAX:
            raise WrongError(expected)
        if above_zero and not number:
            raise WrongError(expected)
        return number

    return BeforeValidator(check)


def _full_hour(value: object) -> int:
    """Return an instant as hours since the epoch; TOML gives a datetime, JSON gives text."""
    if not isinstance(value, str | datetime):
        raise WrongError(FULL_HOUR)
    try:
        unix_ns = unix_ns_of(str(value))
        rfc3339(unix_ns)  # This raises for a year that cannot be written.
    except (ValueError, OverflowError):
        raise WrongError(FULL_HOUR) from None
    hour, rest_ns = divmod(unix_ns, NS_PER_HOUR)
    if rest_ns:
        raise WrongError(f"{FULL_HOUR}, because usage is kept by the hour")
    return hour


def _known_currency(code: str) -> str:
    if code not in CURRENCIES:
        raise WrongError(CURRENCY)
    return code


def _note(text: str) -> str:
    if not 1 <= len(text) <= _NOTE_CHARS_MAX or not text.isprintable() or text != text.strip():
        raise WrongError
    return text


def _number(value: object) -> object:
    if isinstance(value, bool):  # pydantic would take it for 0 or 1.
        raise WrongError
    return value


def _port(value: object) -> object:
    if value == "off":
        return None
    if isinstance(value, str) and value.startswith("tcp://"):
        raise WrongError(f"{PORT} ({KUBERNETES})")
    return _number(value)


def _days(value: object) -> object:
    return None if value == FOREVER else _number(value)


def _bytes(value: object) -> int:
    # Settings that are built anew give what was read before.
    size = value if isinstance(value, int) else 0
    if found := re.fullmatch(r"(\d{1,6})(MB|GB|TB)", str(value), re.ASCII):
        size = int(found[1]) * _SIZES[found[2]]
    if size < _BYTES_MIN:
        raise WrongError
    return size


def _printable(token: SecretStr) -> SecretStr:
    text = token.get_secret_value()
    if len(text) < TOKEN_CHARS_MIN or not re.fullmatch(r"[!-~]+", text):
        raise WrongError(TOKEN)
    return token


def _public_header(name: str) -> str:
    if name.lower() in _SECRET_HEADERS:
        raise WrongError("a header that does not carry a secret")
    return name.lower()


def _tenant_name(name: str) -> str:
    if problem := name_problem(name):
        raise WrongError(problem)
    return name


def _tags(tags: dict[str, str]) -> dict[str, str]:
    for key, value in tags.items():
        if not re.fullmatch(_TAG_KEY, key):
            raise WrongError(TAGS, f"the key {key[:SHOWN_CHARS_MAX]!r}")
        if not 1 <= len(value) <= NAME_CHARS_MAX or not value.isprintable():
            raise WrongError(TAGS, f"{value[:SHOWN_CHARS_MAX]!r} at {key!r}")
    return tags


def _labels(given: object) -> dict[str, str]:
    try:
        return labels_of(given)
    except ValueError as error:
        raise WrongError(LABELS_EXPECTED, str(error)) from None


def _with_duckdb(folder: str) -> str:
    if importlib.util.find_spec("duckdb") is None:
        raise WrongError("DuckDB beside it (pip install duckdb)", "none")
    return folder


def _with_psycopg(url: str) -> str:
    if importlib.util.find_spec("psycopg") is None:
        raise WrongError("psycopg beside it (pip install 'vllm-cost-meter[fleet]')", "none")
    return url


def _digest_of_something(digest: str) -> str:
    if digest.lower() == _SHA256_OF_NOTHING:
        raise WrongError("the SHA-256 of a key", "the SHA-256 of an empty text")
    return digest.lower()


ReplyDetail = Literal["all", "headers", "none"]
StreamComment = Literal["asked", "always"]
UnnamedRequests = Literal["serve", "refuse"]
TenantMetrics = Literal["everywhere", "side_port"]
TenantDetail = Literal["exact", "coarse"]
Durability = Literal["process", "disk"]
Digest = Annotated[str, _matching(r"[0-9a-fA-F]{64}", SHA256), AfterValidator(_digest_of_something)]
Port = Annotated[Annotated[int, Field(ge=0, le=65_535)] | None, BeforeValidator(_port)]
Bytes = Annotated[int, BeforeValidator(_bytes)]
Days = Annotated[Annotated[int, Field(ge=1, le=_DAYS_MAX)] | None, BeforeValidator(_days)]
HeaderName = Annotated[
    str,
    _matching(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}", HEADER),
    AfterValidator(_public_header),
]
UsdPrice = Annotated[Decimal, _decimal(PRICE, PRICE_USD_MAX)]
MoneyAmount = Annotated[Decimal, _decimal(AMOUNT, _AMOUNT_MAX)]
ExchangeRate = Annotated[Decimal, _decimal(RATE, PRICE_USD_MAX, above_zero=True)]
Percent = Annotated[Decimal, _decimal(PERCENT, _PERCENT_MAX)]
Currency = Annotated[str, AfterValidator(_known_currency)]
# As JSON it is an instant again.
FullHour = Annotated[
    int, BeforeValidator(_full_hour), PlainSerializer(instant_of, when_used="json")
]
Note = Annotated[str, AfterValidator(_note)]
Url = Annotated[str, _matching(r"[a-z][a-z0-9+_]*://.*", LEDGER)]
FleetUrl = Annotated[
    str, _matching(r"postgresql\+psycopg://.*", FLEET), AfterValidator(_with_psycopg)
]
Folder = Annotated[str, _matching(r"/.+", FOLDER)]
ArchiveFolder = Annotated[Folder, AfterValidator(_with_duckdb)]
Host = Annotated[str, _matching(r"[0-9A-Za-z.:_%-]{1,255}", HOST)]
Token = Annotated[SecretStr, AfterValidator(_printable)]
TenantName = Annotated[str, AfterValidator(_tenant_name)]
Tags = Annotated[dict[str, str], AfterValidator(_tags)]
Labels = Annotated[dict[str, str], BeforeValidator(_labels)]
TagKey = Annotated[str, _matching(_TAG_KEY, TAG_KEY)]
EntryId = Annotated[str, _matching(_ENTRY_ID, ENTRY_ID)]
MetadataKey = Annotated[str, _matching(r"[0-9A-Za-z_.-]{1,64}", METADATA_KEY)]
WholeNumber = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]
