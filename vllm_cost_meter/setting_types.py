"""What the value of a single setting may be, and how a message calls what was expected.

Apart from `config`, so that there the list of settings can be read as a list. A check raises
WrongError; what came is added where the setting's name is known.

Invariant: a WrongError never holds a secret value.
"""

import hashlib
import re
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from vllm_cost_meter.pricing import parse_price
from vllm_cost_meter.tenants import NAME_CHARS_MAX, name_problem

# Beyond these a price is a slip of the finger, and its digits would cost more than the GPUs.
_PRICE_USD_MAX = 1_000_000
_PRICE_PLACES_MAX = 18
SHOWN_CHARS_MAX = 60
_SHA256_OF_NOTHING = hashlib.sha256(b"").hexdigest()
# Their values are secrets, which must not become names in a ledger.
_SECRET_HEADERS = frozenset({"authorization", "cookie", "proxy-authorization", "x-api-key"})


class Text(str):
    """Text that stands in a message as it is, without quotes."""

    def __repr__(self) -> str:
        return str(self)


class WrongError(ValueError):
    """A value that is not what was expected.

    Without `expected` the message says what the setting's own text does; `got` replaces the value.
    """

    def __init__(self, expected: str = "", got: str | None = None) -> None:
        super().__init__(expected)
        self.expected = expected
        self.got = None if got is None else Text(got)


def about(
    expected: str, unit: str = "", *, secret: bool = False, live: bool = False
) -> dict[str, Any]:
    """Return what docs and messages say of a field beside its description.

    What is `live` may change while a server runs.
    """
    return {"expected": expected, "unit": unit, "secret": secret, "live": live}


KUBERNETES = (
    "Kubernetes sets this for a Service named cost-meter: rename it or set enableServiceLinks: "
    "false"
)
PRICE = (
    f"a decimal number from 0 to {_PRICE_USD_MAX:,} with at most {_PRICE_PLACES_MAX} decimal places"
)
PORT = "0 to 65535, or off"
LEDGER = "an SQLAlchemy URL such as sqlite:////var/lib/cost-meter/ledger.db"
HOST = "a host name or an IP address"
HEADER = "the name of an HTTP header, at most 64 characters"
TOKEN = "printable ASCII without spaces"  # noqa: S105 - what is expected of one
SHA256 = "64 hexadecimal digits"
REPLY = "all, headers or none"
METADATA_KEY = "1 to 64 letters, digits, `_`, `-` or `.`"
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


def _price(value: object) -> Decimal:
    try:
        price = parse_price(str(value))
    except ValueError:
        raise WrongError(PRICE) from None
    exponent = price.as_tuple().exponent
    if price > _PRICE_USD_MAX or not isinstance(exponent, int) or exponent < -_PRICE_PLACES_MAX:
        raise WrongError(PRICE)
    return price


def _number(value: object) -> object:
    if isinstance(value, bool):  # which pydantic would take for 0 or 1
        raise WrongError
    return value


def _port(value: object) -> object:
    if value == "off":
        return None
    if isinstance(value, str) and value.startswith("tcp://"):
        raise WrongError(f"{PORT} ({KUBERNETES})")
    return _number(value)


def _printable(token: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[!-~]+", token.get_secret_value()):
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
        if not re.fullmatch(r"[a-z0-9_-]{1,64}", key):
            raise WrongError(TAGS, f"the key {key[:SHOWN_CHARS_MAX]!r}")
        if not 1 <= len(value) <= NAME_CHARS_MAX or not value.isprintable():
            raise WrongError(TAGS, f"{value[:SHOWN_CHARS_MAX]!r} at {key!r}")
    return tags


def _digest_of_something(digest: str) -> str:
    if digest.lower() == _SHA256_OF_NOTHING:
        raise WrongError("the SHA-256 of a key", "that of the empty text")
    return digest.lower()


Reply = Literal["all", "headers", "none"]
Digest = Annotated[str, _matching(r"[0-9a-fA-F]{64}", SHA256), AfterValidator(_digest_of_something)]
Port = Annotated[Annotated[int, Field(ge=0, le=65_535)] | None, BeforeValidator(_port)]
HeaderName = Annotated[
    str,
    _matching(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}", HEADER),
    AfterValidator(_public_header),
]
Price = Annotated[Decimal, BeforeValidator(_price)]
Url = Annotated[str, _matching(r"[a-z][a-z0-9+_]*://.*", LEDGER)]
Host = Annotated[str, _matching(r"[0-9A-Za-z.:_%-]{1,255}", HOST)]
Token = Annotated[SecretStr, AfterValidator(_printable)]
TenantName = Annotated[str, AfterValidator(_tenant_name)]
Tags = Annotated[dict[str, str], AfterValidator(_tags)]
MetadataKey = Annotated[str, _matching(r"[0-9A-Za-z_.-]{1,64}", METADATA_KEY)]
WholeNumber = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]
