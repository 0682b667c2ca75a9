"""Every failure that a customer or an operator can meet, in one hierarchy on one screen.

Owns: the HTTP status, the stable ``type`` and the name of each error (contract 3.4). Knows nothing of HTTP
frameworks: ``web`` turns these into replies, ``commands`` into one line on stderr. Split by what the reader can
do: mend the request (4xx), add credit (402), wait (429, 503), or nothing (502, 504). Bugs are not in here and
keep their traceback.
"""

from __future__ import annotations

from typing import ClassVar

STATUS_NAMES = {
    400: "Bad Request",
    401: "Unauthorized",
    402: "Payment Required",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    410: "Gone",
    413: "Content Too Large",
    414: "URI Too Long",
    417: "Expectation Failed",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


class AbhiError(Exception):
    """Something expected went wrong. ``message`` is fit for the customer; it never holds a secret."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


# --- mend the request -------------------------------------------------------------------------------------------


class BadRequest(AbhiError):
    status, type = 400, "bad_request"


class MalformedJson(BadRequest):
    type = "malformed_json"


class ForbiddenPath(BadRequest):
    type = "forbidden_path"


class ForbiddenTarget(BadRequest):
    """The address in ``x-fal-target-url`` is missing, malformed, or none of fal's; nothing was forwarded."""

    type = "forbidden_target"


class BodyIncomplete(BadRequest):
    """The caller announced a body and did not send all of it; nothing was forwarded."""

    type = "incomplete_body"


class WebhookUrlRefused(BadRequest):
    """`fal_webhook` names no URL that this service may deliver to; nothing was forwarded."""

    type = "webhook_url_refused"


class InvalidIdempotencyKey(BadRequest):
    type = "invalid_idempotency_key"


class IdempotencyKeyReused(AbhiError):
    """The key stands for another request of this account; nothing was forwarded."""

    status, type = 422, "idempotency_key_reused"


class BodyTooLarge(AbhiError):
    status, type = 413, "body_too_large"


class MissingKey(AbhiError):
    status, type = 401, "missing_key"


class InvalidKey(AbhiError):
    status, type = 401, "invalid_key"


class WebhookSignatureInvalid(AbhiError):
    """A delivery to our own webhook URL that fal has not signed, or too long ago."""

    status, type = 401, "webhook_signature_invalid"


class KeyDisabled(AbhiError):
    status, type = 403, "key_disabled"


class KeyRevoked(AbhiError):
    status, type = 403, "key_revoked"


class KeyExpired(AbhiError):
    status, type = 403, "key_expired"


class ModelNotAllowed(AbhiError):
    """The key may call other models only."""

    status, type = 403, "model_not_allowed"


class AccountSuspended(AbhiError):
    status, type = 403, "account_suspended"


class UnknownRoute(AbhiError):
    status, type = 404, "unknown_route"


class UnpricedModel(AbhiError):
    status, type = 404, "unpriced_model"


class NotFound(AbhiError):
    """A thing of this account that does not exist, or that is somebody else's: the same answer for both."""

    status, type = 404, "not_found"


class MethodNotAllowed(AbhiError):
    """``allowed`` are the methods that the route takes, as the header `Allow` has them."""

    status, type = 405, "method_not_allowed"

    def __init__(self, message: str, *, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed


# --- add credit, or wait ----------------------------------------------------------------------------------------


class InsufficientCredits(AbhiError):
    status, type = 402, "insufficient_credits"


class KeyLimitReached(AbhiError):
    """The account may have credit; this key may not spend it before the next day or month."""

    status, type = 402, "key_limit_reached"


class RateLimited(AbhiError):
    status, type = 429, "rate_limited"


class TooManyConcurrent(AbhiError):
    status, type = 429, "too_many_concurrent"


class UpstreamBusy(AbhiError):
    """All of the operator's places at fal were taken for as long as a call may wait; nothing was forwarded."""

    status, type = 429, "upstream_busy"


class DatabaseUnavailable(AbhiError):
    """The call could not be recorded, so nothing was forwarded."""

    status, type = 503, "database_unavailable"


class StorageUnavailable(AbhiError):
    """A large request body found no room while it waited for fal; nothing was forwarded."""

    status, type = 503, "storage_unavailable"


class IdempotencyInProgress(AbhiError):
    """The first request under the key runs longer than the second may wait for it."""

    status, type = 409, "idempotency_in_progress"


class WebhookNotTaken(AbhiError):
    """fal's delivery could not be taken in just now: fal repeats it."""

    status, type = 503, "webhook_not_taken"


# --- nothing the customer can do --------------------------------------------------------------------------------


class UpstreamError(AbhiError):
    """fal could not give an answer. ``may_have_cost`` says whether fal can have started the work."""

    status, type = 502, "upstream_error"
    may_have_cost: ClassVar[bool] = True


class UpstreamUnreachable(UpstreamError):
    """No connection, or not one byte of the request left: fal cannot have started."""

    type = "upstream_unreachable"
    may_have_cost = False


class UpstreamRefused(UpstreamError):
    """fal refused the operator's credential or account. fal's own text about it is never shown."""

    type = "upstream_refused"
    may_have_cost = False


class UpstreamBroken(UpstreamError):
    """The request was sent and no whole answer came back, or one that HTTP does not allow."""

    type = "upstream_broken"


class UpstreamTimeout(UpstreamError):
    status, type = 504, "upstream_timeout"


class UpstreamOutcomeUnknown(UpstreamError):
    """What `UpstreamBroken` and `UpstreamTimeout` become for fal's own clients, which would repeat a 502 or 504."""

    status, type = 500, "upstream_outcome_unknown"


class IdempotencyAnswerGone(AbhiError):
    """The call under the key has ended, and its answer is not kept. A status that no client of fal's repeats."""

    status, type = 410, "idempotency_answer_gone"


class IdempotencyOutcomeUnknown(AbhiError):
    """The call under the key went to fal, which may bill it, and its hold waits for the operator."""

    status, type = 500, "idempotency_outcome_unknown"


class ChargeNotRecorded(AbhiError):
    """fal answered, and the database would not take the charge in time: the answer is withheld, the call parked."""

    status, type = 500, "charge_not_recorded"


# --- for the operator at the command line -----------------------------------------------------------------------


class SettingsError(AbhiError):
    """One or more settings are wrong; ``problems`` holds a sentence each."""

    type = "bad_settings"

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Refused(AbhiError):
    """An operator's wish that cannot be granted: says why, and changed nothing."""

    status, type = 409, "refused"


class BadAmount(BadRequest):
    type = "bad_amount"


class PriceFileError(AbhiError):
    type = "bad_price_file"


class PlatformError(AbhiError):
    """fal's platform API did not answer, or with something that makes no sense. Nothing was changed."""

    status, type = 502, "fal_api_error"


class PlatformNotFound(PlatformError):
    """fal does not know (one of) the things asked about."""


class BadPriceAnswer(PlatformError):
    """fal's prices, as a whole, are not to be trusted: the old ones stay."""


class SchemaError(AbhiError):
    """The database is of another version than this program, or is no AbhiAPI database."""

    type = "bad_schema"
